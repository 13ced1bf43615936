"""Export of a run's networks to files that need neither cl_ray nor, as ONNX, PyTorch.

Every file takes or gives images as uint8 [n, H, W, C] for any n: scaling to [-1, 1] and back is
part of it. Free of Ray.
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
from cl_ray.errors import UserError, first_error_line
from cl_ray.model import TrainedModel, load
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.normalize import to_uint8, to_unit
from cl_ray.prior import Prior

ExportFormat = Literal["onnx", "torch"]

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_OPSET = 18
"""Version of the ONNX operators; onnxruntime has it since 1.14 (February 2023)."""
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
"""Packages of each format beyond cl_ray's own: the extra `export`."""
_METADATA_FILE = "model.json"
_EXPORTED = re.compile(r"model\.json|(sample|generate|encode|embed|score)\.(onnx|onnx\.data|pt2)")
"""Names of an export's files; weights of more than 2 GB lie in an onnx.data beside their onnx."""
_CHECKED_BATCHES = (1, 7, 64)
"""Batch sizes for which a file is compared with PyTorch; it is traced with 2."""
_TOLERANCE = 1e-4
"""Largest difference relative to the largest value; of pixels, it is one step of 255."""


@dataclass(frozen=True)
class ExportedFunction:
    """One file of an export; `expected` is the same function of the loaded model."""

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    expected: Callable[..., Any]


class _Function(nn.Module):
    """A function of a network as a module, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Tensor], network: nn.Module):
        super().__init__()
        self.function, self.network = function, network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.network, *inputs)


class _Sampler(nn.Module):
    """The fitted prior as a module, whose buffers are its fields in their order."""

    def __init__(self, prior: Prior):
        super().__init__()
        for name, value in prior._asdict().items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        return Prior(*self.buffers()).transform_noise(*inputs)


def _generate(g: Generator, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    return to_uint8(g.decode(latents, labels=labels))


def _score(d: Discriminator, images: Tensor, labels: Tensor | None = None) -> Tensor:
    return d.scores(d.features(to_unit(images)), labels)


def exported_functions(model: TrainedModel) -> dict[str, ExportedFunction]:
    """Return the functions of an export by the stem of their file.

    `sample` takes unit noise, float32 [n, latent], and uniform numbers in [0, 1), float32 [n], to
    latent vectors, float32 [n, latent]; a model without a fitted prior has none. `generate` takes
    latent vectors to images; `encode` takes images to latent vectors, of mean square 1; `embed`, to
    D's representation, float32 [n, d]; `score`, to D's scores, float32 [n], higher for real. Where
    classes are needed, the last input is their indices, int64 [n].
    """
    g, d, prior = model.generator, model.discriminator, model.prior
    if_classes = ("labels",) if model.classes else ()
    if_projection = ("labels",) if d.is_projection else ()
    encode = _Function(lambda g, images: g.encode(to_unit(images)), g)
    embed = _Function(lambda d, images: d.representation(to_unit(images)), d)
    functions = {
        "generate": ExportedFunction(
            _Function(_generate, g),
            ("latents", *if_classes),
            "images",
            lambda latents, labels=None: model.decode(latents, labels=labels),
        ),
        "encode": ExportedFunction(encode, ("images",), "latents", model.encode),
        "embed": ExportedFunction(embed, ("images",), "embeddings", model.embed),
        "score": ExportedFunction(
            _Function(_score, d), ("images", *if_projection), "scores", model.score
        ),
    }
    if prior is None:
        return functions
    inputs = ("noise", "uniform", *(("labels",) if model.classes else ()))
    sample = ExportedFunction(_Sampler(prior), inputs, "latents", prior.transform_noise)
    return {"sample": sample, **functions}


def export(
    run: str | Path,
    out: str | Path,
    format: ExportFormat = "onnx",
    checkpoint: str = "last",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export the EMA generator and D of a run, each file compared with PyTorch.

    Writes the files of `exported_functions` and their description, model.json. The folder appears
    in one rename.

    Args:
        run: Path or URI of the run folder.
        out: Folder to write.
        format: `onnx`, or `torch`, programs of torch.export.
        checkpoint: `last`, `best` or a checkpoint's name.
        overwrite: Replace the export at `out`.

    Returns:
        The content of model.json.

    Raises:
        UserError: A package is missing, `out` exists or cannot be written, there is no such run or
            checkpoint, or a file computes something else than PyTorch.
    """
    if format not in _SUFFIXES:
        raise UserError(f"format {format!r} is unknown; there are: {', '.join(_SUFFIXES)}.")
    missing = [package for package in _PACKAGES[format] if find_spec(package) is None]
    if missing:
        raise UserError(
            f"--format {format} needs {', '.join(missing)}: `pip install {' '.join(missing)}`."
        )
    path = _check_free(str(out), overwrite)
    model = load(run, checkpoint, device="cpu")
    for network in (model.generator, model.discriminator):
        network.to(memory_format=torch.contiguous_format)  # as in the files
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, so on the same disk; removed whatever happens.
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
            new = Path(work) / "new"
            new.mkdir()
            files = {}
            for stem, function in exported_functions(model).items():
                file = new / f"{stem}{_SUFFIXES[format]}"
                files[file.name] = _write(function, model, file, format)
            metadata = _metadata(model, str(run), format, files)
            (new / _METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n")
            replace_atomically(str(new), str(path), f"{work}/old")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_error_line(error)}.") from error
    return metadata


def _check_free(out: str, overwrite: bool) -> Path:
    """Return the folder to write; raise if it holds anything but an export to overwrite."""
    if "://" in out:
        raise UserError(f"{out} is a URI: export to a folder, and copy that there.")
    path = Path(out).expanduser().resolve()
    if not path.exists():
        return path
    if not path.is_dir():
        raise UserError(f"{out} is a file: give a folder as --out.")
    names = sorted(file.name for file in path.iterdir())
    foreign = [name for name in names if not _EXPORTED.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which is not part of an export: give another --out."
        )
    if names and not overwrite:
        raise UserError(f"{out} already exists: give another --out, or --overwrite to replace it.")
    return path


def _write(
    function: ExportedFunction, model: TrainedModel, file: Path, format: ExportFormat
) -> dict[str, Any]:
    """Write one file, compare it with PyTorch, and return its description in model.json."""
    examples = {n: _example_inputs(function, model, n) for n in (2, *_CHECKED_BATCHES)}
    shapes = (({0: torch.export.Dim("n", min=1)},) * len(function.inputs),)
    function.module.eval()
    if format == "onnx":
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            function.module,
            examples[2],
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            input_names=list(function.inputs),
            output_names=[function.output],
            verbose=False,
        )
        assert program is not None
        program.save(file)
        compute = _onnx_session(function, file)
    else:
        exported = torch.export.export(function.module, examples[2], dynamic_shapes=shapes)
        torch.export.save(exported, file)
        compute = torch.export.load(file).module()
    largest, expected = 0.0, np.empty(0)
    for n in _CHECKED_BATCHES:
        with torch.no_grad():
            found = compute(*examples[n]).numpy()
        expected = np.asarray(function.expected(*examples[n]))
        difference = _check_equal(found, expected, f"{file.name}, for {n} images,")
        largest = max(largest, difference)
    named = zip(function.inputs, examples[2], strict=True)
    first, *further = (_describe(name, example) for name, example in named)
    return {
        "input": first,
        **({"further_inputs": further} if further else {}),
        "output": _describe(function.output, torch.from_numpy(expected)),
        "largest_difference": largest,
    }


def _example_inputs(function: ExportedFunction, model: TrainedModel, n: int) -> tuple[Tensor, ...]:
    """Draw random inputs for n images."""
    random = torch.Generator().manual_seed(n)
    sample: dict[str, Callable[[], Tensor]] = {
        "noise": lambda: model.noise(n, seed=n),
        "latents": lambda: model.noise(n, seed=n),
        "uniform": lambda: torch.rand(n, generator=random),
        "images": lambda: torch.randint(
            0, 256, (n, *model.shape), dtype=torch.uint8, generator=random
        ),
        "labels": lambda: torch.arange(n) % len(model.classes),
    }
    return tuple(sample[name]() for name in function.inputs)


def _onnx_session(function: ExportedFunction, file: Path) -> Callable[..., Tensor]:
    """Load an ONNX file with onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def compute(*inputs: Tensor) -> Tensor:
        named = {name: x.numpy() for name, x in zip(function.inputs, inputs, strict=True)}
        return torch.from_numpy(session.run([function.output], named)[0])

    return compute


def _check_equal(found: NDArray[Any], expected: NDArray[Any], what: str) -> float:
    """Return the largest difference, in steps of 255 or relative; raise beyond tolerance."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise UserError(
            f"{what} gives {found.dtype} {list(found.shape)} where PyTorch gives "
            f"{expected.dtype} {list(expected.shape)}: nothing was written."
        )
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    tolerance = 1.0
    if expected.dtype != np.uint8:
        difference /= max(1.0, float(np.abs(expected).max()))
        tolerance = _TOLERANCE
    if not difference <= tolerance:  # NaN fails, too
        raise UserError(
            f"{what} differs from PyTorch by {difference:.2g}, and {tolerance:g} is allowed: "
            "nothing was written. Try other versions of torch and onnxruntime."
        )
    return difference


def _describe(name: str, example: Tensor) -> dict[str, Any]:
    """Return an input's or output's name, type and shape."""
    dtype = str(example.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": ["n", *example.shape[1:]]}


def _metadata(
    model: TrainedModel, run: str, format: ExportFormat, files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of model.json."""
    latents = "standard normal noise"
    if model.prior is not None:
        latents = "what `sample` gives for standard normal noise and uniform numbers in [0, 1)"
    packages = ("cl-ray", "torch", *_PACKAGES[format])
    return {
        "run": run,
        "checkpoint": model.checkpoint,
        "step": model.step,
        "format": format,
        **({"opset": _OPSET} if format == "onnx" else {}),
        "images": "uint8 [n, height, width, channels], 0 to 255; "
        + ("RGB" if model.shape[2] == 3 else "grey"),
        "latents": f"float32 [n, latent]; for `generate`, {latents}",
        **({"classes": list(model.classes)} if model.classes else {}),
        "files": files,
        "config": model.config.model_dump(mode="json"),
        "versions": {package: package_version(package) for package in packages},
    }
