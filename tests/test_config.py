"""The config tree: YAML in and out, marks on fields, and a clear sentence for each mistake."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from cl_ray.base_config import FORMAT_VERSION, BaseConfig, marked_fields
from cl_ray.config import PRESETS, Config, build_config, differences, merge, preset
from cl_ray.errors import UserError
from cl_ray.tuning.options import SearchOptions

VALUES = (True, 3, 2.0 / 3.0, 1e-5 / 7, 40.1, "another", (1, 2), 2, 12)
"""Every field accepts one of these."""


def fields_of(kind: type[BaseConfig], *path: str) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseConfig):
            yield from fields_of(field.annotation, *path, name)
        else:
            yield (*path, name), field


FIELDS = dict(fields_of(Config))


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if len(path) > 1 else value}


def value_of(config: BaseConfig, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def with_other_value(path: tuple[str, ...], field: FieldInfo) -> Config | None:
    """Return the defaults but for one field; None if the field has only one possible value."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else VALUES
    for value in PRESETS if path == ("preset",) else choices:
        if value == field.default:
            continue
        try:
            return build_config(merge(Config().model_dump(), nested(path, value)))
        except UserError:
            continue
    assert len(choices) == 1, f"no other value was found for {path}"
    return None


def error_of(fields: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build_config(merge(Config().model_dump(), fields), "my.yaml")
    return one_sentence(caught.value)


def one_sentence(error: UserError) -> str:
    message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_every_field_survives_yaml(path: tuple[str, ...]) -> None:
    config = with_other_value(path, FIELDS[path])
    if config is None:
        return
    again = Config.from_yaml(config.to_yaml())
    assert again == config
    assert type(value_of(again, path)) is type(value_of(config, path))
    pair = value_of(Config(), path), value_of(config, path)
    assert differences(Config(), again) == {".".join(path): pair}


def test_load_and_worker_range(tmp_path: Path) -> None:
    config = Config(seed=1, batch_size=12, workers=(1, 4), device="cuda")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "config.yaml") == config
    assert config.worker_range == (1, 4)
    assert Config(workers=3, batch_size=9).worker_range == (3, 3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert Config.from_yaml(f"preset: {name}") == config
    assert Config.from_yaml(config.to_yaml()) == config


def test_default_and_unknown_preset() -> None:
    assert preset("quick") == Config()
    with pytest.raises(UserError, match="'slow' is unknown; there are: quick, mnist, photos-64"):
        preset("slow")


def test_yaml_names_some_fields_and_the_base_gives_the_rest() -> None:
    base = Config(epochs=9)
    config = Config.from_yaml("seed: 5\noptimizer:\n  lr_g: 1e-4\n", base=base)
    assert differences(base, config) == {"seed": (0, 5), "optimizer.lr_g": (0.01, 1e-4)}
    assert Config.from_yaml("", base=base) == base
    assert Config.from_yaml("seed: 5\npreset: mnist").epochs == preset("mnist").epochs


def test_merge_replaces_leaves_only() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": (1, 2)}
    changes = {"a": {"c": {"d": 3}}, "e": 4, "f": {"g": 5}}
    merged = {"a": {"b": 1, "c": {"d": 3}}, "e": 4, "f": {"g": 5}}
    assert merge(base, changes) == merged
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": (1, 2)}
    assert merge(base, {}) == base


def test_format_version_of_a_run() -> None:
    config = Config(seed=5)
    assert config.to_yaml().startswith(f"format_version: {FORMAT_VERSION}\n")
    assert Config.from_run_yaml(config.to_yaml(), "config.yaml") == config
    for text, version, age in (
        ("name: a\npreset: quick\ndata: mnist\nstorage: runs\nunknown: 1", 1, "an earlier"),
        ("format_version: 1\nseed: 5", 1, "an earlier"),
        (f"format_version: {FORMAT_VERSION + 1}\nseed: 5", FORMAT_VERSION + 1, "a later"),
    ):
        with pytest.raises(UserError) as caught:
            Config.from_run_yaml(text, "runs/a/config.yaml")
        assert one_sentence(caught.value) == (
            f"runs/a/config.yaml was written by {age} version of cl_ray (format {version}); this "
            f"version reads format {FORMAT_VERSION}: use that version of cl_ray, or start again "
            "under another --name."
        )
    with pytest.raises(UserError, match="my config was written by an earlier version"):
        Config.from_yaml("format_version: 1", "my config")


def test_marked_fields() -> None:
    """All others decide what a run computes, and may be searched."""
    assert set(marked_fields(Config, "changeable_on_resume")) == {
        "name", "storage", "epochs", "workers", "cpus_per_worker", "gpus_per_worker", "threads",
        "log_every", "checkpoint.every", "checkpoint.keep", "evaluation.every", "data",
    }  # fmt: skip
    fixed = marked_fields(Config, "not_searchable")
    assert set(fixed) == {
        "name", "storage", "data", "preset", "epochs", "workers", "cpus_per_worker",
        "gpus_per_worker", "threads", "evaluation", "checkpoint", "from_run",
        "labels.count", "labels.seed", "epoch_repeats",
    }  # fmt: skip
    assert all(fixed.values())  # the reason that an error gives
    assert set(marked_fields(Config, "architecture")) == {"generator", "discriminator"}
    assert set(SearchOptions.model_fields) - set(
        marked_fields(SearchOptions, "changeable_on_resume")
    ) == {
        "epochs", "images", "metric", "scheduler", "workers", "preset", "data",
        "study",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": {"lr": 3}}, ["optimizer.lr", "--help"]),
        ({"epochs": -1}, ["epochs", "-1", "greater than or equal to 1"]),
        ({"generator": {"depht": 3}}, ["no field 'generator.depht'", "is 'generator.depth'"]),
        ({"generator": 3}, ["generator 3", "it is a section, with fields of its own"]),
        ({"epochs": "many"}, ["epochs", "many", "integer"]),
        ({"optimizer": {"lr_g": 0}}, ["optimizer.lr_g", " 0 ", "greater than 0"]),
        ({"optimizer": {"lr_d": 2}}, ["optimizer.lr_d", " 2 ", "less than or equal to 1"]),
        ({"optimizer": {"beta1": 1}}, ["optimizer.beta1", " 1 ", "less than 1"]),
        ({"optimizer": {"beta2": float("nan")}}, ["optimizer.beta2", "nan", "finite"]),
        ({"pairs": {"mode": "view"}}, ["pairs.mode", "'view'", "'views'", "'labels'"]),
        ({"losses": {"gradient_penalty": 0}}, ["'wasserstein'", "losses.gradient_penalty"]),
        (
            {"condition": "classifier", "losses": {"classification": 0}},
            ["'classifier'", "losses.classification", "raise it"],
        ),
        ({"pairs": {"negatives": "hard", "candidates": 1}}, ["pairs.candidates is 1", "4 or more"]),
        (
            {"losses": {"form": "contrad", "contrastive": 0, "fake_supcon": 0, "pair": 0}},
            ["'contrad'", "losses.fake_supcon", "raise one"],
        ),
        (
            {"discriminator": {"family": "residual", "spectral_norm": True}},
            ["spectral_norm", "'residual'", "'convolutional'"],
        ),
        ({"gpus_per_worker": 0.5, "device": "cpu"}, ["gpus_per_worker 0.5 does not fit", "'cpu'"]),
        ({"gpus_per_worker": 2}, ["gpus_per_worker 2 is more than 1", "more workers"]),
        ({"preset": "slow"}, ["preset", "'slow'", "quick", "mnist"]),
        ({"name": "a/b"}, ["name", "'a/b'", "folder name"]),
        ({"name": ".."}, ["name '..'", "no dot as the first"]),
        ({"name": "a\u3000b"}, ["name 'a\\u3000b'", "any characters but spaces"]),
        ({"name": "a\x1b[2J"}, [r"name 'a\x1b[2J'", "control characters"]),
        ({"name": "a\udcff"}, [r"name 'a\udcff'", "control characters"]),
        ({"name": "数" * 77}, ["has 231 bytes in UTF-8", "room for 230: shorten it"]),
        ({"storage": ""}, ["storage is empty"]),
        ({"workers": 0}, ["workers", "0", "1 or more"]),
        ({"workers": (4, 2)}, ["workers", "(4, 2)", "minimum first"]),
        ({"workers": (1, 30)}, ["among 3 workers", "lower the maximum of workers"]),
        ({"workers": (1, 10**7)}, ["among 3 workers", "lower the maximum of workers"]),
        ({"batch_size": 100, "workers": 3}, ["batch_size 100", "3 workers", "99"]),
        ({"batch_size": 2, "workers": 64}, ["batch_size 2", "64 workers", "use 64"]),
        ({"batch_size": 105, "workers": [2, 7]}, ["batch_size 105", "2 workers"]),
    ],
)
def test_mistakes_in_fields(fields: dict[str, Any], words: list[str]) -> None:
    message = error_of(fields)
    for word in ["my.yaml", *words]:
        assert word in message


@pytest.mark.parametrize(("batch", "workers"), [(100, (1, 3)), (128, (1, 4)), (7, (3, 5))])
def test_advised_batch_size_is_accepted(batch: int, workers: tuple[int, int]) -> None:
    message = error_of({"batch_size": batch, "workers": workers})
    advised = int(message.partition("use ")[2].split()[0])
    assert build_config({"batch_size": advised, "workers": workers}).batch_size == advised
    assert build_config({"batch_size": 60, "workers": [1, 6]}).workers == (1, 6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", ["mapping"]),
        ("seed: [1", ["not YAML"]),
        ("seed: 1\npairs:\n  mode: views\nseed: 2", ["'seed' is there twice", "line 4"]),
        ("pairs:\n  mode: views\n  mode: labels", ["'mode' is there twice", "line 3"]),
        ("preset: slow", ["'slow'", "quick"]),
    ],
)
def test_mistakes_in_yaml(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config.from_yaml(text, "my.yaml")
    message = one_sentence(caught.value)
    for word in words:
        assert word in message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        Config.load(tmp_path / "absent.yaml")
    file = tmp_path / "mine.yaml"
    file.write_bytes("data: größe".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        Config.load(file)
    assert one_sentence(caught.value).startswith(f"The config {file} is not UTF-8 text (byte 0xf6")


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]
