"""Ray's own set-up of Azure, with a stand-in for Azure's SDK, on the network of the README."""

import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
GROUP = "/subscriptions/s/resourceGroups/cl-ray/providers/Microsoft.Network"
SDK = (
    "azure", "azure.common", "azure.common.credentials", "azure.core", "azure.core.exceptions",
    "azure.identity", "azure.mgmt", "azure.mgmt.resource", "azure.mgmt.resource.resources",
    "azure.mgmt.resource.resources.models",
)  # fmt: skip
"""The modules that Ray's set-up imports."""


class NotFoundError(Exception):
    pass


def readme_options(prefix: str) -> dict[str, str]:
    """The options of the README's command with this prefix."""
    lines = (ROOT / "cluster" / "README.md").read_text().splitlines()
    (command,) = [line.strip() for line in lines if line.startswith(f"    {prefix}")]
    words = shlex.split(command.removeprefix(prefix))
    return {name.lstrip("-"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def test_subnet_keeps_the_security_group_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    network = readme_options("az network vnet create ")
    group = {"id": f"{GROUP}/networkSecurityGroups/{network['network-security-group']}"}
    subnet = {"addressPrefix": network["subnet-prefixes"], "networkSecurityGroup": group}
    readme_vnet = SimpleNamespace(
        id=f"{GROUP}/virtualNetworks/{network['name']}",
        properties={"subnets": [{"name": network["subnet-name"], "properties": subnet}]},
    )

    def find(group: str, query: str) -> list[SimpleNamespace]:
        return [readme_vnet] if query.split("'")[1] in readme_vnet.id else []

    def get(resource: str, version: str) -> SimpleNamespace:
        if resource != readme_vnet.id:
            raise NotFoundError
        return readme_vnet

    azure = MagicMock()
    azure.resources.list_by_resource_group, azure.resources.get_by_id = find, get
    azure.providers.get.return_value.resource_types = []
    sdk = {name: MagicMock() for name in SDK}
    sdk["azure.core.exceptions"].HttpResponseError = NotFoundError
    sdk["azure.core.exceptions"].ResourceNotFoundError = NotFoundError
    sdk["azure.mgmt.resource"].ResourceManagementClient.return_value = azure
    for name, module in sdk.items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = "ray.autoscaler._private._azure.config"
    monkeypatch.setitem(sys.modules, ours, ModuleType(ours))  # is removed after the test
    del sys.modules[ours]
    from ray.autoscaler._private._azure import config as ray_azure

    config = yaml.safe_load((ROOT / "cluster" / "azure.yaml").read_text())
    assert config["provider"]["resource_group"] == network["resource-group"]
    config["provider"]["subscription_id"] = "s"
    ray_azure._configure_resource_group(config)
    deployed = azure.deployments.create_or_update.call_args.kwargs["parameters"]["properties"]
    (vnet,) = (r for r in deployed["template"]["resources"] if "virtualNetworks" in r["type"])
    (kept,) = vnet["properties"]["subnets"]
    assert kept["properties"]["networkSecurityGroup"]["id"].endswith("/cl-ray-ssh")
    assert deployed["parameters"]["subnet"]["value"] == network["subnet-prefixes"]
    # Ray deploys into this network: the names in its template are those of the README.
    cluster = deployed["parameters"]["clusterId"]["value"]
    assert f"ray-{cluster}-vnet" == network["name"]
    assert f"ray-{cluster}-subnet" == network["subnet-name"]
    variables = deployed["template"]["variables"]
    assert variables["vnetName"] == "[concat('ray-', parameters('clusterId'), '-vnet')]"
    assert variables["subnetName"] == "[concat('ray-', parameters('clusterId'), '-subnet')]"
    rule = readme_options("az network nsg rule create ")
    assert rule["nsg-name"] == network["network-security-group"]
    assert rule["source-address-prefixes"] == "YOUR.IP.ADD.RESS/32"
    text = (ROOT / "cluster" / "README.md").read_text()
    assert text.index("az network vnet create") < text.index("ray up -y cluster/azure.yaml")
