# SPDX-License-Identifier: Apache-2.0
"""How the process of a rank ends: with which code, with which last words, and at once after an error."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def lead(program: Callable[[], int]) -> NoReturn:
    """The whole process, which ends with ``program``'s code, or at once after the traceback of what nobody expected.

    Python would wait for every thread then, while peers and the launcher wait for this process. It is no exception hook
    of ours: ``init_process_group`` wraps the hook that it finds, and keeps what that prints until it returns.
    """
    try:
        code = program()
    except SystemExit as leaving:
        code = _code_of(leaving)
    except BaseException as error:
        code = _say_unexpected(error)
    leave(code)


def _code_of(leaving: SystemExit) -> int:
    """What Python itself would end with; a text goes to standard error."""
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _say_unexpected(error: BaseException) -> int:
    """The report that Python would print, and one line that says whose it is; the exit code."""
    with suppress(Exception):  # of a hook of somebody else's
        sys.excepthook(type(error), error, error.__traceback__)
    rank = int(os.environ.get("RANK", "0"))
    say_last(textwrap.shorten(f"{type(error).__name__}: {error}", 200) + " (traceback above)", rank)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    After an error there are process groups whose threads still run, and Python's teardown may be aborted by one of
    them. The code would be lost, by which a job's script tells a mistake from a fault. So there is no teardown then.
    """
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def say_last(text: str, rank: int) -> None:
    """One line on standard error that says whose it is."""
    print(f"error: rank {rank} on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
