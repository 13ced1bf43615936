"""moto's server, changed where EC2 differs: a request starts MaxCount instances, if it can."""

import sys
from typing import Any

from moto.ec2.responses.instances import InstanceResponse
from moto.server import main

get_param = InstanceResponse._get_param


def get_param_like_ec2(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return get_param(self, "MaxCount" if name == "MinCount" else name, *args, **kwargs)


if __name__ == "__main__":
    InstanceResponse._get_param = get_param_like_ec2
    main(sys.argv[1:])
