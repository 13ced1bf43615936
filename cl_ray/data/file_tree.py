"""List the files of a source, without hidden ones, thumbnails and links that lead in circles."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, cast

import pyarrow.fs as pafs

from cl_ray.errors import UserError, first_error_line

Note = Callable[[str], object]
"""Called with a sentence on what was left out or chosen."""

_NOT_DATA = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found")
"""Folders that systems and image viewers add, in lower case; hidden names begin with a dot."""


@dataclass(frozen=True)
class FileTree:
    """The files of a source.

    Args:
        location: The source as the user named it, without options; error messages put it before
            a file's name.
        root: Its path on its filesystem.
        sizes: Bytes of each file by its name, relative to the location; in the order of reading.
        open: Opens the file of that name; it can be sought in, unless it is in an archive.
        layout: Paths that tell splits and classes, where they are not the names.
        threads: How many may read at once.
    """

    location: str
    root: str
    sizes: dict[str, int]
    open: Callable[[str], IO[bytes]]
    layout: Mapping[str, str] = field(default_factory=dict)
    threads: int = 8

    def read(self, file: str) -> bytes:
        """Return the content of a file.

        Raises:
            UserError: The filesystem does not give it. Of a damaged archive: any exception.
        """
        try:
            with self.open(file) as stream:
                return stream.read(self.sizes[file] + 1)
        except OSError as error:
            reason = first_error_line(error)
            raise UserError(f"{self.location}/{file} cannot be read: {reason}.") from error

    def folders(self, file: str) -> list[str]:
        """Return the folders that tell a file's split and class."""
        return self.layout.get(file, file).split("/")[:-1]


def list_folder(location: str, filesystem: pafs.FileSystem, path: str, note: Note) -> FileTree:
    """List the files below a folder.

    On the local filesystem links are followed, and a folder or file that several lead to is
    listed once.

    Raises:
        UserError: The folder cannot be read, or a file's name is not UTF-8.
    """
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            sizes, ignored, repeated = _walk(path)
        else:
            sizes, ignored, repeated = *_select(filesystem, path), []
    except OSError as error:
        raise UserError(f"{location} cannot be read: {first_error_line(error)}.") from error
    unreadable = next(filter(re.compile("[\ud800-\udfff]").search, sizes), None)
    if unreadable is not None:
        raise UserError(
            f"{location} holds a file whose name is not UTF-8 ({os.fsencode(unreadable)!r}): "
            "rename it."
        )
    if ignored:
        note(f"Left out, as hidden or thumbnails: {counted(ignored)}.")
    if repeated:
        note(f"Left out, as links to what is read already or to nothing: {listed(repeated)}.")
    return tree_of_files(location, filesystem, path, dict(sorted(sizes.items())))


def tree_of_files(
    location: str, filesystem: pafs.FileSystem, path: str, sizes: dict[str, int]
) -> FileTree:
    """Return the files of a folder whose sizes are given."""
    return FileTree(
        location,
        path,
        sizes,
        lambda file: cast(IO[bytes], filesystem.open_input_file(f"{path}/{file}")),
    )


def ignored_part(file: str) -> str | None:
    """Return the first part of a path that is no data: hidden, or a system's."""
    parts = file.split("/")
    return next((p for p in parts if p.startswith(".") or p.lower() in _NOT_DATA), None)


@contextmanager
def damage_errors(name: str, kind: str, way_out: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into a UserError that names it.

    Args:
        name: The file.
        kind: What it cannot be read as.
        way_out: What to do about it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # also of zlib, struct, zipfile and numpy's reader of headers
        raise UserError(
            f"{name} cannot be read as {kind} ({first_error_line(error)}): {way_out}."
        ) from error


def ending(file: str) -> str:
    """Return the ending of a file's name in lower case, such as `.png`; empty if it has none."""
    return os.path.splitext(file)[1].lower()


def counted(names: Counter[str]) -> str:
    """Return names with how often each occurs, the most frequent first."""
    return listed([f"{count:,} {name}" for name, count in names.most_common()])


def listed(names: list[str], most: int = 10) -> str:
    """Return names after each other, the first ones if there are more than `most`."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


def _select(filesystem: pafs.FileSystem, path: str) -> tuple[dict[str, int], Counter[str]]:
    """List a remote folder; return the sizes of files, and ignored names."""
    sizes, ignored = dict[str, int](), Counter[str]()
    for info in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
        file = info.path.removeprefix(path).lstrip("/")
        if info.type == pafs.FileType.File and (part := ignored_part(file)):
            ignored[part] += 1
        elif info.type == pafs.FileType.File:
            sizes[file] = info.size
    return sizes, ignored


def _walk(root: str) -> tuple[dict[str, int], Counter[str], list[str]]:
    """List a local folder; return the sizes of files, ignored names, and links left out.

    pyarrow follows links as well, but a link to a folder above it forty times.
    """
    sizes: dict[str, int] = {}
    ignored, repeated, linked = Counter[str](), list[str](), list[str]()
    visited = set[tuple[int, int]]()
    folders, linked_folders = [root], list[str]()
    while folders or linked_folders:  # links last, so that a folder has its own name
        folder = (folders or linked_folders).pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            repeated.append(os.path.relpath(folder, root))
            continue
        visited.add((status.st_dev, status.st_ino))
        inside = os.path.relpath(folder, root)
        prefix = "" if inside == os.curdir else f"{inside}/"
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if ignored_part(entry.name):
                    ignored[entry.name] += 1
                elif entry.is_dir():
                    (linked_folders if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_symlink():
                    linked.append(name)
                elif entry.is_file():
                    sizes[name] = entry.stat().st_size
    real = {os.path.realpath(os.path.join(root, file)) for file in sizes} if linked else set()
    for name in sorted(linked):
        target = os.path.realpath(os.path.join(root, name))
        if target in real or not os.path.isfile(target):
            repeated.append(name)
        else:
            real.add(target)
            sizes[name] = os.stat(target).st_size
    return sizes, ignored, sorted(repeated)
