"""Locations of files: local paths and URIs of any pyarrow filesystem, and the run folder."""

import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from cl_ray.errors import UserError, first_error_line, redact_credentials


def open_filesystem(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the filesystem that holds a location, and the path on it.

    Args:
        location: A local path, or a URI such as `s3://bucket/key`.

    Raises:
        UserError: The URI's filesystem is unknown or cannot be reached.
    """
    return _connect(absolute_location(location))


@lru_cache(maxsize=32)
def _connect(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" not in location:
        return pyarrow.fs.LocalFileSystem(), location
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(location)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{location} cannot be opened: {first_error_line(error)}.") from error
    return filesystem, path.rstrip("/")


def absolute_location(location: str) -> str:
    """Return a location that means the same in any working directory."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def redact_uri(location: str) -> str:
    """Return a location without the credentials and options that a URI may carry."""
    return redact_credentials(location).partition("?")[0] if "://" in location else location


@dataclass(frozen=True)
class RunStorage:
    """The folder of one run, on local disk or on any pyarrow filesystem.

    Args:
        storage: Absolute path or URI of the parent folder.
        name: The run's name.
    """

    storage: str
    name: str

    @classmethod
    def at(cls, storage: str, name: str) -> "RunStorage":
        """Return the folder of a run; relative paths and file:// become absolute paths."""
        if storage.startswith("file://"):
            storage = open_filesystem(storage)[1]
        return cls(
            storage if "://" in storage else str(Path(storage).expanduser().absolute()), name
        )

    @classmethod
    def from_uri(cls, uri: "str | Path") -> "RunStorage":
        """Return the run folder at a path or URI; options (`?scheme=http`) go to the storage."""
        place, mark, options = str(uri).partition("?") if "://" in str(uri) else (uri, "", "")
        storage, _, name = str(place).rstrip("/").rpartition("/")
        return cls.at(f"{storage or '.'}{mark}{options}", name)

    @classmethod
    def existing(cls, uri: "str | Path") -> "RunStorage":
        """Return the folder of an existing run, as `from_uri` does.

        Raises:
            UserError: There is no run, or its storage cannot be reached.
        """
        folder = cls.from_uri(uri)
        try:
            found = folder.read("config.yaml") is not None
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {first_error_line(error)}.") from error
        if not found:
            reason = (
                "it has no config.yaml" if folder.exists() else "it does not exist, or is empty"
            )
            raise UserError(f"{folder} is not a run folder: {reason}.")
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
        return f"{place.rstrip('/')}/{self.name}{mark}{options}"

    def __str__(self) -> str:
        """Return the path or URI to show, without credentials and options."""
        return redact_uri(self.uri)

    def open(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return the filesystem and the folder's path on it.

        Raises:
            UserError: The filesystem is unknown or cannot be reached.
        """
        try:
            return open_filesystem(self.uri)
        except UserError as error:
            raise UserError(f"In --storage: {error}") from error

    def create(self) -> None:
        """Create the folder and check that it is writable.

        Raises:
            UserError: It cannot be written; no file is left behind.
        """
        filesystem, path = self.open()
        try:
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/.writable") as stream:
                stream.write(b"")
            filesystem.delete_file(f"{path}/.writable")
        except (OSError, ValueError) as error:
            raise UserError(
                f"storage {self.storage!r} cannot be written: {first_error_line(error)}; use "
                "another --storage."
            ) from error

    def exists(self) -> bool:
        """Return whether the folder holds anything."""
        filesystem, path = self.open()
        return bool(filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)))

    def read(self, file: str) -> bytes | None:
        """Return a file's bytes; None if there is no such file."""
        filesystem, path = self.open()
        if not filesystem.get_file_info(f"{path}/{file}").is_file:
            return None
        with filesystem.open_input_stream(f"{path}/{file}") as stream:
            return stream.read()

    def write(self, file: str, blob: bytes) -> None:
        """Write a file atomically: a reader sees the old content or the new one."""
        filesystem, path = self.open()
        target = f"{path}/{file}"
        if self.remote:  # an object store shows an object only when it is complete
            with filesystem.open_output_stream(target) as stream:
                stream.write(blob)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=Path(target).parent, delete=False) as stream:
            stream.write(blob)
        Path(stream.name).chmod(0o644)
        Path(stream.name).replace(target)


class StorageMirror:
    """A local folder whose files are copied to the run folder by `push`.

    For a local run folder it is that folder itself. Ray Train uploads neither metrics nor
    TensorBoard events, and an object store cannot append.
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
        if not self.folder.remote:
            return
        for file in sorted(self.path.rglob("*")):
            if file.is_file():
                state = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._pushed.get(file) != state:
                    self.folder.write(str(file.relative_to(self.path)), file.read_bytes())
                    self._pushed[file] = state
