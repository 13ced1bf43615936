"""The bucket that the fake cloud's runs are written to."""

import json

from helpers.cloud import Cloud

BUCKET = "our-runs"


class Bucket:
    """What lies in the bucket."""

    def __init__(self, cloud: Cloud):
        self.client = cloud.client("s3")

    def files(self) -> dict[str, int]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read(self, key: str) -> bytes:
        try:
            return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return b""

    def epochs(self) -> list[int]:
        """The epochs that the run has written down."""
        lines = self.read("runs/first/metrics.jsonl").splitlines()
        return [json.loads(line)["epoch"] for line in lines]

    def checkpoints(self) -> list[str]:
        """The names of the run's checkpoints, oldest first."""
        start = "runs/first/checkpoints/"
        names = {key.removeprefix(start).partition("/")[0] for key in self.files() if start in key}
        return sorted(name for name in names if name.startswith("step-"))
