# SPDX-License-Identifier: Apache-2.0
"""A thread for calls in order, which holds back nobody who wants to leave."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from megatron_moetion.replicate.worker import ThreadWorker


def test_calls_run_in_order_and_their_results_come_back() -> None:
    worker = ThreadWorker("test")
    seen: list[int] = []

    def note(number: int, *, twice: bool = False) -> int:
        seen.append(number)
        return 2 * number if twice else number

    futures = [worker.submit(note, n, twice=n == 3) for n in range(20)]
    assert [f.result(5) for f in futures] == [6 if n == 3 else n for n in range(20)]
    assert seen == list(range(20))
    worker.close()


def test_an_error_is_raised_to_who_asks_and_the_next_call_runs() -> None:
    worker = ThreadWorker("test")

    def fail() -> None:
        raise ValueError("no")

    failed, after = worker.submit(fail), worker.submit(lambda: 7)
    with pytest.raises(ValueError, match="no"):
        failed.result(5)
    assert after.result(5) == 7
    worker.close()


def test_close_waits_for_what_has_begun_and_cancels_the_rest() -> None:
    worker = ThreadWorker("test")
    begun, go = threading.Event(), threading.Event()

    def wait() -> int:
        begun.set()
        go.wait(5)
        return 1

    first, second = worker.submit(wait), worker.submit(lambda: 2)
    assert begun.wait(5)
    threading.Timer(0.1, go.set).start()
    worker.close()
    assert first.result(0) == 1
    with pytest.raises(CancelledError):
        second.result(0)
    with pytest.raises(CancelledError):
        worker.submit(lambda: 3).result(0)


def test_abandon_waits_for_nothing() -> None:
    worker = ThreadWorker("test")
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(30)

    worker.submit(wait)
    later = worker.submit(lambda: 2)
    assert begun.wait(5)
    worker.abandon()
    assert not later.done()
    go.set()
    with pytest.raises(CancelledError):
        later.result(5)


def test_a_call_that_never_returns_does_not_keep_the_process_alive() -> None:
    program = (
        "import threading; from megatron_moetion.replicate.worker import ThreadWorker; "
        "ThreadWorker('stuck').submit(threading.Event().wait); print('left')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "left\n"
