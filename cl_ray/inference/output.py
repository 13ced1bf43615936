"""The folder that is made: Parquet files that read as one table, or PNG files. Free of ray.

`_made.json` says of what, and whether it is complete. `_parts/` is there while it is being made:
it holds files on their way and, for PNG, an empty file for every part that is there. What begins
with `_` is no data to whoever reads a folder of Parquet.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image

from cl_ray.data.dataset import (
    absolute_location,
    first_error_line,
    open_filesystem,
    without_secrets,
)
from cl_ray.errors import UserError

Content: TypeAlias = bytes | pa.Table
"""What a file is to hold: as it is, or as Parquet."""

RECORD, PARTS, UNFINISHED = "_made.json", "_parts", ".new"
OURS = re.compile(rf"{RECORD}|{PARTS}(/.*)?|part-\d+\.parquet|([^/]+/)?\d+\.png")
"""What `Output` may have written."""
DISK_BLOCK = 4096
"""Bytes that a disk allots at once: a PNG file of a digit takes a whole one."""
PIXELS: dict[str, Any] = {
    "compression": "zstd",
    "column_encoding": {"image.list.element": "BYTE_STREAM_SPLIT"},
}
"""How images are written to Parquet: as in a data set, see `cl_ray.data.writer`."""
FEATURES: dict[str, Any] = {"compression": "none", "write_statistics": ["id", "label"]}
"""How embeddings are: the best codec saves 15 % of them and takes as long again as writing, and
nobody looks a number of an embedding up."""


@dataclass(frozen=True)
class Output:
    """A folder or the URI of one. Small and picklable: every actor writes to it.

    Args:
        location: An absolute path, or a URI.
    """

    location: str

    @classmethod
    def at(cls, out: str) -> "Output":
        """The folder that a user calls so.

        Raises:
            UserError: It is a file, or its filesystem is unknown or not reached.
        """
        filesystem, path = open_filesystem(absolute_location(out))
        with _wrapped(f"{out} cannot be read"):
            if filesystem.get_file_info(path).type == pafs.FileType.File:
                raise UserError(f"out {out} is a file: give a folder, or a name that is free.")
        return cls(absolute_location(out))

    def __str__(self) -> str:
        """The folder as people are told of it."""
        return without_secrets(self.location)

    @property
    def parquet(self) -> bool:
        """Whether it holds Parquet files, rather than PNG."""
        return open_filesystem(self.location)[1].endswith(".parquet")

    @property
    def local(self) -> bool:
        """Whether it lies on a disk, rather than in an object store."""
        return isinstance(open_filesystem(self.location)[0], pafs.LocalFileSystem)

    def claim(self, record: dict[str, Any], overwrite: bool) -> bool:
        """Begin what `record` describes, or find it begun; returns whether it is complete.

        Args:
            record: All that decides what the folder holds.
            overwrite: Delete what another request made here.

        Raises:
            UserError: Another request made something here and `overwrite` is not set, there are
                files that none has made, or nothing can be written.
        """
        filesystem, path = open_filesystem(self.location)
        with _wrapped(f"out {self} cannot be written"):
            found = self._record()
            if found is not None and _of(found) == record:
                self._clear_half_written()
                return bool(found["complete"])
            self._see_that_all_is_ours(found)
            if found is not None:
                if not overwrite:
                    raise UserError(
                        f"out {self} holds what another request made ({_difference(found, record)})"
                        ": take another --out, or --overwrite to replace it."
                    )
                self.put(RECORD, b"{}")  # cut short from here on, it is no one's
                for name in self._files():
                    if name != RECORD:
                        filesystem.delete_file(f"{path}/{name}")
            filesystem.create_dir(path, recursive=True)
            self._write_record(record, complete=False)
        return False

    def missing(self, parts: int) -> list[int]:
        """The parts that are not there yet, from one listing."""
        where = "" if self.parquet else f"/{PARTS}"
        there = {os.path.basename(name) for name in self._names(where)}
        return [part for part in range(parts) if os.path.basename(self.mark(part)) not in there]

    def mark(self, part: int) -> str:
        """The file whose presence says that a part is there, whole."""
        return f"part-{part:06d}.parquet" if self.parquet else f"{PARTS}/{part:06d}"

    def files(
        self, part: int, made: pa.Table, names: list[str] | None
    ) -> list[tuple[str, Content]]:
        """What a part is written as, its mark last: names and contents.

        Args:
            part: Its number.
            made: Its columns.
            names: The folder of each label, for PNG.
        """
        if not self.parquet:
            return [*_pictures(made, names), (self.mark(part), b"")]
        return [(self.mark(part), made)]

    def put(self, name: str, content: Content) -> None:
        """Put a file in place as a whole: a reader finds all of it or nothing."""
        filesystem, path = open_filesystem(self.location)
        target = f"{path}/{name}"
        if not self.local:  # an object store shows an object when it is complete
            with pa.BufferOutputStream() as whole:
                _write(content, whole)
            with filesystem.open_output_stream(target) as stream:
                stream.write(whole.getvalue())
            return
        temporary = f"{path}/{PARTS}/{uuid4().hex}{UNFINISHED}"
        for file in (temporary, target):
            os.makedirs(os.path.dirname(file), exist_ok=True)
        try:
            with pa.OSFile(temporary, "wb") as sink:  # a copy in memory costs as long again
                _write(content, sink)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def finish(self, record: dict[str, Any]) -> None:
        """Say that it is complete, and tidy up."""
        filesystem, path = open_filesystem(self.location)
        with _wrapped(f"out {self} cannot be written"):
            self._write_record(record, complete=True)
            if filesystem.get_file_info(f"{path}/{PARTS}").type == pafs.FileType.Directory:
                filesystem.delete_dir(f"{path}/{PARTS}")

    def _write_record(self, record: dict[str, Any], complete: bool) -> None:
        blob = json.dumps({**record, "complete": complete}, indent=1).encode()
        self.put(RECORD, blob)

    def _record(self) -> dict[str, Any] | None:
        """What `_made.json` says; None where there is none."""
        filesystem, path = open_filesystem(self.location)
        file = f"{path}/{RECORD}"
        if filesystem.get_file_info(file).type != pafs.FileType.File:
            return None
        with filesystem.open_input_stream(file) as stream:
            try:
                return dict(json.loads(stream.read()))
            except (ValueError, TypeError):
                return None

    def _clear_half_written(self) -> None:
        """Delete what an actor that was killed was writing: on a full disk it takes the room."""
        filesystem, path = open_filesystem(self.location)
        for name in self._names(f"/{PARTS}"):
            if name.endswith(UNFINISHED):
                with contextlib.suppress(FileNotFoundError):  # its actor had not died yet
                    filesystem.delete_file(f"{path}/{name}")

    def _see_that_all_is_ours(self, found: dict[str, Any] | None) -> None:
        for name in self._files():
            if found is None or not OURS.fullmatch(name):
                raise UserError(
                    f"out {self} holds {name}, which this command did not write: take another "
                    "--out."
                )

    def _files(self) -> list[str]:
        """All files, by their names from here."""
        return self._names("", recursive=True)

    def _names(self, where: str, recursive: bool = False) -> list[str]:
        filesystem, path = open_filesystem(self.location)
        folder = f"{path}{where}"
        selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
        return [
            info.path.removeprefix(f"{path}/")
            for info in filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        ]


def _of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "complete"}


def _difference(found: dict[str, Any], record: dict[str, Any]) -> str:
    """The first thing in which two requests differ."""
    for key, value in record.items():
        if found.get(key) != value:
            return f"{key} {found.get(key, 'unknown')}, now {value}"
    return "of another version"


def bytes_on_disk(content: Content) -> int:
    """What it takes there, about: of Parquet as much as in memory."""
    size = len(content) if isinstance(content, bytes) else content.nbytes
    return -(-size // DISK_BLOCK) * DISK_BLOCK


def _write(content: Content, sink: pa.NativeFile) -> None:
    if isinstance(content, bytes):
        sink.write(content)
        return
    layout = PIXELS if "image" in content.column_names else FEATURES
    pq.write_table(content, sink, use_dictionary=False, **layout)


def _pictures(made: pa.Table, names: list[str] | None) -> Iterator[tuple[str, bytes]]:
    """File names, in a folder a class if there are labels, and PNG files."""
    images = made["image"].combine_chunks().to_numpy_ndarray()
    labels = made["label"].to_pylist() if "label" in made.column_names else [None] * len(made)
    for number, label, image in zip(made["id"].to_pylist(), labels, images, strict=True):
        folder = "" if label is None else f"{names[label] if names else label}/"
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "png")
        yield f"{folder}{number:08d}.png", buffer.getvalue()


def folder_names(classes: list[str] | None) -> list[str] | None:
    """A folder's name for each class, from its own; None (its number) if that makes two alike."""
    names = [re.sub(r"[^\w .+-]|^[._ ]|[. ]$", "-", name) for name in classes or []]
    return names if len({name.casefold() for name in names}) == len(names) > 0 else None


@contextlib.contextmanager
def _wrapped(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {first_error_line(error)}.") from error
