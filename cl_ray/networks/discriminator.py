"""D, whatever its family: a trunk of features, a score head and a projection head."""

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
    """

    def __init__(self, trunk: nn.Module, flat: int, hidden: int, embedding: int):
        super().__init__()
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

    def scores(self, features: Tensor) -> Tensor:
        """Scores [B], high is real, of features [B, flat]."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds by 1 in 256
            return self.score(features.to(self.score.weight.dtype)).squeeze(1)

    def embed(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, embedding] of features [B, flat]."""
        return functional.normalize(self.projection(features), dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] (high is real) and unit embeddings [B, embedding] of images [B, C, H, W]."""
        features = self.features(images)
        return self.scores(features), self.embed(features)
