"""A run's networks as files that need neither cl_ray nor, as ONNX, PyTorch. Free of Ray.

What another language wants of a model: pixels in and out. So every file takes or gives uint8 images
[n, H, W, C], of any number n, and the scaling to [-1, 1] and back is part of it.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_ray.data.writer import replace_atomically
from cl_ray.environment import package_version
from cl_ray.errors import UserError, first_error_line, redact_credentials
from cl_ray.model import TrainedModel, load
from cl_ray.networks.normalize import to_uint8, to_unit
from cl_ray.prior import Prior

Format = Literal["onnx", "torch"]

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
"""What a file of each format ends in."""

OPSET = 18
"""Of the ONNX operators; onnxruntime has had it since 1.14, of February 2023."""

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
"""The packages of each format beyond cl_ray's own: the extra `export`."""

RECORD = "model.json"

OURS = re.compile(r"model\.json|(sample|generate|encode|embed|score)\.(onnx|onnx\.data|pt2)")
"""What an export may hold; weights of more than 2 GB lie in an onnx.data beside their onnx."""

CHECKED = (1, 7, 64)
"""Numbers of images for which a file is compared with PyTorch; it was traced with another."""

TOLERANCE = 1e-4
"""The largest difference, relative to the largest number; of pixels, one step of 255."""


class Sample(nn.Module):
    """Unit noise, float32 [n, latent], to latent vectors, float32 [n, latent], where images lie.

    Which of the prior's Gaussians each is of follows from float32 [n], drawn evenly from [0, 1),
    and, of a run with classes, from their numbers, int64 [n].
    """

    def __init__(self, prior: Prior):
        super().__init__()
        self.weights, self.means, self.roots = (nn.Buffer(part) for part in prior)

    def forward(self, noise: Tensor, chance: Tensor, labels: Tensor | None = None) -> Tensor:
        """Place."""
        return Prior(self.weights, self.means, self.roots).place(noise, chance, labels)


class Generate(nn.Module):
    """Latent vectors, float32 [n, latent], to images, uint8 [n, H, W, C].

    Of a run with classes it also takes their numbers, int64 [n].
    """

    def __init__(self, run: TrainedModel):
        super().__init__()
        self.generator = run.generator

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode."""
        return to_uint8(self.generator.decode(latents, labels=labels))


class Encode(nn.Module):
    """Images, uint8 [n, H, W, C], to latent vectors, float32 [n, latent], of mean square 1."""

    def __init__(self, run: TrainedModel):
        super().__init__()
        self.generator = run.generator

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        return self.generator.encode(to_unit(images))


class Embed(nn.Module):
    """Images, uint8 [n, H, W, C], to D's representation, float32 [n, d]."""

    def __init__(self, run: TrainedModel):
        super().__init__()
        self.discriminator = run.discriminator

    def forward(self, images: Tensor) -> Tensor:
        """Embed."""
        return self.discriminator.representation(to_unit(images))


class Score(nn.Module):
    """Images, uint8 [n, H, W, C], to D's scores, float32 [n], high for real.

    With the condition `projection` it also takes the numbers of their classes, int64 [n].
    """

    def __init__(self, run: TrainedModel):
        super().__init__()
        self.discriminator = run.discriminator

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score: D's own `forward` without the projection and what training needs of it."""
        d = self.discriminator
        judged = d.score_hidden(d.features(to_unit(images)))
        scores = d.score(judged).squeeze(1)
        if d.is_projection and d.class_head is not None:
            scores = scores + (d.class_head.weight[labels] * judged).sum(1)
        return scores


@dataclass(frozen=True)
class Part:
    """One file of the export.

    Args:
        module: What it computes.
        takes: Its inputs' names.
        gives: Its output's name.
        expected: The same by the loaded run, to check it by.
    """

    module: nn.Module
    takes: tuple[str, ...]
    gives: str
    expected: Callable[..., Any]


def parts_of(run: TrainedModel) -> dict[str, Part]:
    """The files of an export, without their ending."""

    def decode(latents: Tensor, labels: Tensor | None = None) -> NDArray[np.uint8]:
        return run.decode(latents, labels=None if labels is None else labels.numpy())

    def score(images: Tensor, labels: Tensor | None = None) -> NDArray[np.float32]:
        return run.score(images, None if labels is None else labels.numpy())

    prior = run.prior
    by_class = prior is not None and prior.weights.ndim == 2
    drawn = ("noise", "chance", "labels") if by_class else ("noise", "chance")
    sample = {} if prior is None else {"sample": Part(Sample(prior), drawn, "latents", prior.place)}
    given = ("latents", "labels") if run.classes else ("latents",)
    judged = ("images", "labels") if run.discriminator.is_projection else ("images",)
    return {
        **sample,
        "generate": Part(Generate(run), given, "images", decode),
        "encode": Part(Encode(run), ("images",), "latents", run.encode),
        "embed": Part(Embed(run), ("images",), "embeddings", run.embed),
        "score": Part(Score(run), judged, "scores", score),
    }


def export(
    where: str | Path,
    out: str | Path,
    format: Format = "onnx",
    checkpoint: str = "last",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the EMA generator and D of a run as files, each checked against PyTorch.

    `sample` (noise to latents, of a run with a prior), `generate` (latents to images), `encode`
    (images to latents), `embed` (images to D's representation) and `score` (images to D's scores),
    and a record of it all, `model.json`. The folder appears in one rename.

    Args:
        where: The run folder's path or URI.
        out: The folder to write.
        format: `onnx`, or `torch`: programs of torch.export.
        checkpoint: `last`, `best` or a checkpoint's name.
        overwrite: Replace the export that is at `out`.

    Returns:
        What model.json holds.

    Raises:
        UserError: A package is missing, `out` is taken or cannot be written, there is no such run
            or checkpoint, or what was written computes something else than PyTorch does.
    """
    if format not in ENDINGS:
        raise UserError(f"format {format!r} is unknown; there are: {', '.join(ENDINGS)}.")
    missing = [package for package in NEEDS[format] if find_spec(package) is None]
    if missing:
        raise UserError(
            f"--format {format} needs {', '.join(missing)}: `pip install {' '.join(missing)}`."
        )
    path = check_free(str(out), overwrite)
    run = load(where, checkpoint, device="cpu")
    for network in (run.generator, run.discriminator):
        network.to(memory_format=torch.contiguous_format)  # as the files have it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, so on the same disk; whatever happens, nothing of it stays.
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
            new = Path(work) / "new"
            new.mkdir()
            files = {}
            for name, part in parts_of(run).items():
                file = new / f"{name}{ENDINGS[format]}"
                files[file.name] = _write(part, run, file, format)
            record = _record(run, str(where), format, files)
            (new / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            replace_atomically(str(new), str(path), f"{work}/old")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_error_line(error)}.") from error
    return record


def check_free(out: str, overwrite: bool) -> Path:
    """The folder to write, seen to be free.

    Raises:
        UserError: Something is there, unless it is an export and `overwrite` is set.
    """
    if "://" in out:
        raise UserError(
            f"{redact_credentials(out)} is a URI: export to a folder, and copy that there."
        )
    path = Path(out).expanduser().absolute()
    if not path.exists():
        return path
    if not path.is_dir():
        raise UserError(f"{out} is a file: give a folder as --out.")
    there = sorted(file.name for file in path.iterdir())
    foreign = [name for name in there if not OURS.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which is no part of an export: give another --out."
        )
    if there and not overwrite:
        raise UserError(
            f"{out} is there already: give another --out, or --overwrite to replace it."
        )
    return path


def _write(part: Part, run: TrainedModel, file: Path, format: Format) -> dict[str, Any]:
    """Write one file, check it, and say what it takes and gives."""
    examples = {n: _inputs(part, run, n) for n in (2, *CHECKED)}
    shapes = ({0: torch.export.Dim("n", min=1)},) * len(part.takes)
    part.module.eval()
    if format == "onnx":
        _onnx(part, examples[2], shapes, file)
        compute = _onnx_session(file, part)
    else:
        program = torch.export.export(part.module, examples[2], dynamic_shapes=shapes)
        torch.export.save(program, file)
        compute = torch.export.load(file).module()
    largest, expected = 0.0, np.empty(0)
    for n in CHECKED:
        with torch.no_grad():
            found = compute(*examples[n]).numpy()
        expected = np.asarray(part.expected(*examples[n]))
        largest = max(largest, _difference(found, expected, f"{file.name}, for {n} images,"))
    first, *further = (
        _port(name, example) for name, example in zip(part.takes, examples[2], strict=True)
    )
    return {
        "input": first,
        **({"further_inputs": further} if further else {}),
        "output": _port(part.gives, torch.from_numpy(expected)),
        "largest_difference": largest,
    }


def _inputs(part: Part, run: TrainedModel, n: int) -> tuple[Tensor, ...]:
    """Noise, of latent vectors or of pixels, and what else there is to give."""
    random = torch.Generator().manual_seed(n)
    given = {
        "noise": lambda: run.noise(n, seed=n),
        "latents": lambda: run.noise(n, seed=n),
        "chance": lambda: torch.rand(n, generator=random),
        "images": lambda: torch.randint(
            0, 256, (n, *run.shape), dtype=torch.uint8, generator=random
        ),
        "labels": lambda: torch.arange(n) % len(run.classes),
    }
    return tuple(given[name]() for name in part.takes)


def _onnx(part: Part, example: tuple[Tensor, ...], shapes: Any, file: Path) -> None:
    """Write an ONNX file."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    program = torch.onnx.export(
        part.module,
        example,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=OPSET,
        input_names=list(part.takes),
        output_names=[part.gives],
        verbose=False,
    )
    assert program is not None
    program.save(file)


def _onnx_session(file: Path, part: Part) -> Callable[..., Tensor]:
    """What computes an ONNX file, as anybody would who has nothing else."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def compute(*given: Tensor) -> Tensor:
        named = {name: x.numpy() for name, x in zip(part.takes, given, strict=True)}
        return torch.from_numpy(session.run([part.gives], named)[0])

    return compute


def _difference(found: NDArray[Any], expected: NDArray[Any], what: str) -> float:
    """The largest difference, in steps of 255 or relative to the largest number.

    Raises:
        UserError: It is beyond tolerance, or not even the shapes agree.
    """
    pixels = expected.dtype == np.uint8
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise UserError(
            f"{what} gives {found.dtype} {list(found.shape)} where PyTorch gives "
            f"{expected.dtype} {list(expected.shape)}: nothing was written."
        )
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    if not pixels:
        difference /= max(1.0, float(np.abs(expected).max()))
    allowed = 1.0 if pixels else TOLERANCE
    if not difference <= allowed:  # nor is NaN
        raise UserError(
            f"{what} differs from PyTorch by {difference:.2g}, and {allowed:g} is allowed: "
            "nothing was written. Try other versions of torch and onnxruntime."
        )
    return difference


def _port(name: str, example: Tensor) -> dict[str, Any]:
    """An input's or output's name, type and shape."""
    kind = str(example.dtype).removeprefix("torch.")
    return {"name": name, "dtype": kind, "shape": ["n", *example.shape[1:]]}


def _record(
    run: TrainedModel, where: str, format: Format, files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What model.json holds."""
    packages = ("cl-ray", "torch", *NEEDS[format])
    return {
        "run": redact_credentials(where),
        "checkpoint": run.checkpoint,
        "step": run.step,
        "format": format,
        **({"opset": OPSET} if format == "onnx" else {}),
        "images": "uint8 [n, height, width, channels], 0 to 255; "
        + ("RGB" if run.shape[2] == 3 else "grey"),
        "latents": "float32 [n, latent]; for `generate`, "
        + (
            "standard normal noise"
            if run.prior is None
            else "what `sample` gives of standard normal noise and chance even in [0, 1)"
        ),
        **({"classes": list(run.classes)} if run.classes else {}),
        "files": files,
        "config": run.config.model_dump(mode="json"),
        "versions": {package: package_version(package) for package in packages},
    }
