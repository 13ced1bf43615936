"""`cluster/aws_account.py` and its template, against moto and by the template's documents.

Moto makes no bucket policy, no bucket's settings and no IPv6 rule, changes no rule and knows one
partition: these are asked of the documents. Each test has a cluster name, and so names, of its own.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import boto3
import pytest
from botocore.exceptions import ClientError, WaiterError
from cfnlint.api import ManualArgs, lint_file
from helpers.iam import allows, denies
from helpers.moto_cloud import delete_like_cloudformation
from helpers.template import ACCOUNT, TEMPLATE, resources
from moto.cloudformation.parsing import ResourceMap

from cluster import aws_account

REGION, OTHER_REGION = "us-west-2", "eu-central-1"
IMAGES = ("/head", "/gpu")
NUMBERS = count()
PARTITIONS = {
    REGION: ("aws", "ec2.amazonaws.com"),
    "cn-north-1": ("aws-cn", "ec2.amazonaws.com.cn"),
    "us-gov-west-1": ("aws-us-gov", "ec2.amazonaws.com"),
}


class Account:
    """Runs the script on a copy of the YAML, and asks moto for the result."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.capsys, self.cluster, self.yaml = capsys, f"t{next(NUMBERS)}", folder / "aws.yaml"
        self.bucket = f"bucket-of-{self.cluster}"
        text = TEMPLATE.with_name("aws.yaml").read_text()
        self.yaml.write_text(text.replace("cluster_name: cl-ray", f"cluster_name: {self.cluster}"))
        self.iam, self.s3 = boto3.client("iam"), boto3.client("s3", region_name=REGION)
        self.cloudformation = boto3.client("cloudformation", region_name=REGION)

    def run(self, *arguments: str, code: str | None = None) -> str:
        """Run the script and return its output, or its error where one is expected."""
        error = ""
        try:
            aws_account.main([*arguments, f"--yaml={self.yaml}"])
        except SystemExit as exit_:
            error = str(exit_.code)
        assert (code == "error") is bool(error), error
        return self.capsys.readouterr().out + error

    def create(self, *flags: str, bucket: str | None = None, code: str | None = None) -> str:
        flags = ("--ssh-from=203.0.113.7/32", *flags)
        return self.run("create", f"--bucket={bucket or self.bucket}", *flags, code=code)

    def names(self, region: str = REGION) -> tuple[str, str]:
        """The roles and profiles of the head and the workers."""
        return f"{self.cluster}-{region}-head", f"{self.cluster}-{region}-worker"

    def groups(self, region: str = REGION) -> list[dict[str, Any]]:
        """The security groups of the cluster's name, in all networks."""
        filters = [{"Name": "group-name", "Values": [f"{self.cluster}-{region}"]}]
        ec2 = boto3.client("ec2", region_name=region)
        return list(ec2.describe_security_groups(Filters=filters)["SecurityGroups"])

    def roles(self) -> dict[str, dict[str, Any]]:
        """The inline policies of all roles whose name begins with the cluster's."""
        names = [r["RoleName"] for r in self.iam.list_roles(MaxItems=1000)["Roles"]]
        return {
            name: {
                policy: self.iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
                for policy in self.iam.list_role_policies(RoleName=name)["PolicyNames"]
            }
            for name in names
            if name.startswith(f"{self.cluster}-")
        }

    def profiles(self) -> dict[str, list[str]]:
        """The roles in each of the cluster's instance profiles."""
        found = self.iam.list_instance_profiles(MaxItems=1000)["InstanceProfiles"]
        named = {p["InstanceProfileName"]: [r["RoleName"] for r in p["Roles"]] for p in found}
        return {name: roles for name, roles in named.items() if name.startswith(self.cluster + "-")}

    def parameters(self) -> dict[str, str]:
        """The parameters of the cluster's stack."""
        name = f"{self.cluster}-{REGION}"
        (stack,) = self.cloudformation.describe_stacks(StackName=name)["Stacks"]
        return {pair["ParameterKey"]: pair["ParameterValue"] for pair in stack["Parameters"]}

    def buckets(self) -> list[str]:
        return [bucket["Name"] for bucket in self.s3.list_buckets()["Buckets"]]


@pytest.fixture(scope="module")
def aws(bucket: Any) -> Iterator[None]:
    """Moto in this process, with images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{bucket.endpoint}")
        patch.setattr(ResourceMap, "delete", delete_like_cloudformation)
        patch.setattr(aws_account, "IMAGES", IMAGES)  # moto has none of the published ones
        for region in (REGION, OTHER_REGION):
            for name in IMAGES:
                value = f"ami-{region.replace('-', '')}{name[1:]}"
                ssm = boto3.client("ssm", region_name=region)
                ssm.put_parameter(Name=name, Type="String", Value=value)
        yield


@pytest.fixture
def account(aws: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Account:
    return Account(tmp_path, capsys)


def test_cfn_lint_finds_nothing() -> None:
    assert lint_file(TEMPLATE, ManualArgs(regions=list(PARTITIONS))) == []


def test_create_makes_and_names_everything(account: Account) -> None:
    account.create()
    head, worker = account.names()
    (group,) = account.groups()
    assert {name: set(policies) for name, policies in account.roles().items()} == {
        head: {"storage", "autoscaler"},
        worker: {"storage"},
    }
    assert account.profiles() == {head: [head], worker: [worker]}
    text = account.yaml.read_text()
    for written in (group["GroupId"], f"Name: {head}}}", f"Name: {worker}}}", f"region: {REGION}"):
        assert written in text
    assert "ami-0000" not in text
    tags = {"cl-ray:cluster": account.cluster, "cl-ray:region": REGION, "project": "cl-ray"}
    for found in (
        group["Tags"],
        account.iam.list_role_tags(RoleName=head)["Tags"],
        account.iam.list_role_tags(RoleName=worker)["Tags"],
        account.s3.get_bucket_tagging(Bucket=account.bucket)["TagSet"],
    ):
        assert {tag["Key"]: tag["Value"] for tag in found}.items() >= tags.items()


def test_create_again_keeps_images_and_updates_the_stack(account: Account) -> None:
    """An image that changed would replace the head, and end its job, at the next `ray up`."""
    account.create()
    before = account.yaml.read_text()
    older = before.replace("ImageId: ami-", "ImageId: ami-0old")
    account.yaml.write_text(older)
    account.create("--ssh-from=2001:db8:1::/48")
    assert account.yaml.read_text() == older
    changed = {"SshFrom": "2001:db8:1::/48", "IPv6": "true", "CreateBucket": "true"}
    assert account.parameters().items() >= changed.items()
    assert "ami-0old" in str(account.roles())
    account.create("--new-images")
    assert account.yaml.read_text() == before
    assert "ami-0old" not in str(account.roles())


def test_a_second_region_gets_things_of_its_own(account: Account) -> None:
    account.create()
    before, roles = account.yaml.read_text(), account.roles()
    other, bucket = OTHER_REGION, f"{account.bucket}-eu"
    printed = account.create(f"--region={other}", bucket=bucket)
    assert account.yaml.read_text() == before
    assert {name: account.roles()[name] for name in roles} == roles
    head, worker = account.names(other)
    assert set(account.roles()) == {*roles, head, worker}
    copy = account.yaml.with_name(f"aws-{other}.yaml")
    assert f"written into    {copy}\n" in printed
    (group,) = account.groups(other)
    for written in (group["GroupId"], f"Name: {worker}}}", f"region: {other}"):
        assert written in copy.read_text()
    for region in (other, REGION):  # each is deleted without the other
        account.run("delete", f"--region={region}")
        assert set(account.roles()) == (set(roles) if region == other else set())


def test_what_somebody_else_made_is_refused_and_kept(account: Account) -> None:
    """CloudFormation itself refuses roles, profiles and groups that exist."""
    stack, text = f"{account.cluster}-{REGION}", account.yaml.read_text()
    where = {"LocationConstraint": REGION}
    account.s3.create_bucket(Bucket=account.bucket, CreateBucketConfiguration=where)
    assert "exists and is not of this cluster" in account.create(code="error")
    printed = account.run("delete", f"--bucket={account.bucket}", code="error")
    assert "exists and is not of this cluster" in printed
    theirs = "{Resources: {Theirs: {Type: AWS::S3::Bucket}}}"
    account.cloudformation.create_stack(StackName=stack, TemplateBody=theirs)
    for command in ("create", "--bucket=new", "--ssh-from=203.0.113.7/32"), ("delete",):
        assert f"Stack {stack} is not of this script" in account.run(*command, code="error")
    assert account.yaml.read_text() == text
    assert account.bucket in account.buckets()
    assert account.roles() == {}


@pytest.mark.parametrize("change", ["create", "update", "delete"])
def test_a_change_that_fails_ends_with_its_first_reason(
    account: Account, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Moto's changes do not fail, so CloudFormation's answers are played."""
    monkeypatch.setattr("cluster.aws_account.uuid.uuid4", lambda: "now")
    cluster, played = aws_account.Cluster(account.cluster, REGION, account.yaml), Mock()
    cluster.aws = Mock(client=lambda service: played)
    answer = {} if change == "delete" else {"StackId": "id"}
    call = getattr(played, f"{change}_stack")
    call.side_effect = lambda ClientRequestToken, StackName: answer
    played.get_waiter.return_value.wait.side_effect = WaiterError("stack", "failed", {})
    failed = {"ResourceStatus": f"{change.upper()}_FAILED", "LogicalResourceId": "HeadRole"}
    reasons = [("now", "cancelled"), ("now", "it exists"), ("earlier", "old")]  # newest first
    events = [{"ClientRequestToken": t, "ResourceStatusReason": r} | failed for t, r in reasons]
    played.describe_stack_events.return_value = {"StackEvents": events}
    said = f"{change} of stack {cluster.stack} failed: HeadRole: it exists"
    with pytest.raises(SystemExit, match=f"^{said}$"):
        aws_account.change_stack(cluster, change)
    played.get_waiter.assert_called_with(f"stack_{change}_complete")
    assert played.delete_stack.called is (change != "update")  # after `create` nothing is left
    name = answer.get("StackId", cluster.stack)
    played.describe_stack_events.assert_called_with(StackName=name)
    nothing = {"Code": "ValidationError", "Message": "No updates are to be performed."}
    call.side_effect = ClientError({"Error": nothing}, change)
    aws_account.change_stack(cluster, change)  # is no failure


def test_another_network_can_be_given(account: Account) -> None:
    ec2 = boto3.client("ec2", region_name=REGION)
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    account.create(f"--vpc={vpc}")
    account.create()  # in the same one
    (group,) = account.groups()
    assert group["VpcId"] == vpc
    assert f"The cluster is in {vpc}" in account.create("--vpc=vpc-1", code="error")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0.0.0.0/0", "admits too many"),
        ("10.0.0.0/15", "/16 or longer"),
        ("2001:db8::/47", "/48 or longer"),
        ("203.0.113.7/24", "no address range"),
        ("nowhere", "no address range"),
    ],
)
def test_a_range_wider_than_ones_own_is_refused(account: Account, given: str, said: str) -> None:
    assert said in account.create(f"--ssh-from={given}", code="error")
    assert account.groups() == []


def test_errors_are_one_sentence(account: Account) -> None:
    printed = account.create(bucket="not a bucket", code="error")
    assert printed.startswith("create stopped, and may be run again: ")
    assert "nowhere-1" in account.create("--region=nowhere-1", code="error")
    account.yaml.write_text(account.yaml.read_text().replace(account.cluster, "a_b"))
    assert account.create(code="error").startswith("cluster_name 'a_b' in ")


def test_the_group_admits_ssh_from_one_range(account: Account) -> None:
    for parameters in ({}, {"SshFrom": "2001:db8:1::/48", "IPv6": "true"}):
        made = resources(**parameters)
        rules = {n: r["Properties"] for n, r in made.items() if r["Type"].endswith("Ingress")}
        cidr = {"CidrIpv6": "2001:db8:1::/48"} if parameters else {"CidrIp": "203.0.113.7/32"}
        ssh = {"GroupId": "sg-1", "IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
        inside = {"GroupId": "sg-1", "IpProtocol": "-1", "SourceSecurityGroupId": "sg-1"}
        assert rules == {"GroupSsh": ssh | cidr, "GroupInside": inside}
        assert "SecurityGroupIngress" not in made["Group"]["Properties"]


def test_bucket_is_private_and_keeps_versions() -> None:
    settings = resources()["Bucket"]["Properties"]
    assert list(settings["PublicAccessBlockConfiguration"].values()) == [True] * 4
    assert settings["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = settings["LifecycleConfiguration"]["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    kept = {name for name, resource in resources().items() if "DeletionPolicy" in resource}
    assert kept == {"Bucket", "BucketPolicy"}
    assert kept.isdisjoint(resources(CreateBucket="false"))


def test_bucket_takes_encrypted_connections_alone() -> None:
    made = resources(ClusterName="t", BucketName="b")
    policy = made["BucketPolicy"]["Properties"]["PolicyDocument"]
    bucket, run = "arn:aws:s3:::b", "arn:aws:s3:::b/runs/first/config.yaml"
    plain, tls = {"aws__SecureTransport": "false"}, {"aws__SecureTransport": "true"}
    for resource in (bucket, run):
        assert denies(policy, "s3:GetObject", resource, **plain)
        assert not denies(policy, "s3:GetObject", resource, **tls)
    for role in (f"t-{REGION}-head", f"t-{REGION}-worker"):
        principal = {"aws__PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/{role}", **tls}
        storage = made["StoragePolicy"]["Properties"]["PolicyDocument"]
        for action in (
            "DeleteBucket", "DeleteBucketPolicy", "PutBucketVersioning", "PutBucketPolicy",
            "PutLifecycleConfiguration", "PutBucketPublicAccessBlock",
        ):  # fmt: skip
            assert denies(policy, f"s3:{action}", bucket, **principal), action
            assert not allows(storage, f"s3:{action}", bucket), action
        assert denies(policy, "s3:DeleteObjectVersion", run, **principal)
        assert not denies(policy, "s3:PutObject", run, **principal)
        assert not denies(policy, "s3:DeleteObject", run, **principal)


def test_machines_write_runs_alone(account: Account) -> None:
    account.create()
    bucket = f"arn:aws:s3:::{account.bucket}"
    for policies in account.roles().values():
        storage = policies["storage"]
        assert allows(storage, "s3:ListBucket", bucket)
        for action in ("GetObject", "PutObject", "DeleteObject"):
            assert allows(storage, f"s3:{action}", f"{bucket}/runs/first/summary.json")
            assert not allows(storage, f"s3:{action}", f"{bucket}-other/runs/first/summary.json")
            reads = action == "GetObject"
            assert allows(storage, f"s3:{action}", f"{bucket}/data/mine/dataset.json") is reads
        assert not allows(storage, "s3:DeleteObjectVersion", f"{bucket}/runs/first/summary.json")


def test_the_head_starts_machines_of_the_yaml_alone(account: Account) -> None:
    account.create()
    (head, worker), (group,) = account.names(), account.groups()
    policy = account.roles()[head]["autoscaler"]
    arn, iam = f"arn:aws:ec2:{REGION}:{ACCOUNT}:", f"arn:aws:iam::{ACCOUNT}:"
    ours = {
        "aws__RequestTag_ray_cluster_name": account.cluster,
        "ec2__InstanceType": "g5.xlarge",
        "ec2__MetadataHttpTokens": "required",
        "ec2__InstanceProfile": f"{iam}instance-profile/{worker}",
    }
    text = account.yaml.read_text()
    images = [line.split()[1] for line in text.splitlines() if "ImageId:" in line]
    of_head, of_workers = (f"arn:aws:ec2:{REGION}::image/{image}" for image in images)
    network = {"ec2__Vpc": f"{arn}vpc/{group['VpcId']}"}
    mine = {"ec2__ResourceTag_ray_cluster_name": account.cluster}
    ec2 = {"iam__PassedToService": "ec2.amazonaws.com"}
    run, end, tag = "ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"
    cases: list[tuple[str, str, dict[str, str], bool]] = [
        (run, f"{arn}instance/*", ours, True),
        (run, f"{arn}instance/*", ours | {"aws__RequestTag_ray_cluster_name": "other"}, False),
        (run, f"{arn}instance/*", ours | {"ec2__InstanceType": "p5.48xlarge"}, False),
        (run, f"{arn}instance/*", ours | {"ec2__MetadataHttpTokens": "optional"}, False),
        (
            run,
            f"{arn}instance/*",
            ours | {"ec2__InstanceProfile": f"{iam}instance-profile/{head}"},
            False,
        ),
        (run, f"arn:aws:ec2:us-east-1:{ACCOUNT}:instance/*", ours, False),
        (run, of_workers, {}, True),
        (run, of_head, {}, False),
        (run, f"{arn}subnet/subnet-1", network, True),
        (run, f"{arn}subnet/subnet-1", {"ec2__Vpc": f"{arn}vpc/vpc-other"}, False),
        (run, f"{arn}security-group/{group['GroupId']}", {}, True),
        (run, f"{arn}security-group/sg-other", {}, False),
        (run, f"{arn}volume/*", {"ec2__Encrypted": "true"}, True),
        (run, f"{arn}volume/*", {"ec2__Encrypted": "false"}, False),
        (run, f"{arn}key-pair/ray-autoscaler_1_{REGION}", {}, True),
        (run, f"{arn}key-pair/somebodys", {}, False),
        ("iam:PassRole", f"{iam}role/{worker}", ec2, True),
        ("iam:PassRole", f"{iam}role/{head}", ec2, False),
        (end, f"{arn}instance/i-1", mine, True),
        (end, f"{arn}instance/i-1", {"ec2__ResourceTag_ray_cluster_name": "other"}, False),
        (tag, f"{arn}volume/vol-1", {"ec2__CreateAction": "RunInstances"}, True),
        (tag, f"{arn}volume/vol-1", {}, False),
    ]
    for action, resource, context, allowed in cases:
        assert allows(policy, action, resource, **context) is allowed, (action, resource, context)


@pytest.mark.parametrize("region", PARTITIONS)
def test_arns_are_those_of_the_partition(region: str) -> None:
    partition, service = PARTITIONS[region]
    made = resources(region, partition)
    text = json.dumps(made)
    assert text.count('"arn:') == text.count(f'"arn:{partition}:') > 12
    assert f'"iam:PassedToService": "{service}"' in text
    for role in ("HeadRole", "WorkerRole"):
        trust = made[role]["Properties"]["AssumeRolePolicyDocument"]
        assert trust["Statement"]["Principal"] == {"Service": service}


@pytest.mark.parametrize(
    ("region", "name"), [(REGION, "aws.yaml"), (OTHER_REGION, f"aws-{OTHER_REGION}.yaml")]
)
def test_delete_refuses_while_machines_run(account: Account, region: str, name: str) -> None:
    """It names the file of its region."""
    for created in dict.fromkeys((REGION, region)):  # the first one in aws.yaml
        account.create(f"--region={created}", bucket=f"{account.bucket}-{created}")
    before = account.roles()
    ec2 = boto3.client("ec2", region_name=region)
    groups = [group["GroupId"] for group in account.groups(region)]
    one = {"ImageId": "ami-12c6146b", "MinCount": 1, "MaxCount": 1, "SecurityGroupIds": groups}
    machine = ec2.run_instances(**one)["Instances"][0]["InstanceId"]
    printed = account.run("delete", f"--region={region}", code="error")
    assert printed == f"{machine} still run: `ray down -y {account.yaml.with_name(name)}` first."
    assert account.roles() == before
    ec2.terminate_instances(InstanceIds=[machine])
    account.run("delete", f"--region={region}")
    assert not set(account.roles()) & set(account.names(region))


def test_delete_keeps_the_bucket_which_the_next_create_uses_again(account: Account) -> None:
    account.create()
    for body in (b"old", b"new"):
        account.s3.put_object(Bucket=account.bucket, Key="runs/first", Body=body)
    account.run("delete")
    assert (account.roles(), account.profiles(), account.groups()) == ({}, {}, [])
    account.create()
    account.create()
    assert account.parameters()["CreateBucket"] == "false"
    printed = account.run("delete")
    assert printed.startswith(f"deleted in {REGION}: stack {account.cluster}-{REGION} with ")
    assert f"left: Ray's key pair ray-autoscaler_{REGION}" in printed
    assert account.s3.get_object(Bucket=account.bucket, Key="runs/first")["Body"].read() == b"new"
    printed = account.run("delete", f"--bucket={account.bucket}")
    assert f"deleted in {REGION}: bucket {account.bucket}\n" in printed
    assert account.bucket not in account.buckets()
    assert account.run("delete").startswith(f"deleted in {REGION}: nothing, as nothing existed")
    printed = account.run("delete", f"--bucket={account.bucket}", code="error")
    assert printed == f"--bucket {account.bucket} does not exist: leave it out, or give another."
