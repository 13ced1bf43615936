"""The generator G: encodes an image to a latent vector, and decodes latent vectors to images."""

import math

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """G, whatever the family of its decoder.

    Args:
        encoder: Maps images [B, C, H, W] to vectors [B, latent].
        decoder: Maps vectors [B, latent] to images [B, C, H, W] in [-1, 1]. A decoder with an
            attribute `noise_dim` above 0 also takes that many normal numbers for each sample (the
            last one selects style mixing, and never does at infinity), a truncation, and the class
            vectors to add to every latent vector.
        latent_noise_std: Standard deviation of the noise added to the latent vectors of images in
            training.
        class_embedding: Vector of each class, added to latent vectors; equal to a first linear
            layer that also takes the one-hot class. None: unconditional.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_noise_std: float,
        class_embedding: nn.Embedding | None = None,
    ):
        super().__init__()
        self.encoder, self.decoder, self.latent_noise_std = encoder, decoder, latent_noise_std
        self.class_embedding = class_embedding

    @property
    def decoder_noise_dim(self) -> int:
        """Normal numbers that decoding one sample takes in training besides its latent vector."""
        return int(getattr(self.decoder, "noise_dim", 0))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] in [-1, 1] to latent vectors [B, latent] of mean square 1.

        Noise lies near the same sphere, so the decoder has one kind of input.
        """
        return to_sphere(self.encoder(images))

    def decode(
        self,
        latents: Tensor,
        decoder_noise: Tensor | None = None,
        truncation: float = 1.0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Decode latent vectors [B, latent] to images [B, C, H, W] in [-1, 1].

        Args:
            latents: Latent vectors; scaled to the sphere.
            decoder_noise: [B, decoder_noise_dim]; without it an image is a function of its latent
                vector and class alone.
            truncation: In [0, 1]; below 1, images of a style-based decoder vary less.
            labels: Classes [B], if G is conditional.
        """
        assert (labels is None) == (self.class_embedding is None), "labels go with a conditional G"
        class_vectors = None if self.class_embedding is None else self.class_embedding(labels)
        latents = to_sphere(latents)
        if self.decoder_noise_dim:
            return self.decoder(latents, decoder_noise, truncation, class_vectors)
        return self.decoder(latents if class_vectors is None else latents + class_vectors)

    def forward(
        self,
        images: Tensor,
        z: Tensor,
        latent_noise: Tensor,
        decoder_noise: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the fakes of images and of noise, as in training.

        The latent vectors of images are perturbed by noise of `latent_noise_std`: what is decoded
        near them must still be their images, so they spread over the sphere that noise lies on
        (Yue et al., 2026, Sphere Encoder, section 3).

        Args:
            images: Real images [B, C, H, W].
            z: Noise [M, latent].
            latent_noise: Unit noise [B, latent].
            decoder_noise: [B + M, decoder_noise_dim], if the decoder takes any.
            labels: Classes [B + M] of the fakes, if G is conditional.

        Returns:
            Fakes [B + M, C, H, W] of the images, then of z; unperturbed latent vectors [B, latent]
            of the images.
        """
        latents = self.encode(images)
        if decoder_noise is not None and self.decoder_noise_dim:
            decoder_noise = decoder_noise.clone()  # fakes of images mix no second style in
            decoder_noise[: len(images), -1].fill_(math.inf)
        perturbed = latents + self.latent_noise_std * latent_noise
        return self.decode(torch.cat([perturbed, z]), decoder_noise, labels=labels), latents


def to_sphere(vectors: Tensor) -> Tensor:
    """Scale vectors [B, d] to mean square 1."""
    return vectors * torch.rsqrt(vectors.square().mean(1, keepdim=True) + 1e-6)
