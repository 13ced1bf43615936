"""D, whatever its family: a trunk of features, a score head, a projection head, and classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Discriminator(nn.Module):
    """D.

    Args:
        trunk: Images [B, C, H, W] to features [B, flat].
        flat: Numbers of an image's features.
        hidden: Dimensions inside the projection head.
        embedding: Dimensions of the projection.
        classes: How many there are; 0 where labels are not used.
        projects: Whether an image's class is part of its score, instead of being named.
        contrad: Whether it has what ContraD's form needs: a hidden layer before the score, and a
            second projection, in which fakes are one class (Jeong and Shin, 2021, section 3).
    """

    def __init__(
        self,
        trunk: nn.Module,
        flat: int,
        hidden: int,
        embedding: int,
        classes: int = 0,
        projects: bool = False,
        contrad: bool = False,
    ):
        super().__init__()
        self.represented = flat + hidden + embedding
        """Dimensions of the representation."""
        self.trunk = trunk
        self.judge: nn.Module = nn.Identity()
        judged = flat
        if contrad:
            self.judge = nn.Sequential(nn.Linear(flat, hidden), nn.LeakyReLU(0.2))
            judged = hidden
        self.score = nn.Linear(judged, 1)
        self.projection = head(flat, hidden, embedding)
        self.second = head(flat, hidden, embedding) if contrad else None
        self.projects = projects and classes > 0
        seen = judged if projects else flat
        self.classes = nn.Linear(seen, classes, bias=not projects) if classes else None

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to the deepest map, which the heads read, [B, flat]."""
        return self.trunk(images)

    def representation(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to the representation [B, flat + hidden + embedding].

        The features, the projection head's hidden layer and its projection, each of unit length.
        The deeper a layer, the more of what views have in common it has drawn together, and the
        less else it knows: labels that are few are best read off the middle of the head (Chen et
        al., 2020, "Big self-supervised models", section 3), neighbours off the features.
        """
        features = self.features(images)
        *hidden, last = self.projection
        middle = features
        for layer in hidden:
            middle = layer(middle)
        parts = (features, middle, last(middle))
        return torch.cat([functional.normalize(part, dim=1) for part in parts], 1)

    def scores(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores [B], high is real, of features [B, flat].

        With `projects`, the score of an image as one of class y of `labels` [B] is that of the
        image plus the inner product of the features with the class's own vector (Miyato and
        Koyama, 2018, equation 4).
        """
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds by 1 in 256
            features = self.judge(features.to(self.score.weight.dtype))
            scores = self.score(features).squeeze(1)
            if not self.projects:
                return scores
            assert self.classes is not None, "D knows classes only where labels are used"
            assert labels is not None, "the score is of an image and its class"
            return scores + (self.classes.weight[labels] * features).sum(1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the classes [B, classes] of features [B, flat]; of a D that names classes.

        One that `projects` does not: its inner products tell a class's real images from its fakes.
        """
        assert self.classes is not None, "D knows classes only where labels are used"
        assert not self.projects, "D names classes only by the condition classifier"
        with torch.autocast(features.device.type, enabled=False):
            return self.classes(features.to(self.score.weight.dtype))

    def embed(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, embedding] of features [B, flat]."""
        return functional.normalize(self.projection(features), dim=1)

    def embed_fakes(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, embedding] by the second projection, of features [B, flat]."""
        assert self.second is not None, "only in the form contrad"
        return functional.normalize(self.second(features), dim=1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores [B] (high is real) and unit embeddings [B, embedding] of images [B, C, H, W]."""
        features = self.features(images)
        return self.scores(features, labels), self.embed(features)


def head(flat: int, hidden: int, embedding: int) -> nn.Sequential:
    """Features [B, flat] to projections [B, embedding], by one hidden layer (SimCLR)."""
    return nn.Sequential(
        nn.Linear(flat, hidden), nn.LeakyReLU(0.2, inplace=True), nn.Linear(hidden, embedding)
    )
