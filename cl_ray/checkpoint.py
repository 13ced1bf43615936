"""What a run must save to go on exactly, written whole or not at all. Free of Ray.

A checkpoint is a folder `checkpoints/step-00001407` on any pyarrow filesystem. Its manifest is
written last and names the size and digest of every file: a folder without one was cut short and
does not count. torch is imported where it is used: who only looks for checkpoints starts sooner.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs

from cl_ray.errors import UserError

WEIGHTS = {"ema_generator": "generator.safetensors", "discriminator": "discriminator.safetensors"}
"""The networks that people use, each in a file of its own; the rest is in state.pt."""


PRIOR_FILE = "prior.safetensors"
"""The density that samples are drawn from; not every checkpoint has one."""
METRIC_FILE = "figure.json"
"""What a checkpoint's figure is written to when it comes later than the checkpoint."""


GO_ON = "Go on from the one before with `--from-checkpoint"
TAKE = "Take the one before with `--checkpoint"
"""The way out of a damaged checkpoint: of `train`, and of what only looks at its networks."""


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Args:
        name: Its folder's name.
        epoch: Epochs finished.
        step: Steps taken in all.
        figure: The figure by which the best checkpoint is chosen, smaller is better; None until
            it is known.
        files: Size in bytes and SHA-256 of each file.
    """

    name: str
    epoch: int
    step: int
    figure: float | None
    files: dict[str, dict[str, Any]]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        filesystem: Where they are.
        folder: The run's folder on it.
        keep: How many of the newest are kept; the best is kept besides.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, folder: str, keep: int = 3):
        self.filesystem, self.folder, self.keep = filesystem, f"{folder}/checkpoints", keep
        self.held: set[str] = set()
        """Names of those that are kept until `rate` has their figure."""

    def save(self, state: Mapping[str, Any], *, epoch: int, step: int, figure: float | None) -> str:
        """Write a checkpoint, then let go of those no longer kept.

        Args:
            state: `Run.state_dict()`.
            epoch: Epochs finished.
            step: Steps taken in all; names the checkpoint.
            figure: Smaller is better; None where there is none yet.

        Returns:
            The checkpoint's name.
        """
        import safetensors.torch
        import torch

        name = f"step-{step:08d}"
        self._withdraw(name)
        self.filesystem.create_dir(f"{self.folder}/{name}", recursive=True)
        gan = dict(state["gan"])
        known = ("config", "shape", "classes", "counts")
        facts = {key: state[key] for key in known} | {"step": step}
        about = {"cl_ray": json.dumps(facts)}  # one entry: safetensors writes several in any order
        blobs = {
            file: safetensors.torch.save(
                {k: v.contiguous() for k, v in gan.pop(part).items()}, metadata=about
            )
            for part, file in WEIGHTS.items()
        }
        rest = {**state, "gan": gan}
        prior = rest.pop("prior", None)
        if prior is not None:
            blobs[PRIOR_FILE] = safetensors.torch.save(prior)
        buffer = io.BytesIO()
        torch.save(rest, buffer)
        blobs["state.pt"] = buffer.getvalue()
        files = {}
        for file, blob in blobs.items():
            self._write(f"{name}/{file}", blob)
            files[file] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        manifest = {"epoch": epoch, "step": step, "figure": figure, "files": files}
        self._write(f"{name}/manifest.json", json.dumps(manifest, indent=1).encode())
        self._prune()
        return name

    def rate(self, name: str, figure: float | None) -> None:
        """Give a checkpoint the figure that was not known when it was saved, and hold it no more.

        It goes into a file beside the manifest, which is never written twice.
        """
        self.held.discard(name)
        if figure is not None and self._manifest(name):
            self._write(f"{name}/{METRIC_FILE}", json.dumps(figure).encode())
        self._prune()

    def load(self, name: str) -> dict[str, Any]:
        """The state that was saved under `name`, on the CPU.

        Raises:
            UserError: A file is missing, cut short or changed: it is named, and the newest
                whole checkpoint before it.
        """
        import safetensors.torch
        import torch

        manifest = self._known(name)
        blobs = {file: self._whole(manifest, file) for file in manifest.files}
        state = torch.load(io.BytesIO(blobs["state.pt"]), map_location="cpu", weights_only=True)
        for part, file in WEIGHTS.items():
            state["gan"][part] = safetensors.torch.load(blobs[file])
        if PRIOR_FILE in blobs:
            state["prior"] = safetensors.torch.load(blobs[PRIOR_FILE])
        return state

    def networks(self, name: str) -> dict[str, bytes]:
        """The files of the EMA generator and of D, which say of themselves what they are.

        And the one of what samples are drawn from, if the checkpoint has it.

        Raises:
            UserError: As `load` does.
        """
        manifest = self._known(name)
        wanted = [*WEIGHTS.values(), *([PRIOR_FILE] if PRIOR_FILE in manifest.files else [])]
        return {file: self._whole(manifest, file, TAKE) for file in wanted}

    def list(self) -> list[CheckpointManifest]:
        """All that were written whole, oldest first."""
        found = [self._manifest(name) for name in self.names()]
        return [manifest for manifest in found if manifest is not None]

    def names(self) -> tuple[str, ...]:
        """All that were begun, whole or not, oldest first."""
        selector = pyarrow.fs.FileSelector(self.folder, allow_not_found=True)
        names = [i.base_name for i in self.filesystem.get_file_info(selector)]
        return tuple(sorted(name for name in names if name.startswith("step-")))

    def newest(self) -> CheckpointManifest | None:
        """The one to go on from."""
        whole = self.list()
        return whole[-1] if whole else None

    def best(self) -> CheckpointManifest | None:
        """The one with the smallest figure."""
        return best_checkpoint(self.list())

    def rollback_to(self, name: str) -> None:
        """Make `name` the newest, by deleting those after it.

        Raises:
            UserError: There is no such checkpoint, or it is not whole.
        """
        self.load(name)
        for manifest in self.list():
            if manifest.name > name:
                self._delete(manifest.name)
        self._prune()

    def check(self, name: str) -> None:
        """See that every file is there in full size, without reading it.

        Raises:
            UserError: As `load` does.
        """
        manifest = self._manifest(name)
        for file, facts in (manifest.files if manifest else {}).items():
            complaint = self._complaint(name, file, facts)
            if manifest and complaint:
                raise UserError(f"{complaint}{self._way_out(manifest)}")

    def _known(self, name: str) -> CheckpointManifest:
        manifest = self._manifest(name)
        if manifest is None:
            known = ", ".join(m.name for m in self.list()) or "none"
            raise UserError(f"There is no checkpoint {name} in {self.folder}; there are: {known}.")
        return manifest

    def _whole(self, manifest: CheckpointManifest, file: str, way: str = GO_ON) -> bytes:
        """A file's bytes, seen to be those that were written."""
        facts = manifest.files[file]
        complaint = self._complaint(manifest.name, file, facts)
        if complaint:
            raise UserError(f"{complaint}{self._way_out(manifest, way)}")
        blob = self._read(f"{manifest.name}/{file}")
        if hashlib.sha256(blob).hexdigest() != facts["sha256"]:
            raise UserError(
                f"{self.folder}/{manifest.name}/{file} is not what was written (its digest "
                f"differs).{self._way_out(manifest, way)}"
            )
        return blob

    def _complaint(self, name: str, file: str, facts: dict[str, Any]) -> str | None:
        path = f"{self.folder}/{name}/{file}"
        info = self.filesystem.get_file_info(path)
        if info.type != pyarrow.fs.FileType.File:
            return f"{path} is missing."
        if info.size != facts["bytes"]:
            return f"{path} has {info.size:,} bytes of {facts['bytes']:,}: it was cut short."
        return None

    def _way_out(self, damaged: CheckpointManifest, way: str = GO_ON) -> str:
        for manifest in reversed(self.list()):
            whole = all(
                self._complaint(manifest.name, f, d) is None for f, d in manifest.files.items()
            )
            if manifest.step < damaged.step and whole:
                return f" {way} {manifest.name}`."
        return " No whole checkpoint lies before it: start again under another --name."

    def _prune(self) -> None:
        """Delete what is neither among the newest nor the best, and name the best."""
        manifests = self.list()
        best = best_checkpoint(manifests)
        kept = {m.name for m in manifests[-self.keep :]} | ({best.name} if best else set())
        kept |= self.held
        for name in self.names():
            if name not in kept:
                self._delete(name)
        if best:
            self._write("best.txt", f"{best.name}\n".encode())
        elif self.filesystem.get_file_info(f"{self.folder}/best.txt").is_file:
            self.filesystem.delete_file(f"{self.folder}/best.txt")

    def _delete(self, name: str) -> None:
        self._withdraw(name)
        # A store that keeps versions may still list a folder of which nothing is left.
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.folder}/{name}")

    def _withdraw(self, name: str) -> None:
        """Take a checkpoint's manifest away: whatever is cut short from here on, it is gone."""
        path = f"{self.folder}/{name}/manifest.json"
        if self.filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            self.filesystem.delete_file(path)

    def _manifest(self, name: str) -> CheckpointManifest | None:
        path = f"{self.folder}/{name}/manifest.json"
        if self.filesystem.get_file_info(path).type != pyarrow.fs.FileType.File:
            return None
        try:
            manifest = CheckpointManifest(
                name=name, **json.loads(self._read(f"{name}/manifest.json"))
            )
        except (ValueError, TypeError):
            return None  # its own last bytes never came: cut short as well
        path = f"{self.folder}/{name}/{METRIC_FILE}"
        if self.filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            with contextlib.suppress(ValueError):  # cut short: it has no figure yet
                return replace(
                    manifest, figure=float(json.loads(self._read(f"{name}/{METRIC_FILE}")))
                )
        return manifest

    def _read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.folder}/{path}") as stream:
            return stream.read()

    def _write(self, path: str, blob: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.folder}/{path}") as stream:
            stream.write(blob)


def best_checkpoint(manifests: list[CheckpointManifest]) -> CheckpointManifest | None:
    """The one with the smallest figure, the older of two alike; None where none has a figure."""
    rated = [(m.figure, m.step, m) for m in manifests if m.figure is not None]
    return min(rated, key=lambda r: r[:2])[2] if rated else None
