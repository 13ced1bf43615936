"""Create what cluster/aws.yaml needs in an AWS account, and delete it again.

    python cluster/aws_account.py create --bucket my-bucket --ssh-from 203.0.113.7/32
    python cluster/aws_account.py delete

`create` may run again: existing resources are kept, rules and policies are updated, and the names
are written into cluster/aws.yaml. Both commands act in that file's region unless --region is
given. They need boto3, and credentials where boto3 looks for them.
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
"""SSM parameters in which AWS and Canonical publish the ids of their newest images."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    create_ = commands.add_parser("create", help="create what is missing and fill in the YAML")
    create_.add_argument("--bucket", required=True, help="S3 bucket for runs and data")
    create_.add_argument("--ssh-from", required=True, help="your address range, as 203.0.113.7/32")
    delete_ = commands.add_parser("delete", help="delete everything except the bucket")
    for command in (create_, delete_):
        command.add_argument("--region", help="default: the YAML's")
        command.add_argument("--yaml", type=Path, default=HERE / "aws.yaml")
    delete_.add_argument(
        "--wait", type=float, default=300, help="seconds to wait until the security group is unused"
    )
    options = parser.parse_args()
    region = options.region or read_region(options.yaml)
    if options.command == "create":
        create(options.bucket, options.ssh_from, region, options.yaml)
    else:
        delete(region, options.yaml, options.wait)


def read_region(file: Path) -> str:
    """Return the region of the YAML's cluster."""
    try:
        return str(yaml.safe_load(file.read_text())["provider"]["region"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        sys.exit(f"--yaml {file} has no region ({error!r}): give --region, or another --yaml.")


def create(bucket: str, ssh_from: str, region: str, file: Path) -> None:
    """Create bucket, security group, roles and profiles, and write their names into the YAML."""
    try:
        network = ipaddress.ip_network(ssh_from)
    except ValueError as error:
        sys.exit(f"--ssh-from {ssh_from!r} is no address range such as 203.0.113.7/32: {error}.")
    if network.prefixlen == 0:
        sys.exit(f"--ssh-from {ssh_from} is the whole world: give your own range.")
    create_bucket(bucket, region)
    values = {"BUCKET": bucket, "REGION": region, "CLUSTER": CLUSTER}
    storage = load_policy("storage", values)
    create_role(WORKER, {"storage": storage})
    create_role(HEAD, {"storage": storage, "autoscaler": load_policy("autoscaler", values)})
    create_spot_role()
    group = create_group(str(network), region)
    fill_in_yaml(file, region, group, {kind: find_image(kind, region) for kind in IMAGES})
    print(f"bucket          s3://{bucket} (private, encrypted; `delete` keeps it)")
    print(
        f"security group  {group}: SSH from {network}, all traffic between the cluster's machines"
    )
    print(f"profiles        {HEAD}, {WORKER}")
    print(f"written into    {file}")


def create_bucket(bucket: str, region: str) -> None:
    """Create a private bucket; S3 encrypts its objects by default."""
    s3 = boto3.client("s3", region_name=region)
    location = {} if region == "us-east-1" else {"LocationConstraint": region}
    try:
        configuration = {"CreateBucketConfiguration": location} if location else {}
        s3.create_bucket(Bucket=bucket, **configuration)
    except ClientError as error:
        if error_code(error) == "BucketAlreadyExists":
            sys.exit(f"--bucket {bucket} belongs to somebody else: take another name.")
        if error_code(error) != "BucketAlreadyOwnedByYou":
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


def load_policy(name: str, values: dict[str, str]) -> str:
    """Read a policy file and replace its placeholders."""
    text = (HERE / f"aws-{name}-policy.json").read_text()
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return json.dumps(json.loads(text))


def create_role(name: str, policies: dict[str, str]) -> None:
    """Create a machines' role with these policies only, and an instance profile of that name."""
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
    if created(iam.create_role, RoleName=name, AssumeRolePolicyDocument=json.dumps(trust)):
        iam.get_waiter("role_exists").wait(RoleName=name)
    for old in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        if old not in policies:
            iam.delete_role_policy(RoleName=name, PolicyName=old)
    for policy_name, document in policies.items():
        iam.put_role_policy(RoleName=name, PolicyName=policy_name, PolicyDocument=document)
    if created(iam.create_instance_profile, InstanceProfileName=name):
        iam.get_waiter("instance_profile_exists").wait(InstanceProfileName=name)
    # Also checked for an existing profile: an earlier `create` may have ended just before this.
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def create_spot_role() -> None:
    """Create the role by which EC2 runs spot instances; an account has it after its first use."""
    created(
        boto3.client("iam").create_service_linked_role,
        AWSServiceName="spot.amazonaws.com",
        exists=("InvalidInput",),  # "has been taken in this account"
    )


def create_group(ssh_from: str, region: str) -> str:
    """Create our security group in the default VPC, with exactly two rules; returns its id."""
    ec2 = boto3.client("ec2", region_name=region)
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        sys.exit(f"There is no default VPC in {region}: `aws ec2 create-default-vpc` creates one.")
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
    """Return the id of our security group, if there is one."""
    found = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [CLUSTER]}])
    return found["SecurityGroups"][0]["GroupId"] if found["SecurityGroups"] else None


def find_image(kind: str, region: str) -> str | None:
    """Return the newest image of a kind in the region; None, with a message, if it is not found."""
    try:
        found = boto3.client("ssm", region_name=region).get_parameter(Name=IMAGES[kind])
        return str(found["Parameter"]["Value"])
    except ClientError as error:
        print(f"No image found at {IMAGES[kind]} ({error_code(error)}): fill one in by hand.")
        return None


def fill_in_yaml(file: Path, region: str, group: str, images: dict[str, str | None]) -> None:
    """Write the values into the lines that are marked with `# FILLED IN`."""
    lines = file.read_text().splitlines()
    kinds = iter(images.values())  # the head's image comes first
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
    """Delete what `create` created, except the bucket, and the keys that `ray up` created."""
    ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
    running = [
        instance["InstanceId"]
        for page in ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:ray-cluster-name", "Values": [CLUSTER]}]
        )
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
        if instance["State"]["Name"] not in ("terminated", "shutting-down")
    ]
    if running:
        sys.exit(f"{', '.join(running)} in {region} still run: `ray down -y {file}` first.")
    deleted = []
    for name in (HEAD, WORKER):
        deleted_now(iam.remove_role_from_instance_profile, InstanceProfileName=name, RoleName=name)
        if deleted_now(iam.delete_instance_profile, InstanceProfileName=name):
            deleted.append(f"profile {name}")
        for policy_name in ("storage", "autoscaler"):
            deleted_now(iam.delete_role_policy, RoleName=name, PolicyName=policy_name)
        if deleted_now(iam.delete_role, RoleName=name):
            deleted.append(f"role {name}")
    key = f"ray-autoscaler_{region}"
    if ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [key]}])["KeyPairs"]:
        ec2.delete_key_pair(KeyName=key)
        deleted.append(f"key {key}")
    Path(f"~/.ssh/{key}.pem").expanduser().unlink(missing_ok=True)
    group = find_group(ec2)
    blocked = group and delete_group(ec2, group, wait)
    if group and not blocked:
        deleted.append(f"security group {group}")
    print(f"deleted in {region}: {', '.join(deleted) or 'nothing, as nothing existed'}")
    print("left: the bucket. `aws s3 rb --force s3://BUCKET` deletes it with all your runs.")
    if blocked:
        sys.exit(
            f"left as well: security group {group}, which is in use ({blocked}): try again later."
        )


def delete_group(ec2: Any, group: str, wait: float) -> str | None:
    """Delete a security group; returns EC2's message if it is still in use after the wait.

    Instances that are shutting down use it for a minute or two.
    """
    end = time.monotonic() + wait
    while True:
        try:
            ec2.delete_security_group(GroupId=group)
        except ClientError as error:
            if error_code(error) != "DependencyViolation":
                raise
            if time.monotonic() > end:
                return str(error.response["Error"]["Message"]).rstrip(".")
            time.sleep(min(10, wait))
        else:
            return None


def created(call: Any, exists: tuple[str, ...] = (), **arguments: Any) -> bool:
    """Call, and return whether that created something; not if it existed already."""
    try:
        call(**arguments)
    except ClientError as error:
        if error_code(error) in ("EntityAlreadyExists", *exists):
            return False
        raise
    return True


def deleted_now(call: Any, **arguments: Any) -> bool:
    """Call, and return whether that deleted something; not if nothing existed."""
    try:
        call(**arguments)
    except ClientError as error:
        if error_code(error) == "NoSuchEntity":
            return False
        raise
    return True


def error_code(error: ClientError) -> str:
    """Return AWS's name of the error."""
    return str(error.response["Error"]["Code"])


if __name__ == "__main__":
    main()
