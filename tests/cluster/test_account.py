"""`cluster/aws_account.py` against moto, in a region of its own: create, create again, delete."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.ec2.exceptions import DependencyViolationError
from moto.ec2.models import EC2Backend

ROOT = Path(__file__).parent.parent.parent
REGION = "eu-central-1"


class Account:
    """Runs the script on a copy of the YAML, and asks moto for the result."""

    def __init__(self, endpoint: str, folder: Path):
        self.endpoint, self.home = f"http://{endpoint}", folder
        self.yaml = folder / "aws.yaml"
        shutil.copy(ROOT / "cluster" / "aws.yaml", self.yaml)
        self.ec2 = boto3.client("ec2", region_name=REGION, endpoint_url=self.endpoint)
        self.iam = boto3.client("iam", endpoint_url=self.endpoint)

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run the script and return its output."""
        done = subprocess.run(
            [sys.executable, "cluster/aws_account.py", *arguments, f"--yaml={self.yaml}"],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, "AWS_ENDPOINT_URL": self.endpoint, "HOME": str(self.home)},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def create(self, *flags: str) -> str:
        return self.run("create", "--bucket=of-account", "--ssh-from=203.0.113.7/32", *flags)

    def group(self) -> str | None:
        """The id of the cluster's security group."""
        found = self.ec2.describe_security_groups(
            Filters=[{"Name": "group-name", "Values": ["cl-ray"]}]
        )["SecurityGroups"]
        return found[0]["GroupId"] if found else None

    def roles(self, profile: str) -> list[str]:
        """The roles of a profile."""
        found = self.iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]
        return [role["RoleName"] for role in found["Roles"]]

    def start_instance(self) -> str:
        """Start an instance with the tags that Ray sets."""
        made = self.ec2.run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, SecurityGroupIds=[self.group()],
            TagSpecifications=[
                {
                    "ResourceType": "instance",
                    "Tags": [{"Key": "ray-cluster-name", "Value": "cl-ray"}],
                }
            ],
        )  # fmt: skip
        return str(made["Instances"][0]["InstanceId"])


@pytest.fixture(scope="module")
def account(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """Moto in this process, changed where EC2 differs: groups that are in use cannot be deleted."""
    delete = EC2Backend.delete_security_group

    def delete_like_ec2(self: Any, name: str | None = None, group_id: str | None = None) -> None:
        for interface in self.get_all_network_interfaces():
            terminated = interface.instance and interface.instance.state_code == 48
            if not terminated and group_id in [group.id for group in interface.group_set]:
                raise DependencyViolationError(f"resource {group_id} has a dependent object")
        delete(self, name, group_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EC2Backend, "delete_security_group", delete_like_ec2)
        yield Account(bucket.endpoint, tmp_path_factory.mktemp("account"))


def test_create_completes_an_interrupted_create(account: Account) -> None:
    """One that ended between creating the profile and adding its role."""
    account.iam.create_instance_profile(InstanceProfileName="cl-ray-head")
    account.create(f"--region={REGION}")
    assert account.roles("cl-ray-head") == ["cl-ray-head"]
    assert account.roles("cl-ray-worker") == ["cl-ray-worker"]
    group = account.group()
    assert group is not None
    text = account.yaml.read_text()
    assert f"region: {REGION}" in text
    assert group in text


def test_create_again_keeps_the_region_of_the_yaml(account: Account) -> None:
    before = account.group()
    assert f"security group  {before}" in account.create()
    assert f"region: {REGION}" in account.yaml.read_text()
    assert account.roles("cl-ray-head") == ["cl-ray-head"]


def test_delete_refuses_while_instances_run(account: Account) -> None:
    instance = account.start_instance()
    printed = account.run("delete", code=1)
    assert printed == f"{instance} in {REGION} still run: `ray down -y {account.yaml}` first.\n"
    assert account.roles("cl-ray-head") == ["cl-ray-head"]
    account.ec2.terminate_instances(InstanceIds=[instance])


def test_delete_reports_what_it_deleted_and_what_is_left(account: Account) -> None:
    group = account.group()
    subnet = account.ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    held = account.ec2.create_network_interface(SubnetId=subnet, Groups=[group])
    account.ec2.create_key_pair(KeyName=f"ray-autoscaler_{REGION}")
    printed = account.run("delete", "--wait=0", code=1)
    assert printed.startswith(
        f"deleted in {REGION}: profile cl-ray-head, role cl-ray-head, profile cl-ray-worker, role "
        f"cl-ray-worker, key ray-autoscaler_{REGION}\n"
    )
    assert f"left as well: security group {group}, which is in use (resource {group} has" in printed
    assert account.group() == group
    account.ec2.delete_network_interface(
        NetworkInterfaceId=held["NetworkInterface"]["NetworkInterfaceId"]
    )
    printed = account.run("delete", "--wait=0")
    assert printed.startswith(f"deleted in {REGION}: security group {group}\n")
    assert account.group() is None
    assert account.run("delete").startswith(f"deleted in {REGION}: nothing, as nothing existed")
