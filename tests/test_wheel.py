"""A wheel, installed into an empty environment outside of any checkout, has all that it needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.small_run import SMALL_RUN

ROOT = Path(__file__).parent.parent
SMALL_EVALUATION = {"evaluation.samples": 100, "evaluation.images": 200}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, as an old build folder would be packed too."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "cl_ray", source / "cl_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    flags = [
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(source / "dist"),
    ]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(source)], check=True)
    (built,) = (source / "dist").glob("cl_ray-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel beside the dependencies of this environment, but not its cl_ray."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    # A directory that a .pth file adds does not have its own .pth files read, of which one finds
    # the checkout of an editable install.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(dependencies))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cl_ray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)  # five commands, also on a busy machine
def test_commands_work_outside_of_a_checkout(
    environment: Path, tmp_path: Path, make_digits: Callable[[int], str]
) -> None:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    # Of two threads each would wait for the other beside other tests.
    variables |= {"HOME": str(tmp_path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / program), *arguments],
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    location = run("python", "-c", "import cl_ray; print(cl_ray.__file__)").strip()
    assert Path(location).is_relative_to(environment)

    evaluation = [f"--{field}={value}" for field, value in SMALL_EVALUATION.items()]
    evaluation.append("--evaluation.reference=mnist")  # packaged, as are the digits of `tune`
    digits = [f"--data={make_digits(200)}", "--epochs=1", *SMALL_RUN]
    run("cl-ray", "train", "--name=demo", *digits, *evaluation)
    assert (tmp_path / "runs/demo/generator.safetensors").is_file()
    assert "frechet" in (tmp_path / "runs/demo/metrics.jsonl").read_text()

    fields = {**SMALL_EVALUATION, "generator.width": 4, "discriminator.width": 4}
    settings = [f"--set={field}={value}" for field, value in fields.items()]
    flags = ["--name=search", "--space=rates", "--trials=1", "--epochs=1", "--images=200"]
    run("cl-ray", "tune", *flags, *settings)
    for file in ("best.yaml", "leaderboard.csv", "report.html"):
        assert (tmp_path / "runs/search" / file).is_file()

    run("cl-ray", "report", "runs/demo")
    assert "<html" in (tmp_path / "runs/demo/report.html").read_text()
    run("cl-ray", "generate", "runs/demo", "--count=8", "--out=images")
    assert list((tmp_path / "images").iterdir())
    printed = run("cl-ray", "doctor", "--storage=runs")
    assert "no constraints.txt to compare with" in printed
    assert str(tmp_path / ".ray/auth_token") in printed  # which the first command made
