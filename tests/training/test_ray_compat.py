"""Canaries: each fails if an upgrade of Ray, Tune or Optuna changes what `ray_compat` relies on.

The autoscaler's settings are tested with real autoscalers in test_autoscaler.py, the placement
groups of dead actors in tests/tuning/test_callbacks.py.
"""

import importlib
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import ray
import ray.data
from helpers.local_ray import cluster_head, local_ray
from helpers.processes import children
from ray._private import node, services
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal import constants as train_constants
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.tune import constants as tune_constants
from ray.tune.execution import class_cache, tune_controller
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher, SearchGenerator
from ray.util.annotations import RayDeprecationWarning

from cl_ray.storage import RunStorage
from cl_ray.training import ray_compat, ray_session

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see tests/


def test_ray_reads_the_variables_that_are_set() -> None:
    """The niceness and the hidden GPUs show in test_ray_session.py."""
    known = {v for v in vars(train_constants).values() if isinstance(v, str)}
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        assert name in ray_compat.RAY_ENVIRONMENT
        assert name in known
    tune = Path(tune_constants.__file__).parent
    files = [tune.parent / "train" / "constants.py", *tune.rglob("*.py")]
    sources = "".join(file.read_text() for file in files)
    assert not [name for name in ray_compat.TUNE_ENVIRONMENT if f'"{name}"' not in sources]


def test_ray_train_asks_the_coordinator_that_was_started() -> None:
    with local_ray(cpus=1):
        ray_compat.start_autoscaling_coordinator()
        name = "AutoscalingCoordinator"
        started = ray.get_actor(name, namespace=name)
        assert TrainAutoscalingCoordinatorClient("run")._autoscaling_coordinator == started


def test_ray_tune_asks_for_so_many_trials_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNE_MAX_PENDING_TRIALS_PG", raising=False)
    search = SearchGenerator(Searcher())
    with ray_compat.pending_trials(4):
        assert tune_controller._get_max_pending_trials(search) == 4
    assert tune_controller._get_max_pending_trials(search) == 1
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "2")
    with ray_compat.pending_trials(4):
        assert tune_controller._get_max_pending_trials(search) == 2


def test_free_cpus_are_those_of_one_node() -> None:
    code = (
        "import sys, ray; from cl_ray.training.ray_compat import most_free_cpus;"
        "ray.init(sys.argv[1], logging_level='ERROR');"
        "print(ray.available_resources()['CPU'], most_free_cpus())"
    )
    with cluster_head(2) as address:
        command = [sys.executable, "-c", code, address]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "3.0 2.0\n"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_WARN_THRESHOLD_S", "5")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ray_compat.configure_ray_environment(dashboard=True)
    ray_compat.configure_tune_environment()
    assert os.environ["TUNE_WARN_THRESHOLD_S"] == "5"
    assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"


def test_ray_train_keeps_its_list_of_checkpoints_in_that_file(tmp_path: Path) -> None:
    name = train_constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    folder = RunStorage.at(str(tmp_path), "demo")
    folder.write(name, b"{}")
    ray_compat.forget_reported_checkpoints(folder)
    assert folder.read(name) is None
    ray_compat.forget_reported_checkpoints(folder)


def test_ray_is_given_ascii_names_that_differ_where_the_names_do() -> None:
    names = ["demo", "a+b@c=(1)", "é", "e\u0301", "%C3%A9", "%25C3%25A9", "数据", "🦋", "a%"]
    given = [ray_compat.ascii_name(name) for name in names]
    assert given[:3] == ["demo", "a+b@c=(1)", "%C3%A9"]
    assert all(name.isascii() for name in given)
    assert len(set(given)) == len(names)


def test_ray_train_takes_a_folder_of_another_name(tmp_path: Path) -> None:
    folder = RunStorage.at(str(tmp_path), "數é")
    config = ray.cloudpickle.loads(ray.cloudpickle.dumps(ray_compat.build_run_config(folder)))
    assert config.name == "%E6%95%B8%C3%A9"
    assert config.storage_context.experiment_fs_path == folder.uri
    assert ray_compat.build_run_config(RunStorage.at(str(tmp_path), "demo")).name == "demo"


def test_the_command_that_ray_records_loses_its_secret() -> None:
    code = (
        "from cl_ray.training.ray_compat import hide_secrets_in_command as hide; hide();"
        "from ray._private.utils import get_entrypoint_name; print(get_entrypoint_name())"
    )
    command = [sys.executable, "-c", code, "--study", "mssql+pyodbc://me:word@host/db?driver=a"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "word" in " ".join(command)
    assert "word" not in done.stdout
    assert "mssql+pyodbc://host/db?driver=a" in done.stdout


def test_ray_tune_copies_no_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # A search that ran before in this process has called the function.
    names = importlib.reload(class_cache).ENV_VARS_TO_PROPAGATE
    assert "AWS_SECRET_ACCESS_KEY" in names  # if no longer, the function can go
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    ray_compat.withhold_credentials()
    assert names - class_cache.ENV_VARS_TO_PROPAGATE == {n for n in names if "AWS" in n}
    actor = class_cache._ActorClassCache().get(type("Trainable", (), {}))
    assert "word" not in str(actor._default_options["runtime_env"])


def test_optuna_hands_out_a_running_trial_again() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    first = study.ask()
    value = first.suggest_float("x", 0, 1)
    again = ray_compat.optuna_trial(study, first.number)
    assert again.suggest_float("x", 0, 1) == value
    study.tell(again, 0.5)
    assert study.best_value == 0.5


def test_pbt_computes_new_configs_by_the_given_function() -> None:
    scheduler = PopulationBasedTraining(hyperparam_mutations={"x": [1, 2]}, metric="m", mode="min")
    assert callable(scheduler._get_new_config)
    ray_compat.replace_pbt_explore(scheduler, lambda own, donor: {"x": own["x"] + donor["x"]})

    class Trial:
        def __init__(self, x: int):
            self.config = {"x": x}

    assert scheduler._get_new_config(Trial(1), Trial(2)) == ({"x": 3}, {})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(cpus=2):
        yield


@pytest.mark.ray
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_ray_that_is_not_up_in_time_is_ended_and_started_again(
    attempts: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its processes have started when it gives up, without the 30 s of waiting here."""
    assert f'"{ray_session.START_TIMEOUT}.' in inspect.getsource(node)
    given_up: list[str] = []

    def get_node(gcs: str, node_id: str) -> Any:
        if not given_up:
            given_up.append(gcs)
            raise Exception(f"{ray_session.START_TIMEOUT}. This could happen because …")
        return services_get_node(gcs, node_id)

    services_get_node = services.get_node
    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_session, "START_ATTEMPTS", attempts)
    outcome = nullcontext() if attempts > 1 else pytest.raises(RuntimeError, match="too busy")
    with outcome, local_ray(cpus=1):
        assert ray.cluster_resources()["CPU"] == 1
        assert ray.get_runtime_context().gcs_address not in given_up
        assert capsys.readouterr().out.endswith("this machine is too busy. Trying again (2) …\n")
    assert not [command for _, command in children(os.getpid()) if given_up[0] in command]


class Actor:
    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("two\nlines")


@pytest.mark.ray
def test_a_ray_that_this_process_started(cluster: None) -> None:
    assert ray_compat.started_local_ray()
    folder = ray_compat.session_log_dir()
    assert folder is not None
    assert list(folder.glob("raylet*"))
    heads = [node for node in ray.nodes() if ray_compat.HEAD_RESOURCE in node["Resources"]]
    assert len(heads) == 1
    assert ray_compat.autoscaler_settings() is False


@pytest.mark.ray
def test_why_a_process_was_lost_in_one_line(cluster: None) -> None:
    actor = ray.remote(num_cpus=0)(Actor).remote()
    with pytest.raises(RayTaskError) as raised:
        ray.get(actor.fail.remote())
    assert ray_compat.failure_reason(raised.value) == "two lines"
    pid = ray.get(actor.pid.remote())
    os.kill(pid, 9)

    def call_until_it_fails() -> None:
        while True:
            ray.get(actor.pid.remote())

    with pytest.raises(RayActorError) as died:
        call_until_it_fails()
    address = ray.util.get_node_ip_address()
    lost = f"process {pid} on {address}: {ray_compat.CONNECTION_LOST}"
    unavailable = f"its process {ray_compat.CONNECTION_LOST}"
    assert ray_compat.failure_reason(died.value) in (lost, unavailable)
    wrapped = WorkerHealthCheckFailedError("no answer", died.value)
    assert ray_compat.worker_error(wrapped) is died.value
    assert ray_compat.failure_reason(ValueError("first\nlast")) == "last"


def test_the_exception_of_a_training_loop_is_found() -> None:
    error = ValueError("x")
    assert ray_compat.raised_error(UserExceptionWithTraceback(error, "Traceback ...")) is error
    assert ray_compat.raised_error(error) is error


@pytest.mark.ray
def test_actors_of_ray_data_may_be_restarted_without_a_warning(cluster: None) -> None:
    class Double:
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"id": batch["id"] * 2}

    def mapped(options: dict[str, int]) -> ray.data.Dataset:
        return ray.data.range(4).map_batches(
            Double, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5, **options
        )

    with warnings.catch_warnings(), ray_compat.actor_restart_options(2) as options:
        assert mapped(options).sum("id") == 12
    # Without the context they are deprecated: if no longer, the function can go.
    with pytest.warns(RayDeprecationWarning):
        mapped(options)
