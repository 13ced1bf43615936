"""Labels from the shards through the run to images of a class, as users ask for them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from helpers.datasets import labels_of, mnist, write_images
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run
from helpers.small_run import SMALL_RUN
from PIL import Image

import cl_ray
from cl_ray.cli import main
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.evaluation.reference import ReferenceClassifier
from cl_ray.model import TrainedModel

CONDITIONS = ["classifier", "projection"]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)


@pytest.fixture(scope="module", params=CONDITIONS)
def folder(request: Any, digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    # So few latent dimensions that the codes of most classes have a density.
    few = {"depth": 2, "width": 4, "latent": 2}
    run = trained_run(digits, condition=request.param, generator=few)
    return save_run(run, tmp_path_factory.mktemp("runs"), step=10)


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedModel:
    return cl_ray.load(folder)


def test_labels_without_names_are_counted_from_the_files(tmp_path: Path) -> None:
    five = write_images(tmp_path / "five", train=(NOISE, [0, 4] * 20))
    assert Dataset.open(five).class_names() == list("01234")
    far = write_images(tmp_path / "far", train=(NOISE, [0, 10_000] * 20))
    with pytest.raises(UserError, match=r"labels of .*far are 0 to 10000; .* write the dataset"):
        Dataset.open(far).class_names()


def test_data_without_labels_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_images(tmp_path / "noise", train=(NOISE, [None] * 40))
    flags = [f"--data={data}", f"--storage={tmp_path}/runs", "--condition=classifier"]
    assert "condition `classifier` needs labels" in refused(capsys, "train", *flags)
    assert not (tmp_path / "runs").exists()


def test_a_class_is_asked_for_by_name_or_number(run: TrainedModel) -> None:
    kinds = np.full(20, 7)
    noise = run.latents(20, seed=1, labels=kinds)
    assert not torch.equal(noise, run.latents(20, seed=1, labels=kinds - 1))
    sevens = run.decode(noise, labels=kinds)
    assert np.array_equal(run.generate(20, seed=1, label=7), sevens)
    assert np.array_equal(run.generate(20, seed=1, label="7"), sevens)
    assert not np.array_equal(run.generate(20, seed=1, label=6), sevens)
    with pytest.raises(UserError, match=r"class 'cat' is unknown; the run has: 0, 1, .*9"):
        run.generate(20, label="cat")
    ten = replace(run, classes=("1", "0", *run.classes[2:]))
    assert (ten.class_index(1), ten.class_index("1"), ten.class_index("0")) == (1, 0, 1)
    with pytest.raises(UserError, match="give 20 labels, one an image, not none"):
        run.decode(noise)
    with pytest.raises(UserError, match="give 20 labels, one an image, not 3"):
        run.decode(noise, labels=np.arange(3))
    with pytest.raises(UserError, match="labels are 0 to 10; this run's classes are 0 to 9"):
        run.decode(noise, labels=np.arange(3, 23) % 11)


def test_images_are_rebuilt_and_scored_as_of_their_class(run: TrainedModel, digits: str) -> None:
    rows = Dataset.open(digits).read("train")
    ours = run.reconstruct(rows.image, labels_of(rows))
    assert np.array_equal(ours, run.decode(run.encode(rows.image), labels=labels_of(rows)))
    wrong = (labels_of(rows) + 1) % 10
    assert not np.array_equal(ours, run.reconstruct(rows.image, wrong))
    told, mistaken = run.score(rows.image, labels_of(rows)), run.score(rows.image, wrong)
    with pytest.raises(UserError, match="give 300 labels, one an image, not 5"):
        run.score(rows.image, labels_of(rows)[:5])
    if run.config.condition == "projection":
        assert not np.allclose(told, mistaken, atol=1e-3)
        for ask in (run.classify, run.reconstruct):
            with pytest.raises(UserError, match=r"D predicts no classes \(condition projection\)"):
                ask(rows.image)
        with pytest.raises(UserError, match="give 300 labels, one an image, not none"):
            run.score(rows.image)
    else:
        assert np.array_equal(told, mistaken)
        assert np.array_equal(told, run.score(rows.image))
        taken = run.classify(rows.image)
        head = run.discriminator.class_head
        assert head is not None
        with torch.no_grad():
            x = torch.from_numpy(rows.image).permute(0, 3, 1, 2) / 127.5 - 1
            named = run.discriminator.features(x) @ head.weight.T + head.bias
        assert np.array_equal(taken, named.argmax(1).numpy())
        assert np.array_equal(run.reconstruct(rows.image), run.reconstruct(rows.image, taken))


def test_labels_of_other_classes_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "animals", ["cat", "dog"], train=(NOISE, [0, 1] * 20))
    write_images(tmp_path / "bare", train=(NOISE, [None] * 40))
    around = ["generate", folder, f"--out={tmp_path}/out", f"--around={tmp_path}/animals"]
    for command in (around, ["evaluate", folder, f"--data={tmp_path}/animals"]):
        said = refused(capsys, *command)
        assert "animals (cat, dog) are not those that this run was trained with (0, 1, 2" in said
    if cl_ray.load(folder).config.condition == "projection":
        said = refused(capsys, "evaluate", folder, f"--data={tmp_path}/bare")
        assert "decodes images by their labels, and the split train of" in said
        said = refused(capsys, *around[:-1], f"--around={tmp_path}/bare")
        assert "40 of the 40 images of the split train of" in said
        assert "bare have no label, and this run generates images of a given class" in said
    assert not (tmp_path / "out").exists()


def test_how_many_samples_are_of_their_class_is_measured(run: TrainedModel, digits: str) -> None:
    dataset = Dataset.open(digits)
    train = dataset.read("train")

    class Sorter(TrainedModel):
        """Gives real images of the classes asked for, every fourth of another class."""

        def decode(self, latents: Any, truncation: float = 1.0, labels: Any = None) -> Any:
            kinds = labels.copy()
            kinds[::4] = (kinds[::4] + 5) % 10
            places = [np.flatnonzero(labels_of(train) == kind) for kind in kinds]
            return train.image[[place[i % len(place)] for i, place in enumerate(places)]]

    asked: list[int] = []

    class Listener(TrainedModel):
        """Notes which classes it is asked for."""

        def decode(self, latents: Any, truncation: float = 1.0, labels: Any = None) -> Any:
            if not asked:
                asked.extend(labels.tolist())
            return super().decode(latents, truncation, labels)

    measured = EvaluationConfig(reference="mnist", samples=100, images=200)
    honest = Evaluator(dataset, measured).evaluate(Listener(**vars(run))).fidelity
    sorted_ones = Evaluator(dataset, measured).evaluate(Sorter(**vars(run))).fidelity
    assert honest is not None
    assert sorted_ones is not None
    figure = sorted_ones.metrics["class_accuracy"]
    assert figure.value == pytest.approx(0.75, abs=0.03)
    assert figure.real_baseline > 0.95
    test = Evaluator(dataset, measured).images()[1]
    assert sorted(labels_of(test)) == sorted(asked)  # as often as among the real images
    samples = run.decode(run.latents(100, 0, labels=np.array(asked)), labels=np.array(asked))
    reference = ReferenceClassifier.load("mnist")
    right = (reference.labels(reference.features(samples)) == asked).mean()
    assert honest.metrics["class_accuracy"].value == pytest.approx(right)


def test_generate_makes_one_class_or_sorts_them_into_folders(
    folder: Path, run: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", str(folder), "--count=40", "--seed=2"]
    main([*common, "--class=7", f"--out={tmp_path}/sevens.parquet"])
    table = pq.read_table(tmp_path / "sevens.parquet")
    assert table["label"].to_pylist() == [7] * 40
    images = table["image"].combine_chunks().to_numpy_ndarray()
    assert np.abs(images.astype(int) - run.generate(40, seed=2, label=7)).max() <= 1
    main([*common, f"--out={tmp_path}/all"])
    there = {p.name: len(list(p.glob("*.png"))) for p in (tmp_path / "all").iterdir() if p.is_dir()}
    kinds = run.sample_labels(40, seed=2)
    assert kinds is not None
    assert there == {str(k): int((kinds == k).sum()) for k in np.unique(kinds)}
    first = next(iter((tmp_path / "all" / str(kinds[0])).glob("*0000.png")))
    assert np.abs(np.asarray(Image.open(first), int) - run.generate(1, seed=2)[0, ..., 0]).max() < 2
    capsys.readouterr()
    out = f"--out={tmp_path}/none"
    assert "class 'cat' is unknown" in refused(capsys, *common, "--class=cat", out)
    around = ["generate", folder, "--around=mnist", "--class=7", out]
    assert "class 7 cannot be combined with --around" in refused(capsys, *around)
    plain = save_run(trained_run(run.config.data), tmp_path, step=10)
    said = refused(capsys, "generate", plain, "--class=7", out)
    assert "trained without classes. Train one with --condition" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("folder", ["projection"], indirect=True)  # where D takes it too
def test_an_export_takes_the_class(folder: Path, run: TrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "model"
    main(["export", str(folder), "--format=onnx", f"--out={out}"])
    session = onnxruntime.InferenceSession(str(out / "generate.onnx"))
    z, labels = run.noise(13, seed=8), np.arange(13) % 10
    (images,) = session.run(["images"], {"latents": z.numpy(), "labels": labels})
    assert np.abs(images.astype(int) - run.decode(z, labels=labels)).max() <= 1
    assert run.prior is not None
    session = onnxruntime.InferenceSession(str(out / "sample.onnx"))
    uniform = torch.rand(13, generator=torch.Generator().manual_seed(1))
    inputs = {"noise": z.numpy(), "uniform": uniform.numpy(), "labels": labels}
    (latents,) = session.run(["latents"], inputs)
    expected = run.prior.transform_noise(z, uniform, torch.from_numpy(labels))
    assert np.allclose(latents, expected, atol=1e-5)
    record = json.loads((out / "model.json").read_text())
    assert record["classes"] == list("0123456789")
    assert record["files"]["generate.onnx"]["further_inputs"][0]["name"] == "labels"
    pixels = Dataset.open(run.config.data).read("train").image[:9]
    session = onnxruntime.InferenceSession(str(out / "score.onnx"))
    (scores,) = session.run(["scores"], {"images": pixels, "labels": labels[:9]})
    assert np.allclose(scores, run.score(pixels, labels[:9]), atol=1e-3)


@pytest.mark.slow
@pytest.mark.ray
def test_a_stream_is_trained_on_stopped_and_told_of(
    digits: str, tmp_path: Path, two_cpus: None
) -> None:
    flags = [
        *SMALL_RUN, f"--data={digits}", f"--storage={tmp_path}", "--name=cats",
        "--generator.depth=2", "--condition=classifier", "--shards.memory=0.0001",
        "--shards.window=64",
        "--evaluation.reference=mnist", "--evaluation.samples=60", "--evaluation.images=100",
        "--workers=2",
    ]  # fmt: skip
    main(["train", *flags, "--epochs=1"])
    main(["train", *flags, "--epochs=2"])
    cats = tmp_path / "cats"
    lines = [json.loads(line) for line in (cats / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(0 < line["d/classification"] < 20 for line in lines)
    assert all("evaluation/class_accuracy" in line for line in lines)
    summary = json.loads((cats / "summary.json").read_text())
    assert summary["supervision"] == "condition classifier"
    main(["report", str(cats)])
    page = (cats / "report.html").read_text()
    assert "with labels (condition classifier)" in page
    assert "D was trained with the labels that colour the points" in page
    out = tmp_path / "variants.parquet"
    main(["generate", str(cats), f"--around={digits}", "--actors=1", f"--out={out}"])
    table, rows = pq.read_table(out), Dataset.open(digits).read("train")
    of = dict(zip(rows.id.tolist(), labels_of(rows).tolist(), strict=True))
    assert table["label"].to_pylist() == [of[i] for i in table["source"].to_pylist()]
    with pytest.raises(SystemExit):
        main(["train", *[f.replace("classifier", "projection") for f in flags], "--epochs=3"])


@pytest.mark.ray
def test_few_labels_train_a_classifier_and_are_told_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    two_cpus: None,
) -> None:
    monkeypatch.setattr("cl_ray.evaluation.clustering._STEPS", 10)
    data = write_images(
        tmp_path / "d",
        train=mnist("train", 600), validation=mnist("validation", 200), test=mnist("test", 300),
    )  # fmt: skip
    flags = [
        *SMALL_RUN, f"--data={data}", f"--storage={tmp_path}/runs", "--name=few",
        "--generator.depth=2", "--discriminator.depth=2", "--discriminator.width=8",
        "--condition=classifier", "--labels.count=60", "--labels.seed=1",
        "--evaluation.reference=mnist", "--evaluation.samples=60", "--evaluation.images=100",
        "--evaluation.every=7", "--checkpoint.metric=evaluation/classifier_error",
        "--workers=2", "--cpus-per-worker=1",
    ]  # fmt: skip
    main(["train", *flags, "--epochs=7"])
    assert "60 of the 600 training images keep their label, 6 of each class" in " ".join(
        capsys.readouterr().out.split()
    )
    run = tmp_path / "runs" / "few"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation/classifier_error"] < 0.6  # chance is 0.9
    assert last["d/classification"] > 0
    assert "d/consistency" in last
    assert json.loads((run / "summary.json").read_text())["supervision"] == (
        "condition classifier, 60 labels"
    )
    assert cl_ray.load(run, "best").counts == (6,) * 10
    main(["evaluate", str(run), "--reference=none"])
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((run / "evaluation.json").read_text())
    rows = Dataset.open(data).read("test")
    error = (cl_ray.load(run).classify(rows.image) != labels_of(rows)).mean()
    assert found["classification"] == {
        "error": pytest.approx(error), "count": 300, "training_labels": 60,
    }  # fmt: skip
    assert error < 0.6
    assert f"D's classifier (condition classifier, 60 labels): error {error:.2%} of 300" in said
    assert "with labels (condition classifier, 60 labels)" in said
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert "60 training images with a label" in page
    assert "trained with 60 labels" in page
    assert "labels.seed was 1, now 2" in refused(
        capsys, "train", *flags, "--labels.seed=2", "--epochs=8"
    )
