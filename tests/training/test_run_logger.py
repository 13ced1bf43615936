"""Metrics of runs and trials on the node's metrics port, where Prometheus reads them."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.commands import read_metrics, run_flags
from helpers.local_ray import local_ray
from helpers.processes import wait_for
from helpers.run_folder import trained_run
from helpers.small_run import SMALL_RUN
from rich.console import Console

from cl_ray.cli import parse_flags
from cl_ray.commands.tune import command as tune
from cl_ray.config import Config
from cl_ray.metrics_file import read_epochs
from cl_ray.report.records import read_curves
from cl_ray.storage import RunStorage
from cl_ray.training.launch import train
from cl_ray.training.run_logger import RunLogger

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(r"^ray_(cl_ray_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The metrics port of a Ray that updates it twice a second."""
    with local_ray(cpus=2, _system_config={"metrics_report_interval_ms": 500}):
        yield ray.nodes()[0]["MetricsExportPort"]


@pytest.fixture(scope="module")
def prometheus(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """The address of a Prometheus that reads the port every second; None if not installed."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    target = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    where = ["config.file=prometheus.yml", "storage.tsdb.path=data"]
    flags = [*where, "web.listen-address=127.0.0.1:0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *(f"--{f}" for f in flags)], cwd=folder, stderr=log)
    try:
        while not (found := LISTENING.search((folder / "log").read_text())):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        wait_for(lambda: is_ready(f"http://{found[1]}/-/ready"), "Prometheus", pause=0.1)
        yield f"http://{found[1]}"
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a page answers; Prometheus listens before it does."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:  # also urllib's
        return False


def answer(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as page:
        said = json.loads(page.read())
    assert said["status"] == "success"
    return said["data"]


class Scraper(threading.Thread):
    """Reads the port in its context; keeps every value of each (name, run, trial)."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self.port, self.over = port, threading.Event()
        self.seen: dict[tuple[str, str, str], list[float]] = {}

    def run(self) -> None:
        while not self.over.wait(0.3):
            with contextlib.suppress(OSError):  # a port under load
                self.look()

    def look(self) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=120) as page:
            text = page.read().decode()
        for name, labels, value in LINE.findall(text):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            values = self.seen.setdefault((name, tags["run"], tags["trial"]), [])
            if not values or values[-1] != float(value):
                values.append(float(value))

    def of(self, run: str, trial: str = "") -> dict[str, list[float]]:
        """The values of each name of a run or a trial."""
        seen = list(self.seen.items())
        return {name: values for (name, *tags), values in seen if tags == [run, trial]}

    def __enter__(self) -> "Scraper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


@pytest.fixture(scope="module")
def run(
    port: int, prometheus: str | None, digits: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Scraper]:
    folder = tmp_path_factory.mktemp("runs") / "r"
    assert prometheus is None or answer(f"{prometheus}/api/v1/targets")
    flags = ["--epochs=3", "--evaluation.reference=mnist", "--cpus-per-worker=1"]
    config = parse_flags(Config, [*run_flags(folder, digits), *flags], prog="cl-ray train")
    with Scraper(port) as scraper:
        train(config, console=Console(quiet=True))
        wait_for(lambda: not outdated(folder, scraper), "the values of the last epoch")
    return folder, scraper


def outdated(folder: Path, scraper: Scraper) -> list[str]:
    """Metrics of the run's last epoch whose newest value on the port is another."""
    newest = {name: values[-1] for name, values in scraper.of("r").items()}
    return [
        name
        for name, value in read_metrics(folder)[-1].items()
        if name.startswith(("d/", "g/", "score/"))
        and newest.get(f"cl_ray_{name.replace('/', '_')}") != pytest.approx(value, rel=1e-4)
    ]


def test_the_metrics_of_a_run(run: tuple[Path, Scraper]) -> None:
    folder, scraper = run
    seen = scraper.of("r")
    assert outdated(folder, scraper) == []
    assert {"cl_ray_d_adversarial", "cl_ray_g_adversarial", "cl_ray_score_real"} <= set(seen)
    assert seen["cl_ray_epoch"][-1] == 3
    assert seen["cl_ray_running"][0] == 1


@pytest.mark.slow
def test_prometheus_answers_the_queries_of_the_grafana_file(
    prometheus: str | None, run: tuple[Path, Scraper]
) -> None:
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    for name, expected in (("run", ["r"]), ("trial", [])):
        asked = variables[name]["query"]["query"].replace("$run", variables["run"]["allValue"])
        of, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
        query = urllib.parse.urlencode({"match[]": of})
        assert answer(f"{prometheus}/api/v1/label/{label}/values?{query}") == expected
    assert len(board["panels"]) > 8

    def series(asked: str) -> Any:
        span = {"query": asked, "start": time.time() - 600, "end": time.time(), "step": 1}
        return answer(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(span)}")["result"]

    for panel in board["panels"]:
        for target in panel["targets"]:
            asked = target["expr"]
            for name in ("run", "trial"):
                asked = asked.replace(f"${name}", variables[name]["allValue"])
            (found,) = wait_for(partial(series, asked), panel["title"], pause=0.1)
            assert found["metric"]["run"] == "r", panel["title"]
            assert found["values"]


def test_the_metrics_of_every_trial(
    port: int, run: tuple[Path, Scraper], digits: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text("optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}\n")
    small = [f"--set={flag[2:].replace('-', '_')}" for flag in SMALL_RUN]
    with Scraper(port) as scraper:
        tune(
            [
                "--name=s", f"--storage={tmp_path}", f"--data={digits}", "--trials=3",
                "--epochs=8", "--concurrent=2", "--cpus-per-trial=0.5", "--scheduler=none",
                "--images=300", f"--space={tmp_path / 'space.yaml'}", "--metric=reconstruction",
                "--set=evaluation.reference=mnist", *small,
            ]
        )  # fmt: skip
        kinds = ("evaluation_reconstruction", "d_adversarial", "epoch", "images_per_second")
        names, trials = {f"cl_ray_{kind}" for kind in kinds}, ["0000", "0001", "0002"]
        wait_for(lambda: all(names <= set(scraper.of("s", t)) for t in trials), "every trial")
    for trial in trials:
        of = scraper.of("s", trial)
        # Ray updates the port twice a second: an epoch's values may be missing, and the last ones
        # when the process ends, but not all of them.
        lines = read_metrics(tmp_path / f"s/trials/{trial}")
        metrics = [line["evaluation/reconstruction"] for line in lines]
        assert len(metrics) == 8
        known = [pytest.approx(value, rel=1e-4) for value in metrics]
        assert all(value in known for value in of["cl_ray_evaluation_reconstruction"])
        assert set(of["cl_ray_epoch"]) <= set(range(9))


def test_what_an_epoch_sends_to_an_object_store_does_not_grow(bucket: Any, digits: str) -> None:
    folder = RunStorage.at(bucket.uri("sent"), "r")
    trainer = trained_run(digits)
    assert isinstance(trainer.config, Config)
    logger, sent = RunLogger(folder, trainer, trainer.config), {}
    metrics = {f"loss/{n}": n / 7 for n in range(5)}
    for epoch in range(1, 31):
        trainer.epochs, trainer.gan.steps = epoch, 10 * epoch
        logger.log_epoch(metrics)
        logger.log_evaluation(epoch, 10 * epoch, metrics)
        if epoch % 10 == 0:
            sent[epoch] = bucket.bytes_written("sent/r/")
    logger.close()
    assert sent[30] - sent[20] <= 1.2 * sent[10]
    lines = read_epochs(folder)
    assert [line["epoch"] for line in lines] == list(range(1, 31))
    curve = read_curves(folder)["evaluation/loss/3"]  # from all files of events
    assert curve.steps.tolist() == list(range(10, 310, 10))
