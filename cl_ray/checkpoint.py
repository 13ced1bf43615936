"""Checkpoints of a run: everything that it needs to resume exactly, written atomically.

A checkpoint is a folder `checkpoints/step-00001407` on any pyarrow filesystem. Its manifest is
written last and holds the size and digest of every file, so a folder without a manifest was not
completed and does not count. This module is free of Ray, and imports torch only where a function
needs it.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs

from cl_ray.base_config import FORMAT_VERSION, check_format_version
from cl_ray.errors import UserError

WEIGHTS = {"ema_generator": "generator.safetensors", "discriminator": "discriminator.safetensors"}
"""The file of each network that people use; the rest of the state is in state.pt."""
PRIOR_FILE = "prior.safetensors"
"""The fitted prior that samples are drawn from. Not every checkpoint has one."""

_STATE_FILE = "state.pt"
_MANIFEST_FILE = "manifest.json"
_METRIC_FILE = "metric.json"
"""The metric of a checkpoint, if it is known only after the checkpoint was written."""
_BEST_FILE = "best.txt"
_RESUME_HINT = "Resume from the previous one with `--from-checkpoint"
_LOAD_HINT = "Load the previous one with `--checkpoint"


@dataclass(frozen=True)
class CheckpointManifest:
    """The description of a complete checkpoint.

    Args:
        epoch: Finished epochs.
        step: Training steps since the start of the run.
        metric: Value that selects the best checkpoint, smaller is better; None if not known.
        files: Size in bytes and SHA-256 of each file.
    """

    name: str
    epoch: int
    step: int
    metric: float | None
    files: dict[str, dict[str, Any]]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        filesystem: Filesystem of the run folder.
        folder: Path of the run folder on it.
        keep: Number of newest checkpoints to keep; the best one is kept as well.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, folder: str, keep: int = 3):
        self.filesystem, self.folder, self.keep = filesystem, f"{folder}/checkpoints", keep
        self.pinned: set[str] = set()
        """Names of checkpoints that are kept until `set_metric` is called for them."""

    def save(self, state: Mapping[str, Any], *, epoch: int, step: int, metric: float | None) -> str:
        """Write a checkpoint, then delete those that are no longer kept.

        Args:
            state: The result of `Trainer.state_dict()`.
            epoch: Finished epochs.
            step: Training steps since the start of the run; gives the checkpoint its name.
            metric: Value that selects the best checkpoint, smaller is better; None if not known.

        Returns:
            The checkpoint's name.
        """
        import safetensors.torch
        import torch

        name = f"step-{step:08d}"
        self._delete_file(f"{name}/{_MANIFEST_FILE}")  # an interrupted write must not count
        self.filesystem.create_dir(f"{self.folder}/{name}", recursive=True)
        gan = dict(state["gan"])
        described = ("config", "shape", "classes", "counts")
        about = {key: state[key] for key in described} | {"step": step}
        # One entry, because safetensors writes several in any order.
        metadata = {"cl_ray": json.dumps(about)}
        blobs = {
            file: safetensors.torch.save(
                {k: v.contiguous() for k, v in gan.pop(part).items()}, metadata=metadata
            )
            for part, file in WEIGHTS.items()
        }
        rest = {**state, "gan": gan}
        prior = rest.pop("prior", None)
        if prior is not None:
            blobs[PRIOR_FILE] = safetensors.torch.save(prior)
        buffer = io.BytesIO()
        torch.save(rest, buffer)
        blobs[_STATE_FILE] = buffer.getvalue()
        files = {}
        for file, blob in blobs.items():
            self._write(f"{name}/{file}", blob)
            files[file] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "epoch": epoch,
            "step": step,
            "metric": metric,
            "files": files,
        }
        self._write(f"{name}/{_MANIFEST_FILE}", json.dumps(manifest, indent=1).encode())
        self._prune()
        return name

    def set_metric(self, name: str, metric: float | None) -> None:
        """Set the metric of a checkpoint that was saved without one, and unpin it.

        The metric goes into a file of its own, because a manifest is never written twice. It is
        None if it could not be measured.
        """
        self.pinned.discard(name)
        if metric is not None and self._manifest(name):
            self._write(f"{name}/{_METRIC_FILE}", json.dumps(metric).encode())
        self._prune()

    def load(self, name: str) -> dict[str, Any]:
        """Load the state of a checkpoint to the CPU.

        Raises:
            UserError: A file is missing, truncated or changed. The message names the file and
                the newest complete checkpoint before this one.
        """
        import safetensors.torch
        import torch

        manifest = self._existing(name)
        blobs = {file: self._verified(manifest, file) for file in manifest.files}
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

    def list(self) -> list[CheckpointManifest]:
        """Return all complete checkpoints, oldest first.

        Raises:
            UserError: One was written in another format.
        """
        found = [self._manifest(name) for name in self.names()]
        return [manifest for manifest in found if manifest is not None]

    def names(self) -> tuple[str, ...]:
        """Return the names of all checkpoints, complete or not, oldest first."""
        selector = pyarrow.fs.FileSelector(self.folder, allow_not_found=True)
        names = [i.base_name for i in self.filesystem.get_file_info(selector)]
        return tuple(sorted(name for name in names if name.startswith("step-")))

    def newest(self) -> CheckpointManifest | None:
        """Return the newest complete checkpoint, from which a run resumes."""
        manifests = self.list()
        return manifests[-1] if manifests else None

    def best(self) -> CheckpointManifest | None:
        """Return the checkpoint with the smallest metric."""
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

    def check(self, name: str) -> None:
        """Check that every file of a checkpoint exists in full size, without reading it.

        Raises:
            UserError: As `load`.
        """
        manifest = self._existing(name)
        for file in manifest.files:
            damage = self._damage(manifest, file)
            if damage:
                raise UserError(f"{damage}{self._alternative(manifest)}")

    def _existing(self, name: str) -> CheckpointManifest:
        manifest = self._manifest(name)
        if manifest is None:
            known = ", ".join(m.name for m in self.list()) or "none"
            raise UserError(f"There is no checkpoint {name} in {self.folder}; there are: {known}.")
        return manifest

    def _verified(self, manifest: CheckpointManifest, file: str, hint: str = _RESUME_HINT) -> bytes:
        """Read a file and compare its size and digest with the manifest's."""
        damage = self._damage(manifest, file)
        if not damage:
            blob = self._read(f"{manifest.name}/{file}")
            if hashlib.sha256(blob).hexdigest() == manifest.files[file]["sha256"]:
                return blob
            damage = f"{self.folder}/{manifest.name}/{file} has changed (its digest differs)."
        raise UserError(f"{damage}{self._alternative(manifest, hint)}")

    def _damage(self, manifest: CheckpointManifest, file: str) -> str | None:
        """Describe a file that is missing or has another size than the manifest says."""
        path, size = f"{self.folder}/{manifest.name}/{file}", manifest.files[file]["bytes"]
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
                return f" {hint} {manifest.name}`."
        return " There is no complete checkpoint before it: start a new run with another --name."

    def _prune(self) -> None:
        """Delete all but the newest, the best and the pinned checkpoints; update best.txt."""
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
        self._delete_file(f"{name}/{_MANIFEST_FILE}")
        # A store with versioning may still list a folder whose files are all deleted.
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.folder}/{name}")

    def _delete_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.folder}/{path}")

    def _manifest(self, name: str) -> CheckpointManifest | None:
        """Read a checkpoint's manifest; None if it is missing or truncated."""
        try:
            fields = json.loads(self._read(f"{name}/{_MANIFEST_FILE}"))
        except (FileNotFoundError, ValueError):
            return None
        what = f"The checkpoint {self.folder}/{name}"
        check_format_version(fields.pop("format_version", 1), what)
        with contextlib.suppress(FileNotFoundError, ValueError):  # missing or truncated
            fields["metric"] = float(json.loads(self._read(f"{name}/{_METRIC_FILE}")))
        return CheckpointManifest(name=name, **fields)

    def _read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.folder}/{path}") as stream:
            return stream.read()

    def _write(self, path: str, blob: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.folder}/{path}") as stream:
            stream.write(blob)


def _best(manifests: list[CheckpointManifest]) -> CheckpointManifest | None:
    """Return the checkpoint with the smallest metric, the older of two equal ones; None if none."""
    measured = [m for m in manifests if m.metric is not None]
    return min(measured, key=lambda m: (m.metric, m.step), default=None)
