"""`cl-ray data`: a torchvision data set, a folder of images or Parquet becomes a data set."""

import sys
from collections.abc import Sequence

from cl_ray.cli import INTERRUPTED, parse


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    from cl_ray.data.sources import SourceConfig, write_dataset

    source = parse(SourceConfig, arguments, prog="cl-ray data")
    from rich.console import Console

    from cl_ray.data.progress import DatasetProgress, print_dataset_summary

    console = Console()
    try:
        with DatasetProgress(console) as stages:
            info = write_dataset(source, stages.report)
    except KeyboardInterrupt:
        print("cl-ray: stopped; no data set was written.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print_dataset_summary(info, source.out, console)
