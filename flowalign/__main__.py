"""Where the command begins: Ctrl-C ends it with one line whenever it comes, also while it imports what it needs."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """`flowalign.cli.main`, with the exit code of Ctrl-C after one."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started it wants none
        signal.signal(signal.SIGINT, stop)
    try:
        from flowalign.cli.app import main as command

        command()
    except BaseException as error:
        if not asked:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not (isinstance(error, SystemExit) and error.code == 130):  # else it is said already
            print("interrupted; what is done is kept", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # nothing is left to write, and threads may be in the middle of a reward


if __name__ == "__main__":
    main()
