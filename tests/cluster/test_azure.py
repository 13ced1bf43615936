"""Ray's own set-up of Azure, with a stand-in for Azure's SDK, on the network of the README."""

import copy
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
GROUP = "/subscriptions/s/resourceGroups/cl-ray/providers/Microsoft.Network"


class NotFoundError(Exception):
    pass


def readme_options(prefix: str) -> dict[str, str]:
    """The options of the README's command with this prefix."""
    lines = (ROOT / "cluster" / "README.md").read_text().splitlines()
    (command,) = [line.strip() for line in lines if line.startswith(f"    {prefix}")]
    words = shlex.split(command.removeprefix(prefix))
    return {name.lstrip("-"): value for name, value in zip(words[::2], words[1::2], strict=True)}


class Azure:
    """A resource group that has the README's network; keeps what Ray deploys in it."""

    def __init__(self, network: dict[str, str]):
        self.deployed: list[dict[str, Any]] = []
        self.vnet = f"{GROUP}/virtualNetworks/{network['name']}"
        group = {"id": f"{GROUP}/networkSecurityGroups/{network['network-security-group']}"}
        subnet = {"addressPrefix": network["subnet-prefixes"], "networkSecurityGroup": group}
        self.subnets = [{"name": network["subnet-name"], "properties": subnet}]
        self.resource_groups = self.deployments = self.resources = self.providers = self

    def create_or_update(self, **arguments: Any) -> Any:
        if "deployment_name" in arguments:
            self.deployed.append(arguments["parameters"]["properties"])
        outputs = {name: {"value": name} for name in ("msi", "nsg", "subnet")}
        properties = SimpleNamespace(outputs=outputs)
        return SimpleNamespace(result=lambda: SimpleNamespace(properties=properties))

    def list_by_resource_group(self, group: str, filter_: str) -> list[Any]:
        unique_id = filter_.split("'")[1]
        return [SimpleNamespace(id=self.vnet)] if unique_id in self.vnet else []

    def get_by_id(self, resource: str, version: str) -> Any:
        if resource != self.vnet:
            raise NotFoundError
        return SimpleNamespace(properties={"subnets": copy.deepcopy(self.subnets)})

    def delete_by_id(self, **arguments: Any) -> None:
        raise NotFoundError

    def get(self, name: str) -> Any:
        return SimpleNamespace(resource_types=[])


def test_subnet_keeps_the_security_group_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    network = readme_options("az network vnet create ")
    azure = Azure(network)
    contents: dict[str, dict[str, Any]] = {
        "azure.common.credentials": {"get_cli_profile": None},
        "azure.core.exceptions": {
            "HttpResponseError": NotFoundError, "ResourceNotFoundError": NotFoundError
        },
        "azure.identity": {"AzureCliCredential": lambda: None},
        "azure.mgmt.resource": {"ResourceManagementClient": lambda *_: azure},
        "azure.mgmt.resource.resources.models": {
            "DeploymentMode": SimpleNamespace(incremental="incremental")
        },
    }  # fmt: skip
    made: dict[str, ModuleType] = {}
    for name, members in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            if module not in made:
                made[module] = ModuleType(module)
                monkeypatch.setitem(sys.modules, module, made[module])
        vars(made[name]).update(members)
    module = "ray.autoscaler._private._azure.config"
    monkeypatch.setitem(sys.modules, module, ModuleType(module))  # is removed after the test
    del sys.modules[module]
    from ray.autoscaler._private._azure import config as ray_azure

    config = yaml.safe_load((ROOT / "cluster" / "azure.yaml").read_text())
    assert config["provider"]["resource_group"] == network["resource-group"]
    config["provider"]["subscription_id"] = "s"
    ray_azure._configure_resource_group(config)
    (deployed,) = azure.deployed
    (vnet,) = (r for r in deployed["template"]["resources"] if "virtualNetworks" in r["type"])
    (subnet,) = vnet["properties"]["subnets"]
    assert subnet["properties"]["networkSecurityGroup"]["id"].endswith("/cl-ray-ssh")
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
