"""Which files of a folder are read."""

import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from helpers.random_images import Refused, WriteSource, pixels, save

from cl_ray.data.file_tree import FileTree, list_folder


def listing(folder: Path, filesystem: pafs.FileSystem | None = None) -> tuple[FileTree, list[str]]:
    """List a folder; return its files and the notes."""
    notes: list[str] = []
    path = "in" if filesystem else str(folder / "in")
    return list_folder("in", filesystem or pafs.LocalFileSystem(), path, notes.append), notes


@pytest.mark.parametrize("remote", [False, True])
def test_hidden_files_and_thumbnails_are_left_out(tmp_path: Path, remote: bool) -> None:
    for name in ("cat/1.png", "cat/@eaDir/1.png", "@eaDir/x.jpg", "__MACOSX/a/b.png", ".cache/x"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x" * len(name))
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    tree, notes = listing(tmp_path, bucket if remote else None)
    assert tree.sizes == {"cat/1.png": 9}
    assert tree.read("cat/1.png") == b"x" * 9
    (note,) = notes
    assert note.startswith("Left out, as hidden or thumbnails: 2 @eaDir, 1 ")
    assert "1 __MACOSX" in note
    assert "1 .cache" in note


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    for name in ("in/a/1.png", "elsewhere/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    for number in range(6):  # pyarrow would list 6**40 files
        (tmp_path / "in" / "a" / f"up{number}").symlink_to("..")
    (tmp_path / "in" / "0").symlink_to("a")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "copy.png").symlink_to("a/1.png")
    (tmp_path / "in" / "lost.png").symlink_to("nowhere")
    tree, notes = listing(tmp_path)
    assert list(tree.sizes) == ["a/1.png", "b/2.png"]
    (note,) = notes
    assert note.startswith("Left out, as links to what is read already or to nothing: 0, a/up0, ")
    assert note.endswith("a/up5, copy.png, lost.png.")


def test_links_to_one_file_are_read_once(tmp_path: Path, write_source: WriteSource) -> None:
    save(tmp_path / "store" / "1.png", pixels(1)[0])
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "store" / "1.png")
    assert len(write_source(tmp_path / "in")[1].image) == 1


def test_names_that_are_not_utf_8(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/\xff.png")).write_bytes(b"x")
    assert "holds a file whose name is not UTF-8 (b'\\xff.png')" in refused(tmp_path / "in")
