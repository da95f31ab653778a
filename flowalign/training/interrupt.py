"""Ctrl-C and SIGTERM end a run between two steps, not inside one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run has stopped because it was asked to; its checkpoint is written."""


@contextmanager
def asked_to_stop(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one has its usual effect.

    Only the main thread receives signals, so in another thread the event is never set.
    """
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
        what = "stopping: the run finishes a training step first, but not an evaluation"
        say(f"{what}; ask once more to stop at once (the last checkpoint stays)")

    for kind in before:
        signal.signal(kind, ask)
    try:
        yield asked
    finally:
        restore()
