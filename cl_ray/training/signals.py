"""An answer to a signal for a while."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handle_signal(
    number: signal.Signals, answer: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Whatever answers the signal within, whoever answered before does so after.

    Args:
        number: Of the signal.
        answer: What answers it; None leaves that to what is called within.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread have a say
        return
    before = signal.getsignal(number)
    if answer:
        signal.signal(number, answer)
    try:
        yield
    finally:
        signal.signal(number, before)
