"""A command whose terminal closes, or whose reader ends, saves and ends as after Ctrl-C."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import wait_for
from helpers.terminal_process import TerminalProcess

from cl_ray.errors import UserError
from cl_ray.signals import handle_signal, interrupt_kept

SCRIPT = """
import sys, time
from pathlib import Path
from cl_ray.signals import hangup_blocked, termination_as_interrupt
saved = Path(sys.argv[1])
with termination_as_interrupt():
    try:
        print("started", flush=True)
        for n in range(100_000):
            time.sleep(0.01)
    except KeyboardInterrupt:
        for n in range(100):
            print("stopping" * 100, flush=True)
            print("stopping" * 100, flush=True, file=sys.stderr)
        saved.write_text("saved")
        sys.exit(130)
"""


def command(saved: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(saved)]


def test_a_closed_terminal_is_a_ctrl_c(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    process = TerminalProcess(command(saved), tmp_path / "log", terminal=True)
    process.wait_for(lambda: "started" in process.output(), "its start")
    process.close_terminal()
    process.wait_interrupted()
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("number", ["TERM", "HUP", "INT"])
def test_output_that_nobody_reads_stops_nothing(number: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    pipe = subprocess.Popen(
        command(saved), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    assert pipe.stdout.readline() == b"started\n"
    pipe.stdout.close()
    pipe.stderr.close()
    subprocess.run(["kill", f"-{number}", str(pipe.pid)], check=True)
    assert pipe.wait(300) == 130
    assert saved.read_text() == "saved"


def test_output_on_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "cl_ray", "--help"], stdout=full, stderr=subprocess.PIPE
        )
    assert ended.returncode == 1
    assert ended.stderr == b"cl-ray: the output cannot be written: No space left on device.\n"


def test_an_ignored_sighup_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` has it."""
    saved = tmp_path / "saved"
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command(saved)]
    process = TerminalProcess(shell, tmp_path / "log", terminal=True)
    try:
        process.wait_for(lambda: "started" in process.output(), "its start")
        process.close_terminal()
        time.sleep(0.5)
        assert process.process.poll() is None
        process.process.terminate()
        assert process.process.wait(300) == 130
        assert saved.exists()
    finally:
        process.process.kill()


CHILD = """
import subprocess, sys, time
from cl_ray.signals import hangup_blocked
with hangup_blocked():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
time.sleep(600)
"""


def test_processes_that_are_started_meanwhile_do_not_get_it(tmp_path: Path) -> None:
    process = TerminalProcess([sys.executable, "-c", CHILD], tmp_path / "log", terminal=True)
    process.wait_for(lambda: process.output().strip().isdigit(), "its child")
    child = Path("/proc", process.output().strip())
    try:
        process.close_terminal()
        assert process.process.wait(300) == -1  # the process itself ends by it
        wait_for(lambda: "State:\tS" in (child / "status").read_text(), "the child to be asleep")
    finally:
        subprocess.run(["kill", "-KILL", child.name], check=True)


def read_damaged_file(interrupted: bool) -> None:
    try:
        if interrupted:
            signal.raise_signal(signal.SIGINT)
    finally:
        raise UserError("The file is damaged.")


def test_an_interrupt_that_a_library_turned_into_an_error_is_kept() -> None:
    with handle_signal(signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt), interrupt_kept():
            read_damaged_file(interrupted=True)
        with pytest.raises(UserError, match="damaged"), interrupt_kept():
            read_damaged_file(interrupted=False)
