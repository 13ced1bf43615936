"""The shipped aws.yaml on a fake cloud: from nothing to a trained run and back to nothing.

The tests are one story on one cluster, in order: each continues where the one before ended.
"""

import json
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

import pytest
from helpers import client
from helpers.cloud import BUCKET, REGION, Bucket, Cloud, machine_name
from helpers.iam import allows
from helpers.machines import GATEWAY
from helpers.ports import listening_ports, probe
from helpers.processes import wait_for
from helpers.small_run import SMALL_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]  # slow on a busy machine

SUBMIT = "ray job submit --address http://localhost:8265 --working-dir ."
EPOCHS = 10
STEPS = 400 // 32 + 1
"""Steps of an epoch of `copy_digits`."""
BUCKET_ACTIONS = {"GET": "ListBucket", "HEAD": "ListBucket", "PUT": "CreateBucket"}
OBJECT_ACTIONS = {
    "GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject",
    "DELETE": "DeleteObject",
}  # fmt: skip
"""What S3 asks IAM for, by the request's method."""
NAMES = {"YOUR-BUCKET": BUCKET}
NAME = f"cl-ray-{REGION}"
"""The security group, and the beginning of the roles' names."""
NO_GPU = {"--gpus-per-worker 1 --cpus-per-worker 3": "--cpus-per-worker 3"}
"""The fake machines have GPUs in EC2's tables only; two workers of 3 CPUs need two machines."""
SHORT_RUN = f" --data s3://{BUCKET}/digits --evaluation.every 0 " + " ".join(SMALL_RUN)
SMALL_TRIAL = (
    "batch_size=32", "generator.width=4", "generator.latent=8", "discriminator.width=4",
    "discriminator.hidden=16", "log_every=5", "threads=1", "evaluation.reference=mnist",
    "evaluation.samples=60", "evaluation.images=60",
)  # fmt: skip
PUBLIC = {
    "metrics", "grpc.health.v1.Health/Check", "/api/healthz", "/api/local_raylet_healthz"
}  # fmt: skip
"""Answered without a token: metrics, and the health checks of load balancers and Kubernetes."""


@pytest.fixture(scope="module")
def yaml(cloud: Cloud, scratch: Path) -> Path:
    """The shipped file, filled in by the shipped script."""
    file = client.shipped_yaml("aws.yaml", scratch / "aws.yaml")
    changes = {**NAMES, "YOUR.IP.ADD.RESS/32": f"10.77.0.0/16 --yaml {file}"}
    printed = client.run_readme(cloud, "AWS", "python cluster/aws_account.py create", changes)
    assert f"s3://{BUCKET}" in printed
    return file


@pytest.fixture(scope="module")
def bucket(cloud: Cloud, yaml: Path, copy_digits: Callable[[Path], None]) -> Bucket:
    """The bucket, with a dataset of digits in it."""
    local = cloud.folder / "digits"
    copy_digits(local)
    made = Bucket(cloud)
    for file in local.iterdir():
        made.client.upload_file(str(file), BUCKET, f"digits/{file.name}")
    return made


@pytest.fixture(scope="module")
def tunnels() -> Iterator[ExitStack]:
    """Tunnels that stay open from test to test."""
    with ExitStack() as stack:
        yield stack


def submit(cloud: Cloud, prefix: str, flags: str, changes: dict[str, str]) -> None:
    """Submit a job of the README with more flags, and do not wait for its end."""
    changes = {**NAMES, **changes, " --working-dir .": " --no-wait --working-dir ."}
    *shell, command = client.readme_command("AWS", prefix, changes)
    client.run(cloud, *shell, command + flags)


def submit_training(cloud: Cloud, epochs: int, job: str = "first") -> None:
    """Submit the README's training; every submission needs an id of its own."""
    new_id = {"--submission-id first": f"--submission-id {job}"} if job != "first" else {}
    flags = f"{SHORT_RUN} --epochs {epochs}"
    submit(cloud, f"{SUBMIT} --submission-id first", flags, {**NO_GPU, **new_id})


def test_the_security_group_admits_ssh_from_one_range_only(cloud: Cloud, yaml: Path) -> None:
    (group,) = cloud.ec2.describe_security_groups(
        Filters=[{"Name": "group-name", "Values": [NAME]}]
    )["SecurityGroups"]
    rules = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert [rule["IpProtocol"] for rule in rules] == ["-1", "tcp"]
    assert rules[0]["IpRanges"] == []
    assert [pair["GroupId"] for pair in rules[0]["UserIdGroupPairs"]] == [group["GroupId"]]
    assert (rules[1]["FromPort"], rules[1]["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rules[1]["IpRanges"]] == ["10.77.0.0/16"]
    assert group["GroupId"] in yaml.read_text()


def test_up(cloud: Cloud, yaml: Path, tunnels: ExitStack) -> None:
    client.create_token(cloud)
    assert stat.S_IMODE((cloud.home / ".ray/auth_token").stat().st_mode) == 0o600
    client.run_readme(cloud, "AWS", "ray up", {"cluster/aws.yaml": str(yaml)})
    (head,) = cloud.instances()
    assert head["InstanceType"] == "m6i.large"
    assert head["IamInstanceProfile"]["Arn"].endswith(f"/{NAME}-head")
    groups = cloud.ec2.describe_security_groups()["SecurityGroups"]
    assert sorted(g["GroupName"] for g in groups if "ray" in g["GroupName"]) == [NAME]
    mode = client.run(cloud, "ray", "exec", str(yaml), "stat -c mode:%a ~/.ray/auth_token")
    assert "mode:600" in mode
    tunnels.enter_context(client.dashboard(cloud, yaml))


def test_no_ray_api_answers_without_the_token(cloud: Cloud) -> None:
    """Not even to a machine that the security group admits."""
    token = client.read_token(cloud)
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        assert client.http_get(client.DASHBOARD + path)[0] == 401, path
        assert client.http_get(client.DASHBOARD + path, "0" * len(token))[0] == 403, path
        assert client.http_get(client.DASHBOARD + path, token)[0] == 200, path
    address = cloud.instances()[0]["PrivateIpAddress"]
    assert (
        client.http_get(f"http://{address}:8265/api/version")[0] == 0
    )  # it listens on loopback only
    assert socket.create_connection((address, 22), timeout=10)
    # GCS, by which nodes and drivers join.
    check = ("timeout", "60", "ray", "health-check", f"--address={address}:6379")
    client.run(cloud, *check)
    client.run(cloud, "env", "RAY_AUTH_MODE=disabled", *check, ok=False)
    client.run(cloud, "env", f"RAY_AUTH_TOKEN={'0' * len(token)}", *check, ok=False)


def test_training_on_two_machines_survives_the_loss_of_one(
    cloud: Cloud, yaml: Path, bucket: Bucket, tmp_path: Path
) -> None:
    submit_training(cloud, EPOCHS)
    client.wait_for_job(cloud, "first", lambda: len(bucket.epochs()) >= 3, "three epochs")
    head, *workers = cloud.instances()
    assert [w["InstanceType"] for w in workers] == ["g5.xlarge"] * 2
    assert {w.get("InstanceLifecycle") for w in workers} == {"spot"}
    # moto shows the profile on the first machine of a request only.
    profiles = {w["IamInstanceProfile"]["Arn"] for w in workers if "IamInstanceProfile" in w}
    assert [profile.rpartition("/")[2] for profile in profiles] == [f"{NAME}-worker"]
    assert len({m["PrivateIpAddress"] for m in (head, *workers)}) == 3

    cloud.kill(workers[-1]["InstanceId"])
    time.sleep(2)  # metrics that were under way have arrived
    lost_at = len(bucket.epochs())
    assert lost_at < EPOCHS - 2
    client.wait_for_job(
        cloud, "first", lambda: len(bucket.epochs()) > lost_at, "steps after the loss"
    )
    log = client.wait_for_success(cloud, "first")
    assert bucket.epochs() == list(range(1, EPOCHS + 1))  # nothing twice, nothing missing
    resumed = [int(step) for step in re.findall(r"resumes from step-(\d+)", log)]
    assert len(resumed) == 1
    lost = lost_at - resumed[0] / STEPS
    assert lost <= 1
    later = [m["InstanceId"] for m in cloud.instances()]
    assert workers[-1]["InstanceId"] not in later
    # A new machine was started. For a moment Ray counts the lost and the requested machine, and may
    # start one more, which ends when it is idle; never more than max_workers.
    assert 3 <= len(later) <= 1 + 4

    files = bucket.files()
    events = [name for name in files if name.startswith("runs/first/tensorboard/events")]
    for number, name in enumerate(events):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(bucket.read(name))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert max(event.step for event in read.Scalars("g/adversarial")) == EPOCHS * STEPS
    assert any(name.startswith("runs/first/checkpoints/") for name in files)
    assert json.loads(bucket.read("runs/first/summary.json"))["workers"] == 2


def test_no_port_answers_without_the_token(cloud: Cloud) -> None:
    """Every port of every machine, from a machine that the security group admits."""
    token = client.read_token(cloud)
    found = [
        (machine["PrivateIpAddress"], port)
        for machine in cloud.instances()
        for port in listening_ports(cloud.machines, machine_name(machine["InstanceId"]))
    ]
    assert {port.process for _, port in found if port.loopback} <= {
        "dashboard.py",
        "ray::DashboardAgent",
    }
    outside = [(address, port) for address, port in found if not port.loopback]
    with ThreadPoolExecutor(8) as pool:
        none, wrong, right = (
            list(pool.map(probe, *zip(*outside, strict=True), repeat(shown)))
            for shown in (None, "0" * len(token), token)
        )
    admitted: dict[str, set[str]] = {}
    for (_, port), *refused, answer in zip(outside, none, wrong, right, strict=True):
        for result in refused:
            assert result.answered <= PUBLIC, (port, result)
        if answer.answered - PUBLIC:  # a Ray API, which answers those with the token
            assert all(result.refused for result in refused), (port, refused)
        admitted.setdefault(port.process, set()).update(answer.answered)
    # With the token each API answers: else nothing was tried.
    for process, call in {
        "gcs_server": "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
        "raylet": "ray.rpc.NodeManagerService/GetNodeStats",
        "ray::DashboardAgent": "ray.rpc.ReporterService/GetTraceback",
        "ray::RuntimeEnvAgent": "/get_or_create_runtime_env",
        "ray::": "ray.rpc.CoreWorkerService/NumPendingTasks",
        "python": "ray.rpc.RayletDriver/ClusterInfo",  # the server of `ray://`
        "monitor.py": "metrics",
    }.items():
        assert call in admitted[process], process
    lines = client.readme_section("Open ports").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    assert {port.process for _, port in outside} <= listed


def test_a_small_search_runs_as_a_job(cloud: Cloud, bucket: Bucket) -> None:
    sets = "".join(f" --set {change}" for change in SMALL_TRIAL)
    flags = f" --data s3://{BUCKET}/digits --trials 2 --epochs 1{sets}"
    search = "--submission-id search -- python tuning/search.py"
    changes = {
        "-- python tuning/search.py": search,
        "--gpus-per-trial 1 --cpus-per-trial 3 --concurrent 4": "--cpus-per-trial 3",
    }
    submit(cloud, f"{SUBMIT} -- python tuning/search.py", flags, changes)
    client.wait_for_success(cloud, "search")
    files = [name for name in bucket.files() if name.startswith("runs/balance/")]
    assert {"runs/balance/best.yaml", "runs/balance/leaderboard.csv"} <= set(files)
    assert any("tfevents" in name for name in files)


def test_the_run_can_be_watched_and_fetched(cloud: Cloud, yaml: Path, bucket: Bucket) -> None:
    assert "'SUCCEEDED'" in client.run_readme(cloud, "Watching", "ray job list")
    assert f"epoch {EPOCHS}/{EPOCHS}" in client.run_readme(cloud, "Watching", "ray job logs")
    shipped_as = {"cluster/aws.yaml": str(yaml)}
    status = client.run(
        cloud,
        *client.readme_command("Watching", "ray exec cluster/aws.yaml 'ray status'", shipped_as),
    )
    assert "gpu-spot" in status
    fetched = client.run_readme(cloud, "AWS", 'python -c "import cl_ray', NAMES)
    assert "(4, 28, 28, 1)" in fetched
    command = client.readme_command(
        "Watching", "ray exec --port-forward 6006", {**NAMES, **shipped_as}
    )
    with client.background(cloud, "tensorboard", *command):
        url = "http://localhost:6006/data/runs"
        shown = "the run in TensorBoard"
        wait_for(lambda: "first/tensorboard" in client.http_get(url)[1], shown, 0.5)


def test_after_a_lost_head_the_same_commands_resume(
    cloud: Cloud, yaml: Path, bucket: Bucket, tunnels: ExitStack
) -> None:
    """The head is lost during training; `ray up` and the same job resume the last checkpoint."""
    end = EPOCHS + 4
    submit_training(cloud, end, "longer")
    client.wait_for_job(cloud, "longer", lambda: len(bucket.epochs()) > EPOCHS, "another epoch")
    head = next(m for m in cloud.instances() if m["InstanceType"] == "m6i.large")
    tunnels.close()
    cloud.kill(head["InstanceId"])
    client.run_readme(cloud, "AWS", "ray up", {"cluster/aws.yaml": str(yaml)})
    tunnels.enter_context(client.dashboard(cloud, yaml))
    saved = bucket.checkpoints()[-1]
    assert EPOCHS * STEPS < int(saved.removeprefix("step-")) < end * STEPS
    submit_training(cloud, end, "again")
    assert f"resumes from {saved}" in client.wait_for_success(cloud, "again")
    assert bucket.epochs() == list(range(1, end + 1))


def test_the_roles_allow_what_machines_asked_of_s3(cloud: Cloud) -> None:
    """Moto lets all through; on AWS a request beyond the policy would end a run."""
    role = cloud.client("iam").get_role_policy(RoleName=f"{NAME}-worker", PolicyName="storage")
    line = re.compile(rf'^(\S+) - - \[.*?\] ".*?([A-Z]+) /{BUCKET}(?:/([^?\s]*))?(\?\S*)? HTTP')
    asked = set()
    for match in map(line.match, (cloud.folder / "moto.log").read_text().splitlines()):
        if match and match[1] != GATEWAY:  # from a machine
            _, method, key, query = match.groups()
            if not key:
                action = "DeleteObject" if query == "?delete" else BUCKET_ACTIONS[method]
            elif method == "DELETE" and query:
                action = "AbortMultipartUpload"
            else:
                action = OBJECT_ACTIONS[method]
            asked.add((action, f"/{key or 'runs/'}" if action in OBJECT_ACTIONS.values() else ""))
    assert {"ListBucket", "GetObject", "PutObject"} <= {action for action, _ in asked}
    for action, path in asked:
        resource = f"arn:aws:s3:::{BUCKET}{path}"
        assert allows(role["PolicyDocument"], f"s3:{action}", resource), (action, resource)


def test_down_leaves_nothing(cloud: Cloud, yaml: Path, tunnels: ExitStack) -> None:
    tunnels.close()
    client.run_readme(cloud, "AWS", "ray down", {"cluster/aws.yaml": str(yaml)})
    assert cloud.instances("pending", "running", "stopping", "stopped") == []
    wait_for(lambda: not cloud.machines.running, "the machines' end", seconds=300)
    changes = {**NAMES, "delete": f"delete --yaml {yaml}"}
    client.run_readme(cloud, "AWS", "python cluster/aws_account.py delete", changes)
    groups = cloud.ec2.describe_security_groups()["SecurityGroups"]
    assert [g["GroupName"] for g in groups if g["GroupName"] != "default"] == []
    roles = cloud.client("iam").list_roles()["Roles"]
    assert [r["RoleName"] for r in roles if "cl-ray" in r["RoleName"]] == []
    assert cloud.client("s3").list_buckets()["Buckets"] == []
    keys = [pair["KeyName"] for pair in cloud.ec2.describe_key_pairs()["KeyPairs"]]
    assert keys == [f"ray-autoscaler_{REGION}"]  # every Ray cluster in the region uses it
    assert client.leftover_processes(cloud) == []


def test_every_command_was_run(request: pytest.FixtureRequest, cloud: Cloud) -> None:
    """All of the README's for AWS; test_onprem runs the doctor's."""
    chosen = {item.name for item in request.session.items if item.path == request.path}
    if chosen != {name for name in globals() if name.startswith("test_")}:
        pytest.skip("only a part of this file was selected")
    left = {
        c for title in ("AWS", "Watching") for c in client.readme_commands(title)
    } - client.USED_COMMANDS
    assert [command for command in left if " doctor " not in command] == []
