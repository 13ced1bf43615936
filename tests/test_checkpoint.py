"""Checkpoints are complete or do not count, on local disk and on an object store."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from helpers.refusal import error_of
from helpers.saved_states import (
    FILES,
    States,
    assert_complete,
    checkpoint_name,
    newest_step,
    save_steps,
    steps_of,
)
from helpers.states import pack, states_equal, unpack

from cl_ray.base_config import FORMAT_VERSION
from cl_ray.checkpoint import CheckpointStore


@pytest.fixture(params=["local", "subtree", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    """Return a store that keeps two checkpoints, on each kind of filesystem."""
    if request.param == "local":
        yield CheckpointStore(pafs.LocalFileSystem(), f"{tmp_path}/run", keep=2)
    elif request.param == "subtree":
        filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        yield CheckpointStore(filesystem, "run", keep=2)
    else:
        from moto.server import ThreadedMotoServer  # seconds of import, also for each child below

        server = ThreadedMotoServer("127.0.0.1", port=0)  # without versioning, as `bucket` has it
        server.start()
        host, port = server.get_host_and_port()
        try:
            filesystem = pafs.S3FileSystem(
                endpoint_override=f"http://{host}:{port}",
                access_key="a",
                secret_key="b",
                region="us-east-1",
                allow_bucket_creation=True,
            )
            filesystem.create_dir("others")  # moto's servers share one memory, with `bucket` in it
            yield CheckpointStore(filesystem, f"others/{tmp_path.name}", keep=2)
        finally:
            server.stop()


def test_newest_and_best_are_kept(store: CheckpointStore, states: States) -> None:
    filesystem, folder = store.filesystem, store.folder

    def entries() -> set[str]:
        selector = pafs.FileSelector(folder, allow_not_found=True)
        return {info.base_name for info in filesystem.get_file_info(selector)}

    def named() -> str:
        with filesystem.open_input_stream(f"{folder}/best.txt") as stream:
            return stream.read().decode()

    assert store.list() == []
    assert store.newest() is None
    assert store.best() is None
    save_steps(store, states, {1: 0.3})
    assert_complete(store, states, 1)
    manifest = store.newest()
    assert manifest is not None
    assert (manifest.epoch, manifest.step, manifest.metric) == (0, 1, 0.3)
    assert set(manifest.files) == set(FILES)

    save_steps(store, states, {2: 0.5, 3: None, 4: 0.4})
    assert_complete(store, states, 1, 3, 4)  # the best is kept besides the newest two
    assert entries() == {"best.txt", *map(checkpoint_name, (1, 3, 4))}
    assert named() == f"{checkpoint_name(1)}\n"

    store.rollback_to(checkpoint_name(3))
    assert_complete(store, states, 1, 3)
    save_steps(store, states, {5: 0.2})
    assert_complete(store, states, 3, 5)  # the best is another now
    assert entries() == {"best.txt", *map(checkpoint_name, (3, 5))}
    assert named() == f"{checkpoint_name(5)}\n"


def test_saving_changes_nothing_of_the_run(local: CheckpointStore, states: States) -> None:
    state = states[1]
    before = pack(state)
    local.save(state, epoch=0, step=1)
    assert states_equal(state, unpack(before))


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ({1: None, 2: None}, None),
        ({1: float("nan"), 2: 0.5}, 2),
        ({1: 0.5, 2: 0.5, 3: 0.6}, 1),  # the older of two alike
        ({1: 0.5, 2: -0.5, 3: 0.0, 4: None}, 2),
    ],
    ids=str,
)
def test_best_has_the_smallest_metric(
    metrics: dict[int, float | None], best: int | None, local: CheckpointStore, states: States
) -> None:
    local.keep = 1
    save_steps(local, states, metrics)
    found = local.best()
    assert (found.step if found else None) == best
    assert steps_of(local) == sorted({max(metrics), *([best] if best else [])})
    named = Path(local.folder) / "best.txt"
    assert named.exists() == (best is not None)
    assert best is None or named.read_text() == f"{checkpoint_name(best)}\n"


def truncate(file: Path, size: int | None) -> None:
    """Leave so many bytes of a file, counted from its end if negative; None deletes it."""
    file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size])


def flip(file: Path, place: float) -> None:
    """Change one bit; the place is a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("file", "left"), [(FILES[0], None), (FILES[1], 0), (FILES[2], -1)])
def test_truncated_file_is_named_with_an_alternative(
    file: str, left: int | None, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: None, 2: None, 3: None})
    path = Path(local.folder) / checkpoint_name(3) / file
    size = path.stat().st_size
    truncate(path, left)
    for function in (local.load, local.rollback_to):
        message = error_of(function, checkpoint_name(3))
        assert f"{checkpoint_name(3)}/{file} is " in message
        found = "is missing."
        if path.exists():
            found = f"is truncated: it has {path.stat().st_size:,} of {size:,} bytes."
        assert found in message
        hint = f"`--from-checkpoint {checkpoint_name(2)}`"
        assert message.endswith(f" Resume from the previous one with {hint}.")
    local.rollback_to(checkpoint_name(2))
    assert_complete(local, states, 1, 2)


def test_alternative_is_the_newest_complete_one(local: CheckpointStore, states: States) -> None:
    save_steps(local, states, {1: None, 2: None, 3: None})
    for step, hint in (
        (3, "--from-checkpoint step-00000002`"),
        (2, "--from-checkpoint step-00000001`"),
        (1, "There is no complete checkpoint before it: start a new run with another --name"),
    ):
        truncate(Path(local.folder) / checkpoint_name(step) / "state.pt", 100)
        assert hint in error_of(local.load, checkpoint_name(3))


def test_without_a_whole_manifest_it_does_not_count(local: CheckpointStore, states: States) -> None:
    save_steps(local, states, {1: 0.5, 2: 0.4})
    path = Path(local.folder) / checkpoint_name(2) / "manifest.json"
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 11), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert steps_of(local) == [1]
    for place in range(0, 100, 4):
        path.write_bytes(whole)
        flip(path, place / 100)
        assert steps_of(local) == [1], place
    assert newest_step(local) == 1
    assert local.newest() == local.best()
    message = error_of(local.load, checkpoint_name(2))
    assert f"no checkpoint {checkpoint_name(2)} in {local.folder}" in message
    assert message.endswith(f"there are: {checkpoint_name(1)}.")
    path.unlink()
    assert_complete(local, states, 1)
    assert error_of(local.load, checkpoint_name(2)) == message
    save_steps(local, states, {2: 0.4})
    assert_complete(local, states, 1, 2)


@pytest.mark.parametrize(("file", "place"), [(FILES[0], 0), (FILES[1], 0.5), (FILES[2], 1)])
def test_changed_byte_is_found(
    file: str, place: float, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: None, 2: None})
    path = Path(local.folder) / checkpoint_name(2) / file
    flip(path, place)
    message = error_of(local.load, checkpoint_name(2))
    assert f"{checkpoint_name(2)}/{file} has changed (its digest differs)." in message
    assert f" Resume from the previous one with `--from-checkpoint {checkpoint_name(1)}`" in message
    assert error_of(local.rollback_to, checkpoint_name(2)) == message
    if file != "state.pt":  # commands that only read the networks have another flag
        message = error_of(local.networks, checkpoint_name(2))
        assert f" Load the previous one with `--checkpoint {checkpoint_name(1)}`" in message


def test_manifest(local: CheckpointStore, states: States) -> None:
    """Users can check the digests with sha256sum."""
    save_steps(local, states, {1: None})
    folder = Path(local.folder) / checkpoint_name(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == set(FILES) == files
    for file, facts in manifest["files"].items():
        content = (folder / file).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("version", "age"), [(None, "an earlier"), (2, "an earlier"), (99, "a later")]
)
def test_another_format_is_refused(
    version: int | None, age: str, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: None})
    path = Path(local.folder) / checkpoint_name(1) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format_version"] = version
    del manifest["sha256"]
    if version is None:
        manifest = {"epoch": 0, "step": 1, "metric": None, "files": manifest["files"]}
    path.write_text(json.dumps(manifest))
    for function in (local.load, lambda name: local.newest()):
        assert error_of(function, checkpoint_name(1)) == (
            f"The checkpoint {local.folder}/{checkpoint_name(1)} was written by {age} version of "
            f"cl_ray (format {version or 1}); this version reads format {FORMAT_VERSION}: use that "
            "version of cl_ray, or start again under another --name."
        )


DAMAGES: dict[str, Callable[[Path], None]] = {
    "changed": lambda folder: flip(folder / "state.pt", 0.5),
    "truncated": lambda folder: truncate(folder / "generator.safetensors", 100),
    "missing": lambda folder: truncate(folder / "discriminator.safetensors", None),
    "manifest": lambda folder: flip(folder / "manifest.json", 0.3),
    "no manifest": lambda folder: truncate(folder / "manifest.json", 50),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_put_aside_for_the_newest_whole_one(
    damage: str, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: 0.1, 2: 0.2, 3: 0.05})
    assert local.set_aside_damaged() == ()
    folder = Path(local.folder)
    for step in (2, 3):
        DAMAGES[damage](folder / checkpoint_name(step))
    before = {path.name: path.read_bytes() for path in (folder / checkpoint_name(3)).iterdir()}
    notes = local.set_aside_damaged()
    assert len(notes) == 2
    for step, note in zip((3, 2), notes, strict=True):
        assert note.startswith(f"{folder}/{checkpoint_name(step)}/")
        assert note.endswith(
            f" The checkpoint is put aside as damaged-{checkpoint_name(step)}, and the run goes on "
            f"from {checkpoint_name(1)}."
        )
    aside = folder / f"damaged-{checkpoint_name(3)}"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert_complete(local, states, 1)
    assert (folder / "best.txt").read_text() == f"{checkpoint_name(1)}\n"
    save_steps(local, states, {2: 0.2, 3: 0.1, 4: 0.1, 5: 0.1})  # nothing is in the way
    assert aside.exists()
    DAMAGES[damage](folder / checkpoint_name(5))
    assert len(local.set_aside_damaged()) == 1
    assert (folder / f"damaged-{checkpoint_name(5)}").exists()


def test_if_all_are_damaged_none_is_put_aside(local: CheckpointStore, states: States) -> None:
    save_steps(local, states, {1: None, 2: None})
    for step in (1, 2):
        flip(Path(local.folder) / checkpoint_name(step) / "state.pt", 0.5)
    message = error_of(local.set_aside_damaged)
    assert message.startswith(f"All checkpoints of {local.folder} are damaged: ")
    assert message.endswith("Put back a copy of one, or start a new run with another --name.")
    assert local.names() == (checkpoint_name(1), checkpoint_name(2))


def test_an_object_store_puts_aside_too(store: CheckpointStore, states: States) -> None:
    save_steps(store, states, {1: None, 2: None})
    for _ in range(2):
        with store.filesystem.open_output_stream(f"{store.folder}/step-00000002/state.pt") as file:
            file.write(b"rot")
        (note,) = store.set_aside_damaged()
        assert note.startswith(f"{store.folder}/step-00000002/state.pt is truncated: ")
        assert_complete(store, states, 1)
        save_steps(store, states, {2: None})
    selector = pafs.FileSelector(store.folder)
    names = {info.base_name for info in store.filesystem.get_file_info(selector)}
    assert {"damaged-step-00000002", "damaged-step-00000002-1"} < names


def test_all_is_on_the_disk_before_an_older_one_is_deleted(
    local: CheckpointStore,
    states: States,
    monkeypatch: pytest.MonkeyPatch,
    disk_calls: list[tuple[str, str]],
) -> None:
    local.keep = 1
    save_steps(local, states, {1: None})
    disk_calls.clear()
    delete = local._delete

    def record_delete(name: str) -> None:
        disk_calls.append(("delete", name))
        delete(name)

    monkeypatch.setattr(local, "_delete", record_delete)
    save_steps(local, states, {2: None})
    name = checkpoint_name(2)
    new = f"{os.getpid()}.new"
    written = [call for file in FILES for call in (f"{name}/.{file}.{new}", name)]
    calls = [
        (call, path.removeprefix(f"{local.folder}/"))
        for call, path in disk_calls
        if call != "rename"
    ]
    synced = [local.folder, *written, f"{name}/.manifest.json.{new}", name]
    assert calls == [
        *(("sync", path) for path in synced),
        # Its manifest, then the other files.
        ("delete", checkpoint_name(1)), ("sync", checkpoint_name(1)),
    ]  # fmt: skip


def test_rollback_makes_one_the_newest(local: CheckpointStore, states: States) -> None:
    save_steps(local, states, {1: 0.5, 2: None, 3: 0.4})
    message = error_of(local.rollback_to, checkpoint_name(4))
    assert message.endswith(f"there are: {', '.join(map(checkpoint_name, (1, 2, 3)))}.")
    assert_complete(local, states, 1, 2, 3)
    local.rollback_to(checkpoint_name(3))
    assert_complete(local, states, 1, 2, 3)
    local.rollback_to(checkpoint_name(1))
    assert_complete(local, states, 1)
    assert (Path(local.folder) / "best.txt").read_text() == f"{checkpoint_name(1)}\n"


def test_values_of_two_metrics_are_not_compared(store: CheckpointStore, states: States) -> None:
    save_steps(store, states, {1: 3.0, 2: 8.0, 3: None, 4: None})
    best = store.best()
    assert best is not None
    assert best.step == 1
    store.set_metric(checkpoint_name(4), 9.0, "other")
    best = store.best()
    assert best is not None
    assert (best.step, best.metric_name) == (4, "other")


def test_pinned_until_its_metric_is_set(store: CheckpointStore, states: States) -> None:
    """Two are kept; an evaluation of the first runs while others are saved."""
    save_steps(store, states, {1: None})
    store.pinned.add(checkpoint_name(1))
    save_steps(store, states, {2: None, 3: None, 4: None})
    assert steps_of(store) == [1, 3, 4]
    store.set_metric(checkpoint_name(3), 0.5, "loss")
    store.set_metric(checkpoint_name(1), 0.2, "loss")
    save_steps(store, states, {5: 0.3})
    assert_complete(store, states, 1, 4, 5)  # no longer pinned, and kept as the best
    best = store.best()
    assert best is not None
    assert (best.step, best.metric) == (1, 0.2)
    store.set_metric(checkpoint_name(1), 0.4, "loss")
    assert steps_of(store) == [4, 5]  # now another is the best
    store.pinned.add(checkpoint_name(4))
    for unknown in (None, float("nan"), float("inf")):  # it could not be measured
        store.set_metric(checkpoint_name(4), unknown, "loss")
        assert [manifest.metric for manifest in store.list()] == [None, 0.3]
    assert not store.pinned
