"""Read the files of zip and tar archives where they lie: nothing is unpacked to a disk."""

import bz2
import gzip
import io
import posixpath
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import IO, Any, cast

from cl_ray.data.file_tree import FileTree, Note, counted, damage_errors, ignored_part, listed
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.splits import SPLIT_NAMES, find_file_splits
from cl_ray.errors import UserError

_ARCHIVE = re.compile(r"\.(zip|npz|tar|tgz|tbz2?|tar\.(gz|bz2))$", re.IGNORECASE)
_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
"""By the first two bytes of a compressed tar. xz and LZMA may ask for gigabytes of memory."""
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2}
_OPEN_ZIPS = 8
"""Zip archives that are open at once; each of the threads that read may be in another one."""
_MAX_HEADER = 2**20
"""Bytes of a tar that are read at once as a header."""
_MAX_RATIO, _MAX_SMALL = 100, 2**28
"""A tar is at most as many times larger than its compressed file, or has as many bytes."""

_Members = Iterator[tuple[str, int, Callable[[], IO[bytes]]]]
"""The name of each file of an archive, its bytes, and a function that opens it."""
_OpenZip = Callable[[str], zipfile.ZipFile]
_Decompress = Callable[[str], IO[bytes] | None]
"""Returns the content of a compressed tar; None if a tar is not compressed."""


def is_archive(file: str) -> bool:
    """Return whether a file is a zip, npz or tar archive, by its name."""
    return bool(_ARCHIVE.search(file))


def open_archives(
    tree: FileTree, archives: list[str], config: SourceConfig, note: Note
) -> FileTree:
    """Replace archives by the files in them, in their order there.

    Where archives are named as splits, and `config.splits` is `auto`, the splits are the top
    folders of the layout; else the names of archives do not matter.

    Raises:
        UserError: An archive cannot be read, or only some are named as splits.
    """
    splits = find_file_splits(tree.location, archives, config.splits)
    split_of = {archive: split for split, files in splits.items() for archive in files}
    open_zip = lru_cache(_OPEN_ZIPS)(lambda archive: zipfile.ZipFile(tree.open(archive)))
    decompress = lru_cache(1)(partial(_decompress, tree))  # one open stream, read in order
    sizes = {file: size for file, size in tree.sizes.items() if file not in split_of}
    layout: dict[str, str] = {}
    openers: dict[str, Callable[[], IO[bytes]]] = {}
    ignored, replaced = Counter[str](), list[str]()
    threads = tree.threads
    for archive in archives:
        inside: dict[str, str] = {}
        with damage_errors(
            f"{tree.location}/{archive}", "an archive", "copy it again, or unpack it"
        ):
            if archive.lower().endswith((".zip", ".npz")):
                members = _zip_members(tree, archive, open_zip)
            else:
                threads = 1 if decompress(archive) else threads
                members = _tar_members(tree, archive, decompress, ignored)
            for name, size, opener in members:
                # "./a", "/a" and Windows' "a\b". A name is never a path on a disk.
                path = posixpath.normpath(name.replace("\\", "/")).lstrip("/")
                if part := ignored_part(path):
                    ignored[part] += 1
                    continue
                file = f"{archive}/{path}"
                if file in inside:
                    replaced.append(file)
                inside[file], sizes[file], openers[file] = path, size, opener
        # A file beside the folders, such as README.txt or labels.csv, is in no split.
        tops = {path.split("/")[0].lower() for path in inside.values() if "/" in path}
        split = split_of[archive]
        if len(splits) > 1 and {SPLIT_NAMES.get(top) for top in tops} != {split}:
            inside = {file: f"{split}/{path}" for file, path in inside.items()}
        layout |= inside
    if ignored:
        note(f"Left out of archives, as hidden, thumbnails or links: {counted(ignored)}.")
    if replaced:
        note(f"Left out of archives, as later files have the same name: {listed(replaced)}.")

    def opened(file: str) -> IO[bytes]:
        return openers[file]() if file in openers else tree.open(file)

    return replace(tree, sizes=sizes, open=opened, layout=layout, threads=threads)


def _zip_members(tree: FileTree, archive: str, open_zip: _OpenZip) -> _Members:
    def opened(info: zipfile.ZipInfo) -> IO[bytes]:
        return open_zip(archive).open(info)

    for info in open_zip(archive).infolist():
        if info.flag_bits & 1 or info.compress_type not in _ZIP_METHODS:
            how = "encrypted" if info.flag_bits & 1 else f"packed by method {info.compress_type}"
            raise UserError(f"{tree.location}/{archive}/{info.filename} is {how}: unpack it first.")
        if not info.is_dir():  # threads may open members at once
            yield _zip_name(info), info.file_size, partial(opened, info)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a file; many programs write UTF-8 without saying so (APPNOTE 4.4.4)."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _tar_members(
    tree: FileTree, archive: str, decompress: _Decompress, ignored: Counter[str]
) -> _Members:
    def read(offset: int, size: int) -> IO[bytes]:
        stream = decompress(archive)
        if stream is not None:
            stream.seek(offset)
            return io.BytesIO(stream.read(size))
        with tree.open(archive) as plain:
            plain.seek(offset)
            return io.BytesIO(plain.read(size))

    packed = decompress(archive)
    limit = tree.sizes[archive]
    if packed is not None:
        limit = max(_MAX_RATIO * limit, _MAX_SMALL)
    with tree.open(archive) as plain:
        stream = _BoundedStream(packed or plain, limit)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # else all headers stay in memory
                if member.issparse():
                    raise UserError(
                        f"{tree.location}/{archive}/{member.name} is sparse: unpack it first."
                    )
                if member.isreg():
                    yield member.name, member.size, partial(read, member.offset_data, member.size)
                elif not member.isdir():
                    ignored[posixpath.basename(member.name)] += 1
            stream.seek(tar.offset)
            end = stream.read(tarfile.BLOCKSIZE)
            if end.strip(b"\0") or not end:  # tarfile stops there without an error
                raise tarfile.ReadError(f"it is damaged or cut at byte {tar.offset:,}")


def _decompress(tree: FileTree, archive: str) -> IO[bytes] | None:
    with tree.open(archive) as stream:
        opener = _DECOMPRESSORS.get(stream.read(2))
    return opener(tree.open(archive)) if opener else None


class _BoundedStream:
    """A stream of an archive, in which a header cannot ask for more memory or time than is due."""

    def __init__(self, stream: IO[bytes], limit: int):
        self._stream, self._limit = stream, limit
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

    def seek(self, position: int) -> None:
        if position > self._limit:
            raise tarfile.ReadError(
                f"it ends early, or unpacks to more than {_MAX_RATIO} times its size"
            )
        self._stream.seek(position)
