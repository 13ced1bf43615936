"""Train our preset, PyTorch's DCGAN or SimCLR for equal CPU time, and measure them alike.

    python benchmarks/baselines.py data/photos --method dcgan --seconds 2400
    python benchmarks/baselines.py data/photos --method simclr --seconds 2400
    python benchmarks/baselines.py data/photos --method cl_ray --seconds 2400

- dcgan: Radford et al. (2016) as PyTorch's tutorial has it: five layers each, batches of 128, Adam
  at 2e-4 and betas (0.5, 0.999), no augmentation, no moving average of G. Images of 64 pixels.
- simclr: Chen et al. (2020) with the trunk, head and views of our preset, NT-Xent, and Adam.
- cl_ray: the preset that `cl-ray train` chooses by the images' size, in a bare loop.

Samples are compared with a split over the reference classifier of the data, which is trained first
where there is none; probes are fitted to the training images' representations. Seconds are
CPU seconds of the process, so that other programs on the machine do not change the result.
"""

import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from bare import build_trainer, train_until
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from cl_ray.cli import default_preset
from cl_ray.config import Config, preset
from cl_ray.data.config import PHOTO_VIEWS
from cl_ray.data.dataset import Dataset, RowBatch
from cl_ray.data.views import apply_views, sample_views
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.evaluation.classifier import Floats
from cl_ray.evaluation.evaluate import FidelityEvaluator, evaluate_representation
from cl_ray.evaluation.feature_metrics import FeatureData, cluster_accuracy
from cl_ray.evaluation.metrics import SAMPLE_METRICS
from cl_ray.evaluation.probes import ProbeData
from cl_ray.evaluation.reference import load_features
from cl_ray.evaluation.reference_cache import prepare_reference
from cl_ray.evaluation.reference_name import resolve_reference
from cl_ray.losses.contrastive import info_nce
from cl_ray.model import TrainedModel
from cl_ray.networks.build import build_discriminator
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.normalize import to_uint8, to_unit
from cl_ray.report.images import draw_grid, encode_png

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
        layers.append(nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1), nn.Tanh())


def build_dcgan_discriminator(channels: int) -> nn.Module:
    """Build the tutorial's D, from images [B, C, 64, 64] to scores [B]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for width in (WIDTH, WIDTH * 2, WIDTH * 4):
        layers.append(nn.Conv2d(width, width * 2, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH * 8, 1, 4, 1, 0), nn.Flatten(0))


def initialize(module: nn.Module) -> None:
    """Draw weights as the tutorial does (Radford et al., 2016, section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
        nn.init.zeros_(module.bias)


def train_dcgan(images: Tensor, seconds: float) -> tuple[nn.Module, int]:
    """Train G on images uint8 [N, 64, 64, C]; return it and its steps."""
    g, d = build_generator(images.shape[3]), build_dcgan_discriminator(images.shape[3])
    g.apply(initialize), d.apply(initialize)
    g_optimizer, d_optimizer = (torch.optim.Adam(n.parameters(), LR, BETAS) for n in (g, d))
    steps, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        real = to_unit(images[torch.randint(len(images), (BATCH,))])
        fake = g(torch.randn(BATCH, LATENT, 1, 1))
        ones = torch.ones(BATCH)
        d_loss = cross_entropy(d(real), ones) + cross_entropy(d(fake.detach()), 0 * ones)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        cross_entropy(d(fake), ones).backward()
        g_optimizer.step()
        steps += 1
    return g, steps


def train_simclr(
    images: Tensor, config: Config, seconds: float, lr: float, temperature: float
) -> tuple[Discriminator, int]:
    """Train the preset's D as an encoder of images uint8 [N, H, W, C]; return it and its steps."""
    _, dtype = resolve_device("cpu", config.precision)
    height, width, channels = images.shape[1:]
    network = build_discriminator((height, width, channels), config.discriminator)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr, fused=True)
    random = torch.Generator().manual_seed(config.seed)
    present = torch.ones(BATCH, dtype=torch.bool)
    steps, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        rows = to_unit(images[torch.randint(len(images), (BATCH,))])
        views = [apply_views(rows, sample_views(config.views, BATCH, random)) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            view1, view2 = network.embed(network.features(torch.cat(views))).float().chunk(2)
        loss = info_nce(view1, view2, [], present, temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return network, steps


def train_cl_ray(dataset: Dataset, config: Config, seconds: float) -> tuple[TrainedModel, int]:
    """Train a preset in this process; return the networks and their steps."""
    trainer, end = build_trainer(config, dataset), time.process_time() + seconds
    train_until(trainer, lambda _: time.process_time() > end)
    return TrainedModel.from_trainer(trainer), trainer.gan.steps


def measure_samples(samples: Tensor, evaluator: FidelityEvaluator, out: Path) -> None:
    """Print the metrics of samples uint8 [count, H, W, C], and save a grid of the first 64."""
    metrics = [metric for metric in SAMPLE_METRICS if metric.name in MEASURED]
    found = evaluator.measure(samples[: evaluator.count].numpy(), metrics=metrics)
    for name, value in found.metrics.items():
        print(f"{name:12} {value.value:9.4f}, real images {value.real_baseline:.4f}")
    out.write_bytes(encode_png(draw_grid(samples[:64].numpy(), 8)))


def measure_features(network: Discriminator, train: RowBatch, held_out: RowBatch) -> None:
    """Print what probes make of a discriminator's representations."""
    train, held_out = train.labelled(), held_out.labelled()
    assert train.label is not None
    assert held_out.label is not None

    def represent(rows: RowBatch) -> Floats:
        batches = torch.from_numpy(rows.image).split(500)
        with torch.no_grad():
            return torch.cat([network.representation(to_unit(x)) for x in batches]).numpy()

    x, q = represent(train), represent(held_out)
    probes = ProbeData(x, train.label, q, held_out.label)
    clusters = FeatureData(x, q, (q[:2], q[:2]), train.label, held_out.label)
    scores, notes = evaluate_representation(probes)
    for name, score in scores.items():
        print(f"{name:22} {score.value:.4f}")
    print(f"cluster_accuracy       {cluster_accuracy(clusters).value:.4f}", *notes, sep="\n")


def main(
    data: Annotated[str, tyro.conf.Positional],
    method: Literal["cl_ray", "dcgan", "simclr"],
    seconds: float = 2400,
    seed: int = 0,
    split: str = "validation",
    threads: int = 1,
    lr: float = 1e-3,
    temperature: float = 0.5,
    out: Path = Path("samples.png"),
) -> None:
    """Train, measure, and save a grid of samples.

    Args:
        data: A dataset with labels.
        method: What is trained.
        seconds: CPU seconds of training.
        seed: Seed of the weights and of all draws.
        split: Split that samples and features are compared with.
        threads: CPU threads.
        lr: Learning rate of SimCLR.
        temperature: Temperature of SimCLR.
        out: File of a grid of 64 samples.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    keep_freed_memory()
    dataset = Dataset.open(data)
    shape = dataset.info.shape
    config = preset(default_preset(shape[0])).model_copy(update={"seed": seed, "data": data})
    if dataset.info.photographic:
        config = config.model_copy(update={"views": PHOTO_VIEWS})
    rows, held_out = dataset.read("train"), dataset.read(split)
    images = torch.from_numpy(rows.image)
    prepare_reference(dataset, Console())
    reference = resolve_reference(dataset, "auto")
    if method != "simclr" and reference is None:
        raise SystemExit(f"{data} has too few labelled images for a reference classifier.")
    began, steps = time.process_time(), 0
    samples: Tensor | None = None
    encoder: Discriminator | None = None
    if method == "simclr":
        encoder, steps = train_simclr(images, config, seconds, lr, temperature)
    elif method == "dcgan":
        if shape[0] != 64:
            raise SystemExit(f"{data} has {shape[0]} pixels, and the tutorial's networks take 64.")
        generator, steps = train_dcgan(images, seconds)
        with torch.no_grad():  # batches of the tutorial's size, normalized by their own statistics
            batches = -(-len(held_out.id) // BATCH)
            noise = [torch.randn(BATCH, LATENT, 1, 1) for _ in range(batches)]
            samples = torch.cat([to_uint8(generator(z)) for z in noise])
    else:
        model, steps = train_cl_ray(dataset, config, seconds)
        samples, encoder = torch.from_numpy(model.generate(len(held_out.id))), model.discriminator
    print(f"{method}: {steps} steps in {time.process_time() - began:.0f} CPU seconds")
    if samples is not None and reference is not None:
        evaluator = FidelityEvaluator(load_features(reference), rows, held_out, seed=seed)
        measure_samples(samples, evaluator, out)
    if encoder is not None:
        measure_features(encoder.eval(), rows, held_out)


if __name__ == "__main__":
    tyro.cli(main)
