"""The embeddings for TensorBoard's projector, as `tensorboard --logdir runs` shows them."""

import tempfile
from pathlib import Path

import torch

from cl_ray.data.dataset import RowBatch
from cl_ray.evaluation.classifier import Floats
from cl_ray.storage import RunStorage

INDEX = "tensorboard/projector_config.pbtxt"


def write_projector(
    folder: RunStorage,
    step: int,
    components: Floats,
    rows: RowBatch,
    labels: list[str] | None,
    split: str,
) -> None:
    """Put embeddings beside the run's events; those of other steps stay to compare with.

    Args:
        folder: The run folder.
        step: Steps that the networks were trained for.
        components: [n, d]; principal components, as the browser is slow with a thousand numbers.
        rows: The n images, shown as the points.
        labels: What their labels are called; None if they have none.
        split: Which images they are.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
    from torch.utils.tensorboard import SummaryWriter

    header = ["id", "label"] if labels else ["id", "split"]
    metadata = [
        list(r) for r in zip(rows.id.tolist(), labels or [split] * len(rows.id), strict=True)
    ]
    colour = torch.from_numpy(rows.image).permute(0, 3, 1, 2).float() / 255
    with tempfile.TemporaryDirectory() as place:
        # A writer of its own place: one in the run's would leave an empty file of events each time.
        writer = SummaryWriter(place)
        writer.add_embedding(
            torch.from_numpy(components), metadata, colour.expand(-1, 3, -1, -1), step,
            tag="discriminator", metadata_header=header,
        )  # fmt: skip
        writer.close()
        new = text_format.Parse((Path(place) / Path(INDEX).name).read_text(), ProjectorConfig())
        for file in Path(place).rglob("*"):
            if file.is_file() and file.suffix in (".tsv", ".png"):
                folder.write(f"tensorboard/{file.relative_to(place)}", file.read_bytes())
    index = text_format.Parse((folder.read(INDEX) or b"").decode(), ProjectorConfig())
    others = [e for e in index.embeddings if e.tensor_path != new.embeddings[0].tensor_path]
    new.embeddings.extend(others)
    folder.write(INDEX, text_format.MessageToString(new).encode())
