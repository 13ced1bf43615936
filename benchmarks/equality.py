"""Whether N workers take the step of one: the largest difference of a weight after five steps.

`python benchmarks/equality.py` takes five float64 steps, two of them on short batches, by one
process and by real gloo groups of two and four, for every objective, mode of pairs and number of
D's steps, and prints the largest difference of any weight of G, D or the EMA generator.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the same code as the tests'

from helpers.five_steps import CASES, largest_difference, take
from helpers.ranks import together

WORKERS = (2, 4)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    one = take(CASES)
    many = [together(take, workers, CASES)[0] for workers in WORKERS]
    heads = ["objective", "pairs", "steps of D", *(f"{n} workers" for n in WORKERS)]
    table = Table(*heads, title="largest difference of a weight to one worker's")
    for case, alone, *others in zip(CASES, one, *many, strict=True):
        differences = [largest_difference(other.weights, alone.weights) for other in others]
        shown = [f"{difference:.1e}" for difference in differences]
        table.add_row(case.objective, case.mode, str(case.d_steps), *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
