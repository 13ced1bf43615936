"""D's representation on a plane: what lies near what."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cl_ray.evaluation.classifier import Floats

COMPONENTS = 50
"""Principal components that t-SNE sees (van der Maaten and Hinton, 2008, section 4.2: 30), and
that the projector is given."""
PERPLEXITY = 30.0
FEWEST = 10
"""Fewer images than this make no map."""


@dataclass(frozen=True)
class Map:
    """Images as points.

    Args:
        points: [n, 2].
        components: The principal components that they were made of, float32 [n, at most 50].
        kept: Share of the features' variance that those hold.
    """

    points: NDArray[np.float64]
    components: Floats
    kept: float


def principal(features: Floats) -> tuple[Floats, float]:
    """The first principal components [n, at most 50] of features [n, d], and their share."""
    from sklearn.decomposition import PCA

    pca = PCA(min(COMPONENTS, *features.shape), random_state=0)
    components = pca.fit_transform(features.astype(np.float64))
    return components.astype(np.float32), float(pca.explained_variance_ratio_.sum())


def embedding_map(features: Floats) -> Map:
    """Features [n, d], n at least 10, on a plane, by t-SNE of their principal components.

    Which points lie near each other means something; the axes, and how far clusters lie apart,
    mean nothing (van der Maaten and Hinton, 2008).
    """
    from sklearn.manifold import TSNE

    components, kept = principal(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(components)
    return Map(points.astype(np.float64), components, kept)
