"""The resources of cluster/aws-account.yaml as CloudFormation makes them of its parameters."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfnlint.decode.cfn_yaml import load

TEMPLATE = Path(__file__).parent.parent.parent / "cluster" / "aws-account.yaml"
ACCOUNT = "123456789012"
"""moto's."""


def resources(
    region: str = "us-west-2", partition: str = "aws", **parameters: str | list[str]
) -> dict[str, Any]:
    """Resolve the template's functions, without those resources whose condition is false.

    Args:
        region: The stack's region.
        partition: The region's partition.
        parameters: Those of the template that differ from the ones below.
    """
    template = load(str(TEMPLATE))
    given = {
        "ClusterName": "t", "BucketName": "bucket", "CreateBucket": "true", "IPv6": "false",
        "SshFrom": "203.0.113.7/32", "Vpc": "vpc-1", "WorkerTypes": ["g5.xlarge"],
        "WorkerImages": [f"arn:{partition}:ec2:{region}::image/ami-1"],
    }  # fmt: skip
    values: dict[str, Any] = given | parameters
    assert set(values) == set(template["Parameters"])
    stack = f"{values['ClusterName']}-{region}"
    iam = f"arn:{partition}:iam::{ACCOUNT}:"
    values |= {
        "AWS::AccountId": ACCOUNT, "AWS::Partition": partition, "AWS::Region": region,
        "AWS::StackName": stack, "AWS::NoValue": None,
        "AWS::URLSuffix": "amazonaws.com" + (".cn" if partition == "aws-cn" else ""),
        "Bucket": values["BucketName"], "Group.GroupId": "sg-1",
        "HeadRole": f"{stack}-head", "HeadRole.Arn": f"{iam}role/{stack}-head",
        "WorkerRole": f"{stack}-worker", "WorkerRole.Arn": f"{iam}role/{stack}-worker",
        "WorkerProfile.Arn": f"{iam}instance-profile/{stack}-worker",
    }  # fmt: skip
    values |= resolve(template["Conditions"], values)
    found = template["Resources"].items()
    return {
        name: resolve(resource, values)
        for name, resource in found
        if values.get(resource.get("Condition"), True)
    }


def resolve(node: Any, values: Mapping[str, Any]) -> Any:
    """Resolve `Ref`, `Fn::GetAtt`, `Fn::Sub`, `Fn::If` and `Fn::Equals`; no other is known."""
    if isinstance(node, list):
        return [resolve(item, values) for item in node]
    if not isinstance(node, dict):
        return node
    for function, argument in node.items():
        if function == "Fn::Sub":
            return re.sub(r"\$\{([\w:.]+)\}", lambda match: str(values[match[1]]), argument)
        if function in ("Ref", "Fn::GetAtt"):
            return values[argument if function == "Ref" else ".".join(argument)]
        if function == "Fn::If":
            return resolve(argument[1 if values[argument[0]] else 2], values)
        if function == "Fn::Equals":
            return resolve(argument[0], values) == argument[1]
        assert not function.startswith("Fn::"), function
    resolved = {key: resolve(value, values) for key, value in node.items()}
    return {key: value for key, value in resolved.items() if value is not None}
