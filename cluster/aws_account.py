"""What cluster/aws.yaml needs of an AWS account: made by `create`, taken back by `delete`.

python cluster/aws_account.py create --bucket my-bucket --ssh-from 203.0.113.7/32
python cluster/aws_account.py delete

`create` may run again: what is there stays, rules and policies are set anew, and the values go
into cluster/aws.yaml. Both verbs act in that file's region unless --region names another. Needs
boto3, and credentials where boto3 looks for them.
"""

import argparse
import ipaddress
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import ClientError

HERE = Path(__file__).parent
CLUSTER = "cl-ray"
HEAD, WORKER = f"{CLUSTER}-head", f"{CLUSTER}-worker"
IMAGES = {
    "head": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "gpu": "/aws/service/deeplearning/ami/x86_64/"
    "base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
}
"""Parameters that AWS and Canonical keep at their newest images, of every region."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    create_ = verbs.add_parser("create", help="make what is missing and fill in the YAML")
    create_.add_argument("--bucket", required=True, help="S3 bucket for runs and data")
    create_.add_argument("--ssh-from", required=True, help="your address range, as 203.0.113.7/32")
    delete_ = verbs.add_parser("delete", help="delete all of it but the bucket")
    for verb in (create_, delete_):
        verb.add_argument("--region", help="default: the YAML's")
        verb.add_argument("--yaml", type=Path, default=HERE / "aws.yaml")
    delete_.add_argument(
        "--wait", type=float, default=300, help="seconds to wait for what holds the security group"
    )
    asked = parser.parse_args()
    region = asked.region or region_of(asked.yaml)
    if asked.verb == "create":
        create(asked.bucket, asked.ssh_from, region, asked.yaml)
    else:
        delete(region, asked.yaml, asked.wait)


def region_of(file: Path) -> str:
    """The region that the YAML's cluster is in."""
    try:
        return str(yaml.safe_load(file.read_text())["provider"]["region"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        sys.exit(f"--yaml {file} says no region ({error!r}): give --region, or another --yaml.")


def create(bucket: str, ssh_from: str, region: str, file: Path) -> None:
    """Make bucket, security group, roles and profiles, and write their names into the YAML."""
    try:
        network = ipaddress.ip_network(ssh_from)
    except ValueError as error:
        sys.exit(f"--ssh-from {ssh_from!r} is no address range as 203.0.113.7/32: {error}.")
    if network.prefixlen == 0:
        sys.exit(f"--ssh-from {ssh_from} is the whole world: give your own range.")
    make_bucket(bucket, region)
    values = {"BUCKET": bucket, "REGION": region, "CLUSTER": CLUSTER}
    make_role(WORKER, {"storage": policy("storage", values)})
    make_role(
        HEAD,
        {"storage": policy("storage", values), "autoscaler": policy("autoscaler", values)},
    )
    allow_spot()
    group = make_group(str(network), region)
    fill_in(file, region, group, {kind: image(kind, region) for kind in IMAGES})
    print(f"bucket          s3://{bucket} (private, encrypted; `delete` leaves it)")
    print(
        f"security group  {group}: SSH from {network}, and the cluster's machines among themselves"
    )
    print(f"profiles        {HEAD}, {WORKER}")
    print(f"written into    {file}")


def make_bucket(bucket: str, region: str) -> None:
    """A private bucket; S3 encrypts what is put there by itself."""
    s3 = boto3.client("s3", region_name=region)
    place = {} if region == "us-east-1" else {"LocationConstraint": region}
    try:
        s3.create_bucket(Bucket=bucket, **({"CreateBucketConfiguration": place} if place else {}))
    except ClientError as error:
        if code(error) == "BucketAlreadyExists":
            sys.exit(f"--bucket {bucket} belongs to somebody else: take another name.")
        if code(error) != "BucketAlreadyOwnedByYou":
            raise
    s3.put_public_access_block(
        Bucket=bucket,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )


def policy(name: str, values: dict[str, str]) -> str:
    """The policy of that file, with its capitals replaced."""
    text = (HERE / f"aws-{name}-policy.json").read_text()
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return json.dumps(json.loads(text))


def make_role(name: str, policies: dict[str, str]) -> None:
    """A role for machines with these policies and no others, in a profile of the same name."""
    iam = boto3.client("iam")
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "ec2.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        ],
    }
    if made(iam.create_role, RoleName=name, AssumeRolePolicyDocument=json.dumps(trust)):
        iam.get_waiter("role_exists").wait(RoleName=name)
    for old in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        if old not in policies:
            iam.delete_role_policy(RoleName=name, PolicyName=old)
    for policy_name, document in policies.items():
        iam.put_role_policy(RoleName=name, PolicyName=policy_name, PolicyDocument=document)
    if made(iam.create_instance_profile, InstanceProfileName=name):
        iam.get_waiter("instance_profile_exists").wait(InstanceProfileName=name)
    # Asked of one that was there as well: an earlier `create` may have ended just before this.
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def allow_spot() -> None:
    """The role by which EC2 runs spot machines; an account has it after its first use."""
    made(
        boto3.client("iam").create_service_linked_role,
        AWSServiceName="spot.amazonaws.com",
        there=("InvalidInput",),  # "has been taken in this account"
    )


def make_group(ssh_from: str, region: str) -> str:
    """Our security group in the default network; its rules are exactly two afterwards."""
    ec2 = boto3.client("ec2", region_name=region)
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        sys.exit(f"There is no default VPC in {region}: `aws ec2 create-default-vpc` makes one.")
    group = find_group(ec2)
    if group is None:
        group = ec2.create_security_group(
            GroupName=CLUSTER,
            Description="cl_ray: SSH from one range, and the cluster's own machines",
            VpcId=networks[0]["VpcId"],
            TagSpecifications=[
                {"ResourceType": "security-group", "Tags": [{"Key": "project", "Value": CLUSTER}]}
            ],
        )["GroupId"]
    rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    if rules:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    ranges = "Ipv6Ranges" if ":" in ssh_from else "IpRanges"
    cidr = "CidrIpv6" if ":" in ssh_from else "CidrIp"
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, ranges: [{cidr: ssh_from}]},
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    return str(group)


def find_group(ec2: Any) -> str | None:
    """The id of our security group, if there is one."""
    found = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [CLUSTER]}])
    return found["SecurityGroups"][0]["GroupId"] if found["SecurityGroups"] else None


def image(kind: str, region: str) -> str | None:
    """The newest image of that kind in the region; None, and a word, where it is not found."""
    try:
        found = boto3.client("ssm", region_name=region).get_parameter(Name=IMAGES[kind])
        return str(found["Parameter"]["Value"])
    except ClientError as error:
        print(f"No image found at {IMAGES[kind]} ({code(error)}): put one in by hand.")
        return None


def fill_in(file: Path, region: str, group: str, images: dict[str, str | None]) -> None:
    """Write the values into the lines that are marked for it, and leave all else as it is."""
    lines = file.read_text().splitlines()
    kinds = iter(images.values())  # the head's image stands first
    for number, line in enumerate(lines):
        if not line.endswith("# FILLED IN"):
            continue
        if "region:" in line:
            line = re.sub(r"region: \S+", f"region: {region}", line)
        elif "sg-" in line:
            line = re.sub(r"sg-\w+", group, line)
        elif "ami-" in line:
            line = re.sub(r"ami-\w+", next(kinds) or r"\g<0>", line)
        lines[number] = line
    file.write_text("\n".join(lines) + "\n")


def delete(region: str, file: Path, wait: float) -> None:
    """Take back what `create` made, but the bucket, and the keys that `ray up` made."""
    ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
    running = [
        machine["InstanceId"]
        for page in ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:ray-cluster-name", "Values": [CLUSTER]}]
        )
        for reservation in page["Reservations"]
        for machine in reservation["Instances"]
        if machine["State"]["Name"] not in ("terminated", "shutting-down")
    ]
    if running:
        sys.exit(f"{', '.join(running)} in {region} still run: `ray down -y {file}` first.")
    deleted = []
    for name in (HEAD, WORKER):
        gone(iam.remove_role_from_instance_profile, InstanceProfileName=name, RoleName=name)
        if gone(iam.delete_instance_profile, InstanceProfileName=name):
            deleted.append(f"profile {name}")
        for policy_name in ("storage", "autoscaler"):
            gone(iam.delete_role_policy, RoleName=name, PolicyName=policy_name)
        if gone(iam.delete_role, RoleName=name):
            deleted.append(f"role {name}")
    key = f"ray-autoscaler_{region}"
    if ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [key]}])["KeyPairs"]:
        ec2.delete_key_pair(KeyName=key)
        deleted.append(f"key {key}")
    Path(f"~/.ssh/{key}.pem").expanduser().unlink(missing_ok=True)
    group = find_group(ec2)
    held = group and delete_group(ec2, group, wait)
    if group and not held:
        deleted.append(f"security group {group}")
    print(f"deleted in {region}: {', '.join(deleted) or 'nothing, for nothing was there'}")
    print("left: the bucket. `aws s3 rb --force s3://BUCKET` deletes it with all your runs.")
    if held:
        sys.exit(
            f"left as well: security group {group}, which is in use ({held}): try again later."
        )


def delete_group(ec2: Any, group: str, wait: float) -> str | None:
    """Delete a security group; what EC2 says if it is still in use after so many seconds.

    Machines that are shutting down hold it for a minute or two.
    """
    end = time.monotonic() + wait
    while True:
        try:
            ec2.delete_security_group(GroupId=group)
        except ClientError as error:
            if code(error) != "DependencyViolation":
                raise
            if time.monotonic() > end:
                return str(error.response["Error"]["Message"]).rstrip(".")
            time.sleep(min(10, wait))
        else:
            return None


def made(call: Any, there: tuple[str, ...] = (), **arguments: Any) -> bool:
    """Whether the call made something; not if it was there."""
    try:
        call(**arguments)
    except ClientError as error:
        if code(error) in ("EntityAlreadyExists", *there):
            return False
        raise
    return True


def gone(call: Any, **arguments: Any) -> bool:
    """Whether the call deleted something; not if there was nothing."""
    try:
        call(**arguments)
    except ClientError as error:
        if code(error) == "NoSuchEntity":
            return False
        raise
    return True


def code(error: ClientError) -> str:
    """What AWS calls the mistake."""
    return str(error.response["Error"]["Code"])


if __name__ == "__main__":
    main()
