"""Create what cluster/aws.yaml needs in an AWS account, and delete it again.

    python cluster/aws_account.py create --bucket my-bucket --ssh-from 203.0.113.7/32
    python cluster/aws_account.py delete

A cluster has in each region a CloudFormation stack of aws-account.yaml, named CLUSTER-REGION.
`create` may run again: it updates the stack and writes the names into the YAML. The region is the
YAML's unless --region is given. Needs boto3, and credentials where boto3 looks for them.
"""

import argparse
import ipaddress
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError, WaiterError

TEMPLATE = Path(__file__).with_name("aws-account.yaml")
IMAGES = (
    "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
)
"""SSM parameters with the ids of the newest images, in the YAML's order: head, workers."""
SHORTEST_PREFIX = {4: 16, 6: 48}
"""The widest range that may reach SSH, by IP version: 65,536 addresses, or one site."""


class Cluster:
    """A cluster in one region, its YAML, and its stack, whose name begins all its names."""

    def __init__(self, name: str, region: str, file: Path):
        self.name, self.region, self.file = name, region, file
        self.stack = f"{name}-{region}"
        self.aws: Any = boto3.Session(region_name=region)
        self.partition = self.aws.get_partition_for_region(region)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("create", help="create all, fill in the YAML").add_argument
    add("--bucket", required=True, help="S3 bucket for runs and data")
    add("--ssh-from", required=True, help="your range: 203.0.113.7/32; at most a /16 (IPv6: /48)")
    add("--vpc", help="default: the region's default VPC")
    add("--new-images", action="store_true", help="look up the newest images, as for an empty YAML")
    add = commands.add_parser("delete", help="delete everything except the bucket").add_argument
    add("--bucket", help="delete this bucket as well, with all runs and versions")
    for command in commands.choices.values():
        command.add_argument("--region", help="default: the YAML's")
        command.add_argument("--yaml", type=Path, default=TEMPLATE.with_name("aws.yaml"))
    options = parser.parse_args(arguments)
    try:
        (create if options.command == "create" else delete)(options)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"{options.command} stopped, and may be run again: {error}")


def read_range(ssh_from: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the address range that may reach SSH."""
    try:
        network = ipaddress.ip_network(ssh_from)
    except ValueError as error:
        sys.exit(f"--ssh-from {ssh_from!r} is no address range such as 203.0.113.7/32: {error}.")
    shortest = SHORTEST_PREFIX[network.version]
    if network.prefixlen < shortest:
        sys.exit(f"--ssh-from {ssh_from} admits too many addresses: give a /{shortest} or longer.")
    return network


def read_cluster(file: Path, region: str | None) -> Cluster:
    """Return the YAML's cluster, in its region or another one.

    A YAML that is filled in for another region stays as it is: the cluster's is a copy.
    """
    try:
        text = file.read_text()
        config = yaml.safe_load(text)
        name, in_yaml = str(config["cluster_name"]), str(config["provider"]["region"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        sys.exit(f"--yaml {file} has no cluster_name or region ({error!r}): give another --yaml.")
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]{0,31}", name):  # the stack's name begins with it
        sys.exit(f"cluster_name {name!r} in {file} is no letter and up to 31 letters, digits or -.")
    region = region or in_yaml
    if region != in_yaml and "sg-00000000000000000" not in text:
        file = file.with_name(f"{file.stem}-{region}{file.suffix}")
    return Cluster(name, region, file)


def create(options: argparse.Namespace) -> None:
    """Create or update the stack, and write its names into the YAML."""
    network, cluster = read_range(options.ssh_from), read_cluster(options.yaml, options.region)
    now = find_stack(cluster)
    vpc = options.vpc or now.get("Vpc") or find_vpc(cluster)
    if vpc != now.get("Vpc", vpc):
        sys.exit(f"The cluster is in {now['Vpc']}: leave out --vpc, or `delete` first.")
    in_stack = now.get("BucketName") == options.bucket and now["CreateBucket"] == "true"
    new_bucket = in_stack or not bucket_exists(cluster, options.bucket)
    text = (cluster.file if cluster.file.exists() else options.yaml).read_text()
    text = fill_in(cluster, text, options.new_images)
    config = yaml.safe_load(text)
    types = config["available_node_types"].items()
    workers = [node["node_config"] for kind, node in types if kind != config["head_node_type"]]
    image = f"arn:{cluster.partition}:ec2:{cluster.region}::image/"
    parameters = {
        "ClusterName": cluster.name,
        "BucketName": options.bucket,
        "CreateBucket": str(new_bucket).lower(),
        "SshFrom": str(network),
        "IPv6": str(network.version == 6).lower(),
        "Vpc": vpc,
        "WorkerTypes": ",".join(sorted({worker["InstanceType"] for worker in workers})),
        "WorkerImages": ",".join(sorted({image + worker["ImageId"] for worker in workers})),
    }
    given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
    change_stack(
        cluster,
        "update" if now else "create",
        TemplateBody=TEMPLATE.read_text(),
        Parameters=given,
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    found = cluster.aws.client("cloudformation").describe_stacks(StackName=cluster.stack)
    (group,) = (output["OutputValue"] for output in found["Stacks"][0]["Outputs"])
    iam = cluster.aws.client("iam")
    known = (iam.exceptions.InvalidInputException, iam.exceptions.EntityAlreadyExistsException)
    with suppress(*known):  # EC2 runs spot instances by this role; an account may have it
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    cluster.file.write_text(re.sub(r"sg-\w+(?=.*# FILLED IN)", group, text))
    print(f"bucket          s3://{options.bucket} (private, versioned; `delete` keeps it)")
    print(f"security group  {group}: SSH from {network}, all traffic within the cluster")
    print(f"profiles        {cluster.stack}-head, {cluster.stack}-worker")
    print(f"written into    {cluster.file}")


def find_stack(cluster: Cluster) -> dict[str, str]:
    """Return the parameters of the cluster's stack; none if there is no stack."""
    try:
        found = cluster.aws.client("cloudformation").describe_stacks(StackName=cluster.stack)
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        return {}
    pairs = found["Stacks"][0].get("Parameters", [])
    parameters = {pair["ParameterKey"]: pair["ParameterValue"] for pair in pairs}
    if parameters.get("ClusterName") != cluster.name:
        sys.exit(f"Stack {cluster.stack} is not of this script: choose another cluster_name.")
    return parameters


def find_vpc(cluster: Cluster) -> str:
    """Return the region's default network."""
    filters = [{"Name": "is-default", "Values": ["true"]}]
    networks = cluster.aws.client("ec2").describe_vpcs(Filters=filters)["Vpcs"]
    return networks[0]["VpcId"] if networks else sys.exit("There is no default VPC: give --vpc.")


def bucket_exists(cluster: Cluster, bucket: str) -> bool:
    """Return whether an earlier stack of the cluster left the bucket; refuse somebody else's."""
    account = cluster.aws.client("sts").get_caller_identity()["Account"]
    s3, tags = cluster.aws.client("s3"), {}
    try:
        found = s3.get_bucket_tagging(Bucket=bucket, ExpectedBucketOwner=account)["TagSet"]
        tags = {tag["Key"]: tag["Value"] for tag in found}
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchBucket":
            return False
        if code not in ("NoSuchTagSet", "AccessDenied"):
            raise
    ours = {"project": "cl-ray", "cl-ray:cluster": cluster.name, "cl-ray:region": cluster.region}
    if not tags.items() >= ours.items():
        sys.exit(
            f"--bucket {bucket} exists and is not of this cluster, by those of its tags that you "
            "may read: choose another name."
        )
    return True


def change_stack(cluster: Cluster, change: str, **arguments: Any) -> None:
    """Create, update or delete the stack; if that fails, exit with the reason that came first."""
    cloudformation, token = cluster.aws.client("cloudformation"), str(uuid.uuid4())
    call, stack = getattr(cloudformation, f"{change}_stack"), cluster.stack
    try:
        answer = call(StackName=stack, ClientRequestToken=token, **arguments)
        stack = answer.get("StackId", stack)
        waiter = cloudformation.get_waiter(f"stack_{change}_complete")
        waiter.wait(StackName=stack, WaiterConfig={"Delay": 5, "MaxAttempts": 360})
    except ClientError as error:
        if "No updates are to be performed" not in str(error):
            raise
    except WaiterError:
        for event in reversed(cloudformation.describe_stack_events(StackName=stack)["StackEvents"]):
            status, name = event["ResourceStatus"], event["LogicalResourceId"]
            if event.get("ClientRequestToken") == token and status.endswith("_FAILED"):
                if change == "create":  # rolled back: it is empty, but in the way of the next
                    cloudformation.delete_stack(StackName=stack)
                reason = event.get("ResourceStatusReason", status)
                sys.exit(f"{change} of stack {cluster.stack} failed: {name}: {reason}")
        raise


def fill_in(cluster: Cluster, text: str, new_images: bool) -> str:
    """Return the YAML's text with the values of the lines marked `# FILLED IN`, but the group's.

    Images are looked up for another region, where none is filled in, or if `new_images`: a new
    image means a new head at the next `ray up`.
    """
    new_images = new_images or yaml.safe_load(text)["provider"]["region"] != cluster.region
    text = re.sub(r"(region: )\S+(?=.*# FILLED IN)", rf"\g<1>{cluster.region}", text)
    text = re.sub(r"(Name: )\S+(-\w+}.*# FILLED IN)", rf"\g<1>{cluster.stack}\2", text)
    names = iter(IMAGES)

    def find_image(match: re.Match[str]) -> str:
        name = next(names)
        if not (new_images or match[0].startswith("ami-0000000000000000")):
            return match[0]
        try:
            return str(cluster.aws.client("ssm").get_parameter(Name=name)["Parameter"]["Value"])
        except ClientError as error:
            code = error.response["Error"]["Code"]
            print(f"No image at {name} ({code}): fill one in, `create` again.")
            return match[0]

    return re.sub(r"ami-\w+(?=.*# FILLED IN)", find_image, text)


def delete(options: argparse.Namespace) -> None:
    """Delete what `create` made; the bucket only if it is given."""
    cluster, deleted = read_cluster(options.yaml, options.region), []
    if options.bucket and not bucket_exists(cluster, options.bucket):
        sys.exit(f"--bucket {options.bucket} does not exist: leave it out, or give another.")
    # CloudFormation would keep the group of machines that run, but not its rules and the roles.
    states = ["pending", "running", "stopping", "stopped", "shutting-down"]
    filters = {"instance.group-name": [cluster.stack], "instance-state-name": states}
    given = [{"Name": name, "Values": values} for name, values in filters.items()]
    ec2 = cluster.aws.client("ec2")
    reservations = ec2.describe_instances(Filters=given)["Reservations"]
    machines = {i["InstanceId"]: i["State"]["Name"] for r in reservations for i in r["Instances"]}
    running = [machine for machine, state in machines.items() if state != "shutting-down"]
    if running:
        sys.exit(f"{', '.join(running)} still run: `ray down -y {cluster.file}` first.")
    if machines:
        ec2.get_waiter("instance_terminated").wait(InstanceIds=list(machines))
    if find_stack(cluster):
        change_stack(cluster, "delete")
        deleted.append(f"stack {cluster.stack} with its security group, roles and profiles")
    if options.bucket:
        bucket = cluster.aws.resource("s3").Bucket(options.bucket)
        bucket.object_versions.delete()
        bucket.delete()
        deleted.append(f"bucket {options.bucket}")
    print(f"deleted in {cluster.region}: {' and '.join(deleted) or 'nothing, as nothing existed'}")
    if not options.bucket:
        print("left: the bucket. `delete --bucket BUCKET` deletes it with all your runs.")
    print(f"left: Ray's key pair ray-autoscaler_{cluster.region}, which all its clusters use.")


if __name__ == "__main__":
    main()
