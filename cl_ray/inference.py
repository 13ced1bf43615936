"""Generate and embed any number of images with Ray Data and a pool of model actors.

The work is cut into parts that are a pure function of the request, each computed and written by
one actor at a time: memory does not grow with the number of images, a part is there whole or not
at all, and a command that was stopped goes on with the parts that are missing.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from cl_ray.data.dataset import Dataset, Piece, Rows
from cl_ray.errors import UserError
from cl_ray.loading import LoadedRun, load
from cl_ray.training.folder import Folder

PART = 2_000
"""Images in a part, about."""
RECORD = "made.json"
"""What a folder of parts was made of, and whether it is complete."""
ADDED = ("rows", "complete")
"""What the record says besides, once all parts are there."""

Progress = Callable[[int, int], None]
"""Called with the images done and wanted."""


class Work(Protocol):
    """Something that is made part by part; small and picklable."""

    def parts(self) -> int:
        """How many there are."""
        ...

    def rows(self) -> int:
        """Images in all of them."""
        ...

    def make(self, run: LoadedRun, part: int) -> pa.Table:
        """One part, ids and images or embeddings."""
        ...

    def record(self) -> dict[str, Any]:
        """What decides the result, in plain values."""
        ...


@dataclass(frozen=True)
class FromNoise:
    """`count` images that a seed gives."""

    count: int
    seed: int

    def parts(self) -> int:
        """How many parts."""
        return -(-self.count // PART)

    def rows(self) -> int:
        """Images in all."""
        return self.count

    def make(self, run: LoadedRun, part: int) -> pa.Table:
        """Images number PART * part on: columns id and image."""
        start = part * PART
        images = run.generate(min(PART, self.count - start), self.seed, start)
        return table(np.arange(start, start + len(images)), image=pixels(images))

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"verb": "generate", **asdict(self)}


@dataclass(frozen=True)
class Around:
    """`copies` variants of every image of a split: its latent vector, moved, and decoded."""

    dataset: Dataset
    split: str
    copies: int
    distance: float
    seed: int

    def parts(self) -> int:
        """How many parts."""
        return len(cut(self.dataset, self.split, self.copies))

    def rows(self) -> int:
        """Images in all."""
        return self.copies * self.dataset.info.splits[self.split].rows

    def make(self, run: LoadedRun, part: int) -> pa.Table:
        """Columns id (unique), image, source (the image's id) and, if there is one, label.

        The latent vector z, of mean square 1, becomes cos(a) z + sin(a) n with noise n and
        tan(a) the distance: 0 is the reconstruction, and far off it is noise's own image.
        """
        rows = read(self.dataset, self.split, part, self.copies)
        angle = np.arctan(self.distance)
        latents = run.encode(rows.image).repeat_interleave(self.copies, 0)
        ids = (rows.id[:, None] * self.copies + np.arange(self.copies)).reshape(-1)
        noise = run.noise(len(latents), self.seed, start=part * PART * self.copies)
        images = run.decode(float(np.cos(angle)) * latents + float(np.sin(angle)) * noise)
        label = None if rows.label is None else rows.label.repeat(self.copies)
        return table(ids, label, image=pixels(images), source=pa.array(rows.id.repeat(self.copies)))

    def record(self) -> dict[str, Any]:
        """Plain values."""
        fields = {k: getattr(self, k) for k in ("split", "copies", "distance", "seed")}
        return {"verb": "generate", "around": self.dataset.location, **fields}


@dataclass(frozen=True)
class Embed:
    """D's features of every image of a split."""

    dataset: Dataset
    split: str

    def parts(self) -> int:
        """How many parts."""
        return len(cut(self.dataset, self.split))

    def rows(self) -> int:
        """Images in all."""
        return self.dataset.info.splits[self.split].rows

    def make(self, run: LoadedRun, part: int) -> pa.Table:
        """Columns id, label if there is one, and embedding, float32 of a fixed size."""
        rows = read(self.dataset, self.split, part)
        features = run.embed(rows.image)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(features.reshape(-1)), features.shape[1]
        )
        return table(rows.id, rows.label, embedding=column)

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"verb": "embed", "data": self.dataset.location, "split": self.split}


def cut(dataset: Dataset, split: str, copies: int = 1) -> list[list[Piece]]:
    """The row groups of a split, in parts that make about PART images."""
    parts: list[list[Piece]] = []
    rows = PART
    for piece in dataset.pieces(split):
        if rows * copies >= PART:
            parts.append([])
            rows = 0
        parts[-1].append(piece)
        rows += piece.stop - piece.start
    return parts


def read(dataset: Dataset, split: str, part: int, copies: int = 1) -> Rows:
    """The images of one part."""
    return dataset.read(split, cut(dataset, split, copies)[part])


def pixels(images: NDArray[np.uint8]) -> pa.Array:
    """[n, H, W, C] as a column of fixed-shape tensors."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


def table(ids: NDArray[np.int64], label: Any = None, **columns: pa.Array) -> pa.Table:
    """A part's columns, id first."""
    labels = {} if label is None else {"label": pa.array(label)}
    return pa.table({"id": pa.array(ids), **labels, **columns})


class Maker:
    """An actor of the pool: holds the networks, makes and writes one part after another."""

    def __init__(self, run: str, checkpoint: str, work: Work, out: Folder, suffix: str):
        self.run = load(run, checkpoint)
        self.work, self.out, self.suffix = work, out, suffix

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Parts by number in, their numbers of images out."""
        return {"rows": np.array([self.one(int(part)) for part in batch["part"]])}

    def one(self, part: int) -> int:
        """Make a part and put it in place; its last file is what says that it is there."""
        made = self.work.make(self.run, part)
        if self.suffix == "png":
            for name, blob in pictures(made):
                self.out.write(name, blob)
            self.out.write(marker(part, "png"), b"")
        else:
            buffer = io.BytesIO()
            pq.write_table(made, buffer, compression="zstd")
            self.out.write(marker(part, "parquet"), buffer.getvalue())
        return len(made)


def marker(part: int, suffix: str) -> str:
    """The file that says that a part is there: Parquet itself, or an empty one for pictures."""
    return f"part-{part:06d}.parquet" if suffix == "parquet" else f".parts/{part:06d}"


def pictures(made: pa.Table) -> Iterator[tuple[str, bytes]]:
    """File names, in a folder a class if there are labels, and PNG files."""
    labels = made["label"].to_pylist() if "label" in made.column_names else [None] * len(made)
    images = made["image"].combine_chunks().to_numpy_ndarray()
    for number, label, image in zip(made["id"].to_pylist(), labels, images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "png")
        yield f"{'' if label is None else f'{label}/'}{number:08d}.png", buffer.getvalue()


def produce(
    run: str,
    work: Work,
    out: str,
    *,
    checkpoint: str = "last",
    actors: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make all parts that `out` does not hold yet. Ray runs already.

    Args:
        run: The run folder's path or URI.
        work: What is made.
        out: Folder or URI; a name that ends in `.parquet` becomes a folder of Parquet parts,
            which reads as one table; any other a folder of PNG files.
        checkpoint: Which of the run's; see `load`.
        actors: Most models at work at once.
        cpus: CPUs of each.
        gpus: GPUs of each, a fraction allowed.
        overwrite: Replace what is there.
        progress: Called as parts are finished.

    Returns:
        The record that is left in the folder.

    Raises:
        UserError: There is something else in `out`, or it cannot be written.
    """
    import ray.data

    loaded = load(run, checkpoint)
    record = {"run": run, "checkpoint": loaded.checkpoint, **work.record()}
    suffix = "parquet" if out.rstrip("/").endswith(".parquet") else "png"
    storage, _, name = out.rstrip("/").rpartition("/")
    folder = Folder.at(storage or ".", name)
    there = _begin(folder, record, overwrite)
    if there.get("complete"):
        return there
    missing = [p for p in range(work.parts()) if folder.read(marker(p, suffix)) is None]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    numbers = ray.data.from_items([{"part": p} for p in missing], override_num_blocks=len(missing))
    made = numbers.map_batches(
        Maker,
        fn_constructor_args=(run, loaded.checkpoint, work, folder, suffix),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    done = 0
    total = work.rows()
    for block in made.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        done += int(block["rows"].sum())
        if progress:
            progress(done, total)
    record = {**record, "rows": total, "complete": True}
    folder.write(RECORD, json.dumps(record, indent=1).encode())
    return record


def _begin(folder: Folder, record: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """What is recorded there already of the same request; something else is replaced or refused."""
    filesystem, path = folder.open()
    old = folder.read(RECORD)
    found: dict[str, Any] = json.loads(old) if old else {}
    if not overwrite and {k: v for k, v in found.items() if k not in ADDED} == record:
        return found
    there = filesystem.get_file_info(path).type == pafs.FileType.Directory
    if there and filesystem.get_file_info(pafs.FileSelector(path)):
        if not old:
            raise UserError(f"out {folder} holds other files: take another --out, or remove them.")
        if not overwrite:
            raise UserError(f"out {folder} exists: add --overwrite, or take another --out.")
        filesystem.delete_dir_contents(path)
    folder.prepare()
    folder.write(RECORD, json.dumps(record, indent=1).encode())
    return {}
