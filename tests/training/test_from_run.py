"""A run that begins with the networks of another run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from helpers.commands import run_flags, train_here
from helpers.refusal import refused
from helpers.run_folder import build_trainer, save_run, trained_run
from helpers.states import states_equal

from cl_ray import train as train_run
from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.console import PlainConsole
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN
from cl_ray.storage import RunStorage
from cl_ray.training.from_run import initial_state, resolve_from_run
from cl_ray.tuning.search import prepare_search

NETWORKS = ("generator", "discriminator", "ema_generator")
SPECTRAL = {"discriminator": {"depth": 2, "width": 4, "spectral_norm": True}}


def stored(folder: Path, name: str) -> dict[str, Any]:
    return CheckpointStore(*RunStorage.from_uri(folder).open()).load(name)


def test_it_begins_with_the_networks_alone(make_digits: Any, tmp_path: Path) -> None:
    other = trained_run(make_digits(300), **SPECTRAL, optimizer={"algorithm": "adam"})
    source = save_run(other, tmp_path, step=10)
    data = make_digits(200)  # in another run all but the networks may differ
    fields = {"from_run": str(source), "seed": 5, "optimizer": {"lr_g": 1e-4}, **SPECTRAL}
    trainer = build_trainer(data, **fields)
    config = resolve_from_run(
        Config.model_validate(trainer.config.model_dump()), RunStorage.at(str(tmp_path), "new")
    )
    assert config.from_run == f"{source}/checkpoints/step-00000010"
    state = initial_state(config, Dataset.open(data), PlainConsole())
    assert state.keys() == trainer.state_dict().keys()
    trainer.load_state_dict(state)
    for name in NETWORKS:
        ours, theirs = (getattr(gan, name).state_dict() for gan in (trainer.gan, other.gan))
        assert states_equal(ours, theirs)
    assert (trainer.gan.steps, trainer.epochs, trainer.position, trainer.prior) == (0, 0, 0, None)

    by_hand = build_trainer(data, **fields)  # whose optimizers have taken no step
    for name in NETWORKS:
        getattr(by_hand.gan, name).load_state_dict(getattr(other.gan, name).state_dict())
    by_hand.gan.ema_steps = other.gan.ema_steps  # the EMA generator is not begun anew
    assert by_hand.gan.ema_steps > 0
    for each in (trainer, by_hand):
        each.train_epoch()
    assert states_equal(trainer.gan.state_dict(), by_hand.gan.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator": {"depth": 3, "width": 4}}, "(generator.depth is 2 there, 3 here): give"),
        (
            {"generator": {"width": 5, "latent": 9}},
            "(generator.depth is 2 there, 3 here; generator.width is 4 there, 5 here; "
            "generator.latent is 10 there, 9 here)",
        ),
        ({"losses": {"form": "contrad"}}, "(losses.form is 'info-nce' there, 'contrad' here)"),
        ({"from_run": "nowhere"}, "nowhere is not a run folder: it does not exist"),
        ({"from_run": "{}/checkpoints/step-00000009"}, "There is no checkpoint step-00000009 in"),
        ({"from_run": ""}, "from_run"),
    ],
)
def test_other_networks_are_refused(
    make_digits: Any, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    source = save_run(build_trainer(make_digits(300)), tmp_path / "runs", step=1)
    small = {"depth": 2, "width": 4}
    fields = {"generator": small, "discriminator": small, "from_run": str(source), **fields}
    fields["from_run"] = fields["from_run"].format(source)
    storage = tmp_path / "new"
    storage.mkdir()
    with pytest.raises((UserError, ValueError)) as caught:
        train_run(Config(data=make_digits(200), storage=str(storage), name="a", **fields))
    assert message in str(caught.value)
    assert not ray.is_initialized()
    assert list(storage.iterdir()) == []


def test_other_shapes_are_refused(make_digits: Any, tmp_path: Path) -> None:
    source = save_run(build_trainer(make_digits(300)), tmp_path, step=1)
    trainer = build_trainer(make_digits(300), from_run=str(source))
    config = resolve_from_run(
        Config.model_validate(trainer.config.model_dump()), RunStorage.at(str(tmp_path), "new")
    )
    dataset = Dataset.open(config.data)
    large = dataset.info.model_copy(update={"shape": (32, 32, 3)})
    with pytest.raises(UserError, match=r"shape of the images is \[28, 28, 1\] there, \[32, 32, 3"):
        initial_state(config, Dataset(dataset.location, large), PlainConsole())


@pytest.mark.parametrize(
    ("there", "here", "renamed"),
    [
        ("none", "classifier", False),
        ("classifier", "projection", False),
        ("projection", "none", False),
        ("classifier", "classifier", True),
        ("classifier", "classifier", False),
    ],
)
def test_layers_of_other_classes_begin_with_random_weights(
    make_digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    there: str, here: str, renamed: bool,
) -> None:  # fmt: skip
    other = build_trainer(make_digits(300), condition=there)
    source = save_run(other, tmp_path, step=1)
    config = build_trainer(make_digits(300), condition=here, from_run=str(source), seed=3).config
    config = resolve_from_run(
        Config.model_validate(config.model_dump()), RunStorage.at(str(tmp_path), "new")
    )
    dataset = Dataset.open(config.data)
    if renamed:
        info = dataset.info.model_copy(update={"classes": [f"digit {n}" for n in range(10)]})
        dataset = Dataset(dataset.location, info)
    state = initial_state(config, dataset, PlainConsole())["gan"]
    fresh = ContrastiveGAN(
        config, dataset.info.shape, classes=dataset.class_names() * (here != "none")
    )
    changed = renamed or there != here
    for part in NETWORKS:
        before = getattr(other.gan, part).state_dict()
        for name, weights in getattr(fresh, part).state_dict().items():
            random = changed and name.startswith("class_")
            assert torch.equal(state[part][name], weights if random else before[name])
    assert ("layers of classes begin with random weights" in capsys.readouterr().out) == changed


def test_a_run_in_a_folder_of_that_name(make_digits: Any, tmp_path: Path) -> None:
    source = save_run(build_trainer(make_digits(300)), tmp_path / "checkpoints", step=1)
    new = RunStorage.at(str(tmp_path), "new")
    for given in (source, source / "checkpoints" / "step-00000001"):
        config = resolve_from_run(Config(from_run=str(given)), new)
        assert config.from_run == f"{source}/checkpoints/step-00000001"


def test_damage_is_named_and_a_search_is_refused(make_digits: Any, tmp_path: Path) -> None:
    trainer = build_trainer(make_digits(300))
    source = save_run(trainer, tmp_path, step=1)
    save_run(trainer, tmp_path, step=2)
    config = Config.model_validate({**trainer.config.model_dump(), "from_run": str(source)})
    config = resolve_from_run(config, RunStorage.at(str(tmp_path), "new"))
    (source / "checkpoints" / "step-00000002" / "state.pt").write_bytes(b"")
    with pytest.raises(UserError) as damaged:
        initial_state(config, Dataset.open(config.data), PlainConsole())
    hint = f"Begin with the one before, `--from-run {source}/checkpoints/step-00000001`."
    assert str(damaged.value).endswith(hint)
    with pytest.raises(UserError, match="is not for a search, whose trials begin with random"):
        prepare_search([f"--set=from_run={source}", f"--storage={tmp_path}/s"], "search")
    shutil.rmtree(source / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet: train it further"):
        resolve_from_run(
            config.model_copy(update={"from_run": str(source)}), RunStorage.at(str(tmp_path), "new")
        )


@pytest.mark.slow
@pytest.mark.ray
def test_a_fine_tuned_run_resumes_bit_for_bit(
    make_digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], two_cpus: None
) -> None:
    small = {"generator": {"width": 4, "latent": 8}, "discriminator": {"width": 4, "hidden": 16}}
    source = save_run(trained_run(make_digits(300), **small), tmp_path, step=10)
    run, data = tmp_path / "run", make_digits(200)
    flags = [f"--from-run={source}", "--evaluation.every=0", "--epochs=2"]
    printed = train_here(run, data, *flags)
    first = f"{source}/checkpoints/step-00000010"
    assert f"begins with the networks of {first}" in printed
    begun, whole = stored(run, "step-00000000"), stored(run, "step-00000014")
    for name in NETWORKS:
        assert states_equal(begun["gan"][name], stored(source, "step-00000010")["gan"][name])

    # As after a kill in the second epoch. It knows its first checkpoint, also where that is gone,
    # and the same command resumes it.
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    (run / "summary.json").unlink()
    shutil.rmtree(source / "checkpoints")
    assert "resumes from step-00000007" in train_here(run, data, *flags)
    assert states_equal(whole["gan"], stored(run, "step-00000014")["gan"])
    for file in ("config.yaml", "summary.json"):
        text = (run / file).read_text()
        assert (yaml.safe_load if file == "config.yaml" else json.loads)(text)["from_run"] == first
    other = save_run(build_trainer(data, **small), tmp_path / "other", step=1)
    message = refused(capsys, "train", *run_flags(run, data), f"--from-run={other}", *flags[1:])
    assert "was started with other settings (from_run was" in message
