"""G, whatever its family: from an image to a latent vector and back."""

import math

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """G: `encode` an image to a latent vector, `decode` a latent vector to an image.

    Args:
        encoder: Images [B, C, H, W] to vectors [B, latent].
        decoder: Vectors [B, latent] to images [B, C, H, W] in [-1, 1]. One that has an attribute
            `extras`, above 0, may be given so many further normal numbers a sample; the last of
            them decides whether a second style is mixed in, and never does when infinite. It may
            then also be given a `truncation` and what to add to every vector.
        latent_noise_std: Spread of what moves an image's latent vector in training.
        classes: The vector of each class, added to a latent vector: what a first linear layer
            makes of the class beside it. None: images are of no class.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_noise_std: float,
        classes: nn.Embedding | None = None,
    ):
        super().__init__()
        self.encoder, self.decoder, self.latent_noise_std = encoder, decoder, latent_noise_std
        self.classes = classes

    @property
    def extras(self) -> int:
        """Normal numbers that a sample's decoding takes in training, besides its latent vector."""
        return int(getattr(self.decoder, "extras", 0))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to latent vectors [B, latent] of mean square 1.

        Noise lies near the same sphere, so the decoder sees one kind of input.
        """
        return to_sphere(self.encoder(images))

    def decode(
        self,
        latents: Tensor,
        extras: Tensor | None = None,
        truncation: float = 1.0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Latent vectors [B, latent] to images [B, C, H, W] in [-1, 1], of classes `labels` [B].

        Without `extras` [B, extras] an image is a function of its latent vector alone. A
        `truncation` below 1, where the decoder knows it, gives less varied and safer images.
        """
        assert (labels is None) == (self.classes is None), "classes, where G knows any"
        kind = None if self.classes is None else self.classes(labels)
        latents = to_sphere(latents)
        if self.extras:
            return self.decoder(latents, extras, truncation, kind)
        return self.decoder(latents if kind is None else latents + kind)

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        moves: Tensor,
        extras: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fakes [B + M, C, H, W] of `images` [B, C, H, W], then of `noise` [M, latent].

        Their classes are `labels` [B + M], where G knows any.

        The images' latent vectors are moved by `moves` [B, latent], unit noise, times the latent_noise_std:
        what is decoded near them must still be their images, and so they spread out over the
        sphere that noise lies on (Yue et al., 2026, Sphere Encoder, section 3). Beside the fakes
        come those latent vectors [B, latent], unmoved.
        """
        latents = self.encode(images)
        if extras is not None and self.extras:  # an image's fake has one style, its own
            extras = extras.clone()
            extras[: len(images), -1].fill_(math.inf)
        points = torch.cat([latents + self.latent_noise_std * moves, noise])
        return self.decode(points, extras, labels=labels), latents


def to_sphere(vectors: Tensor) -> Tensor:
    """Vectors [B, d] scaled to mean square 1."""
    return vectors * torch.rsqrt(vectors.square().mean(1, keepdim=True) + 1e-6)
