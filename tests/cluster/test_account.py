"""`cluster/aws_account.py` against moto: each test has a cluster name, and so names, of its own."""

import importlib.util
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.iam import allows, denies
from helpers.moto_cloud import get_no_permission
from moto.ec2.exceptions import DependencyViolationError
from moto.ec2.models import EC2Backend
from moto.s3.models import FakeBucket

ROOT = Path(__file__).parent.parent.parent
REGION, OTHER_REGION = "us-west-2", "eu-central-1"
REGIONS = (REGION, OTHER_REGION, "cn-north-1", "us-gov-west-1")
IMAGES = {"head": "/head", "gpu": "/gpu"}
ACCOUNT = "123456789012"
"""moto's."""
NUMBERS = count()
THEIRS = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:ListAllMyBuckets", "Resource": "*"}],
}
PRIVATE = dict.fromkeys(
    ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aws_account", ROOT / "cluster/aws_account.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Account:
    """Runs the script on a copy of the YAML, and asks moto for the result."""

    def __init__(self, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.script, self.capsys = script, capsys
        self.cluster = f"t{next(NUMBERS)}"
        self.bucket = f"bucket-of-{self.cluster}"
        self.yaml = folder / "aws.yaml"
        text = (ROOT / "cluster" / "aws.yaml").read_text()
        self.yaml.write_text(text.replace("cluster_name: cl-ray", f"cluster_name: {self.cluster}"))
        self.iam, self.s3 = script.client("iam", REGION), script.client("s3", REGION)

    def run(self, *arguments: str, code: str | None = None) -> str:
        """Run the script and return its output, or its error where one is expected."""
        error = ""
        try:
            self.script.main([*arguments, f"--yaml={self.yaml}"])
        except SystemExit as exit_:
            error = str(exit_.code)
        assert (code == "error") is bool(error), error
        return self.capsys.readouterr().out + error

    def create(self, *flags: str, bucket: str | None = None, code: str | None = None) -> str:
        bucket = bucket or self.bucket
        flags = ("--ssh-from=203.0.113.7/32", *flags)
        return self.run("create", f"--bucket={bucket}", *flags, code=code)

    def delete(self, *flags: str, everywhere: bool = False, code: str | None = None) -> str:
        """Run `delete`, which looks for machines in one region, or in all of the account's."""
        return self.run(
            "delete", *flags, *([] if everywhere else [f"--regions={REGION}"]), code=code
        )

    def names(self, region: str = REGION) -> tuple[str, str]:
        """The roles and profiles of the head and the workers."""
        return f"{self.cluster}-{region}-head", f"{self.cluster}-{region}-worker"

    def tags(self, region: str = REGION) -> list[dict[str, str]]:
        tags = {"cl-ray:cluster": self.cluster, "cl-ray:region": region, "project": "cl-ray"}
        return [{"Key": key, "Value": value} for key, value in tags.items()]

    def ec2(self, region: str = REGION) -> Any:
        return self.script.client("ec2", region)

    def groups(self, region: str = REGION) -> list[dict[str, Any]]:
        """The security groups of the cluster's name, in all networks."""
        name = f"{self.cluster}-{region}"
        filters = [{"Name": "group-name", "Values": [name]}]
        return list(self.ec2(region).describe_security_groups(Filters=filters)["SecurityGroups"])

    def roles(self) -> dict[str, dict[str, Any]]:
        """The inline policies of all roles whose name begins with the cluster's."""
        names = [r["RoleName"] for r in self.iam.list_roles(MaxItems=1000)["Roles"]]
        return {
            name: {
                policy: self.policy(name, policy)
                for policy in self.iam.list_role_policies(RoleName=name)["PolicyNames"]
            }
            for name in names
            if name.startswith(f"{self.cluster}-")
        }

    def policy(self, role: str, name: str) -> dict[str, Any]:
        found = self.iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        return dict(found)

    def profiles(self) -> dict[str, list[str]]:
        """The roles in each of the cluster's instance profiles."""
        return {
            profile["InstanceProfileName"]: [role["RoleName"] for role in profile["Roles"]]
            for profile in self.iam.list_instance_profiles(MaxItems=1000)["InstanceProfiles"]
            if profile["InstanceProfileName"].startswith(f"{self.cluster}-")
        }

    def start_machine(self, region: str, profile: str, **tags: str) -> str:
        """Start an instance with a profile."""
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        made = self.ec2(region).run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, IamInstanceProfile={"Name": profile},
            TagSpecifications=[{"ResourceType": "instance", "Tags": pairs}],
        )  # fmt: skip
        return str(made["Instances"][0]["InstanceId"])


@pytest.fixture(scope="module")
def aws(bucket: Any, script: ModuleType) -> Iterator[None]:
    """Moto in this process, with images.

    Changed where AWS differs: groups that are in use cannot be deleted, and a bucket's policy is
    not asked, as moto knows none of the conditions under which ours denies.
    """
    delete = EC2Backend.delete_security_group

    def delete_like_ec2(self: Any, name: str | None = None, group_id: str | None = None) -> None:
        for interface in self.get_all_network_interfaces():
            terminated = interface.instance and interface.instance.state_code == 48
            if not terminated and group_id in [group.id for group in interface.group_set]:
                raise DependencyViolationError(f"resource {group_id} has a dependent object")
        delete(self, name, group_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{bucket.endpoint}")
        patch.setattr(EC2Backend, "delete_security_group", delete_like_ec2)
        patch.setattr(FakeBucket, "get_permission", get_no_permission)
        patch.setattr(script, "IMAGES", IMAGES)  # moto has none of the published ones
        for region in REGIONS:
            for name in IMAGES.values():
                script.client("ssm", region).put_parameter(
                    Name=name, Type="String", Value=f"ami-{region.replace('-', '')}{name[1:]}"
                )
        yield


@pytest.fixture
def account(
    aws: None, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Account:
    return Account(script, tmp_path, capsys)


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
    tagged = [
        group["Tags"],
        account.iam.list_role_tags(RoleName=head)["Tags"],
        account.iam.get_instance_profile(InstanceProfileName=worker)["InstanceProfile"]["Tags"],
        account.s3.get_bucket_tagging(Bucket=account.bucket)["TagSet"],
    ]
    for tags in tagged:
        assert sorted(tags, key=lambda tag: tag["Key"]) == account.tags()


def test_create_again_changes_the_range_alone(account: Account) -> None:
    """An image that changed would replace the head, and end its job, at the next `ray up`."""
    account.create()
    before, roles = account.yaml.read_text(), account.roles()
    older = before.replace("ImageId: ami-", "ImageId: ami-0old")
    account.yaml.write_text(older)
    (old,) = account.groups()
    assert "'CidrIp': '203.0.113.7/32'" in str(old["IpPermissions"])
    account.create("--ssh-from=2001:db8:1::/48")
    (group,) = account.groups()
    assert group["GroupId"] == old["GroupId"]
    ssh, inside = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert [r["CidrIpv6"] for r in ssh["Ipv6Ranges"]] == ["2001:db8:1::/48"]
    assert ssh["IpRanges"] == []
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert (inside["IpProtocol"], inside["IpRanges"]) == ("-1", [])
    assert f"[{group['GroupId']}]" in older
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]]
    assert account.yaml.read_text() == older
    assert set(account.roles()) == set(roles)
    account.create("--new-images")
    assert account.yaml.read_text() == before
    assert account.roles() == roles


def test_create_completes_an_interrupted_create(account: Account) -> None:
    """One that ended between creating the profile and adding its role."""
    head, _ = account.names()
    account.iam.create_instance_profile(InstanceProfileName=head, Tags=account.tags())
    account.create()
    assert account.profiles()[head] == [head]


def test_a_second_region_gets_things_of_its_own(account: Account) -> None:
    account.create()
    before, roles = account.yaml.read_text(), account.roles()
    other = OTHER_REGION
    printed = account.create(f"--region={other}", bucket=f"{account.bucket}-eu")
    assert account.yaml.read_text() == before
    assert {name: account.roles()[name] for name in roles} == roles
    head, worker = account.names(other)
    assert set(account.roles()) == {*roles, head, worker}
    assert account.profiles()[worker] == [worker]
    copy = account.yaml.with_name(f"aws-{other}.yaml")
    assert f"written into    {copy}\n" in printed
    (group,) = account.groups(other)
    for written in (group["GroupId"], f"Name: {worker}}}", f"region: {other}"):
        assert written in copy.read_text()
    for region in (other, REGION):  # each is deleted without the other
        account.delete(f"--region={region}")
        assert set(account.roles()) == (set(roles) if region == other else set())


def make_bucket(account: Account) -> Any:
    where, name = {"LocationConstraint": REGION}, account.bucket
    account.s3.create_bucket(Bucket=name, CreateBucketConfiguration=where)
    setting = "PublicAccessBlockConfiguration"
    account.s3.put_public_access_block(Bucket=name, **{setting: dict.fromkeys(PRIVATE, False)})
    return lambda: account.s3.get_public_access_block(Bucket=name)[setting]


def make_role(account: Account) -> Any:
    head, _ = account.names()
    account.iam.create_role(RoleName=head, AssumeRolePolicyDocument="{}")
    account.iam.put_role_policy(
        RoleName=head, PolicyName="theirs", PolicyDocument=json.dumps(THEIRS)
    )
    return account.roles


def make_profile(account: Account) -> Any:
    head, _ = account.names()
    account.iam.create_role(RoleName="theirs", AssumeRolePolicyDocument="{}")
    account.iam.create_instance_profile(InstanceProfileName=head)
    account.iam.add_role_to_instance_profile(InstanceProfileName=head, RoleName="theirs")
    return account.profiles


def make_group(account: Account, vpc: str | None = None) -> Any:
    ec2 = account.ec2()
    if vpc is None:
        filters = [{"Name": "is-default", "Values": ["true"]}]
        vpc = ec2.describe_vpcs(Filters=filters)["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(
        GroupName=f"{account.cluster}-{REGION}", Description="theirs", VpcId=vpc
    )["GroupId"]
    rule = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443}
    ec2.authorize_security_group_ingress(
        GroupId=group, IpPermissions=[{**rule, "IpRanges": [{"CidrIp": "198.51.100.0/24"}]}]
    )
    return lambda: ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]


def everything(account: Account) -> list[Any]:
    buckets = [bucket["Name"] for bucket in account.s3.list_buckets()["Buckets"]]
    return [account.roles(), account.profiles(), account.groups(), buckets]


@pytest.mark.parametrize("make", [make_bucket, make_role, make_profile, make_group])
def test_what_somebody_else_made_is_refused_and_kept(account: Account, make: Any) -> None:
    look = make(account)
    before, existed, text = look(), everything(account), account.yaml.read_text()
    printed = account.create(code="error")
    assert "exists, but this script did not make it for this cluster" in printed
    assert f"cl-ray:cluster={account.cluster}" in printed
    assert printed.count(". ") == printed.count("\n") == 0  # one sentence
    assert look() == before
    assert account.yaml.read_text() == text
    assert everything(account) == existed
    account.delete(code=None if make in (make_bucket, make_group) else "error")
    assert look() == before
    if make is make_bucket:
        printed = account.delete(f"--bucket={account.bucket}", code="error")
        assert "did not make" in printed
        assert look() == before


def test_a_group_of_that_name_in_another_network_is_kept(account: Account) -> None:
    vpc = account.ec2().create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    look = make_group(account, vpc)
    before = look()
    account.create()
    assert len(account.groups()) == 2
    assert look() == before
    account.delete()
    assert account.groups() == look() == before


def test_another_network_can_be_given(account: Account) -> None:
    vpc = account.ec2().create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
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
        ("::/0", "admits too many"),
        ("2001:db8::/47", "/48 or longer"),
        ("203.0.113.7/24", "no address range"),
        ("nowhere", "no address range"),
    ],
)
def test_a_range_wider_than_ones_own_is_refused(account: Account, given: str, said: str) -> None:
    assert said in account.create(f"--ssh-from={given}", code="error")
    assert account.groups() == []


def test_bucket_keeps_versions_and_takes_encrypted_connections_alone(account: Account) -> None:
    account.create()
    s3, name = account.s3, account.bucket
    blocked = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
    assert blocked == PRIVATE
    assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    policy = json.loads(s3.get_bucket_policy(Bucket=name)["Policy"])
    bucket, run = f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/runs/first/config.yaml"
    plain, tls = {"aws__SecureTransport": "false"}, {"aws__SecureTransport": "true"}
    for resource in (bucket, run):
        assert denies(policy, "s3:GetObject", resource, **plain)
        assert not denies(policy, "s3:GetObject", resource, **tls)
    for role in account.names():
        principal = {"aws__PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/{role}", **tls}
        for action in (
            "DeleteBucket", "DeleteBucketPolicy", "PutBucketVersioning", "PutBucketPolicy",
            "PutLifecycleConfiguration", "PutBucketPublicAccessBlock",
        ):  # fmt: skip
            assert denies(policy, f"s3:{action}", bucket, **principal), action
            storage = account.policy(role, "storage")
            assert not allows(storage, f"s3:{action}", bucket), action
        assert denies(policy, "s3:DeleteObjectVersion", run, **principal)
        assert not denies(policy, "s3:PutObject", run, **principal)
        assert not denies(policy, "s3:DeleteObject", run, **principal)


def test_machines_write_runs_alone(account: Account) -> None:
    account.create()
    bucket = f"arn:aws:s3:::{account.bucket}"
    for role in account.names():
        storage = account.policy(role, "storage")
        assert allows(storage, "s3:ListBucket", bucket)
        for action in ("GetObject", "PutObject", "DeleteObject"):
            assert allows(storage, f"s3:{action}", f"{bucket}/runs/first/summary.json")
            assert not allows(storage, f"s3:{action}", f"{bucket}-other/runs/first/summary.json")
        assert allows(storage, "s3:GetObject", f"{bucket}/data/mine/dataset.json")
        for action in ("PutObject", "DeleteObject"):
            assert not allows(storage, f"s3:{action}", f"{bucket}/data/mine/dataset.json")
        assert not allows(storage, "s3:DeleteObjectVersion", f"{bucket}/runs/first/summary.json")


def test_the_head_starts_machines_of_the_yaml_alone(account: Account) -> None:
    account.create()
    head, worker = account.names()
    (group,) = account.groups()
    policy = account.policy(head, "autoscaler")
    arn = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
    profile = f"arn:aws:iam::{ACCOUNT}:instance-profile/"
    ours = {
        "aws__RequestTag_ray_cluster_name": account.cluster,
        "ec2__InstanceType": "g5.xlarge",
        "ec2__MetadataHttpTokens": "required",
        "ec2__InstanceProfile": f"{profile}{worker}",
    }

    def starts(resource: str, **context: str) -> bool:
        return allows(policy, "ec2:RunInstances", resource, **context)

    assert starts(f"{arn}instance/*", **ours)
    for other in (
        {"aws__RequestTag_ray_cluster_name": "another"},
        {"ec2__InstanceType": "p5.48xlarge"},
        {"ec2__MetadataHttpTokens": "optional"},
        {"ec2__InstanceProfile": f"{profile}{head}"},
    ):
        assert not starts(f"{arn}instance/*", **ours | other), other
    assert not starts(f"arn:aws:ec2:us-east-1:{ACCOUNT}:instance/*", **ours)
    text = account.yaml.read_text()
    images = [line.split()[1] for line in text.splitlines() if "ImageId:" in line]
    of_head, of_workers = (f"arn:aws:ec2:{REGION}::image/{image}" for image in images)
    assert starts(of_workers)
    assert not starts(of_head)
    network = f"{arn}vpc/{group['VpcId']}"
    assert starts(f"{arn}subnet/subnet-1", ec2__Vpc=network)
    assert not starts(f"{arn}subnet/subnet-1", ec2__Vpc=f"{arn}vpc/vpc-other")
    assert starts(f"{arn}security-group/{group['GroupId']}")
    assert not starts(f"{arn}security-group/sg-other")
    assert starts(f"{arn}volume/*", ec2__Encrypted="true")
    assert not starts(f"{arn}volume/*", ec2__Encrypted="false")
    assert starts(f"{arn}key-pair/ray-autoscaler_1_{REGION}")
    assert not starts(f"{arn}key-pair/somebodys")
    ec2 = {"iam__PassedToService": "ec2.amazonaws.com"}
    assert allows(policy, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{worker}", **ec2)
    assert not allows(policy, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{head}", **ec2)
    mine, theirs = ({"ec2__ResourceTag_ray_cluster_name": c} for c in (account.cluster, "other"))
    assert allows(policy, "ec2:TerminateInstances", f"{arn}instance/i-1", **mine)
    assert not allows(policy, "ec2:TerminateInstances", f"{arn}instance/i-1", **theirs)
    tagging = {"ec2__CreateAction": "RunInstances"}
    assert allows(policy, "ec2:CreateTags", f"{arn}volume/vol-1", **tagging)
    assert not allows(policy, "ec2:CreateTags", f"{arn}volume/vol-1")


@pytest.mark.parametrize(
    ("region", "partition", "service"),
    [
        ("cn-north-1", "aws-cn", "ec2.amazonaws.com.cn"),
        ("us-gov-west-1", "aws-us-gov", "ec2.amazonaws.com"),
    ],
)
def test_arns_are_those_of_the_partition(
    account: Account, region: str, partition: str, service: str
) -> None:
    account.create(f"--region={region}")
    iam, s3 = (account.script.client(service, region) for service in ("iam", "s3"))
    account.iam = iam
    head, _ = account.names(region)
    documents = [*account.roles()[head].values()]
    documents.append(json.loads(s3.get_bucket_policy(Bucket=account.bucket)["Policy"]))
    text = json.dumps(documents)
    assert text.count('"arn:') == text.count(f'"arn:{partition}:') > 12
    assert f'"iam:PassedToService": "{service}"' in text
    trust = iam.get_role(RoleName=head)["Role"]["AssumeRolePolicyDocument"]
    assert trust["Statement"][0]["Principal"] == {"Service": service}
    assert f"deleted in {region}: profile {head}" in account.delete(f"--region={region}")


@pytest.mark.parametrize(
    ("region", "name"), [(REGION, "aws.yaml"), ("eu-west-1", "aws-eu-west-1.yaml")]
)
def test_delete_refuses_while_machines_run(account: Account, region: str, name: str) -> None:
    """It names the file of its region."""
    for created in dict.fromkeys((REGION, region)):  # the first one in aws.yaml
        account.create(f"--region={created}", bucket=f"{account.bucket}-{created}")
    file, before = account.yaml.with_name(name), account.roles()
    assert file.exists()
    _, worker = account.names(region)
    machine = account.start_machine(region, worker, **{"ray-cluster-name": account.cluster})
    flags = f"--region={region}", f"--regions={region}"
    printed = account.delete(*flags, everywhere=True, code="error")
    assert printed == f"{machine} in {region} still run: `ray down -y {file}` first."
    assert account.roles() == before
    account.ec2(region).terminate_instances(InstanceIds=[machine])
    account.delete(*flags, everywhere=True)
    assert not set(account.roles()) & set(account.names(region))


def test_a_role_that_another_region_uses_stays(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.create()
    regions = {"Regions": [{"RegionName": region} for region in (REGION, "eu-west-1")]}
    monkeypatch.setattr(account.ec2(), "describe_regions", lambda: regions)  # moto's are many
    head, worker = account.names()
    machine = account.start_machine("eu-west-1", worker, owner="somebody")
    assert f"{machine} in eu-west-1 still run" in account.delete(everywhere=True, code="error")
    assert account.profiles() == {head: [head], worker: [worker]}
    account.ec2("eu-west-1").terminate_instances(InstanceIds=[machine])
    account.delete()
    assert account.profiles() == {}


def test_delete_keeps_what_it_did_not_make(account: Account) -> None:
    """A policy in our role, and Ray's key pair, which other Ray clusters use."""
    account.create()
    _, worker = account.names()
    account.iam.put_role_policy(
        RoleName=worker, PolicyName="theirs", PolicyDocument=json.dumps(THEIRS)
    )
    key = f"ray-autoscaler_{REGION}"
    account.ec2().create_key_pair(KeyName=key)
    printed = account.delete(code="error")
    assert f"left as well: role {worker} (" in printed
    assert account.roles() == {worker: {"theirs": THEIRS}}
    assert account.ec2().describe_key_pairs(KeyNames=[key])["KeyPairs"]
    account.ec2().delete_key_pair(KeyName=key)


def test_delete_reports_what_it_deleted_and_what_is_left(account: Account) -> None:
    account.create()
    head, worker = account.names()
    (group,) = account.groups()
    filters = [{"Name": "vpc-id", "Values": [group["VpcId"]]}]
    subnet = account.ec2().describe_subnets(Filters=filters)["Subnets"][0]["SubnetId"]
    held = account.ec2().create_network_interface(SubnetId=subnet, Groups=[group["GroupId"]])
    printed = account.delete("--wait=0", code="error")
    assert printed.startswith(
        f"deleted in {REGION}: profile {head}, role {head}, profile {worker}, role {worker}\n"
    )
    assert f"left as well: security group {group['GroupId']}, which is in use (resource" in printed
    account.ec2().delete_network_interface(
        NetworkInterfaceId=held["NetworkInterface"]["NetworkInterfaceId"]
    )
    printed = account.delete("--wait=0")
    assert printed.startswith(f"deleted in {REGION}: security group {group['GroupId']}\n")
    assert account.groups() == []
    assert account.delete().startswith(f"deleted in {REGION}: nothing, as nothing existed")


def test_delete_with_the_bucket_deletes_every_version(account: Account) -> None:
    account.create()
    for body in (b"old", b"new"):
        account.s3.put_object(Bucket=account.bucket, Key="runs/first", Body=body)
    account.s3.delete_object(Bucket=account.bucket, Key="runs/first")
    account.delete()
    assert len(account.s3.list_object_versions(Bucket=account.bucket)["Versions"]) == 2
    account.delete(f"--bucket={account.bucket}")
    names = [b["Name"] for b in account.s3.list_buckets()["Buckets"]]
    assert account.bucket not in names


def test_errors_of_aws_are_one_sentence(account: Account) -> None:
    printed = account.create(bucket="not a bucket", code="error")
    assert printed.startswith("create stopped, and may be run again: ")
    printed = account.create("--region=nowhere-1", code="error")
    assert "nowhere-1" in printed
