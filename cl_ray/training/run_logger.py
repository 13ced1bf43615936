"""A run's log, written by rank 0: metrics.jsonl, TensorBoard, sample images, Prometheus gauges."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from ray.util.metrics import Gauge
from tensorboard.plugins.hparams import summary_v2 as hp  # its `api` needs TensorFlow
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from cl_ray.config import Config, differences, leaves, preset
from cl_ray.forward import normalize_batch, predict_missing_labels
from cl_ray.metrics_file import MetricsFile
from cl_ray.networks.normalize import to_uint8
from cl_ray.report.records import read_record
from cl_ray.step_log import Metrics, StepLog
from cl_ray.storage import RunStorage, StorageMirror, sync
from cl_ray.trainer import Trainer
from cl_ray.training.progress import TrialInfo
from cl_ray.training.ray_compat import ascii_name

GRID_IMAGES = 64
"""Images in a grid of samples, and in one of pairs with their reconstructions."""
GRID_COLUMNS, GRID_GAP, GRID_GREY = 16, 2, 128
HPARAMS_FIELDS = (
    "optimizer.lr_g",
    "optimizer.lr_d",
    "generator.depth",
    "discriminator.depth",
    "batch_size",
    "losses.objective",
    "pairs.mode",
    "condition",
    "seed",
)
"""Fields of a run of its own that TensorBoard's HPARAMS tab shows, also where all are the same."""
HPARAMS_METRICS = (
    "evaluation/frechet",
    "evaluation/linear_probe",
    "evaluation/knn_1",
    "epoch/g/reconstruction",
)
"""Curves whose last values TensorBoard's HPARAMS tab shows beside the hyperparameters."""
EVENT_FILE_BYTES = 256 * 1024
"""Size from which events go into another file on an object store, where a file can only be sent
again whole."""


class RunLogger:
    """Writes the log of a run, or of a search's trial, into its folder.

    Lines, images and an evaluation of epochs that the trainer has not finished are deleted, as it
    will write them again.
    """

    def __init__(
        self,
        folder: RunStorage,
        trainer: Trainer,
        config: Config,
        trial: TrialInfo | None = None,
    ):
        self.folder, self.trainer, self._mirror = folder, trainer, StorageMirror(folder)
        self.metrics = MetricsFile(folder, trainer.epochs)
        for name in folder.files("samples"):
            if (image := re.fullmatch(r"\w+-(\d+)\.png", name)) and int(image[1]) > trainer.epochs:
                folder.delete(f"samples/{name}")
        evaluation = read_record(folder, "evaluation.json")
        if evaluation and evaluation.get("step", 0) > trainer.gan.steps:
            folder.delete("evaluation.json")
        names = (trial.search, folder.name) if trial else (folder.name, "")
        self._gauges = PrometheusGauges(*names)
        if not trainer.gan.steps:  # a run that was ended before its first checkpoint starts again
            for name in folder.files("tensorboard"):
                folder.delete(f"tensorboard/{name}")
        self._events = SummaryWriter(
            str(self._mirror.path / "tensorboard"), purge_step=trainer.gan.steps + 1
        )
        if not trainer.gan.steps:
            self._log_hyperparameters(config, trial)
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(GRID_IMAGES, config.generator.latent, generator=generator)
        self._uniform = torch.rand(GRID_IMAGES, generator=generator)

    def log_steps(self, log: StepLog) -> None:
        """Write the metrics of the last steps as curves and gauges."""
        if not self.folder.remote:  # `flush` checks where it uploads
            self.folder.check_lease()
        speed = log.images / log.seconds
        for name, value in log.metrics.items():
            self._events.add_scalar(name, value, log.step)
        self._events.add_scalar("speed/images_per_second", speed, log.step)
        self._events.add_scalar("speed/data_time_fraction", log.data_time / log.seconds, log.step)
        position = {"epoch": log.epoch, "step": log.step}
        self._gauges.set({**position, **log.metrics, "images_per_second": speed})

    def log_epoch(self, metrics: Metrics) -> None:
        """Write a finished epoch: its line, curves, gauges and image grids."""
        step, epoch = self.trainer.gan.steps, self.trainer.epochs
        self.metrics.add(epoch, step, metrics)
        for name, value in metrics.items():
            self._events.add_scalar(f"epoch/{name}", value, step)
        self._gauges.set({"epoch": epoch, "step": step, **metrics})
        for name, grid in {"samples": self.sample_grid(), "pairs": self.pair_grid()}.items():
            self._events.add_image(name, grid, step)
            png = io.BytesIO()
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(png, "png")
            self.folder.write(f"samples/{name}-{epoch:04d}.png", png.getvalue())
        self.flush()

    def log_evaluation(self, epoch: int, step: int, metrics: Metrics) -> None:
        """Add an evaluation's metrics to the line of its epoch, and write them as curves."""
        named = {f"evaluation/{name}": value for name, value in metrics.items()}
        self.metrics.add(epoch, step, named)
        for name, value in named.items():
            self._events.add_scalar(name, value, step)
        self._gauges.set(named)
        self.flush()

    def lacks_evaluation(self, epoch: int) -> bool:
        """Whether no line of an epoch has an evaluation."""
        return not any(
            line["epoch"] == epoch and any(k.startswith("evaluation/") for k in line)
            for line in self.metrics.lines
        )

    def flush(self) -> None:
        """Write everything to the run folder, in which a power cut does not lose it."""
        self._events.flush()
        if not self.folder.remote:
            events = Path(self._events.log_dir)
            for path in (*events.iterdir(), events):
                sync(path)
        full = self.folder.remote and self._mirror.size() >= EVENT_FILE_BYTES
        if full:  # the next event opens a file
            self._events.close()
        self._mirror.push()
        if full:
            self._mirror.clear()

    def close(self) -> None:
        """Write what is still in memory, also of a run that is interrupted."""
        self._gauges.close()
        self.folder.check_lease()
        self._events.close()
        self._mirror.push()

    @torch.no_grad()
    def sample_grid(self) -> torch.Tensor:
        """The EMA generator's images of fixed noise, as one uint8 image [3, H, W]."""
        gan, prior = self.trainer.gan, self.trainer.prior
        labels = None
        if gan.classes:
            labels, count = torch.arange(GRID_IMAGES), len(gan.classes)
            labels = labels % count if count <= GRID_IMAGES else labels * count // GRID_IMAGES
        latents = self._noise
        if prior is not None:
            latents = prior.transform_noise(self._noise, self._uniform, labels)
        latents = latents.to(gan.device, gan.dtype)
        labels = None if labels is None else labels.to(gan.device)
        return uint8_grid(gan.ema_generator.decode(latents, labels=labels))

    @torch.no_grad()
    def pair_grid(self) -> torch.Tensor:
        """Columns of x+, G(x+), x-, G(x-) of the last batch, as one uint8 image [3, H, W]."""
        gan, batch = self.trainer.gan, self.trainer.preview_batch
        assert batch is not None
        batch = predict_missing_labels(gan.discriminator, normalize_batch(batch, gan.dtype))
        columns, g, present = [], gan.ema_generator, batch.present[0]  # of rank 0
        for number, images in enumerate(batch.real):
            x = images[present][: GRID_IMAGES // 4]
            labels = None
            if batch.labels is not None:
                labels = batch.labels[present][: GRID_IMAGES // 4, number]
            columns += [x, g.decode(g.encode(x), labels=labels)]
        return uint8_grid(torch.stack(columns, 1).flatten(0, 1))

    def _log_hyperparameters(self, config: Config, trial: TrialInfo | None) -> None:
        """Write what TensorBoard's HPARAMS tab compares: a search's trials by what it varies.

        The first run that it reads decides which columns it shows.
        """
        if trial:
            values: Mapping[str, bool | float | str] = trial.hparams
            metrics = [f"evaluation/{name}" for name in trial.metrics]
        else:
            fields = dict(leaves(config.model_dump(exclude={"name", "storage"})))
            changed = (name for name in differences(preset("quick"), config) if name in fields)
            values = {
                name: fields[name] if isinstance(fields[name], int | float) else str(fields[name])
                for name in dict.fromkeys([*HPARAMS_FIELDS, *changed])
            }
            metrics = []
        summaries = (
            hp.hparams_config_pb(
                [hp.HParam(k, hp.Discrete([], dtype=type(v))) for k, v in values.items()],
                [hp.Metric(tag) for tag in dict.fromkeys([*metrics, *HPARAMS_METRICS])],
            ),
            hp.hparams_pb(
                dict(values), f"{trial.search}/{self.folder.name}" if trial else self.folder.name
            ),
        )
        for summary in summaries:
            self._events._get_file_writer().add_summary(summary)
        self._events.add_text("config", f"```yaml\n{config.to_yaml()}```")


class PrometheusGauges:
    """A run's latest metrics as Ray application metrics.

    Each node's metrics port serves them to Prometheus, with `ray_` before the names: the epoch is
    `ray_cl_ray_epoch{run="demo",trial=""}`. The dashboard's Metrics page shows them where Grafana
    is set up with docs/grafana.json. A name beyond ASCII is percent-encoded. Of a search's trial
    `run` is the search and `trial` its number, which is empty for a run of its own.
    """

    def __init__(self, run: str, trial: str = ""):
        self._tags = {"run": ascii_name(run), "trial": trial}
        self._gauges: dict[str, Gauge] = {}
        self.set({"running": 1})

    def set(self, metrics: Mapping[str, float]) -> None:
        """Set the metrics' values; the gauge of `d/adversarial` is `cl_ray_d_adversarial`."""
        for name, value in metrics.items():
            if name not in self._gauges:
                gauge = "cl_ray_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(gauge, name, tag_keys=tuple(self._tags))
            self._gauges[name].set(value, self._tags)

    def close(self) -> None:
        """Mark the run as over; its last values stay until its process ends."""
        self.set({"running": 0})


def uint8_grid(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] in [-1, 1] as one uint8 image [3, H', W'], on grey.

    As `torchvision.utils.make_grid`, whose import takes more than a second, lays them out.
    """
    pixels = to_uint8(images.float().cpu())
    count, height, width, _ = pixels.shape
    columns = min(GRID_COLUMNS, count)
    rows = -(-count // columns)
    shape = (rows * columns, height + GRID_GAP, width + GRID_GAP, 3)
    cells = torch.full(shape, GRID_GREY, dtype=torch.uint8)
    cells[:count, GRID_GAP:, GRID_GAP:] = pixels
    sheet = cells.unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
    return functional.pad(sheet, (0, GRID_GAP, 0, GRID_GAP), value=GRID_GREY)
