"""What a run says to people: metrics.jsonl, TensorBoard, pictures, Ray's metrics. Rank 0 only."""

import json
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from cl_ray.config import Config, differences, preset
from cl_ray.networks.normalize import to_unit
from cl_ray.storage import RunStorage, StorageMirror
from cl_ray.trainer import Metrics, StepLog, Trainer
from cl_ray.training.prometheus import PrometheusGauges

SHOWN = 64
"""Samples in a grid; half as many pairs are shown with their reconstructions."""
COMPARED = (
    "evaluation/frechet",
    "evaluation/linear_probe",
    "evaluation/knn_1",
    "epoch/g/reconstruction",
)
"""Curves whose last values stand beside the hyperparameters in TensorBoard's HPARAMS tab."""


class RunLogger:
    """Keeps the run's records in its folder.

    Args:
        folder: The run folder.
        run: The run, where it stands now; what was written beyond that is dropped, as the run
            will write it again.
        search: The name of the search that the run is a trial of.
    """

    def __init__(self, folder: RunStorage, run: Trainer, search: str | None = None):
        self.run, self.mirror = run, StorageMirror(folder)
        self.gauges = PrometheusGauges(search or folder.name, folder.name if search else "")
        lines = map(json.loads, (folder.read("metrics.jsonl") or b"").decode().splitlines())
        self.metrics = self.mirror.path / "metrics.jsonl"
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        self._write([line for line in lines if line["epoch"] <= run.epochs])
        self.events = SummaryWriter(
            str(self.mirror.path / "tensorboard"), purge_step=run.gan.steps + 1
        )
        if not run.gan.steps:
            self._hyperparameters(run.config)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(SHOWN, run.config.generator.latent, generator=generator)
        self.chance = torch.rand(SHOWN, generator=generator)

    def record(self, record: StepLog) -> None:
        """Curves of the last steps."""
        for name, value in record.metrics.items():
            self.events.add_scalar(name, value, record.step)
        self.events.add_scalar(
            "speed/images_per_second", record.images / record.seconds, record.step
        )
        self.events.add_scalar("speed/waited", record.waited / record.seconds, record.step)
        place = {"epoch": record.epoch, "step": record.step}
        speed = {"images_per_second": record.images / record.seconds}
        self.gauges.set({**place, **record.metrics, **speed})

    def epoch(self, metrics: Metrics) -> None:
        """A finished epoch: one line, two pictures, and all of it in the run folder."""
        step, epoch = self.run.gan.steps, self.run.epochs
        with self.metrics.open("a") as lines:
            lines.write(json.dumps({"epoch": epoch, "step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(f"epoch/{name}", value, step)
        self.gauges.set({"epoch": epoch, "step": step, **metrics})
        for name, grid in {"samples": self.samples(), "pairs": self.pairs()}.items():
            self.events.add_image(name, grid, step)
            file = self.mirror.path / "samples" / f"{name}-{epoch:04d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file)
        self.send()

    def evaluated(self, epoch: int, step: int, metrics: Metrics) -> None:
        """What an epoch's networks are worth: added to the epoch's line, and curves."""
        named = {f"evaluation/{name}": value for name, value in metrics.items()}
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        added = [line | named if line["epoch"] == epoch else line for line in lines]
        self._write(added)
        for name, value in named.items():
            self.events.add_scalar(name, value, step)
        self.gauges.set(named)
        self.send()

    def send(self) -> None:
        """Have all that was said reach the run folder."""
        self.events.flush()
        self.mirror.push()

    def lacks_evaluation(self, epoch: int) -> bool:
        """Whether an epoch's line says nothing of what its networks are worth."""
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return any(
            line["epoch"] == epoch and not any(k.startswith("evaluation/") for k in line)
            for line in lines
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Put all lines in place at once: a kill leaves the old ones or the new ones."""
        new = self.metrics.with_suffix(".new")
        new.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        new.replace(self.metrics)

    @torch.no_grad()
    def samples(self) -> torch.Tensor:
        """The EMA generator's images of noise that stays the same, as one uint8 picture [3, H, W]."""
        gan = self.run.gan
        prior = self.run.prior
        labels = None
        if gan.classes:
            labels, count = torch.arange(SHOWN), len(gan.classes)
            labels = labels % count if count <= SHOWN else labels * count // SHOWN
        latents = self.noise if prior is None else prior.place(self.noise, self.chance, labels)
        latents = latents.to(gan.device, gan.dtype)
        labels = None if labels is None else labels.to(gan.device)
        return _picture(gan.ema_generator.decode(latents, labels=labels), columns=16)

    @torch.no_grad()
    def pairs(self) -> torch.Tensor:
        """Rows of x+, G(x+), x-, G(x-), eight pairs a row, of the batch seen last."""
        gan, batch = self.run.gan, self.run.batch
        assert batch is not None
        columns, g = [], gan.ema_generator
        for number, images in enumerate((batch.positive, batch.negative)):
            x = to_unit(images[batch.present][: SHOWN // 4], gan.dtype)
            labels = None
            if batch.labels is not None:
                labels = batch.labels[batch.present][: SHOWN // 4, number]
            columns += [x, g.decode(g.encode(x), labels=labels)]
        return _picture(torch.stack(columns, 1).flatten(0, 1), columns=16)

    def close(self) -> None:
        """Write out what is still in memory, also of a run that is broken off."""
        self.gauges.close()
        self.events.close()
        self.mirror.push()

    def _hyperparameters(self, config: Config) -> None:
        """What TensorBoard's HPARAMS tab compares runs by."""
        changed = differences(preset("quick"), config)
        searched = {
            "lr_g": config.optimizer.lr_g,
            "lr_d": config.optimizer.lr_d,
            "depth_g": config.generator.depth,
            "depth_d": config.discriminator.depth,
            "batch_size": config.batch_size,
            "objective": config.losses.objective,
            "pairs": config.pairs.mode,
            "condition": config.condition,
            "seed": config.seed,
        }
        others = {k: str(v) for k, (_, v) in changed.items() if k not in ("name", "storage")}
        for summary in hparams({**others, **searched}, dict.fromkeys(COMPARED, 0.0)):
            self.events._get_file_writer().add_summary(summary)
        self.events.add_text("config", f"```yaml\n{config.to_yaml()}```")


def _picture(images: torch.Tensor, columns: int) -> torch.Tensor:
    grid = make_grid(images.float().cpu() / 2 + 0.5, nrow=columns, pad_value=0.5)
    return grid.clamp(0, 1).mul(255).round().to(torch.uint8)
