"""Signals that end a command, as by Ctrl-C, and output that nobody can read any more."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handle_signal(
    number: signal.Signals, handler: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Handle a signal by another function, if given, and restore the present handler at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers only in the main thread
        return
    before = signal.getsignal(number)
    if handler:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as since `_hang_up`
            signal.signal(number, before)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C.

    Schedulers and `ray job stop` send SIGTERM, for which Ray's own handler prints a traceback. A
    terminal that closes sends SIGHUP, unless that is ignored, as `nohup` has it. What is printed to
    a closed terminal or pipe is discarded: an error there would prevent what is saved at the end.
    """
    with contextlib.ExitStack() as handled:
        handled.enter_context(_discarding_unread_output())
        handled.enter_context(handle_signal(signal.SIGTERM, _interrupt))
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.enter_context(handle_signal(signal.SIGHUP, _hang_up))
        yield


@contextlib.contextmanager
def interrupt_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of an error that follows Ctrl-C.

    C++ code that Ctrl-C interrupts may raise another error: torch takes a shape that it could not
    read for a wrong one, and who reads the file would call it damaged.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored
        yield
        return
    interrupted = threading.Event()

    def note(*signal_and_frame: Any) -> None:
        interrupted.set()
        before(*signal_and_frame)

    with handle_signal(signal.SIGINT, note):
        try:
            yield
        except Exception as error:
            if interrupted.is_set():
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def hangup_blocked() -> Iterator[None]:
    """Block SIGHUP in the processes that are started meanwhile.

    A terminal that closes sends it to all of them, and a command that ends in order needs them.
    This process receives at the end what came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*signal_and_frame: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, as in a program that a script started with `&`
        raise KeyboardInterrupt
    handler(*signal_and_frame)


def _hang_up(*signal_and_frame: Any) -> None:
    # The shell and the kernel each send one, the second perhaps when this process ends.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _interrupt(*signal_and_frame)


class _Output(io.FileIO):
    """A standard stream, whose output is discarded once its terminal or its reader is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return len(data)


@contextlib.contextmanager
def _discarding_unread_output() -> Iterator[None]:
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    # Those of a notebook are others.
    before = {name: s for name, s in streams.items() if isinstance(s, io.TextIOWrapper)}
    for name, stream in before.items():
        with contextlib.suppress(OSError):  # no file
            stream.flush()
            output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            kept = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering")}
            setattr(sys, name, io.TextIOWrapper(output, **kept))
    failed: OSError | None = None
    try:
        yield
    finally:
        for name, stream in before.items():
            try:
                getattr(sys, name).flush()
            except OSError as error:  # as of a full disk
                failed = error
            setattr(sys, name, stream)
    if failed:
        sys.exit(f"cl-ray: the output cannot be written: {failed.strerror}.")
