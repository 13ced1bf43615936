"""The map of D's embeddings: t-SNE for the page, and the files of TensorBoard's projector."""

import html
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray

from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch
from cl_ray.errors import UserError, printable
from cl_ray.evaluation.classifier import Floats
from cl_ray.model import TrainedModel
from cl_ray.report.charts import COLOURS, CYCLE, Chart
from cl_ray.storage import RunStorage

MAX_IMAGES = 2000
MIN_IMAGES = 10
"""Fewer images than this make no map."""
_COMPONENTS = 50
"""Principal components that t-SNE sees (van der Maaten and Hinton, 2008, section 4.2: 30), and
that the projector is given."""
_PERPLEXITY = 30.0
_MAX_NAMES = 40
"""Classes that the legend names, at most."""
_SYMBOLS = 4
"""Forms of the points, one for as many classes as there are colours."""
_NAME_SIZE = (0.04, 0.07)
"""Width of a letter of a name and its height on a phone, as fractions of those of the map."""
_SPRITE_SIDE = 64
"""Pixels of an image's longest side among the points; TensorBoard holds several copies of all."""
_PROJECTOR = "tensorboard/projector_config.pbtxt"


def embedding_map(features: Floats) -> tuple[NDArray[np.float64], Floats, float]:
    """Map features [n, d], n at least 10, by t-SNE of their principal components.

    Only which points are near each other has a meaning; the axes and the distance of clusters
    have none (van der Maaten and Hinton, 2008).

    Returns:
        The points [n, 2], the components that t-SNE saw, float32 [n, at most 50], and the fraction
        of the features' variance in those.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(min(_COMPONENTS, *features.shape), random_state=0)
    components = pca.fit_transform(features.astype(np.float64)).astype(np.float32)
    variance = float(pca.explained_variance_ratio_.sum())
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    points = tsne.fit_transform(components).astype(np.float64)
    return points, components, variance


@dataclass(frozen=True)
class EmbeddingPlot:
    """A map of D's embeddings, and what was mapped.

    Args:
        chart: The points on a plane, coloured by label.
        components: Principal components that t-SNE saw, float32 [n, at most 50].
        variance: Fraction of the embeddings' variance in those.
        dimensions: Dimensions of the embeddings.
        names: The names of their labels; None if they have none.
    """

    chart: Chart
    components: Floats
    variance: float
    dimensions: int
    split: str
    rows: RowBatch
    names: list[str] | None


def plot_embedding(
    run: TrainedModel, dataset: Dataset, rows: RowBatch, split: str
) -> EmbeddingPlot:
    """Map D's embeddings of images.

    Raises:
        UserError: The images are fewer than 10, or all embeddings are the same.
    """
    if len(rows.id) < MIN_IMAGES:
        raise UserError(f"{len(rows.id)} images are too few for a map.")
    features = run.embed(rows.image)
    if not np.ptp(features, axis=0).any():  # t-SNE would divide by 0
        raise UserError(f"All {len(features)} embeddings are the same: there is nothing to map.")
    points, components, variance = embedding_map(features)
    names = None
    if rows.label is not None:  # a tab or a line feed would break the projector's table
        names = [printable(_class_name(dataset, label)) for label in rows.label.tolist()]
    chart = _map_chart(points, names, rows)
    return EmbeddingPlot(chart, components, variance, features.shape[1], split, rows, names)


def _map_chart(points: NDArray[np.float64], names: list[str] | None, rows: RowBatch) -> Chart:
    """Draw points, one trace a label; names of labels stand at the medians of their points."""
    figure, labels = go.Figure(), rows.label
    groups = [None] if labels is None else np.unique(labels).tolist()
    centres, texts = [], []
    for group in groups:
        chosen = np.arange(len(points)) if labels is None else np.flatnonzero(labels == group)
        x, y = points[chosen].T
        colour, symbol = COLOURS["quiet"], 0
        if group is not None and group != UNLABELLED:
            colour, symbol = CYCLE[group % len(CYCLE)], group // len(CYCLE) % _SYMBOLS
        name = "" if names is None else html.escape(names[chosen[0]], quote=False)
        origins = [] if rows.origin is None else map(printable, rows.origin[chosen])
        hover = [f"{name} {html.escape(origin, quote=False)}".strip() for origin in origins]
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, hovertext=hover or name, hoverinfo="text",
            marker={"color": colour, "size": 5, "opacity": 0.75, "symbol": symbol},
        )  # fmt: skip
        centres.append((np.median(x), np.median(y)))
        texts.append(name)
    is_named = labels is not None and len(groups) <= _MAX_NAMES
    if is_named:
        # Of two names that overlap neither is written: one alone would seem to name both groups.
        away = np.abs(np.array(centres)[:, None] - np.array(centres)) / np.ptp(points, axis=0)
        width = _NAME_SIZE[0] * max(map(len, texts))
        overlaps = ((away < (width, _NAME_SIZE[1])).all(2)).sum(1) > 1
        for (x, y), text, overlap in zip(centres, texts, overlaps, strict=True):
            if not overlap:
                font = {"size": 16, "color": COLOURS["ink"], "weight": 700}
                figure.add_annotation(x=x, y=y, text=text, showarrow=False, font=font)
    hidden = {"visible": False}
    figure.update_layout(showlegend=is_named, xaxis=hidden, yaxis=hidden)
    figure.update_layout(legend={"itemsizing": "constant"})
    count = len(groups) - (UNLABELLED in groups)
    alt = f"Map of {len(points)} images as points{f' in {count} labels' if names else ''}."
    return Chart("", alt, figure, height=560)


def _class_name(dataset: Dataset, label: int) -> str:
    if label == UNLABELLED:
        return "no label"
    known = dataset.info.classes
    return known[label] if known and label < len(known) else str(label)


def write_projector(folder: RunStorage, step: int, plot: EmbeddingPlot) -> None:
    """Add embeddings to TensorBoard's projector, beside those of other steps.

    The projector is given the principal components, as a browser is slow with a thousand numbers
    an image, and the images as points.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
    from torch.utils.tensorboard import SummaryWriter

    ids = plot.rows.id.tolist()
    columns: dict[str, list[Any]] = {"id": ids}
    columns |= {"label": plot.names} if plot.names else {"split": [plot.split] * len(ids)}
    if plot.rows.origin is not None:
        columns["origin"] = [printable(origin) for origin in plot.rows.origin]
    metadata = [list(row) for row in zip(*columns.values(), strict=True)]
    stride = -(-plot.rows.image.shape[1] // _SPRITE_SIDE)
    images = torch.from_numpy(plot.rows.image[:, ::stride, ::stride]).permute(0, 3, 1, 2).float()
    with tempfile.TemporaryDirectory() as place:
        # A writer in the run's own folder would leave an empty file of events each time.
        writer = SummaryWriter(place)
        writer.add_embedding(
            torch.from_numpy(plot.components), metadata, (images / 255).expand(-1, 3, -1, -1), step,
            tag="discriminator", metadata_header=list(columns),
        )  # fmt: skip
        writer.close()
        text = (Path(place) / Path(_PROJECTOR).name).read_text()
        for file in Path(place).rglob("*"):
            if file.is_file() and file.suffix in (".tsv", ".png"):
                folder.write(f"tensorboard/{file.relative_to(place)}", file.read_bytes())
    config = text_format.Parse(text, ProjectorConfig())
    before = text_format.Parse((folder.read(_PROJECTOR) or b"").decode(), ProjectorConfig())
    own = config.embeddings[0].tensor_path
    config.embeddings.extend(e for e in before.embeddings if e.tensor_path != own)
    folder.write(_PROJECTOR, text_format.MessageToString(config).encode())
