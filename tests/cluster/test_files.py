"""The files of cluster/, as far as seconds and no cloud allow."""

import json
import re
import stat
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.template import resources
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
CLOUDS = ("aws", "gcp", "azure")
TARGETS = (*CLOUDS, "onprem")


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_ray_accepts_the_yaml(target: str) -> None:
    config = prepare_config(read(f"{target}.yaml"))
    validate_config(config)  # raises on unknown fields
    assert config["head_node_type"] in config["available_node_types"]


def test_ray_refuses_an_unknown_field() -> None:
    config = read("aws.yaml") | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("target", TARGETS)
def test_token_and_loopback_are_set(target: str) -> None:
    config = read(f"{target}.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for place in ("head", "worker"):
        commands = config[f"{place}_start_ray_commands"]
        assert "chmod 600 ~/.ray/auth_token" in commands
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token ray start" in start
        assert "--dashboard-host=0.0.0.0" not in start
    (head,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


@pytest.mark.parametrize("target", TARGETS)
def test_commands_have_valid_shell_syntax(target: str) -> None:
    """A `#` in an unquoted YAML line cuts the command off."""
    config = read(f"{target}.yaml")
    keys = [key for key in config if key.endswith("_commands")]
    for command in (c for key in keys for c in config[key]):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("target", TARGETS)
def test_machines_install_what_is_listed_with_its_hash(target: str) -> None:
    config = read(f"{target}.yaml")
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).is_file(), local
    setup = "\n".join(config["setup_commands"])
    assert "--python 3.11" in setup
    assert not re.search(r"curl|wget|https?:", setup)
    installs = [c for c in config["setup_commands"] if "pip install" in c]
    assert len(installs) == 2
    for command in installs:
        _, *words = command.partition("pip install ")[2].rstrip(")").split()
        files = re.findall(r"--requirements? ([^\s)]+)", command)
        assert "--require-hashes" in command
        assert set(files) <= set(config["file_mounts"])
        # Nothing is installed that is not in one of the files.
        options = {
            "--require-hashes",
            "--requirement",
            "--requirements",
            "--python",
            "~/cl_ray/venv",
        }
        assert set(words) <= {*options, *files}


def listed(name: str) -> dict[str, str]:
    """The versions in a list of packages; each has a hash."""
    packages = re.split(r"^(?=\S)", (CLUSTER / name).read_text(), flags=re.MULTILINE)
    found = {}
    for package in packages:
        match = re.match(r"([\w.-]+)==(\S+)", package)
        if match:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", package), package
            found[match[1]] = match[2]
        else:
            assert package.startswith("#") or not package.strip(), package
    assert found
    return found


def test_lists_of_packages_are_those_of_the_project() -> None:
    """If this fails, write the lists anew with the command in their first lines."""
    versions = listed("requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for needed in (*project["dependencies"], *extras["tuning"], *extras["s3"]):
        requirement = Requirement(needed)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, needed
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert versions.get(canonicalize_name(name), version) == version, line
    for cloud in ("azure", "gcp"):
        both = listed(f"requirements-{cloud}.txt").items() & versions.items()
        assert both == {p for p in listed(f"requirements-{cloud}.txt").items() if p[0] in versions}


@pytest.mark.parametrize("folder", ["cluster", "cluster/kubernetes"])
def test_no_script_from_the_internet_is_run(folder: str) -> None:
    for file in (ROOT / folder).iterdir():
        if file.is_file():
            assert not re.search(r"\b(curl|wget)\b", file.read_text()), file


@pytest.mark.parametrize("target", CLOUDS)
def test_size_is_bounded_and_spot_is_preferred(target: str) -> None:
    config = read(f"{target}.yaml")
    assert 0 < config["max_workers"] <= 8
    assert 0 < config["idle_timeout_minutes"] <= 10
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    assert set(types) == {"gpu-spot", "gpu-on-demand"}
    assert all(t.get("min_workers", 0) == 0 and t["max_workers"] <= 4 for t in types.values())
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    spot, demand = (json.dumps(types[name]).lower() for name in ("gpu-spot", "gpu-on-demand"))
    assert '"spot"' in spot
    assert '"spot"' not in demand


def test_aws_nodes_are_closed_and_tagged() -> None:
    config = read("aws.yaml")
    assert config["provider"]["cache_stopped_nodes"] is False
    for kind, node in config["available_node_types"].items():
        node = node["node_config"]
        assert node["ImageId"].startswith("ami-")
        assert node["SecurityGroupIds"]  # else Ray creates one that is open to the internet
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        disk = node["BlockDeviceMappings"][0]["Ebs"]
        assert (disk["VolumeType"], disk["Encrypted"]) == ("gp3", True)
        role = "head" if kind == "head" else "worker"
        region = config["provider"]["region"]
        assert node["IamInstanceProfile"] == {"Name": f"{config['cluster_name']}-{region}-{role}"}
        assert {spec["ResourceType"] for spec in node["TagSpecifications"]} == {
            "instance",
            "volume",
        }


def test_google_accounts_may_get_the_bucket() -> None:
    """Arrow calls storage.buckets.get before it writes, and objectAdmin does not allow that."""
    readme = (CLUSTER / "README.md").read_text()
    bindings = re.findall(
        r"gs://YOUR-BUCKET --member serviceAccount:(\S+)@\S+ --role (\S+)", readme
    )
    reader = "roles/storage.legacyBucketReader"
    assert {account for account, role in bindings if role == reader} == {
        "cl-ray-worker",
        "ray-autoscaler-sa-v1",
    }
    worker = read("gcp.yaml")["available_node_types"]["gpu-spot"]["node_config"]
    assert worker["serviceAccounts"][0]["email"].startswith("cl-ray-worker@")


@pytest.mark.parametrize("name", ["AutoscalerPolicy", "StoragePolicy"])
def test_policies_allow_no_action_and_no_thing_by_wildcard(name: str) -> None:
    """test_account.py asks them for requests."""
    for statement in resources()[name]["Properties"]["PolicyDocument"]["Statement"]:
        assert "*" not in str(statement["Action"])
        assert statement["Resource"] != "*" or "Describe" in str(statement["Action"])
        assert "NotResource" not in statement
        assert "NotAction" not in statement


def test_google_machines_boot_pinned_images_securely() -> None:
    for node in read("gcp.yaml")["available_node_types"].values():
        node = node["node_config"]
        shielded = dict.fromkeys(("SecureBoot", "Vtpm", "IntegrityMonitoring"), True)
        assert node["shieldedInstanceConfig"] == {f"enable{k}": v for k, v in shielded.items()}
        (disk,) = node["disks"]
        assert "/family/" not in disk["initializeParams"]["sourceImage"]


def test_azure_images_are_pinned() -> None:
    for node in read("azure.yaml")["available_node_types"].values():
        assert node["node_config"]["azure_arm_parameters"]["imageVersion"] != "latest"


def test_job_package_contains_the_code_only(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv"])
    names = zipfile.ZipFile(package).namelist()
    assert package.stat().st_size < 20e6
    inside = {Path(name).parts[0] for name in names}
    assert {"cl_ray", "tuning", "pyproject.toml", "constraints.txt"} <= inside
    assert not inside & {"tests", "benchmarks", "docs", "runs", ".git", ".venv", "cluster"}
    assert any(name.endswith("mnist/dataset.json") for name in names)


def test_files_contain_no_secret() -> None:
    for file in CLUSTER.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE", file.read_text()), file
            assert not stat.S_IMODE(file.stat().st_mode) & 0o022
