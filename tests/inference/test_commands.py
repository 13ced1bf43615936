"""`cl-ray generate` and `cl-ray embed`, as they are typed, stopped and mistyped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch

from cl_ray import cli
from cl_ray.checkpoint import CheckpointStore
from cl_ray.commands.embed import EmbedCommand
from cl_ray.commands.generate import GenerateCommand
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.storage import RunStorage

COUNT = 8 * 4096


def complains(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that a mistake ends says, in one line, and without Ray."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert ended.value.code == 1
    assert not ray.is_initialized()
    said = capsys.readouterr().err
    assert said.startswith("cl-ray: ")
    assert said.count("\n") == 1
    return said


def test_mistakes_are_named_before_ray_starts(
    capsys: pytest.CaptureFixture[str], trained: Path, some_digits: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    embed = ["embed", trained, f"--out={out}"]
    generate = ["generate", trained, f"--out={out}"]
    for count in ("0", "-3"):
        assert f"count {count} is refused" in complains(capsys, *generate, f"--count={count}")
    assert "count 5 is of no use with --around" in complains(
        capsys, *generate, "--count=5", f"--around={some_digits}"
    )
    assert "copies 2 is of no use without --around" in complains(capsys, *generate, "--copies=2")
    assert "copies 0 is refused" in complains(
        capsys, *generate, f"--around={some_digits}", "--copies=0"
    )
    assert "has no split tset: it has train, test" in complains(capsys, *embed, "--split=tset")
    assert f"{tmp_path}/none is not a folder" in complains(
        capsys, *embed, f"--data={tmp_path}/none"
    )
    assert "must end in .parquet" in complains(capsys, "embed", trained, f"--out={tmp_path}/digits")
    assert "is not a run folder" in complains(capsys, "embed", tmp_path, f"--out={out}")
    assert "there are: step-00000002" in complains(capsys, *generate, "--checkpoint=step-00000003")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "holds thesis.txt" in complains(
        capsys, "generate", trained, f"--out={tmp_path}/full", "--overwrite"
    )
    rows = torch.randint(0, 255, (20, 32, 32, 1), dtype=torch.uint8).numpy()
    other = str(tmp_path / "other")
    write_splits(
        {"train": [RawImage(i, None, "image") for i in rows]},
        other,
        DatasetMetadata("other", "here"),
    )
    assert "images of 32x32x1 and" in complains(capsys, *embed, f"--data={other}", "--split=train")
    assert "makes 28x28x1" in complains(capsys, *generate, f"--around={other}")
    assert not out.exists()


def test_runs_of_no_use_are_named(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    def another(name: str, text: str) -> CheckpointStore:
        folder = RunStorage.at(str(tmp_path), name)
        folder.write("config.yaml", text.encode())
        return CheckpointStore(*folder.open())

    def said(name: str) -> str:
        out = tmp_path / "out"
        message = complains(capsys, "generate", tmp_path / name, f"--out={out}")
        assert not out.exists()
        return message

    text = (trained / "config.yaml").read_text()
    another("young", text)
    assert "no checkpoint yet" in said("young")
    state = CheckpointStore(*RunStorage.at(str(trained.parent), trained.name).open()).load(
        "step-00000002"
    )
    foreign = {**state, "config": text + "colour: blue\n"}
    another("foreign", text).save(foreign, epoch=1, step=2, figure=None)
    assert "colour" in said("foreign")
    weights = state["gan"]["ema_generator"]
    state["gan"]["ema_generator"] = {k: w * float("nan") for k, w in weights.items()}
    another("broken", text).save(state, epoch=1, step=2, figure=None)
    assert "not all numbers" in said("broken")


def flags(run: Path, out: Path) -> list[str]:
    return ["generate", str(run), "--count", str(COUNT), "--seed=5", "--out", str(out)]


def started(run: Path, out: Path, parts: int) -> subprocess.Popen[str]:
    """The command, as soon as so many parts are there."""
    command = [sys.executable, "-m", "cl_ray", *flags(run, out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    while process.poll() is None and len(marks(out)) < parts:
        time.sleep(0.02)
    return process


def marks(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "_parts").glob("[0-9]" * 6))


def test_stopped_and_killed_it_goes_on(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, local_ray: None
) -> None:
    out = tmp_path / "digits"
    process = started(trained, out, parts=1)
    process.send_signal(signal.SIGINT)
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 130, printed + complaint
    assert f"of {COUNT:,} images are in {out}, and the same command goes on." in complaint
    assert "2 actors" in printed or "1 actor," in printed
    first = marks(out)
    assert 1 <= len(first) < 8
    times = {p: p.stat().st_mtime_ns for p in (out / "_parts").iterdir() if p.name in first}

    process = started(trained, out, parts=len(first) + 1)
    process.kill()
    process.communicate(timeout=120)
    second: list[str] = []
    while second != marks(out):  # its actors end a moment after it
        second = marks(out)
        time.sleep(1)
    assert len(first) < len(second) < 8
    finished = [int(p.stem) // 4096 for p in out.glob("*.png")]
    times |= {
        p: p.stat().st_mtime_ns for p in out.glob("*.png") if f"{int(p.stem) // 4096:06d}" in second
    }
    assert len(finished) >= 4096 * len(second)

    cli.main(flags(trained, out))  # on the Ray that runs in this process
    printed = capsys.readouterr().out
    assert f"{4096 * len(second):,} of {COUNT:,} images are in {out} already" in printed
    assert f"{COUNT:,} images are in {out}, as PNG files:" in printed
    assert "images/s" in printed
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.suffix == ".png")
    assert json.loads((out / "_made.json").read_text())["complete"]

    cli.main(flags(trained, out))
    assert f"are in {out}, as PNG files already." in capsys.readouterr().out
    cli.main(flags(trained, tmp_path / "at once"))
    ours, theirs = (
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (out, tmp_path / "at once")
    )
    assert len(ours) == COUNT + 1
    assert ours == theirs


def test_embeddings_and_variants_of_a_data_set(
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    some_digits: str,
    tmp_path: Path,
    local_ray: None,
) -> None:
    out = tmp_path / "train.parquet"
    cli.main(["embed", str(trained), f"--data={some_digits}", "--split=train", f"--out={out}"])
    printed = capsys.readouterr().out
    assert f"2,040 embeddings are in {out}, a folder of Parquet files that reads as one" in printed
    assert pq.read_table(out).column_names == ["id", "label", "embedding"]

    more = tmp_path / "more.parquet"
    cli.main(["generate", str(trained), f"--around={some_digits}", f"--out={more}"])
    table = pq.read_table(more)
    assert table.column_names == ["id", "label", "source", "image"]
    assert table["label"].to_pylist() == pq.read_table(out)["label"].to_pylist()
    capsys.readouterr()
    cli.main(["data", f"--source={more}", f"--out={tmp_path}/augmented"])  # it can be trained on
    assert "2,040 images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [GenerateCommand, EmbedCommand])
def test_help_names_every_flag(capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    verb = "embed" if kind is EmbedCommand else "generate"
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name, field in kind.model_fields.items():
        assert field.description
        flag = {"label": "class"}.get(name, name).replace("_", "-")
        assert name == "run" or f"--{flag}" in printed
