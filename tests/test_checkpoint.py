"""Checkpoints: whole or not at all, on local disk and on an object store, whatever interrupts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from helpers.five_steps import global_batch
from helpers.saved import (
    ABOUT,
    FILES,
    States,
    assert_whole,
    gan,
    name_of,
    save,
    steps_of,
)
from helpers.states import alike, pack, unpack

from cl_ray.checkpoint import CheckpointStore
from cl_ray.errors import UserError


@pytest.fixture(params=["local", "subtree", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    """Two are kept."""
    if request.param == "local":
        yield CheckpointStore(pafs.LocalFileSystem(), f"{tmp_path}/run", keep=2)
    elif request.param == "subtree":
        filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        yield CheckpointStore(filesystem, "run", keep=2)
    else:
        from moto.server import ThreadedMotoServer  # seconds of import, also for each child below

        server = ThreadedMotoServer("127.0.0.1", port=0)
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


def test_life_of_a_run(anywhere: CheckpointStore, states: States) -> None:
    filesystem, folder = anywhere.filesystem, anywhere.folder

    def there() -> set[str]:
        selector = pafs.FileSelector(folder, allow_not_found=True)
        return {info.base_name for info in filesystem.get_file_info(selector)}

    assert anywhere.list() == []
    assert anywhere.newest() is None
    assert anywhere.best() is None
    save(anywhere, states, {1: 0.3})
    assert_whole(anywhere, states, 1)
    manifest = anywhere.newest()
    assert manifest is not None
    assert (manifest.epoch, manifest.step, manifest.figure) == (0, 1, 0.3)
    assert set(manifest.files) == set(FILES)

    save(anywhere, states, {2: 0.5, 3: None, 4: 0.4})
    assert_whole(anywhere, states, 1, 3, 4)  # the best is kept besides the newest two
    assert there() == {"best.txt", *map(name_of, (1, 3, 4))}
    with filesystem.open_input_stream(f"{folder}/best.txt") as stream:
        assert stream.read().decode() == f"{name_of(1)}\n"

    anywhere.rollback_to(name_of(3))
    assert_whole(anywhere, states, 1, 3)
    save(anywhere, states, {5: 0.2})
    assert_whole(anywhere, states, 3, 5)  # the best is another now
    assert there() == {"best.txt", *map(name_of, (3, 5))}
    with filesystem.open_input_stream(f"{folder}/best.txt") as stream:
        assert stream.read().decode() == f"{name_of(5)}\n"


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(local: CheckpointStore) -> None:
    whole, again = gan(), gan()
    whole.step(global_batch(0, "views"))
    around: dict[str, Any] = {"epochs": 0, "position": 1, "sums": {}, "workers": 1, **ABOUT}
    state = {"gan": whole.state_dict(), **around}
    before = pack(state)
    local.save(state, epoch=0, step=1, metric=None)
    assert alike(state, unpack(before))  # what is saved stays the run's
    again.load_state_dict(local.load(name_of(1))["gan"])
    for number in (1, 2):
        for one in (whole, again):
            one.step(global_batch(number, "views"))
    assert alike(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ({1: None, 2: None}, None),
        ({1: None, 2: 0.5}, 2),
        ({1: 0.5, 2: 0.5, 3: 0.6}, 1),  # the older of two alike
        ({1: 0.5, 2: -0.5, 3: 0.0, 4: None}, 2),
    ],
    ids=str,
)
def test_the_best_has_the_smallest_figure(
    metrics: dict[int, float | None],
    best: int | None,
    local: CheckpointStore,
    states: States,
) -> None:
    local.keep = 1
    save(local, states, metrics)
    found = local.best()
    assert (found.step if found else None) == best
    assert steps_of(local) == sorted({max(metrics), *([best] if best else [])})
    named = Path(local.folder) / "best.txt"
    assert named.exists() == (best is not None)
    assert best is None or named.read_text() == f"{name_of(best)}\n"


def complaint(function: Callable[[str], Any], name: str) -> str:
    with pytest.raises(UserError) as caught:
        function(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def cut_to(size: int | None) -> Callable[[Path], None]:
    """Leaves the first so many bytes of a file; counted from its end if negative."""

    def cut(file: Path) -> None:
        file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size])

    return cut


CUTS = {"missing": cut_to(None), "empty": cut_to(0), "short": cut_to(100), "a byte": cut_to(-1)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("file", FILES)
def test_a_cut_is_named_and_the_one_before_offered(
    file: str, cut: str, local: CheckpointStore, states: States
) -> None:
    save(local, states, {1: None, 2: None, 3: None})
    path = Path(local.folder) / name_of(3) / file
    whole = path.stat().st_size
    CUTS[cut](path)
    for function in (local.load, local.check, local.rollback_to):
        if function == local.rollback_to and file != "state.pt":
            continue  # it loads
        message = complaint(function, name_of(3))
        assert f"{name_of(3)}/{file}" in message
        if path.exists():
            assert f"has {path.stat().st_size:,} bytes of {whole:,}: it was cut short." in message
        else:
            assert "is missing" in message
        assert message.endswith(
            f" Go on from the one before with `--from-checkpoint {name_of(2)}`."
        )
    local.rollback_to(name_of(2))
    assert_whole(local, states, 1, 2)


def test_one_that_is_damaged_as_well_is_not_offered(local: CheckpointStore, states: States) -> None:
    save(local, states, {1: None, 2: None, 3: None})
    for step, offered in ((3, "step-00000002"), (2, "step-00000001"), (1, None)):
        cut_to(100)(Path(local.folder) / name_of(step) / "state.pt")
        message = complaint(local.load, name_of(3))
        if offered:
            assert f"--from-checkpoint {offered}`" in message
        else:
            assert "No whole checkpoint lies before it" in message
            assert "--name" in message


def test_without_its_whole_manifest_it_does_not_count(
    local: CheckpointStore, states: States
) -> None:
    save(local, states, {1: 0.5, 2: 0.4})
    path = Path(local.folder) / name_of(2) / "manifest.json"
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 11), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert steps_of(local) == [1]
    newest, best = local.newest(), local.best()
    assert newest == best
    assert newest is not None
    assert newest.step == 1
    message = complaint(local.load, name_of(2))
    assert f"no checkpoint {name_of(2)} in {local.folder}" in message
    assert message.endswith(f"there are: {name_of(1)}.")
    path.unlink()
    assert_whole(local, states, 1)
    assert complaint(local.load, name_of(2)) == message
    save(local, states, {2: 0.4})
    assert_whole(local, states, 1, 2)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_changed_byte_is_found(
    place: float, file: str, local: CheckpointStore, states: States
) -> None:
    save(local, states, {1: None, 2: None})
    path = Path(local.folder) / name_of(2) / file
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    message = complaint(local.load, name_of(2))
    assert f"{name_of(2)}/{file} is not what was written (its digest differs)." in message
    assert message.endswith(f" Go on from the one before with `--from-checkpoint {name_of(1)}`.")
    assert complaint(local.rollback_to, name_of(2)) == message
    if file != "state.pt":  # who only looks at the networks has another flag
        told = complaint(local.networks, name_of(2))
        assert told.endswith(f" Take the one before with `--checkpoint {name_of(1)}`.")


def test_the_manifest_says_what_sha256_would(local: CheckpointStore, states: States) -> None:
    """So that people can check it without us."""
    import hashlib

    save(local, states, {1: None})
    folder = Path(local.folder) / name_of(1)
    written = json.loads((folder / "manifest.json").read_text())
    assert (
        set(written["files"])
        == set(FILES)
        == {p.name for p in folder.iterdir()} - {"manifest.json"}
    )
    for file, facts in written["files"].items():
        content = (folder / file).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_return_to_makes_one_the_newest(local: CheckpointStore, states: States) -> None:
    save(local, states, {1: 0.5, 2: None, 3: 0.4})
    message = complaint(local.rollback_to, name_of(4))
    assert message.endswith(f"there are: {', '.join(map(name_of, (1, 2, 3)))}.")
    assert_whole(local, states, 1, 2, 3)
    local.rollback_to(name_of(3))
    assert_whole(local, states, 1, 2, 3)
    local.rollback_to(name_of(1))
    assert_whole(local, states, 1)
    assert (Path(local.folder) / "best.txt").read_text() == f"{name_of(1)}\n"


def test_one_that_waits_for_its_figure_is_held_and_rated(
    anywhere: CheckpointStore, states: States
) -> None:
    """Two are kept; an evaluation of the first goes on while others are saved."""
    save(anywhere, states, {1: None})
    anywhere.pinned.add(name_of(1))
    save(anywhere, states, {2: None, 3: None, 4: None})
    assert steps_of(anywhere) == [1, 3, 4]
    anywhere.set_metric(name_of(3), 0.5)
    anywhere.set_metric(name_of(1), 0.2)
    save(anywhere, states, {5: 0.3})
    assert_whole(anywhere, states, 1, 4, 5)  # held no more, and kept as the best
    best = anywhere.best()
    assert best is not None
    assert (best.step, best.figure) == (1, 0.2)
    anywhere.set_metric(name_of(1), 0.4)
    assert steps_of(anywhere) == [4, 5]  # the best is another now
    anywhere.pinned.add(name_of(4))
    anywhere.set_metric(name_of(4), None)  # it could not be measured
    assert not anywhere.pinned
