"""The shipped aws.yaml from nothing to a trained run and back to nothing, on a fake cloud.

One cluster, and one story told in order: each test goes on where the one before ended.
"""

import json
import re
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.cloud import Cloud, name_of, wait_for
from helpers.digits import COUNT, put_digits
from helpers.doors import doors, knock, process_of
from helpers.laptop import (
    JOBS,
    beside,
    dashboard,
    left_over,
    log_of,
    make_token,
    note,
    over,
    run,
    shipped,
    status,
    text_of,
    until,
)
from helpers.small_run import SMALL
from helpers.storage import BUCKET, Bucket
from helpers.typed import TYPED, commands, section, typed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SUBMIT = "ray job submit --address http://localhost:8265 --working-dir ."
EPOCHS, STEPS = 10, COUNT // 32 + 1
NAMES = {"YOUR-BUCKET": BUCKET}
NO_CUDA = {"--gpus-per-worker 1 --cpus-per-worker 3": "--cpus-per-worker 3"}
"""The fake machines have GPUs in EC2's tables alone; two workers of 3 CPUs need two of them."""
SHORT = f" --data s3://{BUCKET}/digits --threads 1 --evaluation.every 0 " + " ".join(SMALL)
SMALL_TRIAL = (
    "batch_size=32", "generator.width=4", "generator.latent=8", "discriminator.width=4",
    "discriminator.hidden=16", "log_every=5", "threads=1", "evaluation.reference=mnist",
    "evaluation.samples=60", "evaluation.images=60",
)  # fmt: skip
HEALTH = {"grpc.health.v1.Health/Check", "/api/healthz", "/api/local_raylet_healthz"}
"""Whether something lives is told to everybody: load balancers and Kubernetes ask for it."""


@pytest.fixture(scope="module")
def yaml(cloud: Cloud, scratch: Path) -> Path:
    """The shipped file, filled in by the shipped script."""
    file = shipped("aws.yaml", scratch / "aws.yaml")
    changes = {**NAMES, "YOUR.IP.ADD.RESS/32": f"10.77.0.0/16 --yaml {file}"}
    said = run(cloud, *typed("AWS", "python cluster/aws_account.py create", changes))
    assert f"s3://{BUCKET}" in said
    return file


@pytest.fixture(scope="module")
def bucket(cloud: Cloud, yaml: Path) -> Bucket:
    """The bucket, with a data set of digits in it."""
    local = cloud.folder / "digits"
    put_digits(local)
    made = Bucket(cloud)
    for file in local.rglob("*"):
        if file.is_file():
            made.client.upload_file(str(file), BUCKET, f"digits/{file.relative_to(local)}")
    return made


@pytest.fixture(scope="module")
def tunnels() -> Iterator[ExitStack]:
    """What stays open from test to test."""
    with ExitStack() as stack:
        yield stack


def begin(cloud: Cloud, beginning: str, more: str, changes: dict[str, str]) -> None:
    """Type a job of the README, with flags that make it short, and do not wait for its end."""
    changes = {**NAMES, **changes, " --working-dir .": " --no-wait --working-dir ."}
    *shell, command = typed("AWS", beginning, changes)
    run(cloud, *shell, command + more)


def train(cloud: Cloud, epochs: int, job: str = "first") -> None:
    """The README's training; typed again it wants another submission id."""
    again = {"--submission-id first": f"--submission-id {job}"} if job != "first" else {}
    short = f"{SHORT} --epochs {epochs}"
    begin(cloud, f"{SUBMIT} --submission-id first", short, {**NO_CUDA, **again})


def test_the_account_lets_in_ssh_from_one_range_and_nothing_else(cloud: Cloud, yaml: Path) -> None:
    (group,) = cloud.ec2.describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["cl-ray"]}]
    )["SecurityGroups"]
    rules = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert [rule["IpProtocol"] for rule in rules] == ["-1", "tcp"]
    assert rules[0]["IpRanges"] == []
    assert [pair["GroupId"] for pair in rules[0]["UserIdGroupPairs"]] == [group["GroupId"]]
    assert (rules[1]["FromPort"], rules[1]["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rules[1]["IpRanges"]] == ["10.77.0.0/16"]
    assert group["GroupId"] in yaml.read_text()
    iam = cloud.client("iam")
    assert iam.list_role_policies(RoleName="cl-ray-worker")["PolicyNames"] == ["storage"]
    storage = iam.get_role_policy(RoleName="cl-ray-worker", PolicyName="storage")["PolicyDocument"]
    reached = [statement["Resource"] for statement in storage["Statement"]]
    assert reached == [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]


def test_up(cloud: Cloud, yaml: Path, tunnels: ExitStack) -> None:
    make_token(cloud)
    assert stat.S_IMODE((cloud.home / ".ray/auth_token").stat().st_mode) == 0o600
    run(cloud, *typed("AWS", "ray up", {"cluster/aws.yaml": str(yaml)}))
    (head,) = cloud.instances()
    assert head["InstanceType"] == "m6i.large"
    assert head["IamInstanceProfile"]["Arn"].endswith("/cl-ray-head")
    groups = cloud.ec2.describe_security_groups()["SecurityGroups"]
    assert sorted(g["GroupName"] for g in groups if "ray" in g["GroupName"]) == ["cl-ray"]
    mode = run(cloud, "ray", "exec", str(yaml), "stat -c mode:%a ~/.ray/auth_token")
    assert "mode:600" in mode
    tunnels.enter_context(dashboard(cloud, yaml))


def test_no_ray_api_answers_without_the_token(cloud: Cloud, yaml: Path) -> None:
    """Not even to a neighbour whom the security group would let in."""
    token = (cloud.home / ".ray/auth_token").read_text().strip()
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        assert status(JOBS + path) == 401, path
        assert status(JOBS + path, "0" * len(token)) == 403, path
        assert status(JOBS + path, token) == 200, path
    address = cloud.instances()[0]["PrivateIpAddress"]
    assert status(f"http://{address}:8265/api/version") == 0  # loopback alone
    assert socket.create_connection((address, 22), timeout=10)
    # GCS, by which nodes and drivers join.
    check = ("timeout", "60", "ray", "health-check", f"--address={address}:6379")
    run(cloud, *check)
    run(cloud, "env", "RAY_AUTH_MODE=disabled", *check, ok=False)
    run(cloud, "env", f"RAY_AUTH_TOKEN={'0' * len(token)}", *check, ok=False)


def test_training_on_two_machines_outlives_one_of_them(
    cloud: Cloud, yaml: Path, bucket: Bucket, tmp_path: Path
) -> None:
    train(cloud, EPOCHS)
    until(cloud, "first", lambda: len(bucket.epochs()) >= 3, "three epochs")
    head, *workers = cloud.instances()
    assert [w["InstanceType"] for w in workers] == ["g5.xlarge"] * 2
    assert {w.get("InstanceLifecycle") for w in workers} == {"spot"}
    # moto shows the profile on the first machine of a request alone.
    profiles = {w["IamInstanceProfile"]["Arn"] for w in workers if "IamInstanceProfile" in w}
    assert [profile.rpartition("/")[2] for profile in profiles] == ["cl-ray-worker"]
    assert len({m["PrivateIpAddress"] for m in (head, *workers)}) == 3

    cloud.unplug(workers[-1]["InstanceId"])
    began = time.monotonic()
    time.sleep(2)  # what was on its way has arrived
    lost_at = len(bucket.epochs())
    assert lost_at < EPOCHS - 2
    until(cloud, "first", lambda: len(bucket.epochs()) > lost_at, "steps after the loss")
    seconds = time.monotonic() - began
    until(cloud, "first", lambda: over(cloud, "first") == "SUCCEEDED", "the end of the job")
    said = log_of(cloud, "first")
    assert bucket.epochs() == list(range(1, EPOCHS + 1))  # nothing twice, nothing missing
    resumed = [int(step) for step in re.findall(r"goes on from step-(\d+)", said)]
    assert len(resumed) == 1
    lost = lost_at - resumed[0] / STEPS
    assert lost <= 1
    later = [m["InstanceId"] for m in cloud.instances()]
    note(epochs_lost=lost, seconds_to_recovery=seconds, machines_after=len(later))
    assert workers[-1]["InstanceId"] not in later
    # Another one came. For a moment Ray counts what was lost and what is asked for anew, and may
    # start a machine more, which goes again when it is idle; never more than max_workers.
    assert 3 <= len(later) <= 1 + 4

    files = bucket.files()
    events = [name for name in files if name.startswith("runs/first/tensorboard/events")]
    for number, name in enumerate(events):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(bucket.read(name))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert max(event.step for event in read.Scalars("g/adversarial")) == EPOCHS * STEPS
    assert any(name.startswith("runs/first/checkpoints/") for name in files)
    assert json.loads(bucket.read("runs/first/summary.json"))["workers"] == 2


def test_no_door_opens_without_the_token(cloud: Cloud) -> None:
    """Every port of every machine, to a neighbour whom the security group would let in."""
    token = (cloud.home / ".ray/auth_token").read_text().strip()
    found = [
        (name_of(m["InstanceId"]), m["PrivateIpAddress"], door)
        for m in cloud.instances()
        for door in doors(cloud.machines, name_of(m["InstanceId"]))
    ]
    assert {process_of(d) for _, _, d in found if d.loopback} <= {
        "dashboard.py",
        "ray::DashboardAgent",
    }
    outside = [(address, door) for _, address, door in found if not door.loopback]
    with ThreadPoolExecutor(8) as pool:
        none, bad, good = (
            list(pool.map(lambda at, shown=shown: knock(*at, shown), outside))
            for shown in (None, "0" * len(token), token)
        )
    opened: dict[str, set[str]] = {}
    for (_, door), *refused, admitted in zip(outside, none, bad, good, strict=True):
        for answer in refused:
            assert answer.answered <= {"metrics", *HEALTH}, (door, answer)
        if admitted.answered - {"metrics", *HEALTH}:  # a Ray API: it answers those who may ask
            assert all(answer.refused for answer in refused), (door, refused)
        opened.setdefault(process_of(door), set()).update(admitted.answered)
    # What was behind the doors: else nothing was tried.
    for process, call in {
        "gcs_server": "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
        "raylet": "ray.rpc.NodeManagerService/GetNodeStats",
        "ray::DashboardAgent": "ray.rpc.ReporterService/GetTraceback",
        "ray::RuntimeEnvAgent": "/get_or_create_runtime_env",
        "ray::": "ray.rpc.CoreWorkerService/NumPendingTasks",
        "python": "ray.rpc.RayletDriver/ClusterInfo",  # the server of `ray://`
        "monitor.py": "metrics",
    }.items():
        assert call in opened[process], process
    lines = section("Open ports").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    assert {process_of(door) for _, door in outside} <= listed
    tried = [answer for answer in (*none, *bad) if answer.refused]
    note(refused=sum(answer.refused for answer in tried), doors=len(outside))


def test_a_small_search_as_a_job(cloud: Cloud, bucket: Bucket) -> None:
    sets = "".join(f" --set {change}" for change in SMALL_TRIAL)
    short = f" --data s3://{BUCKET}/digits --trials 2 --epochs 1{sets}"
    search = "--submission-id search -- python tuning/search.py"
    changes = {
        "-- python tuning/search.py": search,
        "--gpus-per-trial 1 --cpus-per-trial 3 --concurrent 4": "--cpus-per-trial 3",
    }
    begin(cloud, f"{SUBMIT} -- python tuning/search.py", short, changes)
    until(cloud, "search", lambda: over(cloud, "search") == "SUCCEEDED", "the end of the search")
    files = [name for name in bucket.files() if name.startswith("runs/balance/")]
    assert {"runs/balance/best.yaml", "runs/balance/leaderboard.csv"} <= set(files)
    assert any("tfevents" in name for name in files)


def test_what_is_watched_and_fetched(cloud: Cloud, yaml: Path, bucket: Bucket) -> None:
    assert "'SUCCEEDED'" in run(cloud, *typed("Watching", "ray job list"))
    assert f"epoch {EPOCHS}/{EPOCHS}" in run(cloud, *typed("Watching", "ray job logs"))
    shipped_as = {"cluster/aws.yaml": str(yaml)}
    status_ = run(cloud, *typed("Watching", "ray exec cluster/aws.yaml 'ray status'", shipped_as))
    assert "gpu-spot" in status_
    fetched = run(cloud, *typed("AWS", 'python -c "import cl_ray', NAMES))
    assert "(4, 28, 28, 1)" in fetched
    board = typed("Watching", "ray exec --port-forward 6006", {**NAMES, **shipped_as})
    with beside(cloud, "tensorboard", *board):
        url = "http://localhost:6006/data/runs"
        wait_for(lambda: status(url) == 200, 90, "TensorBoard")
        wait_for(lambda: "first/tensorboard" in text_of(url), 90, "the run in TensorBoard")


def test_a_lost_head_costs_no_more_than_the_same_commands_again(
    cloud: Cloud, yaml: Path, bucket: Bucket, tunnels: ExitStack
) -> None:
    """In mid-training; then `ray up` and the same job, which goes on from the last checkpoint."""
    end = EPOCHS + 4
    train(cloud, end, "longer")
    until(cloud, "longer", lambda: len(bucket.epochs()) > EPOCHS, "an epoch more")
    head = next(m for m in cloud.instances() if m["InstanceType"] == "m6i.large")
    tunnels.close()
    cloud.unplug(head["InstanceId"])
    run(cloud, *typed("AWS", "ray up", {"cluster/aws.yaml": str(yaml)}))
    tunnels.enter_context(dashboard(cloud, yaml))
    saved = bucket.checkpoints()[-1]
    assert EPOCHS * STEPS < int(saved.removeprefix("step-")) < end * STEPS
    train(cloud, end, "again")
    until(cloud, "again", lambda: over(cloud, "again") == "SUCCEEDED", "the end of the job")
    assert f"goes on from {saved}" in log_of(cloud, "again")
    assert bucket.epochs() == list(range(1, end + 1))


def test_down_leaves_nothing(cloud: Cloud, yaml: Path, tunnels: ExitStack) -> None:
    tunnels.close()
    run(cloud, *typed("AWS", "ray down", {"cluster/aws.yaml": str(yaml)}))
    assert cloud.instances("pending", "running", "stopping", "stopped") == []
    wait_for(lambda: not cloud.machines.running, 30, "the machines' end")
    run(cloud, *typed("AWS", "python cluster/aws_account.py delete"))
    groups = cloud.ec2.describe_security_groups()["SecurityGroups"]
    assert [g["GroupName"] for g in groups if g["GroupName"] != "default"] == []
    roles = cloud.client("iam").list_roles()["Roles"]
    assert [r["RoleName"] for r in roles if "cl-ray" in r["RoleName"]] == []
    assert cloud.ec2.describe_key_pairs()["KeyPairs"] == []
    assert left_over(cloud) == []


def test_every_command_was_typed(request: pytest.FixtureRequest) -> None:
    """All of the README's for AWS but what has no program here, and the doctor: test_onprem."""
    chosen = {item.name for item in request.session.items if item.path == request.path}
    if chosen != {name for name in globals() if name.startswith("test_")}:
        pytest.skip("a part of the story was chosen")
    left = {c for title in ("AWS", "Watching") for c in commands(title)} - TYPED
    assert {" ".join(c.split()[:3]) for c in left if " doctor " not in c} == {"aws s3 rb"}
    note(typed=len(TYPED))
