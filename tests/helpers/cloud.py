"""A cloud on this machine: moto plays EC2, IAM and S3, and every instance is a fake machine."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3

from helpers.machines import GATEWAY, Machines, stop

HERE = Path(__file__).parent
REGION = "us-west-2"
ENDPOINT = f"http://{GATEWAY}:5555"
ACCESS = {
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Cloud:
    """Boots a machine for every instance that moto has, and pulls its plug when that ends.

    Args:
        folder: Scratch folder: the client's home and temporary folder lie in it, and the logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.machines = Machines(folder / "machines", ACCESS)
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        (folder / "ray").mkdir()
        with (folder / "moto.log").open("wb") as log:
            self.moto = subprocess.Popen(
                [sys.executable, str(HERE / "moto_cloud.py"), "-H", GATEWAY, "-p5555"],
                env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.ec2 = self.client("ec2")
        self.lost: set[str] = set()
        """Instances whose plug a test pulled: EC2 learns of it a little later, as the real one."""
        self._over = threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        wait_for(self._moto_answers, 60, "moto")
        self._follower.start()

    def client(self, service: str) -> Any:
        """A client of one of the cloud's services."""
        return boto3.client(
            service, endpoint_url=ENDPOINT, region_name=REGION,
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """What the user's laptop has set."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **ACCESS,
            "HOME": str(self.home),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
        }

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """What EC2 says of its instances in one of these states, oldest first."""
        found = [
            instance
            for reservation in self.ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
            if instance["State"]["Name"] in (states or ("pending", "running"))
        ]
        return sorted(found, key=lambda instance: instance["LaunchTime"])

    def unplug(self, instance: str) -> None:
        """Take a machine away as spot capacity is taken: it is gone, and EC2 ends the instance."""
        self.machines.unplug(name_of(instance))
        self.lost.add(instance)
        self.ec2.terminate_instances(InstanceIds=[instance])

    def _moto_answers(self) -> bool:
        try:
            self.ec2.describe_instances()
        except Exception:
            return False
        return True

    def _follow(self) -> None:
        up: set[str] = set()
        while not self._over.wait(1):
            live = {instance["InstanceId"]: instance for instance in self.instances()}
            for identity in live.keys() - up:
                self._boot(live[identity])
            for identity in up - live.keys() - self.lost:
                self.machines.unplug(name_of(identity))
            up = set(live)

    def _boot(self, instance: dict[str, Any]) -> None:
        keys = self.ec2.describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)
        addresses = [instance["PrivateIpAddress"]]
        if instance.get("PublicIpAddress"):
            addresses.append(instance["PublicIpAddress"])
        self.machines.boot(
            name_of(instance["InstanceId"]), keys["KeyPairs"][0]["PublicKey"], "ubuntu", *addresses
        )

    def close(self) -> None:
        """End everything."""
        self._over.set()
        if self._follower.is_alive():
            self._follower.join()
        self.machines.close()
        stop(self.moto)


def name_of(instance: str) -> str:
    """A machine's name: short enough for a host's."""
    return f"m{instance[2:10]}"


def wait_for(what: Any, seconds: float, name: str) -> Any:
    """What the call returns once it is true; the wait is a limit, no measurement.

    Raises:
        AssertionError: It never is.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{name}: nothing in {seconds} s")
