"""An export computes what the run computes, and is there whole or not at all."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.datasets import write_images
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run
from numpy.typing import NDArray

import cl_ray
import cl_ray.export
from cl_ray import cli
from cl_ray.config import Config
from cl_ray.networks.normalize import to_unit

SMALL = {"depth": 3, "width": 4}
FILES = {
    "sample": ("noise", "uniform", "latents"),
    "generate": ("latents", "images"),
    "encode": ("images", "latents"),
    "embed": ("images", "embeddings"),
    "score": ("images", "scores"),
}
SHAPES = {"grey": (28, 28, 1), "colour": (33, 33, 3)}


@pytest.fixture(scope="module")
def runs(make_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one epoch each: grey digits, and colour images of an odd size."""
    folder = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (70, *SHAPES["colour"]), dtype=np.uint8)
    data = {
        "grey": make_digits(100),
        "colour": write_images(folder / "colour", train=(colour, [None] * 70)),
    }
    folders = {}
    for name in data:
        networks: dict[str, Any] = {"generator": SMALL, "discriminator": SMALL}
        if name == "colour":  # with layers that ONNX has no operators for
            networks["generator"] |= {"family": "style"}
            wide = {"depth": 1, "width": 32}  # features are averaged over windows of 3 of 16 cells
            networks["discriminator"] = {**wide, "spectral_norm": True}
        trainer = trained_run(data[name], **networks)
        folders[name] = save_run(trainer, folder / name, step=4)
    return folders


def open_onnx(folder: Path, name: str) -> Callable[..., NDArray[Any]]:
    file = str(folder / f"{name}.onnx")
    onnx.checker.check_model(file, full_check=True)
    opsets = {opset.domain: opset.version for opset in onnx.load(file).opset_import}
    assert opsets[""] == 18
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    takes, (gives,) = session.get_inputs(), session.get_outputs()
    names = [port.name for port in takes]
    assert (*names, gives.name) == FILES[name]
    for port in (*takes, gives):
        assert port.shape[0] == "n"
        assert port.type == ("tensor(uint8)" if port.name == "images" else "tensor(float)")
    about = json.loads((folder / "model.json").read_text())["files"][f"{name}.onnx"]
    said = [about["input"], *about.get("further_inputs", []), about["output"]]
    assert [port["shape"] for port in said] == [port.shape for port in (*takes, gives)]
    return lambda *given: session.run(None, dict(zip(names, given, strict=True)))[0]


def open_torch(folder: Path, name: str) -> Callable[..., NDArray[Any]]:
    module = torch.export.load(folder / f"{name}.pt2").module()
    return lambda *given: module(*map(torch.from_numpy, given)).numpy()


@pytest.mark.parametrize(
    ("kind", "form"), [("grey", "onnx"), ("colour", "onnx"), ("colour", "torch")]
)
def test_the_files_compute_what_the_run_does(
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    form: str,
) -> None:
    out = tmp_path / "deep" / "model"
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["export", str(runs[kind]), f"--out={out}", f"--format={form}"])
    printed = capsys.readouterr().out
    loaded, shape = cl_ray.load(runs[kind]), SHAPES[kind]
    ending = {"onnx": "onnx", "torch": "pt2"}[form]
    assert {file.name for file in out.iterdir()} == {f"{n}.{ending}" for n in FILES} | {
        "model.json"
    }
    assert [file.name for file in out.parent.iterdir()] == ["model"]
    compute = {name: {"onnx": open_onnx, "torch": open_torch}[form](out, name) for name in FILES}
    random = np.random.default_rng(1)
    for n in (1, 2, 9, 130):
        prior = loaded.prior
        assert prior is not None
        noise, uniform = loaded.noise(n, seed=4).numpy(), random.random(n, np.float32)
        code = prior.codes.numpy()[np.floor(uniform.astype(float) * len(prior.codes)).astype(int)]
        there = code + noise @ prior.scale_tril.numpy().T
        assert np.allclose(compute["sample"](noise, uniform), there, atol=1e-5)
        latents = loaded.latents(n, seed=3).numpy()
        pixels = compute["generate"](latents)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (n, *shape)
        assert np.abs(pixels.astype(int) - loaded.generate(n, seed=3)).max() <= 1
        images = random.integers(0, 256, (n, *shape), dtype=np.uint8)
        for name, expected in {
            "encode": loaded.encode(images).numpy(),
            "embed": loaded.embed(images),
            "score": loaded.score(images),
        }.items():
            assert compute[name](images).shape == expected.shape
            assert np.allclose(compute[name](images), expected, rtol=1e-3, atol=1e-4), name

    record = json.loads((out / "model.json").read_text())
    assert (record["checkpoint"], record["step"], record["format"]) == ("step-00000004", 4, form)
    assert Config.model_validate(record["config"]) == loaded.config
    assert record["versions"]["torch"] == version("torch")
    for name, about in record["files"].items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert f"{about['largest_difference']:.2g} of" in line
        assert about["largest_difference"] <= 1


def test_an_export_is_replaced_only_when_asked_and_nothing_else_ever(
    capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    run, out = str(runs["grey"]), tmp_path / "model"
    arguments = (run, f"--out={out}", "--format=torch")
    cli.main(["export", *arguments])
    first = (out / "model.json").read_bytes()
    assert refused(capsys, "export", *arguments) == (
        f"{out} already exists: give another --out, or --overwrite to replace it."
    )
    cli.main(["export", str(runs["colour"]), *arguments[1:], "--overwrite"])
    assert (out / "model.json").read_bytes() != first

    (out / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert refused(capsys, "export", *arguments, "--overwrite") == (
        f"{out} holds notes.txt, which is not part of an export: give another --out."
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").touch()
    assert refused(capsys, "export", run, f"--out={tmp_path}/file", "--overwrite") == (
        f"{tmp_path}/file is a file: give a folder as --out."
    )
    assert "s3://bucket/model is a URI" in refused(capsys, "export", run, "--out=s3://bucket/model")


def test_files_that_compute_something_else_are_refused(
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cl_ray.export, "to_unit", lambda images: 1.01 * to_unit(images))
    message = refused(capsys, "export", runs["grey"], f"--out={tmp_path}/model", "--format=torch")
    assert message.startswith("encode.pt2, for 1 images, differs from PyTorch by 0.0")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_named_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, run = f"--out={tmp_path}/model", str(runs["grey"])
    said = refused(capsys, "export", run, out, "--checkpoint=step-00000005")
    assert "there are: step-00000004" in said
    with pytest.raises(SystemExit) as end:
        cli.main(["export", run, out, "--format=tflite"])
    assert end.value.code == 2
    assert "tflite" in capsys.readouterr().err
    with pytest.raises(cl_ray.UserError, match="format 'tflite' is unknown; there are: onnx, "):
        cl_ray.export.export(run, tmp_path / "model", "tflite")  # type: ignore[arg-type]
    monkeypatch.setattr(cl_ray.export, "_PACKAGES", {"onnx": ("onnx", "no_such_runtime")})
    assert refused(capsys, "export", run, out) == (
        "--format onnx needs no_such_runtime: `pip install no_such_runtime`."
    )
    assert list(tmp_path.iterdir()) == []
