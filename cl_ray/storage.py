"""Locations of files: local paths and URIs of any pyarrow filesystem, and the run folder."""

import contextlib
import errno
import os
import re
import socket
import tempfile
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs

from cl_ray.errors import StorageError, UserError, first_error_line
from cl_ray.uri import uri_problem

LEASE_FILE = ".lease"
"""File of the folder of a run, a search or a trial that names the process that may write there."""


def open_filesystem(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the filesystem of a local path or a URI such as `s3://bucket/key`, and the path on it.

    Raises:
        UserError: The URI's filesystem is unknown or cannot be reached, or it may hold a secret.
    """
    return _connect(absolute_location(location))


@lru_cache(maxsize=32)
def _connect(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" not in location:
        return pyarrow.fs.LocalFileSystem(), location
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(location)
    except ImportError as error:  # of fsspec, or of the library that it needs for the scheme
        library = "huggingface_hub" if location.startswith("hf://") else "fsspec"
        raise UserError(
            f"{location} needs a library that is not installed ({first_error_line(error)}): "
            f"`pip install {library}`."
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{location} cannot be opened: {first_error_line(error)}.") from error
    return filesystem, path.rstrip("/")


def absolute_location(location: str) -> str:
    """Return a location that means the same in any working directory.

    Raises:
        UserError: It is a URI that may hold a secret.
    """
    if problem := uri_problem(location):
        raise UserError(f"The URI {problem}.")
    if "://" in location:  # pyarrow reads ASCII only, and decodes it
        return re.sub(r"[^\x00-\x7f]+", lambda letters: quote(letters[0]), location)
    return os.path.abspath(os.path.expanduser(location))


def without_options(location: str) -> str:
    """Return a location without the options of a URI, as it is shown."""
    return location.partition("?")[0] if "://" in location else location


def write_file(path: Path, blob: bytes) -> None:
    """Write a local file, so that a crash or a power cut leaves the old content or the new one.

    When this returns, the content and the file's name are on the disk. If it fails, the old file
    is unchanged and nothing else is left.

    Raises:
        OSError: It cannot be written; the error names the file.
    """
    # Of this process: another one may write the same file, as `cl-ray evaluate` and a run do.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        create_folder(path.parent)
        with temporary.open("wb") as stream:
            stream.write(blob)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename, error.filename2 = str(path), None
        raise


def read_blob(filesystem: pyarrow.fs.FileSystem, path: str) -> bytes:
    """Return the content of a file on any filesystem."""
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_blob(filesystem: pyarrow.fs.FileSystem, path: str, blob: bytes) -> None:
    """Write a file atomically and durably: see `write_file`.

    An object store shows an object only when it is complete and durable.
    """
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        write_file(Path(path), blob)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(blob)


def create_folder(path: Path) -> None:
    """Create a local folder and its parents, which are on the disk when this returns."""
    if not path.is_dir():
        create_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Bring a local file's content, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems do not sync folders, and a folder may be writable but not readable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


class LeaseLostError(UserError):
    """Another process has taken over the folder of a run, a search or a trial."""


@dataclass(frozen=True)
class RunStorage:
    """The folder of one run, on local disk or on any pyarrow filesystem.

    Args:
        storage: Absolute path or URI of the parent folder.
        lease: The folder whose lease was taken, and what was written there; see `take_lease`.
    """

    storage: str
    name: str
    lease: "tuple[RunStorage, bytes] | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def at(cls, storage: str, name: str) -> "RunStorage":
        """Return the folder of a run; relative paths and file:// become absolute paths.

        Raises:
            UserError: The storage is a URI that may hold a secret.
        """
        storage = absolute_location(storage)
        if storage.startswith("file://"):
            storage = open_filesystem(storage)[1]
        return cls(storage, name)

    @classmethod
    def from_uri(cls, uri: "str | Path") -> "RunStorage":
        """Return the run folder at a path or URI; options (`?scheme=http`) go to the storage.

        Raises:
            UserError: It is a URI that may hold a secret.
        """
        place, mark, options = absolute_location(str(uri)), "", ""
        if "://" in place:
            place, mark, options = place.partition("?")
        storage, _, name = place.rstrip("/").rpartition("/")
        if storage.endswith(":/"):
            raise UserError(f"{place} is a whole bucket: give the run's folder in it.")
        name = unquote(name) if "://" in place else name
        return cls.at(f"{storage or '/'}{mark}{options}", name)

    @classmethod
    def existing(cls, uri: "str | Path") -> "RunStorage":
        """Return the folder of an existing run, as `from_uri` does.

        Raises:
            UserError: There is no run, or its storage cannot be reached.
        """
        folder = cls.from_uri(uri)
        try:
            found = folder.read("config.yaml") is not None
            exists = found or folder.exists()
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {first_error_line(error)}.") from error
        if not found:
            missing = "has no config.yaml" if exists else "does not exist, or is empty"
            raise UserError(f"{folder} is not a run folder: it {missing}.")
        return folder

    @property
    def remote(self) -> bool:
        """Whether it has a URI. Such storage is assumed to be shared by all nodes."""
        return "://" in self.storage

    @property
    def uri(self) -> str:
        """The path, or the URI with the storage's options (`?scheme=http`) at its end."""
        if not self.remote:
            return f"{self.storage.rstrip('/')}/{self.name}"
        place, mark, options = self.storage.partition("?")
        return f"{place.rstrip('/')}/{quote(self.name, safe='')}{mark}{options}"

    def __str__(self) -> str:
        """Return the path or URI to show, without options."""
        return without_options(self.uri)

    def open(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return the filesystem and the folder's path on it.

        Raises:
            UserError: The filesystem is unknown or cannot be reached.
        """
        return open_filesystem(self.uri)

    def create(self) -> None:
        """Create the folder and check that it is writable.

        Raises:
            UserError: It cannot be written; no file is left behind.
        """
        filesystem, path = self.open()
        try:
            if self.remote:
                filesystem.create_dir(path, recursive=True)
            self.write(".writable", b"A full disk takes an empty file.")
            filesystem.delete_file(f"{path}/.writable")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_error_line(error)
            raise UserError(
                f"storage {self.storage!r} cannot be written: {reason}; fix that or use another "
                "--storage."
            ) from error

    def subfolder(self, name: str) -> "RunStorage":
        """Return a folder in this one, under the same lease."""
        return RunStorage(self.uri, name, self.lease)

    def take_lease(self) -> "RunStorage":
        """Return the folder for this process and its workers, who alone can write to it now.

        Workers of an earlier driver, which was killed or runs on another machine, no longer can:
        every write checks that the lease is still the writer's, and so are those of folders above.
        """
        if not self.remote:
            for left in Path(self.uri).rglob(".*.new"):  # by a process that was killed
                left.unlink(missing_ok=True)
        holder = f"process {os.getpid()} on {socket.gethostname()}\n{uuid4().hex}\n".encode()
        self.write(LEASE_FILE, holder)
        return replace(self, lease=(self, holder))

    def check_lease(self) -> None:
        """Check that nobody else has taken the folder's lease, or one above it, if this one has it.

        Raises:
            LeaseLostError: Somebody has.
            StorageError: The folder is not there.
        """
        if self.lease is None:
            return
        folder, ours = self.lease
        holder = folder.read(LEASE_FILE)
        if holder is None:
            raise StorageError(
                f"{folder} is not there on {socket.gethostname()}: it was deleted, or that machine "
                "does not see it, and several need storage that all of them share: --storage "
                "s3://..., gs://... or a path that every machine mounts."
            )
        if holder != ours:
            raise LeaseLostError(
                f"{folder} was taken over by {holder.decode().partition(chr(10))[0]}, and this "
                "process stops: only one can write there."
            )
        folder.check_lease()

    def exists(self) -> bool:
        """Return whether the folder holds anything."""
        return bool(self._infos(""))

    def files(self, within: str = "") -> list[str]:
        """Return the sorted names of the files in it, or in one of its folders; none if missing."""
        return sorted(info.base_name for info in self._infos(within) if info.is_file)

    def _infos(self, within: str) -> list[pyarrow.fs.FileInfo]:
        filesystem, path = self.open()
        selector = pyarrow.fs.FileSelector(f"{path}/{within}".rstrip("/"), allow_not_found=True)
        return list(filesystem.get_file_info(selector))

    def delete(self, file: str) -> None:
        """Delete a file."""
        filesystem, path = self.open()
        filesystem.delete_file(f"{path}/{file}")

    def read(self, file: str) -> bytes | None:
        """Return a file's bytes; None if there is no such file."""
        filesystem, path = self.open()
        if not filesystem.get_file_info(f"{path}/{file}").is_file:
            return None
        return read_blob(filesystem, f"{path}/{file}")

    def write(self, file: str, blob: bytes) -> None:
        """Write a file as `write_blob` does.

        Raises:
            OSError: It cannot be written.
            LeaseLostError: Another driver has taken the folder.
        """
        self.check_lease()
        filesystem, path = self.open()
        write_blob(filesystem, f"{path}/{file}", blob)


class StorageMirror:
    """A local folder whose files are copied to the run folder by `push`.

    For a local run folder it is that folder itself. TensorBoard's events are written there: an
    object store cannot append.
    """

    def __init__(self, folder: RunStorage):
        self.folder = folder
        if folder.remote:
            self._spool = tempfile.TemporaryDirectory(prefix=f"{folder.name}-")  # ends with self
            self.path = Path(self._spool.name)
        else:
            self.path = Path(folder.uri)
        self._pushed: dict[Path, tuple[int, int]] = {}

    def push(self) -> None:
        """Upload every file that changed since the last call."""
        for file in self._files():
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._pushed.get(file) != state:
                self.folder.write(str(file.relative_to(self.path)), file.read_bytes())
                self._pushed[file] = state

    def size(self) -> int:
        """Return the bytes of the files that `push` may upload."""
        return sum(file.stat().st_size for file in self._files())

    def clear(self) -> None:
        """Delete the local copies of what was uploaded and does not change any more."""
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        return sorted(filter(Path.is_file, self.path.rglob("*"))) if self.folder.remote else []
