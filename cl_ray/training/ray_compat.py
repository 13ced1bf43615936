"""Every private, undocumented or deprecated part of Ray, Ray Tune and Optuna that cl_ray uses.

Each function names the version in which it was seen and the reason why no public API does.
`tests/training/test_ray_compat.py` has a test for each, which fails when an upgrade changes it.
Ray and Optuna are imported inside the functions: the environment must be set before Ray starts.
"""

import ipaddress
import logging
import os
import re
import shlex
import string
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cl_ray.uri import redact

if TYPE_CHECKING:
    import optuna
    from ray.train import RunConfig
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import PopulationBasedTraining
    from ray.util.placement_group import PlacementGroup

    from cl_ray.storage import RunStorage

TESTED_RAY = "2.60"
"""The minor version of Ray that the tests run with."""
HEAD_RESOURCE = "node:__internal_head__"
"""The resource that only the head node has (Ray 2.60). No public API names the head node."""
CONNECTION_LOST = "was killed, ran out of memory or crashed (Ray knows no exit code)"
"""Short for Ray's half page on a worker process whose connection ended."""

RAY_ENVIRONMENT = {
    # A report is drained once per poll of the controller: every 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # It needs the dashboard, and logs an error without it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # At Ray's own niceness of 15, one busy program on one of two cores slows a run of two threads
    # by more than ten times. It applies to a Ray that is started here.
    "RAY_worker_niceness": "0",
    # A process that is given no GPU sees none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
"""Variables that Ray reads at start, undocumented (Ray 2.60)."""

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial has the files of a run
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `tuning/callbacks.py` handles Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the study is the record, Tune's own is not used
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Variables that Ray Tune reads, only some of them documented (Ray 2.60)."""


LOCAL_RAY_ENVIRONMENT = {
    # The node's address is 127.0.0.1, as where Ray supports no clusters, and all servers of a node
    # bind to its address. `ray.init(_node_ip_address="127.0.0.1")` takes the machine's instead.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Workers on this machine run the driver's Python. Under `uv run` Ray would upload the working
    # directory and start `uv run` for each of them.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Variables of a Ray that is started on this machine for one process, undocumented (Ray 2.60)."""

WITHOUT_METRICS = {
    # Ports that answer everybody. -1 is no port: the server does not start.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Variables that close the ports of a local Ray's metrics, undocumented (Ray 2.60)."""


def configure_ray_environment(dashboard: bool) -> None:
    """Set the variables that Ray reads when it starts; those that the user has set stay.

    With a dashboard, Ray Train tracks its state for it.
    """
    tracking = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"} if dashboard else {}
    for name, value in (RAY_ENVIRONMENT | tracking).items():
        os.environ.setdefault(name, value)


@contextmanager
def local_ray_environment(dashboard: bool) -> Iterator[None]:
    """Have a Ray that starts within the context bind its servers to 127.0.0.1.

    Its processes inherit the variables, and this one has read two of them already. With a dashboard
    there are metrics too. What the user has set stays.
    """
    from ray._private import ray_constants

    variables = LOCAL_RAY_ENVIRONMENT | ({} if dashboard else WITHOUT_METRICS)
    added = {k: v for k, v in variables.items() if k not in os.environ}
    constants = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "ENABLE_RAY_CLUSTER",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
    }
    before = {constants[k]: getattr(ray_constants, constants[k]) for k in added if k in constants}
    os.environ.update(added)
    for name in before:
        setattr(ray_constants, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(ray_constants, name, value)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def fast_worker_start() -> Iterator[None]:
    """Have the workers of a Ray that starts within the context start by our `setup_worker.py`.

    Ray 2.60 has no option for the script. It joins its name to the folder of its own, which an
    absolute path replaces. A version without that name starts its workers as usual.
    """
    from ray._private import ray_constants

    name = "SETUP_WORKER_FILENAME"
    before = getattr(ray_constants, name, None)
    if before is None:
        yield
        return
    setattr(ray_constants, name, str(Path(__file__).with_name("setup_worker.py")))
    try:
        yield
    finally:
        setattr(ray_constants, name, before)


def most_free_cpus() -> float:
    """CPUs that are free on the node that has the most, which one process may ask for.

    `ray.available_resources` (Ray 2.60) adds up those of all nodes.
    """
    from ray._private.state import available_resources_per_node

    nodes = available_resources_per_node().values()
    return float(max((node.get("CPU", 0.0) for node in nodes), default=0.0))


def start_autoscaling_coordinator() -> None:
    """Start the actor by which Ray Train and Ray Data ask for nodes, without waiting for it.

    Ray 2.60 starts it when Ray Train's controller runs, and the controller waits for it. A version
    that has no such function starts it as usual.
    """
    with suppress(ImportError, AttributeError):
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

        module.get_or_create_autoscaling_coordinator()


def torch_framework() -> Any:
    """Return what a backend's config names as its framework if that is PyTorch (Ray 2.60).

    Only `TorchConfig` names it in public, whose module imports torch.
    """
    from ray.train.v2._internal.util import TrainingFramework

    return TrainingFramework.TORCH


def on_loopback() -> bool:
    """Whether the node of the connected Ray has a loopback address, so that there is no other."""
    import ray

    return ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback


def available_memory() -> int:
    """Bytes of memory that are free here, within the limit of a container.

    Ray 2.60 takes a share of them for its object store; no public API tells.
    """
    from ray._private.utils import estimate_available_memory

    return int(estimate_available_memory())


def in_ray_job() -> bool:
    """Whether this process is the driver of a job that `ray job submit` or KubeRay started.

    Ray 2.60: the variable by which such a driver is given its runtime environment.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def gcs_address(address: str) -> str:
    """The address HOST:PORT of a cluster's GCS; `auto` is the cluster that runs on this machine.

    Raises:
        ConnectionError: No cluster runs here.
        ValueError: The address has another form.
    """
    from ray._private import services
    from ray._private.authentication import authentication_token_setup

    if address == "auto":  # as `ray.init` does: a cluster on this machine may be sent the token
        authentication_token_setup.logger.setLevel(logging.ERROR)
        authentication_token_setup.maybe_enable_token_auth_if_token_available(False)
    found = services.canonicalize_bootstrap_address(address)
    if found is None:
        raise ConnectionError("no Ray cluster runs on this machine")
    return str(found)


def ask_gcs(address: str, timeout: float) -> str:
    """Ask a GCS for the cluster's id; return the name of gRPC's status, such as "OK".

    Ray 2.60 repeats this question for minutes, whatever the status is, when it joins a cluster.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with init_grpc_channel(address, GLOBAL_GRPC_OPTIONS) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=timeout)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def ray_runs_here() -> bool:
    """Whether a node of any Ray cluster runs on this machine.

    Ray 2.60 looks for the process in the same way, and a driver that finds none waits in vain.
    """
    from ray._private import services

    return bool(services.find_node_ids())


def configure_tune_environment() -> None:
    """Set the variables that Ray Tune reads; those that the user has set stay."""
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def pending_trials(count: int) -> Iterator[None]:
    """Have Ray Tune ask for the resources of so many trials at once, unless the user set a number.

    An autoscaler then starts their machines together. Ray 2.60 reads it when a search starts.
    """
    name = "TUNE_MAX_PENDING_TRIALS_PG"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(count)
    try:
        yield
    finally:
        del os.environ[name]


def hide_secrets_in_command() -> None:
    """Remove what may be secret from this process's command line.

    Ray (2.60) records it as the entrypoint of the driver's job, which the dashboard shows;
    `ray.init` has no option for it.
    """
    import ray._raylet

    command = shlex.join(sys.orig_argv)
    if (shown := redact(command)) != command:
        ray._raylet.setproctitle(shown)


def withhold_credentials() -> None:
    """Keep Ray Tune from writing the environment's AWS keys into Ray's logs.

    Ray 2.60 copies them into the trials' `runtime_env`, which is logged; no option keeps it from
    that. Processes of a node have that node's environment anyway.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def untested_ray_warning() -> str | None:
    """One line if the installed Ray is of another minor version than the tested one."""
    import ray

    if ".".join(ray.__version__.split(".")[:2]) == TESTED_RAY:
        return None
    return f"Ray {ray.__version__} is not tested with cl_ray: the tested version is {TESTED_RAY}."


def started_local_ray() -> bool:
    """Whether this process started Ray by `ray.init()`, rather than joined a cluster.

    Ray 2.60: no public API tells. Without a node object, as behind Ray Client, it is a cluster.
    """
    import ray

    node = ray._private.worker._global_node
    return node is not None and bool(node.ray_init_cluster)


def session_log_dir() -> Path | None:
    """The folder of this node's log files, which the dashboard's Logs page lists.

    Ray 2.60: no public API tells. None where the process has no node object.
    """
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node else None


def worker_error(error: BaseException) -> BaseException:
    """The error of the worker inside the one that Ray Train reports for it.

    Ray 2.60 wraps a failed health check in `WorkerHealthCheckFailedError`, which is private.
    """
    return getattr(error, "health_check_failure", error)


def raised_error(error: BaseException) -> BaseException:
    """The exception that the training loop raised, inside the one that Ray Train reports for it.

    Ray 2.60 wraps it in `UserExceptionWithTraceback`, which is private.
    """
    return getattr(error, "_base_exc", error)


def failure_reason(error: BaseException) -> str:
    """Describe in one line why a process was lost, or what was raised in it."""
    from ray.exceptions import RayActorError, RayTaskError

    error = worker_error(error)
    if isinstance(error, RayTaskError):
        return " ".join(str(error.cause).split())
    if not isinstance(error, RayActorError):
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return lost_process_reason(str(error))


def lost_process_reason(text: str) -> str:
    """Describe in one line why a process was lost, from the text of a `RayActorError`.

    Ray 2.60 puts the process, its address and the cause only into that text.
    """
    if re.match(r"The actor \w+ is unavailable: ", text):
        return f"its process {CONNECTION_LOST}"
    found = (re.search(rf"\t{field}: (\S+)", text) for field in ("pid", "ip"))
    pid, address = (match.group(1) if match else "?" for match in found)
    cause = re.search(r"The actor (is dead|died because).*", text, re.S)
    reason = " ".join((cause.group() if cause else text).split())
    if "Worker unexpectedly exits with a connection error" in reason:
        reason = CONNECTION_LOST
    return f"process {pid} on {address}: {reason[:300]}"


def tune_failure(trial: "Trial") -> str:
    """Return the text of the error by which a trial of Ray Tune failed last; empty if it has none.

    Ray 2.60 appends it to `Trial.error_file`, and has the error itself only as a pickle.
    """
    if not trial.error_file:
        return ""
    text = Path(trial.error_file).read_text("utf-8", errors="replace")
    return re.split(r"^Failure # \d+ \(occurred at .*\)\n", text, flags=re.M)[-1]


def orphaned_placement_groups() -> "list[PlacementGroup]":
    """Placement groups of this job whose creator, an actor, is dead.

    Ray 2.60: `ray.util.placement_group_table` leaves the creator out. Ray Train removes such
    groups only by the dashboard's state API, so without a dashboard they would stay (ray#54305).
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    table = state._connect_and_get_accessor().get_placement_group_table()
    groups = map(PlacementGroupTableData.FromString, table)
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
        for group in groups
        if ray.JobID(group.creator_job_id).hex() == job
        and not ray.ActorID(group.creator_actor_id).is_nil()  # the driver's own
        and group.creator_actor_dead
        and not group.is_detached  # made to outlive its creator
        and group.state != PlacementGroupTableData.REMOVED
    ]


def autoscaler_settings() -> dict[str, Any] | bool:
    """What the cluster's autoscaler was started with; False if there is none, True if unknown.

    Ray 2.60: no public API tells. The autoscaler is the head's process `monitor.py`; under
    `ray up` its command line names the config file. Without a file that process only watches.
    KubeRay runs its autoscaler in a container of its own; the status that every autoscaler leaves
    in Ray's key-value store shows that it lives, but not its limits.
    """
    import ray

    from cl_ray.training.resources import alive_nodes, start_on_node

    def look() -> dict[str, Any] | bool:  # nested: pickled by value, for the head's process
        import json
        import time

        import psutil
        import yaml
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.experimental.internal_kv import _internal_kv_get

        gcs = ray.get_runtime_context().gcs_address
        flag = "--autoscaling-config="
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            ours = f"--gcs-address={gcs}" in words
            if not ours or not any(Path(word).name == "monitor.py" for word in words):
                continue
            files = [word.removeprefix(flag) for word in words if word.startswith(flag)]
            if not files:
                return False
            try:
                config = yaml.safe_load(Path(files[0]).expanduser().read_text())
            except (OSError, yaml.YAMLError):
                return True
            return config if isinstance(config, dict) else True
        # Version 1 of the autoscaler writes the time, version 2 counts its reports.
        status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
        if time.time() - status.get("time", 0) < 60:
            return True
        return bool(get_cluster_status(gcs).stats.autoscaler_version != "0")

    nodes = alive_nodes()
    head = next(node["NodeID"] for node in nodes if HEAD_RESOURCE in node["Resources"])
    return ray.get(start_on_node(head, look))


def forget_reported_checkpoints(folder: "RunStorage") -> None:
    """Delete Ray Train's own list of a run's checkpoints, before the run is resumed.

    Ray 2.60 reads that list when a trainer of the same name starts, and refuses to start if one
    of its folders is gone. `CheckpointStore` deletes old checkpoints and is what a run resumes
    from, so the list is not needed.
    """
    with suppress(FileNotFoundError):
        folder.delete("checkpoint_manager_snapshot.json")


def ascii_name(name: str) -> str:
    """The name that Ray is given for a run or a search: percent-encoded beyond ASCII.

    Ray 2.60 encodes the tags of metrics and the keys of Tune's registry as ASCII. Two names never
    become one, as % is encoded too.
    """
    return quote(name, safe=string.punctuation.replace("%", ""))


def build_run_config(folder: "RunStorage", **options: Any) -> "RunConfig":
    """Ray Train's config of a run in that folder.

    Ray 2.60 takes the name for the tags of its metrics and for the folder.
    """
    from ray.train import RunConfig
    from ray.train.v2._internal.execution.storage import StorageContext

    config = RunConfig(name=ascii_name(folder.name), storage_path=folder.storage, **options)
    if config.name != folder.name:
        config.storage_context = StorageContext(folder.storage, folder.name)
    return config


def optuna_trial(study: "optuna.Study", number: int) -> "optuna.Trial":
    """A running trial of a study, whose sampled values are given again.

    Optuna 4 and 5 make a `Trial` only by `ask`, which starts a new one; its id is private.
    """
    import optuna

    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def replace_pbt_explore(
    scheduler: "PopulationBasedTraining",
    explore: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> None:
    """Have population-based training compute new configs by `explore(config, donor_config)`.

    Ray 2.60: the public `custom_explore_fn` is given the donor's config alone.
    """

    def new_config(trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return explore(trial.config, trial_to_clone.config), {}

    scheduler._get_new_config = new_config


@contextmanager
def actor_restart_options(times: int) -> Iterator[dict[str, int]]:
    """Options of `Dataset.map_batches` that restart an actor that died, and retry its batch.

    Ray 2.60 deprecates both without a successor, and retries without end if they are left out.
    The deprecation warning is not shown within the context.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield {"max_restarts": times, "max_task_retries": times}
