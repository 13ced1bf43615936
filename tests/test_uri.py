"""No secret of a URI is shown or stored, in whatever form it is given."""

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from helpers.bucket import KEYS
from helpers.datasets import mnist, write_images
from helpers.refusal import refused
from helpers.small_run import SMALL_RUN
from helpers.small_search import CONFIG, SPACE

import cl_ray
from cl_ray.cli import main
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset, DatasetInfo
from cl_ray.errors import UserError
from cl_ray.storage import RunStorage, open_filesystem
from cl_ray.uri import public_uri, redact, remember_secrets, uri_problem

SECRET = "Zq7+x/MARK9w"
ENCODED = quote(SECRET, safe="")
FILESYSTEMS = {
    "user and password": f"s3://key:{ENCODED}@bucket/runs",
    "raw slash": f"s3://key:{SECRET}@bucket/runs",
    "raw slash after a number": f"s3://key:12/{ENCODED}@bucket/runs",
    "token": f"s3://{ENCODED}@bucket/runs",
    "upper-case scheme": f"S3://KEY:{ENCODED}@bucket/runs",
    "encoded separators": f"s3://key%3A{ENCODED}%40bucket/runs",
    "question mark": f"s3://key:?{ENCODED}@bucket/runs",
    "hash": f"s3://key:1#{ENCODED}@bucket/runs",
    "space": f"s3://key:a {ENCODED}@bucket/runs",
    "quote": f"s3://key:a'{ENCODED}@bucket/runs",
    "line": f"s3://key:a\n{ENCODED}@bucket/runs",
    "option": f"s3://bucket/runs?region=eu&password={ENCODED}",
    "encoded name": f"s3://bucket/runs?%70assword={ENCODED}",
    "upper-case option": f"s3://bucket/runs?REGION={ENCODED}",
    "bare option": f"s3://bucket/runs?{ENCODED}",
    "fragment": f"s3://bucket/runs#{ENCODED}",
    "nested": f"s3://bucket/runs?endpoint_override=http://me:{ENCODED}@host:9000",
    "nested, encoded": f"s3://bucket/r?endpoint_override=http%3A%2F%2Fme%3A{ENCODED}%40host",
    "nested option": f"s3://bucket/runs?endpoint_override=host%3Fsig%3D{ENCODED}",
    "nested path": f"s3://bucket/runs?endpoint_override=host/{ENCODED}",
    "one slash": f"s3:/key:{ENCODED}@bucket/runs",
    "azure account key": f"abfs://account:{ENCODED}@host/box/runs",
    "azure signature": f"abfs://box@account/runs?sv=2024&sig={ENCODED}",
    "google": f"gs://me:{ENCODED}@bucket/runs",
    "hadoop": f"hdfs://me:{ENCODED}@host:8020/runs",
    "web": f"https://host/runs?access_token={ENCODED}",
    "fsspec": f"fsspec+s3://key:{ENCODED}@bucket/runs",
    "unknown scheme": f"nothing://me:{ENCODED}@host/runs",
}
DATABASES = {
    "postgresql": f"postgresql://me:{ENCODED}@host/db",
    "postgresql, raw slash": f"postgresql+psycopg2://me:{SECRET}@host/db",
    "postgresql option": f"postgresql://host/db?user=me&password={ENCODED}",
    "postgresql token": f"postgresql://{ENCODED}@host/db",
    "mysql": f"mysql+pymysql://me:{ENCODED}@host/db",
    "mariadb": f"mariadb://me:{ENCODED}@host/db",
    "sqlite": f"sqlite:///s.db?key={ENCODED}",
    "sqlite user": f"sqlite://me:{ENCODED}@/s.db",
    "no URL": f"host=db user=me password={ENCODED}",
    "one slash": f"postgresql:/me:{ENCODED}@host/db",
}
ACCEPTED = {
    "redis": f"redis://:{ENCODED}@host:6379/0",
    "mssql": f"mssql+pyodbc://me:{ENCODED}@host/db?driver=a&PWD={ENCODED}",
    "pg8000": f"postgresql+pg8000://me:{ENCODED}@host/db",
}
"""Databases whose driver reads a password nowhere else, or that Optuna refuses itself."""
PUBLIC = [
    "mnist", "data/a:b@c", "/data/what?is#this", "file:///data/a b",
    "s3://bucket", "s3://b/r?region=eu&scheme=http&endpoint_override=127.0.0.1:9000",
    "s3://b/r?endpoint_override=https://minio.local:9000/", "s3://b/a%40b", "s3://b/r?",
    "gs://anonymous@b/r", "abfs://box@account.dfs.core.windows.net/r", "ray://host:10001",
    "hf://datasets/owner/name@main/data", "http://[::1]:8265", "sqlite:///s.db", "sqlite://",
    "postgresql+psycopg://host:5432/db?sslmode=require",
    "mysql+pymysql://host/db?read_default_file=/home/me/my.cnf&charset=utf8mb4",
]  # fmt: skip


def leaks(text: str) -> bool:
    """Whether the secret is in a text: as it is, percent-encoded, or a part of it."""
    return "MARK9w" in text or "Zq7" in text


@pytest.mark.parametrize("form", FILESYSTEMS)
def test_no_flag_takes_a_secret(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is named, whether it exists or not, and nothing is written.

    One check looks at the arguments of all commands; it takes what has one slash for no URI.
    """
    monkeypatch.chdir(tmp_path)
    given = FILESYSTEMS[form]
    commands = [
        (["train", "--name=a", f"--storage={given}"], "--storage "),
        (["evaluate", given], "A URI "),
        (["train", "--data", given], "--data "),
        (["train", f"--config={given}"], "--config "),
        (["train", f"--stroage={given}"], "--stroage "),
        (["tune", "--resume=a", f"--storage={given}"], "--storage "),
        (["tune", f"--set=data={given}"], "--set "),
        (["tune", f"--space={given}"], "--space "),
        (["data", f"--source={given}", "--out=out"], "--source "),
        (["data", "--source=.", f"--out={given}"], "--out "),
        (["report", given], "A URI "),
        (["export", given, "--out=out"], "A URI "),
        (["generate", "run", f"--out={given}"], "--out "),
        (["embed", "run", f"--data={given}", "--out=o.parquet"], "--data "),
        (["doctor", f"--storage={given}"], "--storage "),
    ]
    everywhere = form in ("user and password", "one slash")
    for arguments, named in commands if everywhere else commands[:2]:
        if form == "one slash" and named in ("--config ", "--stroage ", "--set ", "--space "):
            continue  # files of that name, and no flag
        message = refused(capsys, *arguments)
        assert not leaks(message)
        assert message.removeprefix("In the flags: ").startswith(named.lstrip("-")) or (
            message.startswith(named) or form == "one slash"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", DATABASES)
def test_a_study_takes_no_secret_that_belongs_elsewhere(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(capsys, "tune", f"--storage={tmp_path}", f"--study={DATABASES[form]}")
    assert not leaks(message)
    assert "study " in message
    if form in ("postgresql", "mysql"):
        place = {"postgresql": "PGUSER and PGPASSWORD", "mysql": "read_default_file="}[form]
        assert f"credentials belong in {place}" in message or place in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ACCEPTED)
def test_a_study_that_cannot_be_opened_shows_no_secret(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, make_digits: Callable[[int], str]
) -> None:
    flags = [f"--storage={tmp_path}", "--name=s", f"--data={make_digits(300)}"]
    message = refused(
        capsys, "tune", *flags, "--set=evaluation.reference=none", f"--study={ACCEPTED[form]}"
    )
    assert message.startswith("study '")
    assert not leaks(message)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(leaks(file.read_text(errors="replace")) for file in written)


def test_where_credentials_belong_is_named() -> None:
    for given, where in (
        ("s3://k:p@b", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in ~/.aws/credentials"),
        ("gs://k:p@b", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfss://k:p@b", "AZURE_CLIENT_SECRET"),
        ("hf://k:p@b", "HF_TOKEN"),
        ("postgresql://k:p@b", "PGUSER and PGPASSWORD, or in PGUSER and ~/.pgpass"),
        ("mysql://k:p@b", "?read_default_file="),
    ):
        problem = uri_problem(given, is_database=True)
        assert problem is not None
        assert problem.startswith("has a user or password, which may be secret: leave it out")
        assert where in problem
    assert uri_problem("sqlite://k:p@b", is_database=True) == (
        "has a user or password, which may be secret: leave it out"
    )
    assert "an option beside region, scheme" in str(uri_problem("s3://b?token=x"))


@pytest.mark.parametrize("form", FILESYSTEMS)
def test_python_takes_no_secret(form: str, tmp_path: Path) -> None:
    given = FILESYSTEMS[form]
    calls: list[Callable[[], Any]] = [
        lambda: RunStorage.at(given, "a"),
        lambda: RunStorage.from_uri(f"{given}/a"),
        lambda: open_filesystem(given),
        lambda: Dataset.open(given),
        lambda: cl_ray.load(given),
        lambda: Config.from_yaml(f"storage: {given!r}"),
        lambda: Config.from_yaml(f"data: [{given!r}]"),
        lambda: Config(data=given),
    ]
    for call in calls:
        with pytest.raises((UserError, ValueError)) as caught:
            call()
        assert not leaks(str(caught.value))


def test_broken_yaml_is_not_quoted() -> None:
    long = "x" * 60
    for text in (f"data: s3://{long}:{ENCODED}@b: c", f"data: [{{s3://k:{ENCODED}@b"):
        with pytest.raises(UserError, match=r"the config is not YAML: .*, line 1\.") as caught:
            Config.from_yaml(text)
        assert not leaks(str(caught.value))


@pytest.mark.parametrize(
    "form", [f for f in FILESYSTEMS if f not in ("space", "line", "one slash")]
)
def test_a_message_keeps_no_secret_of_a_uri_in_it(form: str) -> None:
    """Also of one that no check has seen."""
    for text in (f"{FILESYSTEMS[form]}: no such host", f"get ({FILESYSTEMS[form]!r}) failed."):
        assert not leaks(str(UserError(text)))


@pytest.mark.parametrize("given", PUBLIC)
def test_what_is_public_stays(given: str) -> None:
    assert uri_problem(given) is None
    assert public_uri(given) in (given, given.rstrip("?"))
    for text in (f"In {given}: a word.", f"'{given}' ({given}), [{given}]", f"a={given}"):
        assert redact(text) == text


def test_other_text_stays() -> None:
    for text in ("give --storage s3://..., gs://... or a path.", "me@host wrote s3://b/c, x@y.z"):
        assert redact(text) == text


def test_remembered_secrets_are_replaced_everywhere() -> None:
    remember_secrets(ACCEPTED["mssql"])
    for text in (
        f"login of user 'me' with {SECRET} failed",
        f"PWD={ENCODED};x",
        f"FATAL: no login of 'me' with the password {SECRET!r} ({ACCEPTED['mssql']})",
    ):
        assert not leaks(redact(text))
    remember_secrets("vault://me:word@host/db")
    remember_secrets("vault://token@host/db")
    assert redact("the token of 'me' is a word of /words") == "the *** of 'me' is a *** of /words"


def test_a_traceback_keeps_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: list[str]) -> None:
        raise RuntimeError(f"lost the connection of me to {ACCEPTED['mssql']}: {SECRET}")

    monkeypatch.setattr("cl_ray.commands.tune.command", command)
    with pytest.raises(SystemExit) as end:
        main(["tune", f"--study={ACCEPTED['mssql']}"])
    text = str(end.value.code)  # which Python prints
    assert "RuntimeError: lost the connection of me to mssql+pyodbc://host/db?driver=a" in text
    assert "Traceback" in text
    assert not leaks(text + capsys.readouterr().err)


def test_the_record_of_older_data_is_read_without_its_secret() -> None:
    info = Dataset.open("mnist").info.model_dump()
    old = DatasetInfo.model_validate({**info, "source": f"made of {FILESYSTEMS['raw slash']}"})
    assert old.source == "made of s3://***"


DRIVER = '''
import sys
from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

class Dialect(SQLiteDialect_pysqlite):
    """SQLite, by a driver that takes a user and a password, and reads them nowhere else."""

    supports_statement_cache = True

    def create_connect_args(self, url):
        assert (url.username, url.password) == ("me", sys.argv[1])
        return super().create_connect_args(URL.create("sqlite", database=url.database))

registry.register("vault", "__main__", "Dialect")
from cl_ray.cli import main
from cl_ray.evaluation import clustering, reference_cache

clustering._STEPS, reference_cache._MOST_EPOCHS = 10, 2
for arguments in sys.argv[2].split("\\n"):
    main(arguments.split(" "))
'''


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, bucket: Any) -> dict[str, bytes]:
    """Everything that data, train, evaluate, report, export, tune and embed leave, by name.

    The keys of a bucket are in the environment, and a study's password is in its URL.
    """
    folder = tmp_path_factory.mktemp("secrets")
    digits = write_images(folder / "digits", train=mnist("train", 300), test=mnist("test", 120))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "space.yaml").write_text(SPACE)
    data, storage = bucket.uri("trust/data"), bucket.uri("trust/runs")
    run = bucket.uri("trust/runs/demo")
    study = f"vault://me:{ENCODED}@host/{folder}/study.db?token={ENCODED}"
    small = ["--evaluation.samples=60", "--evaluation.images=60", *SMALL_RUN]
    commands = [
        ["data", f"--source={digits}", f"--out={data}"],
        ["train", f"--data={data}", f"--storage={storage}", "--name=demo", "--epochs=1", *small],
        ["evaluate", run, "--samples=60", "--images=60"],
        ["report", run],
        ["export", run, f"--out={folder}/onnx"],
        ["embed", run, f"--data={data}", f"--out={bucket.uri('trust/e.parquet')}"],
        [
            "tune", f"--data={data}", f"--storage={storage}", "--name=s", "--trials=1",
            "--epochs=1", f"--config={folder}/config.yaml", f"--space={folder}/space.yaml",
            "--verbose", f"--study={study}",
        ],
        ["tune", "--resume=s", f"--storage={storage}", "--trials=1", f"--study={study}"],
        ["tune", "--resume=s", f"--storage={storage}", "--trials=1"],
    ]  # fmt: skip
    # Short, for the path of a socket; Ray's session lies there, and temporary files.
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as temporary:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, SECRET, "\n".join(" ".join(c) for c in commands)],
            capture_output=True,
            env={
                **os.environ, "COLUMNS": "400", "TMPDIR": temporary, "RAY_TMPDIR": temporary,
                "OMP_NUM_THREADS": "1",  # two would wait for each other beside other tests
                **{name: SECRET for name in KEYS if "KEY" in name}, "AWS_SESSION_TOKEN": SECRET,
            },
        )  # fmt: skip
        assert b"not stored: give --study with it again" in done.stderr, done.stdout + done.stderr
        found = {"stdout": done.stdout, "stderr": done.stderr}
        for place in (folder, Path(temporary)):
            for file in place.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    found[str(file)] = file.read_bytes()
    return found | {f"s3:{name}": blob for name, blob in bucket.files("trust/", True).items()}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_no_output_of_any_command_holds_a_secret(outputs: dict[str, bytes]) -> None:
    for name in (
        "s3:runs/demo/config.yaml", "s3:runs/demo/summary.json", "s3:runs/demo/metrics.jsonl",
        "s3:runs/demo/generator.safetensors", "s3:runs/demo/evaluation.json",
        "s3:runs/demo/report.html", "s3:runs/s/search.yaml", "s3:runs/s/leaderboard.csv",
        "s3:runs/s/best.yaml", "s3:runs/s/report.html", "s3:data/dataset.json",
    ):  # fmt: skip
        assert name in outputs
    for part in ("tensorboard/events", "onnx/model.json", "/logs/", "_manifest.json", "study.db"):
        assert any(part in name for name in outputs), part
    plain, encoded = SECRET.encode(), ENCODED.encode()
    marks = (
        b"MARK9w",
        plain,
        encoded,
        *(base64.b64encode(b"x" * n + plain)[4:-4] for n in (0, 1, 2)),
    )
    assert [name for name, blob in outputs.items() if any(m in blob for m in marks)] == []
