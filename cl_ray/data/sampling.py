"""Some rows of a split."""

import numpy as np

from cl_ray.data.dataset import Dataset, RowBatch, RowRange

GROUPS = 256
"""Row groups that are read at least, drawn at random where a split has more."""


def sample_rows(dataset: Dataset, split: str, count: int, seed: int) -> RowBatch:
    """Rows of a split drawn at random without repetition, all of them if it has no more.

    They are of GROUPS row groups, drawn at random, or as many more as it takes to have that many.
    """
    random = np.random.default_rng([seed, 1])
    pieces = dataset.pieces(split)
    most = max(GROUPS, -(-count // dataset.info.row_group) + len(dataset.info.splits[split].shards))
    groups = [pieces[i] for i in random.permutation(len(pieces))[:most]]
    places = [(group, row) for group in groups for row in range(group.stop)]
    chosen = [places[number] for number in random.permutation(len(places))[:count]]
    rows = [RowRange(group.shard, group.group, row, row + 1) for group, row in chosen]
    return dataset.read(split, rows)
