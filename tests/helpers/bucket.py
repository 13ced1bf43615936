"""An S3 bucket on this machine, by moto's server, with a session-wide fixture."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 server with an endpoint of its own, as MinIO has."""

    endpoint: str
    client: Any

    def uri(self, key: str = "") -> str:
        return f"s3://bucket/{key}?endpoint_override={self.endpoint}&scheme=http"

    def files(self, prefix: str, deleted: bool = False) -> dict[str, bytes]:
        """All objects below a prefix, by their names after it; without the marks of folders.

        With `deleted`, also what was deleted or written over, with the version in its name.
        """
        found: dict[str, bytes] = {}
        for item in self._written(prefix):
            key, version = item["Key"], item["VersionId"]
            if not key.endswith("/") and (deleted or item["IsLatest"]):
                name = key.removeprefix(prefix) + ("" if item["IsLatest"] else f"@{version}")
                body = self.client.get_object(Bucket="bucket", Key=key, VersionId=version)
                found[name] = body["Body"].read()
        return found

    def versions(self, prefix: str) -> dict[str, int]:
        """How often each object was written."""
        return Counter(item["Key"].removeprefix(prefix) for item in self._written(prefix))

    def bytes_written(self, prefix: str) -> int:
        """How many bytes were written in all below a prefix."""
        return sum(item["Size"] for item in self._written(prefix))

    def _written(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Yield all versions of all objects below a prefix."""
        pages = self.client.get_paginator("list_object_versions")
        for page in pages.paginate(Bucket="bucket", Prefix=prefix):
            yield from page.get("Versions", [])


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    """An S3 server on this machine, with keys in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        yield Bucket(f"{host}:{port}", client)
    server.stop()
