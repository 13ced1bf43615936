"""The folder of the results: Parquet files that read as one table, or PNG files. Free of ray.

`_manifest.json` holds the request and whether it is complete. `_parts/` exists while the folder is
incomplete: it holds temporary files and, for PNG, an empty marker file for each finished part.
Readers of Parquet folders skip names that begin with `_`.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import absolute_location, open_filesystem, sync, without_options

FileContent: TypeAlias = bytes | pa.Table
"""The content of a file: bytes as they are, or a table that becomes Parquet."""

MANIFEST, PARTS, TEMPORARY = "_manifest.json", "_parts", ".tmp"
OWN_FILES = re.compile(rf"{MANIFEST}|_\w+\.png|{PARTS}(/.*)?|part-\d+\.parquet|([^/]+/)?\d+\.png")
"""Names that `OutputFolder` may have written; `_NAME.png` is a picture beside Parquet files."""
IMAGE_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "column_encoding": {"image.list.element": "BYTE_STREAM_SPLIT"},
}
"""Parquet options for images, the same as in `cl_ray.data.writer`."""
FEATURE_PARQUET: dict[str, Any] = {"compression": "none", "write_statistics": ["id", "label"]}
"""Parquet options for embeddings: the best codec saves 15 % and takes as long again as writing."""


@dataclass(frozen=True)
class OutputFolder:
    """A results folder at an absolute path or a URI; picklable, as every actor writes to it."""

    location: str

    @classmethod
    def resolve(cls, out: str) -> "OutputFolder":
        """Return the folder that a user names.

        Raises:
            UserError: It is a file, or its filesystem is unknown or unreachable.
        """
        filesystem, path = open_filesystem(absolute_location(out))
        with _as_user_error(f"{out} cannot be read"):
            if filesystem.get_file_info(path).type == pafs.FileType.File:
                raise UserError(f"out {out} is a file: give a folder, or a name that is free.")
        return cls(absolute_location(out))

    def __str__(self) -> str:
        return without_options(self.location)

    @property
    def parquet(self) -> bool:
        """Whether it holds Parquet files, not PNG."""
        return open_filesystem(self.location)[1].endswith(".parquet")

    @property
    def local(self) -> bool:
        """Whether it is a local path, not an object store."""
        return isinstance(open_filesystem(self.location)[0], pafs.LocalFileSystem)

    def claim(self, request: dict[str, Any], overwrite: bool) -> bool:
        """Start a request, all that decides what the folder holds; return whether it is complete.

        Raises:
            UserError: The folder holds the results of another request and `overwrite` is not set,
                it holds files that this command did not write, or it cannot be written.
        """
        filesystem, path = open_filesystem(self.location)
        with _as_user_error(f"out {self} cannot be written"):
            manifest = self._read_manifest()
            complete = manifest.pop("complete", False) if manifest else False
            if manifest == request:
                self._delete_temporary_files()
                return bool(complete)
            files = self._list("", recursive=True)
            for name in files:
                if manifest is None or not OWN_FILES.fullmatch(name):
                    raise UserError(
                        f"out {self} holds {name}, which this command did not write: choose "
                        "another --out."
                    )
            if manifest is not None:
                if not overwrite:
                    raise UserError(
                        f"out {self} holds the results of another request "
                        f"({_first_difference(manifest, request)}): choose another --out, or "
                        "--overwrite to replace them."
                    )
                self.write(MANIFEST, b"{}")  # so that an interrupted deletion matches no request
                for name in files:
                    if name != MANIFEST:
                        filesystem.delete_file(f"{path}/{name}")
            filesystem.create_dir(path, recursive=True)
            self._write_manifest(request, complete=False)
        return False

    def missing_parts(self, num_parts: int) -> list[int]:
        """Return the parts that are not written yet; lists the folder once."""
        names = self._list("" if self.parquet else f"/{PARTS}")
        return [part for part in range(num_parts) if self._marker(part) not in names]

    def part_files(
        self, part: int, table: pa.Table, class_folders: list[str] | None
    ) -> list[tuple[str, FileContent]]:
        """Return the files of a part, names and contents; the last one marks it as finished.

        For PNG, `class_folders` has the folder of each label; None uses the label's number.
        """
        if self.parquet:
            return [(self._marker(part), table)]
        return [*_png_files(table, class_folders), (self._marker(part), b"")]

    def write(self, name: str, content: FileContent) -> None:
        """Write a file atomically: a reader finds all of it or nothing."""
        filesystem, path = open_filesystem(self.location)
        target = f"{path}/{name}"
        if not self.local:  # an object store shows an object only when it is complete
            with pa.BufferOutputStream() as buffer:
                _encode(content, buffer)
            with filesystem.open_output_stream(target) as stream:
                stream.write(buffer.getvalue())
            return
        temporary = f"{path}/{PARTS}/{uuid4().hex}{TEMPORARY}"
        for file in (temporary, target):
            os.makedirs(os.path.dirname(file), exist_ok=True)
        try:
            with pa.OSFile(temporary, "wb") as sink:  # a copy in memory would double the time
                _encode(content, sink)
            # Or after a power cut a part of empty files would count as written. A PNG part is
            # marked after all its files: one `os.sync` takes less than thousands of `fsync`.
            if name.endswith(".parquet"):
                sync(Path(temporary))
            elif name.startswith(PARTS) and hasattr(os, "sync"):
                os.sync()
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def largest(self, column: str, count: int) -> list[dict[str, Any]]:
        """Return the rows with the largest values of a column of Parquet files, largest first.

        `row` is added to each, its number among all rows.
        """
        filesystem, path = open_filesystem(self.location)
        found, seen = list[pa.Table](), 0
        for name in sorted(self._list("")):
            if name.endswith(".parquet"):
                part = pq.read_table(f"{path}/{name}", filesystem=filesystem)
                number = pa.array(range(seen, seen + len(part)))
                seen += len(part)
                rows = pa.concat_tables([*found, part.append_column("row", number)])
                found = [rows.take(pc.select_k_unstable(rows, count, [(column, "descending")]))]
        return found[0].to_pylist() if found else []

    def finish(self, request: dict[str, Any]) -> None:
        """Mark the request as complete and remove `_parts`."""
        with _as_user_error(f"out {self} cannot be written"):
            if self.local:
                sync(Path(self.location))  # the names of the parts before that they are complete
            self._write_manifest(request, complete=True)
            self._remove_parts()

    def add_picture(self, name: str, png: bytes) -> None:
        """Write a picture beside the files of a complete request."""
        with _as_user_error(f"out {self} cannot be written"):
            self.write(name, png)
            self._remove_parts()

    def _remove_parts(self) -> None:
        filesystem, path = open_filesystem(self.location)
        if filesystem.get_file_info(f"{path}/{PARTS}").type == pafs.FileType.Directory:
            filesystem.delete_dir(f"{path}/{PARTS}")

    def _marker(self, part: int) -> str:
        """Name the file whose presence shows that a part is finished."""
        return f"part-{part:06d}.parquet" if self.parquet else f"{PARTS}/{part:06d}"

    def _write_manifest(self, request: dict[str, Any], complete: bool) -> None:
        self.write(MANIFEST, json.dumps({**request, "complete": complete}, indent=1).encode())

    def _read_manifest(self) -> dict[str, Any] | None:
        """Read `_manifest.json`; None where there is none, or it is no JSON object."""
        filesystem, path = open_filesystem(self.location)
        file = f"{path}/{MANIFEST}"
        if filesystem.get_file_info(file).type != pafs.FileType.File:
            return None
        with filesystem.open_input_stream(file) as stream:
            try:
                return dict(json.loads(stream.read()))
            except (ValueError, TypeError):
                return None

    def _delete_temporary_files(self) -> None:
        """Delete files that a killed actor left half-written: a full disk needs the space."""
        filesystem, path = open_filesystem(self.location)
        for name in self._list(f"/{PARTS}"):
            if name.endswith(TEMPORARY):
                with contextlib.suppress(FileNotFoundError):  # its actor was still shutting down
                    filesystem.delete_file(f"{path}/{name}")

    def _list(self, folder: str, recursive: bool = False) -> set[str]:
        """Names of the files in a folder, relative to this one."""
        filesystem, path = open_filesystem(self.location)
        selector = pafs.FileSelector(f"{path}{folder}", recursive=recursive, allow_not_found=True)
        return {
            info.path.removeprefix(f"{path}/")
            for info in filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        }


def class_folder_names(classes: list[str] | None) -> list[str] | None:
    """Return a folder name for each class; None (its number) if two names would be equal."""
    names = [re.sub(r"[^\w .+-]|^[._ ]|[. ]$", "-", name) for name in classes or []]
    return names if len({name.casefold() for name in names}) == len(names) > 0 else None


def _first_difference(manifest: dict[str, Any], request: dict[str, Any]) -> str:
    for key, value in request.items():
        if manifest.get(key) != value:
            return f"{key} {manifest.get(key, 'unknown')}, now {value}"
    return "of another version"


def _encode(content: FileContent, sink: pa.NativeFile) -> None:
    if isinstance(content, bytes):
        sink.write(content)
        return
    options = IMAGE_PARQUET if "image" in content.column_names else FEATURE_PARQUET
    pq.write_table(content, sink, use_dictionary=False, **options)


def _png_files(table: pa.Table, class_folders: list[str] | None) -> Iterator[tuple[str, bytes]]:
    """Encode images as PNG, in a folder for each class if there are labels.

    Where the image is from that it was made of, is PNG's text `Source`.
    """
    images = table["image"].combine_chunks().to_numpy_ndarray()
    labels, origins = (
        table[name].to_pylist() if name in table.column_names else [None] * len(table)
        for name in ("label", "origin")
    )
    numbers = table["id"].to_pylist()
    for number, label, origin, image in zip(numbers, labels, origins, images, strict=True):
        folder = "" if label is None else f"{class_folders[label] if class_folders else label}/"
        buffer, texts = io.BytesIO(), PngInfo()
        if origin is not None:
            texts.add_text("Source", origin)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture.save(buffer, "png", pnginfo=texts)
        yield f"{folder}{number:08d}.png", buffer.getvalue()


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {first_error_line(error)}.") from error
