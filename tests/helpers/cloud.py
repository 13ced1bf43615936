"""A cloud on this machine: moto plays EC2, IAM and S3, and every instance is a fake machine."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import boto3

from helpers.machines import GATEWAY, Machines, stop
from helpers.processes import wait_for

REGION = "us-west-2"
ENDPOINT = f"http://{GATEWAY}:5555"
BUCKET = "our-runs"
AWS_ENVIRONMENT = {
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Cloud:
    """Boots a machine for every instance in moto, and kills it when the instance ends.

    Args:
        folder: Scratch folder for the client's home and temporary files, and for logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.machines = Machines(folder / "machines", AWS_ENVIRONMENT)
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        (folder / "ray").mkdir()
        server = Path(__file__).with_name("moto_cloud.py")
        with (folder / "moto.log").open("wb") as log:
            self.moto = subprocess.Popen(
                [sys.executable, str(server), "-H", GATEWAY, "-p5555"],
                env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.ec2 = self.client("ec2")
        self.killed: set[str] = set()
        """Instances whose machine a test killed; EC2 notices a little later."""
        self._closed = threading.Event()
        self._follower = threading.Thread(target=self._follow_instances, daemon=True)
        wait_for(self._moto_answers, "moto", 0.5, seconds=60)
        self._follower.start()

    def client(self, service: str) -> Any:
        """A boto3 client of one of the cloud's services."""
        return boto3.client(
            service, endpoint_url=ENDPOINT, region_name=REGION,
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the user's commands."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **AWS_ENVIRONMENT,
            "HOME": str(self.home),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
        }

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """EC2's description of the instances in these states (default: alive), oldest first."""
        found = [
            instance
            for reservation in self.ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
            if instance["State"]["Name"] in (states or ("pending", "running"))
        ]
        return sorted(found, key=lambda instance: instance["LaunchTime"])

    def kill(self, instance: str) -> None:
        """Kill a machine as a spot interruption does: first it is gone, then EC2 ends it."""
        self.machines.kill(machine_name(instance))
        self.killed.add(instance)
        self.ec2.terminate_instances(InstanceIds=[instance])

    def _moto_answers(self) -> bool:
        try:
            self.ec2.describe_instances()
        except Exception:
            return False
        return True

    def _follow_instances(self) -> None:
        booted: set[str] = set()
        while not self._closed.wait(1):
            alive = {instance["InstanceId"]: instance for instance in self.instances()}
            for identity in alive.keys() - booted:
                self._boot(alive[identity])
            for identity in booted - alive.keys() - self.killed:
                self.machines.kill(machine_name(identity))
            booted = set(alive)

    def _boot(self, instance: dict[str, Any]) -> None:
        keys = self.ec2.describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)
        addresses = [instance["PrivateIpAddress"]]
        if instance.get("PublicIpAddress"):
            addresses.append(instance["PublicIpAddress"])
        name = machine_name(instance["InstanceId"])
        self.machines.boot(name, keys["KeyPairs"][0]["PublicKey"], "ubuntu", *addresses)

    def close(self) -> None:
        """End all machines and moto."""
        self._closed.set()
        if self._follower.is_alive():
            self._follower.join()
        self.machines.close()
        stop(self.moto)


class Bucket:
    """The bucket to which the cloud's runs are written."""

    def __init__(self, cloud: Cloud):
        self.client = cloud.client("s3")

    def files(self) -> dict[str, int]:
        """Key and size of each object."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read(self, key: str) -> bytes:
        """An object's bytes; none if it does not exist."""
        try:
            return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return b""

    def epochs(self) -> list[int]:
        """The epochs in the run's metrics."""
        lines = self.read("runs/first/metrics.jsonl").splitlines()
        return [json.loads(line)["epoch"] for line in lines]

    def checkpoints(self) -> list[str]:
        """The names of the run's checkpoints, oldest first."""
        prefix = "runs/first/checkpoints/"
        names = {
            key.removeprefix(prefix).partition("/")[0] for key in self.files() if prefix in key
        }
        return sorted(name for name in names if name.startswith("step-"))


def machine_name(instance: str) -> str:
    """A name for an instance's machine, short enough for a host name."""
    return f"m{instance[2:10]}"
