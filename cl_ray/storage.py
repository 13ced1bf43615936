"""The run folder, on local disk or on any pyarrow filesystem."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs

from cl_ray.data.dataset import first_error_line, open_filesystem
from cl_ray.errors import UserError, redact_credentials


@dataclass(frozen=True)
class RunStorage:
    """One run's folder.

    Args:
        storage: Absolute path or URI of the storage.
        name: The run's name.
    """

    storage: str
    name: str

    @classmethod
    def at(cls, storage: str, name: str) -> "RunStorage":
        """The folder of a run; a relative path counts from here, and file:// is a path."""
        if storage.startswith("file://"):
            storage = open_filesystem(storage)[1]
        return cls(
            storage if "://" in storage else str(Path(storage).expanduser().absolute()), name
        )

    @classmethod
    def of(cls, where: "str | Path") -> "RunStorage":
        """The run folder that a path or URI names; a URI's options, `?scheme=http`, stay at it."""
        place, mark, options = str(where).partition("?") if "://" in str(where) else (where, "", "")
        storage, _, name = str(place).rstrip("/").rpartition("/")
        return cls.at(f"{storage or '.'}{mark}{options}", name)

    @classmethod
    def of_run(cls, where: "str | Path") -> "RunStorage":
        """The folder, as `of`, of a run that is there.

        Raises:
            UserError: It is not, or its storage is not reached.
        """
        folder = cls.of(where)
        try:
            there = folder.read("config.yaml") is not None
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {first_error_line(error)}.") from error
        if not there:
            bare = "there is no such folder, or nothing in it"
            why = "it has no config.yaml" if folder.there() else bare
            raise UserError(f"{folder} is not a run folder: {why}.")
        return folder

    @property
    def remote(self) -> bool:
        """Whether it is reached by a URI; such storage is taken to be shared by all nodes."""
        return "://" in self.storage

    @property
    def uri(self) -> str:
        """What opens it: a path, or a URI that ends in the storage's options, `?scheme=http`."""
        if not self.remote:
            return f"{self.storage.rstrip('/')}/{self.name}"
        place, mark, options = self.storage.partition("?")
        return f"{place.rstrip('/')}/{self.name}{mark}{options}"

    def __str__(self) -> str:
        """The folder as people are told of it, without the keys and options of a URI."""
        return redact_credentials(self.uri).partition("?")[0] if self.remote else self.uri

    def open(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Its filesystem, and its path on it.

        Raises:
            UserError: There is no such filesystem, or it is not reached.
        """
        try:
            return open_filesystem(self.uri)
        except UserError as error:
            raise UserError(f"In --storage: {redact_credentials(str(error))}") from error

    def prepare(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
            UserError: It cannot; nothing is left behind.
        """
        filesystem, path = self.open()
        try:
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/.writable") as stream:
                stream.write(b"")
            filesystem.delete_file(f"{path}/.writable")
        except (OSError, ValueError) as error:
            raise UserError(
                f"storage {redact_credentials(self.storage)!r} cannot be written: {_line(error)}; "
                "take another with --storage."
            ) from error

    def there(self) -> bool:
        """Whether anything lies in it."""
        filesystem, path = self.open()
        return bool(filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)))

    def read(self, file: str) -> bytes | None:
        """A file's bytes; None where there is none."""
        filesystem, path = self.open()
        if filesystem.get_file_info(f"{path}/{file}").type != pyarrow.fs.FileType.File:
            return None
        with filesystem.open_input_stream(f"{path}/{file}") as stream:
            return stream.read()

    def write(self, file: str, blob: bytes) -> None:
        """Put a file in place as a whole: a reader finds the old or the new one."""
        filesystem, path = self.open()
        target = f"{path}/{file}"
        if self.remote:  # an object store shows an object when it is complete
            with filesystem.open_output_stream(target) as stream:
                stream.write(blob)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=Path(target).parent, delete=False) as stream:
            stream.write(blob)
        Path(stream.name).chmod(0o644)
        Path(stream.name).replace(target)


class StorageMirror:
    """A local folder whose files reach the run folder: at once if that is local, else by `push`.

    Train uploads neither metrics nor events, and an object store cannot append.
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
        """Send every file that changed since the last time."""
        if not self.folder.remote:
            return
        for file in sorted(self.path.rglob("*")):
            if file.is_file():
                state = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._pushed.get(file) != state:
                    self.folder.write(str(file.relative_to(self.path)), file.read_bytes())
                    self._pushed[file] = state


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
