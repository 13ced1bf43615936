"""Measure whether N workers take the same step as one: the largest difference of a weight.

`python benchmarks/equality.py` takes five float64 steps, two of them on short batches, in one
process and in gloo groups of two and four, for every case of the tests.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # shares code with the tests

from helpers.five_steps import CASES, largest_difference, take_five_steps
from helpers.ranks import run_on_ranks

WORKERS = (2, 4)


def main() -> None:
    torch.set_num_threads(1)
    one = take_five_steps(CASES)
    many = [run_on_ranks(take_five_steps, workers, CASES)[0] for workers in WORKERS]
    heads = ["case", *(f"{n} workers" for n in WORKERS)]
    table = Table(*heads, title="largest difference of a weight to one worker's")
    for case, single, *others in zip(CASES, one, *many, strict=True):
        differences = [largest_difference(other.weights, single.weights) for other in others]
        table.add_row(str(case), *(f"{difference:.1e}" for difference in differences))
    Console().print(table)


if __name__ == "__main__":
    main()
