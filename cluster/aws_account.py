"""Create what cluster/aws.yaml needs in an AWS account, and delete it again.

    python cluster/aws_account.py create --bucket my-bucket --ssh-from 203.0.113.7/32
    python cluster/aws_account.py delete

Names carry the YAML's `cluster_name` and the region, and everything has the tags of
`Cluster.tags`. What has such a name without these tags was made by somebody else: `create` refuses
it and `delete` leaves it. `create` may run again: what exists is kept, its rules and policies are
updated, and the names are written into the YAML. Both commands act in the YAML's region unless
--region is given. They need boto3, and credentials where boto3 looks for them.
"""

import argparse
import ipaddress
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

HERE = Path(__file__).parent
IMAGES = {
    "head": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "gpu": "/aws/service/deeplearning/ami/x86_64/"
    "base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
}
"""SSM parameters in which AWS and Canonical publish the ids of their newest images."""
SHORTEST_PREFIX = {4: 16, 6: 48}
"""The widest range that may reach SSH, by IP version: 65,536 addresses, or one site."""
PRIVATE = dict.fromkeys(
    ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
)
LIFECYCLE = {
    "ID": "cl-ray",
    "Status": "Enabled",
    "Filter": {},
    "NoncurrentVersionExpiration": {"NoncurrentDays": 7},
    "Expiration": {"ExpiredObjectDeleteMarker": True},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
}
"""What was deleted or overwritten can be restored for a week; after that it costs nothing."""


NO_GROUP, NO_IMAGE = "sg-00000000000000000", "ami-00000000000000"
"""How the YAML's lines look before they are filled in."""
Tags = list[dict[str, str]]


@dataclass(frozen=True)
class Cluster:
    """The names and tags of what one cluster has in one region."""

    name: str
    region: str
    account: str
    partition: str

    @property
    def group(self) -> str:
        """The name of its security group, and the prefix of all its names."""
        return f"{self.name}-{self.region}"

    @property
    def roles(self) -> tuple[str, str]:
        """The names of the head's and the workers' role; each has a profile of the same name."""
        return f"{self.group}-head", f"{self.group}-worker"

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which the script knows what it made."""
        return {"project": "cl-ray", "cl-ray:cluster": self.name, "cl-ray:region": self.region}

    @property
    def tag_list(self) -> Tags:
        """The tags as AWS takes them."""
        return [{"Key": key, "Value": value} for key, value in self.tags.items()]

    @property
    def ec2_service(self) -> str:
        """The principal by which EC2 takes a role."""
        return "ec2.amazonaws.com" + (".cn" if self.partition == "aws-cn" else "")

    def client(self, service: str) -> Any:
        """Return boto3's client in the region; IAM and STS are those of its partition."""
        return client(service, self.region)

    @property
    def placeholders(self) -> dict[str, Any]:
        """What the policy files name in capital letters."""
        return {
            "PARTITION": self.partition,
            "REGION": self.region,
            "ACCOUNT": self.account,
            "CLUSTER": self.name,
            "HEAD": self.roles[0],
            "WORKER": self.roles[1],
            "EC2_SERVICE": self.ec2_service,
        }

    def made(self, tags: Tags) -> bool:
        """Return whether these are the tags of something that this script made."""
        return {tag["Key"]: tag["Value"] for tag in tags}.items() >= self.tags.items()

    def require_own(self, thing: str, tags: Tags | None) -> None:
        """Refuse a thing that exists (its tags are not None) and that somebody else made."""
        if tags is not None and not self.made(tags):
            wanted = ", ".join(f"{key}={value}" for key, value in self.tags.items())
            sys.exit(
                f"{thing} exists, but this script did not make it for this cluster (it lacks the "
                f"tags {wanted}): choose another name, or add the tags if it may be changed."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    create_ = commands.add_parser("create", help="create what is missing and fill in the YAML")
    create_.add_argument("--bucket", required=True, help="S3 bucket for runs and data")
    create_.add_argument(
        "--ssh-from",
        required=True,
        help="your address range, as 203.0.113.7/32; at most a /16 (IPv6: /48)",
    )
    create_.add_argument("--vpc", help="default: the region's default VPC")
    create_.add_argument(
        "--new-images", action="store_true", help="look up the newest images, as for an empty YAML"
    )
    delete_ = commands.add_parser("delete", help="delete everything except the bucket")
    delete_.add_argument("--bucket", help="delete this bucket as well, with all runs and versions")
    delete_.add_argument(
        "--regions", nargs="+", help="where machines are looked for (default: the account's)"
    )
    delete_.add_argument(
        "--wait", type=float, default=300, help="seconds to wait until the security group is unused"
    )
    for command in (create_, delete_):
        command.add_argument("--region", help="default: the YAML's")
        command.add_argument("--yaml", type=Path, default=HERE / "aws.yaml")
    options = parser.parse_args(arguments)
    try:
        network = read_range(options.ssh_from) if options.command == "create" else ""
        cluster = read_cluster(options.yaml, options.region)
        if options.command == "create":
            create(cluster, options.bucket, network, options.vpc, options.yaml, options.new_images)
        else:
            delete(cluster, options.yaml, options.bucket, options.regions, options.wait)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"{options.command} stopped, and may be run again: {error}")


def read_range(ssh_from: str) -> str:
    """Return the address range that may reach SSH."""
    try:
        network = ipaddress.ip_network(ssh_from)
    except ValueError as error:
        sys.exit(f"--ssh-from {ssh_from!r} is no address range such as 203.0.113.7/32: {error}.")
    shortest = SHORTEST_PREFIX[network.version]
    if network.prefixlen < shortest:
        sys.exit(
            f"--ssh-from {ssh_from} admits too many addresses: give your own range, "
            f"/{shortest} or longer."
        )
    return str(network)


def read_cluster(file: Path, region: str | None) -> Cluster:
    """Return the YAML's cluster, in its region or another one."""
    try:
        config = yaml.safe_load(file.read_text())
        name, region = str(config["cluster_name"]), region or str(config["provider"]["region"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        sys.exit(f"--yaml {file} has no cluster_name or region ({error!r}): give another --yaml.")
    if not re.fullmatch(r"[\w-]{1,32}", name, re.ASCII):  # it becomes a part of names and ARNs
        sys.exit(f"cluster_name {name!r} in {file} is not 1 to 32 letters, digits, - and _.")
    partition = boto3.Session().get_partition_for_region(region)
    account = client("sts", region).get_caller_identity()["Account"]
    return Cluster(name, region, account, partition)


def create(
    cluster: Cluster, bucket: str, ssh_from: str, vpc: str | None, file: Path, new_images: bool
) -> None:
    """Create bucket, security group, roles and profiles, and write their names into the YAML."""
    # All are looked at before the first is made: a refusal leaves nothing behind.
    vpc = find_vpc(cluster, vpc)
    cluster.require_own(f"--bucket {bucket}", bucket_tags(cluster, bucket))
    for name in cluster.roles:
        cluster.require_own(f"role {name}", role_tags(cluster, name))
        cluster.require_own(f"instance profile {name}", profile_tags(cluster, name))
    group = create_group(cluster, vpc, ssh_from)
    file = fill_in_yaml(cluster, file, group, new_images)
    create_bucket(cluster, bucket)
    values = policy_values(cluster, file) | {"BUCKET": bucket, "GROUP": group, "VPC": vpc}
    storage, autoscaler = load_policy("storage", values), load_policy("autoscaler", values)
    head, worker = cluster.roles
    create_role(cluster, worker, {"storage": storage})
    create_role(cluster, head, {"storage": storage, "autoscaler": autoscaler})
    create_spot_role(cluster)
    print(f"bucket          s3://{bucket} (private, encrypted, versioned; `delete` keeps it)")
    print(
        f"security group  {group}: SSH from {ssh_from}, all traffic between the cluster's machines"
    )
    print(f"profiles        {head}, {worker}")
    print(f"written into    {file}")


def bucket_tags(cluster: Cluster, bucket: str) -> Tags | None:
    """Return the bucket's tags; None if there is no such bucket."""
    owner = {"ExpectedBucketOwner": cluster.account}
    try:
        return cluster.client("s3").get_bucket_tagging(Bucket=bucket, **owner)["TagSet"]
    except ClientError as error:
        if error_code(error) == "AccessDenied":
            sys.exit(
                f"--bucket {bucket} belongs to another account, or you may not read its tags "
                "(s3:GetBucketTagging): choose another name, or get access."
            )
        if error_code(error) not in ("NoSuchTagSet", "NoSuchBucket"):
            raise
        return [] if error_code(error) == "NoSuchTagSet" else None


def create_bucket(cluster: Cluster, bucket: str) -> None:
    """Create a private, versioned bucket that TLS alone reaches; S3 encrypts objects by default."""
    s3 = cluster.client("s3")
    if bucket_tags(cluster, bucket) is None:
        location = {"LocationConstraint": cluster.region}
        where = {} if cluster.region == "us-east-1" else {"CreateBucketConfiguration": location}
        s3.create_bucket(Bucket=bucket, **where)
        s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": cluster.tag_list})
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=PRIVATE)
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3.put_bucket_lifecycle_configuration(
        Bucket=bucket, LifecycleConfiguration={"Rules": [LIFECYCLE]}
    )
    policy = load_policy("bucket", cluster.placeholders | {"BUCKET": bucket})
    s3.put_bucket_policy(Bucket=bucket, Policy=policy)


def policy_values(cluster: Cluster, file: Path) -> dict[str, Any]:
    """Return the values of the policies' placeholders: machines are what the YAML's workers are."""
    config = yaml.safe_load(file.read_text())
    workers = [
        node["node_config"]
        for kind, node in config["available_node_types"].items()
        if kind != config["head_node_type"]
    ]
    image = f"arn:{cluster.partition}:ec2:{cluster.region}::image/"
    return cluster.placeholders | {
        "INSTANCE_TYPES": sorted({worker["InstanceType"] for worker in workers}),
        "IMAGES": sorted({image + worker["ImageId"] for worker in workers}),
    }


def load_policy(name: str, values: dict[str, Any]) -> str:
    """Read a policy file and replace its placeholders, whole strings or parts of them."""
    names = "|".join(values)

    def replace(match: re.Match[str]) -> str:
        return json.dumps(values[match[1]]) if match[1] else values[match[2]]

    text = (HERE / f"aws-{name}-policy.json").read_text()
    return json.dumps(json.loads(re.sub(rf'"({names})"|\b({names})\b', replace, text)))


def role_tags(cluster: Cluster, name: str) -> Tags | None:
    """Return the role's tags; None if there is no such role."""
    found = existing(cluster.client("iam").list_role_tags, RoleName=name)
    return None if found is None else found["Tags"]


def profile_tags(cluster: Cluster, name: str) -> Tags | None:
    """Return the instance profile's tags; None if there is no such profile."""
    found = existing(cluster.client("iam").get_instance_profile, InstanceProfileName=name)
    return None if found is None else found["InstanceProfile"].get("Tags", [])


def create_role(cluster: Cluster, name: str, policies: dict[str, str]) -> None:
    """Create a machines' role with these policies, and an instance profile of that name."""
    iam = cluster.client("iam")
    service = {"Principal": {"Service": cluster.ec2_service}}
    allow = {"Effect": "Allow", "Action": "sts:AssumeRole", **service}
    trust = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    if role_tags(cluster, name) is None:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=cluster.tag_list)
        iam.get_waiter("role_exists").wait(RoleName=name)
    for policy_name, document in policies.items():
        iam.put_role_policy(RoleName=name, PolicyName=policy_name, PolicyDocument=document)
    if profile_tags(cluster, name) is None:
        iam.create_instance_profile(InstanceProfileName=name, Tags=cluster.tag_list)
        iam.get_waiter("instance_profile_exists").wait(InstanceProfileName=name)
    # Also checked for an existing profile: an earlier `create` may have ended just before this.
    if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def create_spot_role(cluster: Cluster) -> None:
    """Create the role by which EC2 runs spot instances; an account has it after its first use."""
    try:
        cluster.client("iam").create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    except ClientError as error:
        # InvalidInput: "has been taken in this account".
        if error_code(error) not in ("EntityAlreadyExists", "InvalidInput"):
            raise


def find_vpc(cluster: Cluster, vpc: str | None) -> str:
    """Return the VPC: that of our security group, else the given one, else the default one."""
    for group in find_groups(cluster):
        if vpc not in (None, group["VpcId"]):
            sys.exit(f"The cluster is in {group['VpcId']}: leave out --vpc, or `delete` first.")
        vpc = group["VpcId"]
    if vpc is None:
        default = [{"Name": "is-default", "Values": ["true"]}]
        networks = cluster.client("ec2").describe_vpcs(Filters=default)["Vpcs"]
        if not networks:
            sys.exit(
                f"There is no default VPC in {cluster.region}: give --vpc, or create one "
                f"(`aws ec2 create-default-vpc --region {cluster.region}`)."
            )
        vpc = networks[0]["VpcId"]
    return str(vpc)


def find_groups(cluster: Cluster, **filters: str) -> list[dict[str, Any]]:
    """Return the security groups of our name: in a VPC, or those with our tags in all VPCs."""
    filters = filters or {f"tag:{key}": value for key, value in cluster.tags.items()}
    wanted = {"group-name": cluster.group, **filters}
    given = [{"Name": name, "Values": [value]} for name, value in wanted.items()]
    found = cluster.client("ec2").describe_security_groups(Filters=given)
    return list(found["SecurityGroups"])


def create_group(cluster: Cluster, vpc: str, ssh_from: str) -> str:
    """Create our security group in the VPC, with exactly two rules; returns its id."""
    ec2 = cluster.client("ec2")
    rules = []
    for group in find_groups(cluster, **{"vpc-id": vpc}):  # a name is unique in a VPC
        cluster.require_own(f"security group {cluster.group} in {vpc}", group.get("Tags", []))
        identity, rules = group["GroupId"], group["IpPermissions"]
        break
    else:
        identity = ec2.create_security_group(
            GroupName=cluster.group,
            Description="cl_ray: SSH from one range, and the cluster's own machines",
            VpcId=vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": cluster.tag_list}],
        )["GroupId"]
    if rules:
        ec2.revoke_security_group_ingress(GroupId=identity, IpPermissions=rules)
    ranges = "Ipv6Ranges" if ":" in ssh_from else "IpRanges"
    cidr = "CidrIpv6" if ":" in ssh_from else "CidrIp"
    ec2.authorize_security_group_ingress(
        GroupId=identity,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, ranges: [{cidr: ssh_from}]},
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": identity}]},
        ],
    )
    return str(identity)


def find_image(kind: str, region: str) -> str | None:
    """Return the newest image of a kind in the region; None, with a message, if it is not found."""
    try:
        found = client("ssm", region).get_parameter(Name=IMAGES[kind])
        return str(found["Parameter"]["Value"])
    except ClientError as error:
        print(f"No image at {IMAGES[kind]} ({error_code(error)}): fill one in, `create` again.")
        return None


def fill_in_yaml(cluster: Cluster, file: Path, group: str, new_images: bool) -> Path:
    """Write the values into the lines that are marked with `# FILLED IN`.

    A file that is filled in for another region stays as it is: a copy for this region is written.
    Images are looked up for another region, where none is filled in, or if `new_images`: a new
    image means a new head at the next `ray up`.

    Returns:
        The file that was written.
    """
    text = file.read_text()
    file = file_of_region(cluster.region, file)
    text = file.read_text() if file.exists() else text
    new_images = new_images or not is_of(cluster.region, text)
    kinds = iter(IMAGES)  # the head's image comes first
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.endswith("# FILLED IN"):
            continue
        if "region:" in line:
            line = re.sub(r"region: \S+", f"region: {cluster.region}", line)
        elif "sg-" in line:
            line = re.sub(r"sg-\w+", group, line)
        elif "Name:" in line:
            line = re.sub(r"Name: \S+-(head|worker)", rf"Name: {cluster.group}-\1", line)
        elif "ami-" in line:
            kind = next(kinds)
            if new_images or NO_IMAGE in line:
                line = re.sub(r"ami-\w+", find_image(kind, cluster.region) or r"\g<0>", line)
        lines[number] = line
    file.write_text("\n".join(lines) + "\n")
    return file


def file_of_region(region: str, file: Path) -> Path:
    """Return the file, or its copy for the region if it is filled in for another one."""
    text = file.read_text()
    if NO_GROUP in text or is_of(region, text):
        return file
    return file.with_name(f"{file.stem}-{region}{file.suffix}")


def is_of(region: str, text: str) -> bool:
    """Return whether a YAML's provider is in the region."""
    return bool(yaml.safe_load(text)["provider"]["region"] == region)


def delete(
    cluster: Cluster, file: Path, bucket: str | None, regions: list[str] | None, wait: float
) -> None:
    """Delete what `create` made; the bucket only if it is given."""
    if bucket:
        cluster.require_own(f"--bucket {bucket}", bucket_tags(cluster, bucket))
    machines = find_machines(cluster, regions)
    if machines:
        file = file_of_region(cluster.region, file)
        sys.exit(f"{', '.join(machines)} still run: `ray down -y {file}` first.")
    deleted: list[str] = []
    left: list[str] = []

    def ours(thing: str, tags: Tags | None) -> bool:
        if tags is not None and not cluster.made(tags):
            left.append(f"{thing}, which this script did not make")
        return tags is not None and cluster.made(tags)

    for name in cluster.roles:
        if ours(f"profile {name}", profile_tags(cluster, name)):
            delete_profile(cluster, name)
            deleted.append(f"profile {name}")
        if ours(f"role {name}", role_tags(cluster, name)):
            problem = delete_role(cluster, name)
            if problem:
                left.append(f"role {name} ({problem})")
            else:
                deleted.append(f"role {name}")
    for group in find_groups(cluster):
        problem = delete_group(cluster, group["GroupId"], wait)
        thing = f"security group {group['GroupId']}"
        if problem:
            left.append(f"{thing}, which is in use ({problem})")
        else:
            deleted.append(thing)
    if bucket and bucket_tags(cluster, bucket) is None:
        left.append(f"--bucket {bucket}, which does not exist")
    elif bucket:
        everything = boto3.resource("s3", region_name=cluster.region).Bucket(bucket)
        everything.object_versions.delete()
        everything.delete()
        deleted.append(f"bucket {bucket}")
    print(f"deleted in {cluster.region}: {', '.join(deleted) or 'nothing, as nothing existed'}")
    if not bucket:
        print("left: the bucket. `delete --bucket BUCKET` deletes it with all your runs.")
    print(f"left: Ray's key pair ray-autoscaler_{cluster.region}, which all its clusters use.")
    if left:
        sys.exit(f"left as well: {'; '.join(left)}.")


def find_machines(cluster: Cluster, regions: list[str] | None) -> list[str]:
    """Return the cluster's machines, and those of every region that have one of its profiles."""
    if regions is None:
        found = cluster.client("ec2").describe_regions()["Regions"]  # those that are enabled
        regions = [region["RegionName"] for region in found]
    machines, tag = [], {"Key": "ray-cluster-name", "Value": cluster.name}
    states = ["pending", "running", "stopping", "stopped"]
    filters = [{"Name": "instance-state-name", "Values": states}]
    for region in dict.fromkeys((cluster.region, *regions)):
        pages = client("ec2", region).get_paginator("describe_instances").paginate(Filters=filters)
        try:
            instances = list(pages.search("Reservations[].Instances[]"))
        except ClientError as error:
            sys.exit(
                f"{region} cannot be searched for machines that use the roles "
                f"({error_code(error)}), so nothing is deleted: get access, or give the regions "
                "where you have machines as --regions."
            )
        for instance in instances:
            profile = instance.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2]
            of_cluster = region == cluster.region and tag in instance.get("Tags", [])
            if of_cluster or profile in cluster.roles:
                machines.append(f"{instance['InstanceId']} in {region}")
    return machines


def delete_profile(cluster: Cluster, name: str) -> None:
    """Delete an instance profile of ours."""
    iam = cluster.client("iam")
    profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    for role in profile["Roles"]:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    iam.delete_instance_profile(InstanceProfileName=name)


def delete_role(cluster: Cluster, name: str) -> str | None:
    """Delete a role of ours; returns IAM's message if it has more than `create` gave it."""
    iam = cluster.client("iam")
    for policy in ("storage", "autoscaler"):
        existing(iam.delete_role_policy, RoleName=name, PolicyName=policy)
    try:
        iam.delete_role(RoleName=name)
    except ClientError as error:
        if error_code(error) != "DeleteConflict":
            raise
        return str(error.response["Error"]["Message"]).rstrip(".")
    return None


def delete_group(cluster: Cluster, group: str, wait: float) -> str | None:
    """Delete a security group; returns EC2's message if it is still in use after the wait.

    Instances that are shutting down use it for a minute or two.
    """
    ec2, end = cluster.client("ec2"), time.monotonic() + wait
    while True:
        try:
            ec2.delete_security_group(GroupId=group)
            return None
        except ClientError as error:
            if error_code(error) != "DependencyViolation":
                raise
            if time.monotonic() > end:
                return str(error.response["Error"]["Message"]).rstrip(".")
        time.sleep(min(10, wait))


@cache
def client(service: str, region: str) -> Any:
    """Return boto3's client, which takes a while to make."""
    return boto3.client(service, region_name=region)


def existing(call: Any, **arguments: Any) -> dict[str, Any] | None:
    """Call, and return the answer; None if what it is about does not exist."""
    try:
        return dict(call(**arguments))
    except ClientError as error:
        if error_code(error) != "NoSuchEntity":
            raise
        return None


def error_code(error: ClientError) -> str:
    """Return AWS's name of the error."""
    return str(error.response["Error"]["Code"])


if __name__ == "__main__":
    main()
