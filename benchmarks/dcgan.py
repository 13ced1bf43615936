"""Train the DCGAN of PyTorch's tutorial on a dataset of 64 pixels, and measure its samples.

    python benchmarks/dcgan.py data/photos --seconds 2400 --out dcgan.png

Radford et al. (2016) as the tutorial has it: five layers each, batches of 128, Adam at 2e-4 and
betas (0.5, 0.999), no augmentation, no moving average of G. `cl-ray evaluate` measures our runs in
the same way: as many samples as the split has images, over the same reference classifier.
"""

import time
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import FidelityEvaluator
from cl_ray.evaluation.metrics import SAMPLE_METRICS
from cl_ray.evaluation.reference import load_features, resolve_reference
from cl_ray.networks.normalize import to_uint8, to_unit

MEASURED = ("frechet", "kernel", "precision", "recall", "density", "coverage")
LATENT, WIDTH, BATCH, LR, BETAS = 100, 64, 128, 2e-4, (0.5, 0.999)


def build_generator(channels: int) -> nn.Module:
    """Build the tutorial's G, from latent vectors [B, 100, 1, 1] to images [B, C, 64, 64]."""
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(LATENT, WIDTH * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(WIDTH * 8),
        nn.ReLU(True),
    ]
    for width in (WIDTH * 4, WIDTH * 2, WIDTH):
        layers += [
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1), nn.Tanh())


def build_discriminator(channels: int) -> nn.Module:
    """Build the tutorial's D, from images [B, C, 64, 64] to scores [B]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for width in (WIDTH, WIDTH * 2, WIDTH * 4):
        layers += [
            nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width * 2),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH * 8, 1, 4, 1, 0), nn.Flatten(0))


def initialize(module: nn.Module) -> None:
    """Draw weights as the tutorial does (Radford et al., 2016, section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
        nn.init.zeros_(module.bias)


def train(images: Tensor, seconds: float) -> tuple[nn.Module, int]:
    """Train G on images uint8 [N, 64, 64, C] for so many seconds; return it and its steps."""
    g, d = build_generator(images.shape[3]), build_discriminator(images.shape[3])
    g.apply(initialize), d.apply(initialize)
    g_optimizer, d_optimizer = (torch.optim.Adam(n.parameters(), LR, BETAS) for n in (g, d))
    end, steps = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        real = to_unit(images[torch.randint(len(images), (BATCH,))])
        fake = g(torch.randn(BATCH, LATENT, 1, 1))
        ones = torch.ones(BATCH)
        scores = d(real), d(fake.detach())
        d_loss = functional.binary_cross_entropy_with_logits(scores[0], ones)
        d_loss = d_loss + functional.binary_cross_entropy_with_logits(scores[1], 0 * ones)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = functional.binary_cross_entropy_with_logits(d(fake), ones)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        steps += 1
    return g, steps


def main(
    data: Annotated[str, tyro.conf.Positional],
    seconds: float = 2400,
    seed: int = 0,
    split: str = "test",
    threads: int = 2,
    out: str = "dcgan.png",
) -> None:
    """Train, measure and save a grid of samples.

    Args:
        data: A dataset of 64 pixels with a reference, which `cl-ray train` or `evaluate` trains.
        seconds: Time of training.
        seed: Seed of the weights and of all draws.
        split: Split that the samples are compared with.
        threads: CPU threads.
        out: File of a grid of 64 samples.
    """
    torch.set_num_threads(threads)
    dataset = Dataset.open(data)
    reference = resolve_reference(dataset, "auto")
    if dataset.info.shape[0] != 64 or reference is None:
        raise UserError(f"{data} needs images of 64 pixels, and a reference of `cl-ray evaluate`.")
    torch.manual_seed(seed)
    rows = dataset.read("train")
    g, steps = train(torch.from_numpy(rows.image), seconds)
    held_out = dataset.read(split)
    evaluator = FidelityEvaluator(load_features(reference), rows, held_out, seed=seed)
    # Batches of the tutorial's size, normalized by their own statistics, as its samples are.
    with torch.no_grad():
        batches = -(-evaluator.count // BATCH)
        samples = torch.cat(
            [to_uint8(g(torch.randn(BATCH, LATENT, 1, 1))) for _ in range(batches)]
        ).numpy()
    metrics = [metric for metric in SAMPLE_METRICS if metric.name in MEASURED]
    found = evaluator.measure(samples[: evaluator.count], metrics=metrics)
    print(f"{steps} steps in {seconds:.0f} s, {threads} threads")
    for name, value in found.metrics.items():
        print(f"{name:12} {value.value:9.4f}, real images {value.real_baseline:.4f}")
    grid = samples[:64].reshape(8, 8, *samples.shape[1:]).swapaxes(1, 2)
    picture = grid.reshape(8 * 64, 8 * 64, -1)
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(out)


if __name__ == "__main__":
    tyro.cli(main)
