"""moto's server, changed where AWS differs.

A request starts MaxCount instances, if it can. What a stack retains except on its creation stays
when it is deleted. A bucket's policy is not asked: moto knows none of the conditions under which
ours denies, and would deny everything.
"""

import sys
from typing import Any

from moto.cloudformation.parsing import ResourceMap
from moto.ec2.responses.instances import InstanceResponse
from moto.iam.access_control import PermissionResult
from moto.s3.models import FakeBucket
from moto.server import main

get_param, delete = InstanceResponse._get_param, ResourceMap.delete


def get_param_like_ec2(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return get_param(self, "MaxCount" if name == "MinCount" else name, *args, **kwargs)


def delete_like_cloudformation(self: Any) -> None:
    for resource in self._resource_json_map.values():
        if resource.get("DeletionPolicy") == "RetainExceptOnCreate":
            resource["DeletionPolicy"] = "Retain"
    delete(self)


def get_no_permission(self: Any, action: str, resource: str) -> PermissionResult:
    return PermissionResult.NEUTRAL


if __name__ == "__main__":
    FakeBucket.get_permission = get_no_permission
    ResourceMap.delete = delete_like_cloudformation
    InstanceResponse._get_param = get_param_like_ec2
    main(sys.argv[1:])
