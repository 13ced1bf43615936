"""The discriminator D: a trunk of features, and heads for score, embedding and class."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.batch import DiscriminatorOutput

MAX_FEATURES = 1152
"""Features of the representation, which averages larger maps; those of 28 pixels have as many."""


class Discriminator(nn.Module):
    """D, whatever the family of its trunk.

    Args:
        trunk: Maps images [B, C, H, W] to features [B, flat], a flattened feature map.
        feature_map: Its channels, height and width, which is the same.
        hidden: Dimensions of the hidden layer of each projection head.
        embedding: Dimensions of an embedding.
        classes: Number of classes; 0 if labels are not used.
        is_projection: Whether the class is part of the score (projection discriminator); otherwise
            D classifies (auxiliary classifier).
        contrad: Whether to add what ContraD needs: a hidden layer before the score, and a second
            projection head for fakes (Jeong and Shin, 2021, section 3).
    """

    def __init__(
        self,
        trunk: nn.Module,
        feature_map: tuple[int, int, int],
        hidden: int,
        embedding: int,
        classes: int = 0,
        is_projection: bool = False,
        contrad: bool = False,
    ):
        super().__init__()
        flat, (channels, side, _) = math.prod(feature_map), feature_map
        window = 1
        while window < side and channels * math.ceil(side / window) ** 2 > MAX_FEATURES:
            window += 1
        self.pool = nn.Sequential(
            nn.Unflatten(1, feature_map), nn.AvgPool2d(window, ceil_mode=True), nn.Flatten()
        )
        self.representation_dim = channels * math.ceil(side / window) ** 2 + hidden + embedding
        self.is_projection = is_projection and classes > 0
        self.trunk = trunk
        self.score_hidden: nn.Module = nn.Identity()
        score_dim = flat
        if contrad:
            self.score_hidden = nn.Sequential(nn.Linear(flat, hidden), nn.LeakyReLU(0.2))
            score_dim = hidden
        self.score = nn.Linear(score_dim, 1)
        self.projection = projection_head(flat, hidden, embedding)
        self.fake_projection = projection_head(flat, hidden, embedding) if contrad else None
        class_dim = score_dim if is_projection else flat
        self.class_head = nn.Linear(class_dim, classes, bias=not is_projection) if classes else None

    def forward(
        self, images: Tensor, labels: Tensor | None = None, detach_scores: bool = False
    ) -> DiscriminatorOutput:
        """Compute all heads of images [B, C, H, W] in [-1, 1].

        Args:
            images: The images.
            labels: Their classes [B], for a projection discriminator.
            detach_scores: Whether to stop the gradient of the scores before the features, and to
                compute the embedding of fakes (ContraD's step of D).
        """
        dtype, features = self.score.weight.dtype, self.features(images)
        score = self.scores(features.detach() if detach_scores else features, labels)
        embedding = self.embed(features).to(dtype)
        classifies = self.class_head is not None and not self.is_projection
        logits = self.classify(features) if classifies else None
        fake_embedding = self.embed_fakes(features).to(dtype) if detach_scores else None
        return DiscriminatorOutput(score, embedding, logits, fake_embedding)

    def features(self, images: Tensor) -> Tensor:
        """Compute the trunk's features [B, flat] of images [B, C, H, W] in [-1, 1]."""
        return self.trunk(images)

    def scores(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute scores [B], high for real, from features [B, flat].

        A projection discriminator adds the inner product of the features with the vector of each
        image's class in `labels` [B] (Miyato and Koyama, 2018, equation 4).
        """
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds by 1 in 256
            features = self.score_hidden(features.to(self.score.weight.dtype))
            scores = self.score(features).squeeze(1)
            if not self.is_projection:
                return scores
            assert self.class_head is not None
            assert labels is not None, "a projection discriminator needs labels"
            return scores + (self.class_head.weight[labels] * features).sum(1)

    def classify(self, features: Tensor) -> Tensor:
        """Compute class logits [B, classes] from features [B, flat], as an auxiliary classifier.

        A projection discriminator cannot: its inner products separate the real images of a class
        from the fakes of that class.
        """
        assert self.class_head is not None
        assert not self.is_projection
        with torch.autocast(features.device.type, enabled=False):
            return self.class_head(features.to(self.score.weight.dtype))

    def embed(self, features: Tensor) -> Tensor:
        """Compute unit embeddings [B, embedding] from features [B, flat]."""
        return functional.normalize(self.projection(features), dim=1)

    def embed_fakes(self, features: Tensor) -> Tensor:
        """Compute unit embeddings [B, embedding] by the second projection head of ContraD."""
        assert self.fake_projection is not None, "only in the form contrad"
        return functional.normalize(self.fake_projection(features), dim=1)

    def representation(self, images: Tensor) -> Tensor:
        """Compute the representation [B, representation_dim] of images [B, C, H, W].

        It concatenates the features, averaged over windows to at most MAX_FEATURES or one for each
        channel, the projection head's hidden layer and its output, each scaled to unit length.
        Deeper layers keep only what views of an image have in common: few
        labels are best predicted from the middle of the head (Chen et al., 2020, "Big
        self-supervised models", section 3), neighbours from the features.
        """
        features = self.features(images)
        *hidden_layers, last = self.projection
        hidden = features
        for layer in hidden_layers:
            hidden = layer(hidden)
        parts = (self.pool(features), hidden, last(hidden))
        return torch.cat([functional.normalize(part, dim=1) for part in parts], 1)


def projection_head(flat: int, hidden: int, embedding: int) -> nn.Sequential:
    """Build SimCLR's head (Chen et al., 2020, section 2) from [B, flat] to [B, embedding]."""
    return nn.Sequential(
        nn.Linear(flat, hidden), nn.LeakyReLU(0.2, inplace=True), nn.Linear(hidden, embedding)
    )
