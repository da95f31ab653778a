"""Ctrl-C and SIGTERM, so that a run ends between two steps and not in one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has: its checkpoint is written."""


@contextmanager
def asked_to_stop(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second acts as ever. Only the main thread gets signals."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()
        what = "stopping: a training step is finished first, an evaluation is not"
        say(f"{what}; once more to stop at once (the last checkpoint stays)")

    for kind in before:
        signal.signal(kind, ask)
    try:
        yield asked
    finally:
        restore()
