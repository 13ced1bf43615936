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
    """

    def __init__(
        self,
        trunk: nn.Module,
        flat: int,
        hidden: int,
        embedding: int,
        classes: int = 0,
        projects: bool = False,
    ):
        super().__init__()
        self.projects = projects and classes > 0
        self.classes = nn.Linear(flat, classes, bias=not projects) if classes else None
        self.trunk = trunk
        self.score = nn.Linear(flat, 1)
        self.projection = nn.Sequential(
            nn.Linear(flat, hidden),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(hidden, embedding),
        )

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to the representation, the deepest map [B, flat]."""
        return self.trunk(images)

    def scores(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores [B], high is real, of features [B, flat].

        With `projects`, the score of an image as one of class y of `labels` [B] is that of the
        image plus the inner product of the features with the class's own vector (Miyato and
        Koyama, 2018, equation 4).
        """
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds by 1 in 256
            features = features.to(self.score.weight.dtype)
            scores = self.score(features).squeeze(1)
            if not self.projects:
                return scores
            assert self.classes is not None, "D knows classes only where labels are used"
            assert labels is not None, "the score is of an image and its class"
            return scores + (self.classes.weight[labels] * features).sum(1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the classes [B, classes] of features [B, flat].

        With `projects` they are the inner products, log p(y | real) - log p(y | fake) up to what
        is the same for all classes (Miyato and Koyama, 2018, equation 3).
        """
        assert self.classes is not None, "D knows classes only where labels are used"
        with torch.autocast(features.device.type, enabled=False):
            return self.classes(features.to(self.score.weight.dtype))

    def embed(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, embedding] of features [B, flat]."""
        return functional.normalize(self.projection(features), dim=1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores [B] (high is real) and unit embeddings [B, embedding] of images [B, C, H, W]."""
        features = self.features(images)
        return self.scores(features, labels), self.embed(features)
