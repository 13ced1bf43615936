"""`cl-ray generate` and `cl-ray embed`: interrupted, killed, resumed, and with wrong arguments."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from helpers.datasets import mnist, write_images
from helpers.random_images import METADATA, pixels, raw_images
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run
from PIL import Image

import cl_ray
from cl_ray import cli
from cl_ray.commands.generate import IN_PROCESS_ROWS
from cl_ray.data.writer import write_splits
from cl_ray.inference.output import OutputFolder
from cl_ray.inference.tasks import GenerateTask

COUNT = 8 * 4096


def test_mistakes_are_named_before_ray_starts(
    capsys: pytest.CaptureFixture[str], trained: Path, some_digits: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    embed = ["embed", str(trained), f"--out={out}"]
    generate = ["generate", str(trained), f"--out={out}"]
    score = ["score", str(trained), f"--out={out}"]
    around = [*generate, f"--around={some_digits}"]
    other, folder = tmp_path / "other", tmp_path / "folder"
    write_splits({"train": raw_images(pixels(20, 32, 32, 1))}, str(other), METADATA)
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for arguments, expected in (
        ([*generate, "--count=0"], "count 0 is refused"),
        ([*generate, "--count=-3"], "count -3 is refused"),
        ([*generate, "--copies=2"], "copies 2 needs --around DATA"),
        ([*generate, f"--around={other}"], "expects 28x28x1"),
        ([*generate, "--checkpoint=step-00000003"], "there are: step-00000002"),
        ([*generate, "--truncation=0.5"], "truncation 0.5 is for a style-based generator"),
        ([*around, "--count=5"], "count 5 cannot be combined with --around: --copies says"),
        ([*around, "--class=5"], "class 5 cannot be combined with --around"),
        ([*around, "--truncation=0.5"], "truncation 0.5 cannot be combined with --around"),
        ([*around, "--copies=0"], "copies 0 is refused"),
        ([*embed, "--split=tset"], "has no split tset: it has train, validation, test"),
        ([*embed, f"--data={tmp_path}/none"], f"{tmp_path}/none is not a folder"),
        ([*embed, f"--data={other}", "--split=train"], "images of 32x32x1 and"),
        (["embed", str(trained), f"--out={tmp_path}/digits"], "must end in .parquet"),
        (["embed", str(tmp_path), f"--out={out}"], "is not a run folder"),
        ([*score, f"--data={other}", "--split=train"], "images of 32x32x1 and"),
        ([*score, "--data=mnist", f"--known={other}"], f"{other} has images of 32x32x1 and"),
        ([*score, "--data=mnist", "--split=tset"], "has no split tset"),
        (["score", str(trained), "--data=mnist", f"--out={tmp_path}/s"], "must end in .parquet"),
        (["generate", str(trained), f"--out={folder}", "--overwrite"], "holds thesis.txt"),
    ):
        assert expected in refused(capsys, *arguments)
    assert not ray.is_initialized()
    assert not out.exists()


def arguments(run: Path, out: Path, count: int = COUNT) -> list[str]:
    return ["generate", str(run), f"--count={count}", "--seed=5", "--out", str(out)]


def finished_parts(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "_parts").glob("[0-9]" * 6))


def start(run: Path, out: Path, parts: int, count: int = COUNT) -> subprocess.Popen[str]:
    """Start the command and wait until so many parts are finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_ray", *arguments(run, out, count)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    while process.poll() is None and len(finished_parts(out)) < parts:
        time.sleep(0.02)
    return process


def test_few_images_are_made_without_ray(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digits"
    process = start(trained, out, parts=1, count=IN_PROCESS_ROWS)
    process.send_signal(signal.SIGTERM)
    printed, message = process.communicate(timeout=300)
    assert process.returncode == 130, printed + message
    assert "in this process, without Ray" in printed
    assert f"of {IN_PROCESS_ROWS:,} images are in {out}, and the same command resumes." in message
    assert 1 <= len(finished_parts(out)) < 5

    cli.main(arguments(trained, out, IN_PROCESS_ROWS))
    assert "Resuming: " in capsys.readouterr().out
    assert not ray.is_initialized()
    expected = cl_ray.load(trained).generate(8200, seed=5)
    for number in (0, 4095, 4096, 8199):
        image = np.asarray(Image.open(out / f"{number:08d}.png"))
        assert np.abs(image.astype(int) - expected[number, ..., 0]).max() <= 1


def test_the_most_novel_images_are_listed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    make_digits: Any,
    tmp_path: Path,
) -> None:
    images = np.concatenate([mnist("test", 60)[0], pixels(2, 28, 28, 1)])
    data = write_images(tmp_path / "mixed", test=(images, [None] * 62), train=(images, [None] * 62))
    out = tmp_path / "scores.parquet"
    asked = ["score", str(trained), f"--data={data}", f"--out={out}", "--top=2"]
    load, loaded = cl_ray.load, list[str]()

    def count(run: str, *arguments: str) -> cl_ray.TrainedModel:
        loaded.append(run)
        return load(run, *arguments)

    monkeypatch.setattr("cl_ray.model.load", count)
    cli.main(asked)
    assert len(loaded) == 1
    printed = capsys.readouterr().out
    assert "compared with 51 of 64 training images" in printed
    assert "it has no split validation" in printed
    assert "62 scores are in" in printed
    assert not ray.is_initialized()
    table = printed.partition("The 2 most novel images")[2]
    assert re.findall(r"│ (\d+) ", table) in (["60", "61"], ["61", "60"])
    cli.main(asked)
    printed = capsys.readouterr().out
    assert f"62 scores are in {out} already" in printed
    assert printed.endswith(table)
    (out / "part-000000.parquet").unlink()  # to be made again
    cli.main(asked)
    printed = capsys.readouterr().out
    assert f"62 scores are in {out}, a folder" in printed
    assert printed.endswith(table)
    assert not (out / "_parts").exists()

    picture = out / "_most_novel.png"
    assert f"62 of them, the most novel first: {picture}" in printed
    sheet = np.asarray(Image.open(picture))[..., 0]
    assert sheet.shape == (7 * 30 - 2, 10 * 30 - 2)
    shown = [sheet[:28, :28], sheet[:28, 30:58]]
    assert {x.tobytes() for x in shown} == {x.tobytes() for x in images[60:]}
    assert pq.read_table(out).num_rows == 62
    cli.main([*asked, f"--known={data}", "--overwrite", "--top=0"])
    assert not picture.exists()


@pytest.mark.ray
def test_interrupted_and_killed_it_resumes(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, two_cpus: None
) -> None:
    out = tmp_path / "digits"
    process = start(trained, out, parts=1)
    process.send_signal(signal.SIGINT)
    printed, message = process.communicate(timeout=300)
    assert process.returncode == 130, printed + message
    assert f"of {COUNT:,} images are in {out}, and the same command resumes." in message
    assert "2 actors" in printed or "1 actor," in printed
    first = finished_parts(out)
    assert 1 <= len(first) < 8

    process = start(trained, out, parts=len(first) + 1)
    actors = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=300)
    psutil.wait_procs(actors, timeout=300)  # they end a moment later
    second = finished_parts(out)
    assert len(first) < len(second) < 8
    times = {
        p: p.stat().st_mtime_ns for p in out.glob("*.png") if f"{int(p.stem) // 4096:06d}" in second
    }
    assert len(times) == 4096 * len(second)

    cli.main(arguments(trained, out))  # on the Ray of this process
    printed = capsys.readouterr().out
    assert f"Resuming: {4096 * len(second):,} of {COUNT:,} images are in {out}." in printed
    assert f"{COUNT:,} images are in {out}, as PNG:" in printed
    assert "images/s" in printed
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert json.loads((out / "_manifest.json").read_text())["complete"]

    cli.main(arguments(trained, out))
    assert f"{COUNT:,} images are in {out} already, as PNG." in capsys.readouterr().out
    assert len(list(out.iterdir())) == COUNT + 1
    model, task = cl_ray.load(trained), GenerateTask(COUNT, seed=5)
    last = (part for part in range(8) if f"{part:06d}" not in second)
    for part in (int(first[0]), int(min(set(second) - set(first))), next(last)):
        table = task.compute(model, 4096 * part, 4096 * (part + 1))
        files = OutputFolder.resolve(str(out)).part_files(part, table, None)
        assert all((out / name).read_bytes() == content for name, content in files[:-1])


@pytest.mark.ray
def test_embeddings_variants_and_truncated_samples(
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    some_digits: str,
    make_digits: Any,
    tmp_path: Path,
    two_cpus: None,
) -> None:
    out = tmp_path / "train.parquet"
    cli.main(["embed", str(trained), f"--data={some_digits}", "--split=train", f"--out={out}"])
    printed = capsys.readouterr().out
    assert f"2,040 embeddings are in {out}, a folder of Parquet files that reads as one" in printed
    assert pq.read_table(out).column_names == ["id", "label", "embedding"]

    variants = tmp_path / "variants.parquet"
    cli.main(["generate", str(trained), f"--around={some_digits}", f"--out={variants}"])
    table = pq.read_table(variants)
    assert table.column_names == ["id", "label", "source", "image"]
    assert table["label"].to_pylist() == pq.read_table(out)["label"].to_pylist()
    capsys.readouterr()
    cli.main(["data", f"--source={variants}", f"--out={tmp_path}/augmented"])  # trainable data
    assert "2,040 images" in capsys.readouterr().out

    style = {"family": "style", "depth": 2, "width": 4}
    run = trained_run(make_digits(64), generator=style, discriminator=style)
    folder = save_run(run, tmp_path / "style", step=2)
    truncated = tmp_path / "truncated.parquet"
    flags = ["--count=60", "--seed=4", "--truncation=0.3", "--actors=1"]
    cli.main(["generate", str(folder), *flags, f"--out={truncated}"])
    model = cl_ray.load(folder)
    found = pq.read_table(truncated)["image"].combine_chunks().to_numpy_ndarray().astype(int)
    expected = model.generate(60, seed=4, truncation=0.3)
    assert np.abs(found - expected).max() <= 1
    assert 0 < found.std(0).mean() < model.generate(60, seed=4).std(0).mean()
