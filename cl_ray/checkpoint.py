"""Checkpoints of a run: everything that it needs to resume exactly, written atomically.

A checkpoint is a folder `checkpoints/step-00001407` on any pyarrow filesystem. Its manifest is
written last and holds the size and digest of every file, so a folder without a manifest was not
completed and does not count. On a local disk all of it is synced before an older one is deleted.
This module is free of Ray, and imports torch only where a function needs it.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs
from pydantic import Field, ValidationError

from cl_ray.base_config import FORMAT_VERSION, BaseConfig, check_format_version
from cl_ray.errors import UserError
from cl_ray.storage import create_folder, read_blob, sync, write_blob

WEIGHTS = {"ema_generator": "generator.safetensors", "discriminator": "discriminator.safetensors"}
"""The file of each network that people use; the rest of the state is in state.pt."""
PRIOR_FILE = "prior.safetensors"
"""The fitted prior that samples are drawn from. Not every checkpoint has one."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""

_STATE_FILE = "state.pt"
_MANIFEST_FILE = "manifest.json"
_METRIC_FILE = "metric.json"
"""The metric of a checkpoint, if it is known only after the checkpoint was written."""
_BEST_FILE = "best.txt"
_DAMAGED = "damaged-"
"""Prefix of the name of a damaged checkpoint that was put aside."""
_RESUME_HINT = "Resume from the previous one with `--from-checkpoint "
_LOAD_HINT = "Load the previous one with `--checkpoint "


class CheckpointFile(BaseConfig):
    """A file of a checkpoint as its manifest records it."""

    bytes: int = Field(ge=0)
    sha256: str


class CheckpointManifest(BaseConfig):
    """The description of a complete checkpoint.

    Args:
        metric: Value that selects the best checkpoint, smaller is better; None if not known.
        metric_name: What it is the value of.
        files: Size in bytes and SHA-256 of each file.
    """

    name: str
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    metric: float | None
    metric_name: str | None = None
    files: dict[str, CheckpointFile]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        keep: Number of newest checkpoints to keep; the best one is kept as well.
        before_write: Called before a checkpoint is begun, is completed and is deleted; raises an
            error if another process may write there now.
    """

    def __init__(
        self,
        filesystem: pyarrow.fs.FileSystem,
        folder: str,
        keep: int = 3,
        before_write: Callable[[], None] = lambda: None,
    ):
        self.filesystem, self.folder, self.keep = filesystem, f"{folder}/{CHECKPOINTS}", keep
        self._before_write = before_write
        self.pinned: set[str] = set()
        """Names of checkpoints that are kept until `set_metric` is called for them."""

    def save(
        self,
        state: Mapping[str, Any],
        *,
        epoch: int,
        step: int,
        metric: float | None = None,
        metric_name: str | None = None,
    ) -> str:
        """Write a checkpoint, then delete those that are no longer kept; return its name.

        `state` is the result of `Trainer.state_dict()`; for the others see `CheckpointManifest`.

        Raises:
            OSError: It cannot be written; what was written of it is deleted.
        """
        import safetensors.torch
        import torch

        name = f"step-{step:08d}"
        gan = dict(state["gan"])
        described = ("config", "data", "shape", "classes", "counts", "predicted_labels")
        about = {key: state[key] for key in described if key in state} | {"step": step}
        # One entry, because safetensors writes several in any order.
        metadata, blobs = {"cl_ray": json.dumps(about)}, {}
        for part, file in WEIGHTS.items():
            weights = {k: v.contiguous() for k, v in gan.pop(part).items()}
            blobs[file] = safetensors.torch.save(weights, metadata)
        rest = {**state, "gan": gan}
        prior = rest.pop("prior", None)
        if prior is not None:
            blobs[PRIOR_FILE] = safetensors.torch.save(prior)
        buffer = io.BytesIO()
        torch.save(rest, buffer)
        blobs[_STATE_FILE] = buffer.getvalue()
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "epoch": epoch,
            "step": step,
            "metric": _finite(metric),
            "metric_name": metric_name,
            "files": {
                file: {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
                for file, blob in blobs.items()
            },
        }
        manifest["sha256"] = _digest(manifest)
        self._before_write()
        try:
            if name in self.names():  # of the same step, or incomplete
                self._delete(name)
            if self._is_local:
                create_folder(Path(self.folder, name))
            else:
                self.filesystem.create_dir(f"{self.folder}/{name}", recursive=True)
            for file, blob in blobs.items():
                self._write(f"{name}/{file}", blob)
            self._before_write()
            self._write(f"{name}/{_MANIFEST_FILE}", json.dumps(manifest, indent=1).encode())
        except OSError:
            with contextlib.suppress(OSError):
                self._delete(name)
            raise
        self._prune()
        return name

    def set_metric(self, name: str, metric: float | None, metric_name: str) -> None:
        """Set the metric of a checkpoint that was saved without one, and unpin it.

        The metric goes into a file of its own, because a manifest is never written twice. It is
        None if it could not be measured.
        """
        self.pinned.discard(name)
        if _finite(metric) is not None and self._manifest(name):
            fields = {"metric": metric, "metric_name": metric_name}
            self._write(f"{name}/{_METRIC_FILE}", json.dumps(fields).encode())
        self._prune()

    def load(self, name: str, hint: str = _RESUME_HINT) -> dict[str, Any]:
        """Load the state of a checkpoint to the CPU; `hint` says how to take another one.

        Raises:
            UserError: A file is missing, truncated or changed. The message names the file and
                the newest complete checkpoint before this one.
        """
        import safetensors.torch
        import torch

        manifest = self._existing(name)
        blobs = {file: self._verified(manifest, file, hint) for file in manifest.files}
        state = torch.load(io.BytesIO(blobs[_STATE_FILE]), map_location="cpu", weights_only=True)
        for part, file in WEIGHTS.items():
            state["gan"][part] = safetensors.torch.load(blobs[file])
        if PRIOR_FILE in blobs:
            state["prior"] = safetensors.torch.load(blobs[PRIOR_FILE])
        return state

    def networks(self, name: str) -> dict[str, bytes]:
        """Read the files of the EMA generator, of D and, if there is one, of the fitted prior.

        Raises:
            UserError: As `load`.
        """
        manifest = self._existing(name)
        wanted = [*WEIGHTS.values(), *([PRIOR_FILE] if PRIOR_FILE in manifest.files else [])]
        return {file: self._verified(manifest, file, _LOAD_HINT) for file in wanted}

    def metadata(self, name: str) -> dict[str, Any]:
        """Read what the EMA generator's file says of its run; see `read_metadata`.

        Raises:
            UserError: As `load`.
        """
        return read_metadata(self._verified(self._existing(name), WEIGHTS["ema_generator"]))

    def list(self) -> list[CheckpointManifest]:
        """Return all complete checkpoints, oldest first.

        Raises:
            UserError: One was written in another format.
        """
        found = [self._manifest(name) for name in self.names()]
        return [manifest for manifest in found if manifest is not None]

    def names(self) -> tuple[str, ...]:
        """Return the names of all checkpoints, complete or not, oldest first."""
        selector = pyarrow.fs.FileSelector(self.folder, allow_not_found=True, recursive=True)
        found = self.filesystem.get_file_info(selector)
        if not self._is_local:  # with versioning, folders may be listed whose files are all deleted
            found = [info for info in found if info.is_file]
        names = {info.path.removeprefix(f"{self.folder}/").partition("/")[0] for info in found}
        return tuple(sorted(name for name in names if name.startswith("step-")))

    def newest(self) -> CheckpointManifest | None:
        """Return the newest complete checkpoint, from which a run resumes."""
        manifests = self.list()
        return manifests[-1] if manifests else None

    def best(self) -> CheckpointManifest | None:
        """Return the checkpoint with the smallest metric of those with the newest one's."""
        return _best(self.list())

    def rollback_to(self, name: str) -> None:
        """Make a checkpoint the newest by deleting all later ones.

        Raises:
            UserError: There is no such checkpoint, or it is damaged.
        """
        self.load(name)
        for manifest in self.list():
            if manifest.name > name:
                self._delete(manifest.name)
        self._prune()

    def set_aside_damaged(self) -> tuple[str, ...]:
        """Rename the checkpoints that are newer than the newest undamaged one; return why.

        So a run whose newest checkpoint has decayed resumes from the one before it, also where
        nobody watches. It reads all files of these checkpoints.

        Raises:
            UserError: All are damaged, and none was renamed; or one is of another format.
        """
        damaged: dict[str, str] = {}
        resumes = None
        for name in reversed(self.names()):
            manifest = f"{self.folder}/{name}/{_MANIFEST_FILE}"
            if not self.filesystem.get_file_info(manifest).is_file:
                continue  # its writing or its deletion was interrupted
            damage = self._find_damage(name)
            if damage is None:
                resumes = name
                break
            damaged[name] = damage
        if not damaged:
            return ()
        if resumes is None:
            raise UserError(
                f"All checkpoints of {self.folder} are damaged: {' '.join(damaged.values())} Put "
                "back a copy of one, or start a new run with another --name."
            )
        notes = tuple(
            f"{damage} The checkpoint is put aside as {self._set_aside(name)}, and the run goes on "
            f"from {resumes}."
            for name, damage in damaged.items()
        )
        self._prune()
        return notes

    def _find_damage(self, name: str) -> str | None:
        """Describe what is wrong with a checkpoint that was complete once; None if nothing is."""
        try:
            manifest = self._manifest(name)
            if manifest is None:
                return f"{self.folder}/{name}/{_MANIFEST_FILE} has changed."
            for file in manifest.files:
                if damage := self._file_damage(manifest, file)[0]:
                    return damage
        except OSError as error:
            if error.errno != errno.EIO:  # others, as a network's, may pass
                raise
            return f"{self.folder}/{name} cannot be read (the disk reports an error)."
        return None

    def _set_aside(self, name: str) -> str:
        """Rename a checkpoint so that it no longer counts; return the new name."""
        selector = pyarrow.fs.FileSelector(self.folder)
        taken = {info.base_name for info in self.filesystem.get_file_info(selector)}
        aside, number = f"{_DAMAGED}{name}", 1
        while aside in taken:
            aside, number = f"{_DAMAGED}{name}-{number}", number + 1
        if self._is_local:
            self.filesystem.move(f"{self.folder}/{name}", f"{self.folder}/{aside}")
            sync(Path(self.folder))
            return aside
        self.filesystem.create_dir(f"{self.folder}/{aside}")  # an object store renames files only
        files = self.filesystem.get_file_info(pyarrow.fs.FileSelector(f"{self.folder}/{name}"))
        for info in sorted(files, key=lambda info: info.base_name != _MANIFEST_FILE):
            self.filesystem.move(info.path, f"{self.folder}/{aside}/{info.base_name}")
        self._delete(name)
        return aside

    def _existing(self, name: str) -> CheckpointManifest:
        manifest = self._manifest(name)
        if manifest is None:
            known = ", ".join(m.name for m in self.list()) or "none"
            raise UserError(f"There is no checkpoint {name} in {self.folder}; there are: {known}.")
        return manifest

    def _verified(self, manifest: CheckpointManifest, file: str, hint: str = _RESUME_HINT) -> bytes:
        """Read a file and compare its size and digest with the manifest's."""
        damage, blob = self._file_damage(manifest, file)
        if damage:
            raise UserError(f"{damage}{self._alternative(manifest, hint)}")
        return blob

    def _file_damage(self, manifest: CheckpointManifest, file: str) -> tuple[str | None, bytes]:
        """Read a file; return what is wrong with it, if anything, and its content."""
        damage = self._damage(manifest, file)
        if damage:
            return damage, b""
        blob = self._read(f"{manifest.name}/{file}")
        if hashlib.sha256(blob).hexdigest() == manifest.files[file].sha256:
            return None, blob
        return f"{self.folder}/{manifest.name}/{file} has changed (its digest differs).", blob

    def _damage(self, manifest: CheckpointManifest, file: str) -> str | None:
        """Describe a file that is missing or has another size than the manifest says."""
        path, size = f"{self.folder}/{manifest.name}/{file}", manifest.files[file].bytes
        info = self.filesystem.get_file_info(path)
        if not info.is_file:
            return f"{path} is missing."
        if info.size != size:
            return f"{path} is truncated: it has {info.size:,} of {size:,} bytes."
        return None

    def _alternative(self, damaged: CheckpointManifest, hint: str = _RESUME_HINT) -> str:
        """Suggest the newest complete checkpoint before a damaged one."""
        for manifest in reversed(self.list()):
            complete = all(self._damage(manifest, file) is None for file in manifest.files)
            if manifest.step < damaged.step and complete:
                return f" {hint}{manifest.name}`."
        return " There is no complete checkpoint before it: start a new run with another --name."

    def _prune(self) -> None:
        """Delete all but the newest, the best and the pinned checkpoints; update best.txt."""
        self._before_write()
        manifests = self.list()
        best = _best(manifests)
        kept = {m.name for m in manifests[-self.keep :]} | ({best.name} if best else set())
        kept |= self.pinned
        for name in self.names():
            if name not in kept:
                self._delete(name)
        if best:
            self._write(_BEST_FILE, f"{best.name}\n".encode())
        else:
            self._delete_file(_BEST_FILE)

    def _delete(self, name: str) -> None:
        """Delete a checkpoint, its manifest first, so that an interrupted deletion never counts."""
        if self._delete_file(f"{name}/{_MANIFEST_FILE}") and self._is_local:
            sync(Path(self.folder, name))
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.folder}/{name}")

    def _delete_file(self, path: str) -> bool:
        """Delete a file; return whether there was one."""
        try:
            self.filesystem.delete_file(f"{self.folder}/{path}")
        except FileNotFoundError:
            return False
        return True

    def _manifest(self, name: str) -> CheckpointManifest | None:
        """Read a checkpoint's manifest; None if it is missing, truncated or changed."""
        try:
            fields = dict(json.loads(self._read(f"{name}/{_MANIFEST_FILE}")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        what = f"The checkpoint {self.folder}/{name}"
        digest = fields.pop("sha256", None)
        if digest not in (None, _digest(fields)):
            return None
        check_format_version(fields.pop("format_version", 1), what)
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # missing or damaged
            fields |= json.loads(self._read(f"{name}/{_METRIC_FILE}"))
        try:
            return CheckpointManifest(name=name, **fields)
        except (ValidationError, TypeError):
            return None

    @property
    def _is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def _read(self, path: str) -> bytes:
        return read_blob(self.filesystem, f"{self.folder}/{path}")

    def _write(self, path: str, blob: bytes) -> None:
        write_blob(self.filesystem, f"{self.folder}/{path}", blob)


def read_metadata(blob: bytes) -> dict[str, Any]:
    """Return what a file of weights says of its run, from the header of safetensors.

    Returns:
        `config` as YAML, `data` (fingerprint of the data set), `shape` of an image, `classes`,
        `counts` of their training images, and `step`.
    """
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    metadata: dict[str, Any] = json.loads(header["__metadata__"]["cl_ray"])
    return metadata


def _finite(metric: float | None) -> float | None:
    """Return a metric that can be compared; NaN and Inf are not known."""
    return metric if metric is not None and math.isfinite(metric) else None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _best(manifests: list[CheckpointManifest]) -> CheckpointManifest | None:
    """Return the checkpoint with the smallest metric, the older of two equal ones; None if none.

    Those with another metric than the newest, which was changed since, are not compared.
    """
    measured = [m for m in manifests if m.metric is not None]
    alike = [m for m in measured if m.metric_name == measured[-1].metric_name]
    return min(alike, key=lambda m: (m.metric, m.step), default=None)
