"""moto as a server, mended where EC2 is otherwise: a request is met up to MaxCount."""

import sys
from typing import Any

from moto.ec2.responses.instances import InstanceResponse
from moto.server import main

ask = InstanceResponse._get_param


def ask_like_ec2(self: Any, name: str, *rest: Any, **named: Any) -> Any:
    return ask(self, "MaxCount" if name == "MinCount" else name, *rest, **named)


if __name__ == "__main__":
    InstanceResponse._get_param = ask_like_ec2
    main(sys.argv[1:])
