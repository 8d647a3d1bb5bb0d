# SPDX-License-Identifier: Apache-2.0
"""A process that is told to end has its last words, also where its main thread waits for ever, and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_moetion.persist.grace import EXIT_CODE, Grace

SCRIPT = """
import os, signal, sys, threading, time
from megatron_moetion.persist.grace import Grace
if sys.argv[1] == "handled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
if sys.argv[1] == "waited-for":
    signal.set_wakeup_fd(os.open("/dev/null", os.O_WRONLY | os.O_NONBLOCK))
grace = Grace(lambda: (time.sleep(0.2), print("last words", flush=True)), os._exit)
print(grace.begin(), flush=True)
if sys.argv[1] == "closed":
    grace.close()
    grace.close()
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, threading.active_count() <= 2, flush=True)
if sys.argv[1] == "stuck":
    os.read(os.pipe()[0], 1)
if sys.argv[1] == "forks":
    child = os.fork()
    if not child:
        time.sleep(60)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.5)
    print("goes on", flush=True)
    os._exit(0)
if sys.argv[1] == "fails":
    grace._last_words = lambda: 1 / 0
while True:
    time.sleep(0.05)
"""


def run(how: str, *signals: signal.Signals) -> tuple[int, list[str]]:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True)
    too_late = threading.Timer(30, process.kill)
    too_late.start()
    assert process.stdout is not None
    lines = [process.stdout.readline().strip()]
    if how == "closed":
        lines.append(process.stdout.readline().strip())
    for each in signals:
        process.send_signal(each)
        time.sleep(0.1)
    said = process.stdout.read()  # not ``communicate``, which knows nothing of what ``readline`` has read ahead
    code = process.wait()
    too_late.cancel()
    return code, lines + said.split("\n")[:-1]


@pytest.mark.parametrize("how", ["training", "stuck"])
def test_a_signal_brings_the_last_words_and_the_end(how: str) -> None:
    assert run(how, signal.SIGTERM) == (EXIT_CODE, ["None", "last words"])


def test_other_signals_do_what_they_did() -> None:
    assert run("training", signal.SIGWINCH, signal.SIGTERM) == (EXIT_CODE, ["None", "last words"])
    assert run("training", signal.SIGKILL) == (-signal.SIGKILL, ["None"])


def test_after_the_end_of_training_the_signal_ends_the_process_at_once() -> None:
    assert run("closed", signal.SIGTERM) == (-signal.SIGTERM, ["None", "True True"])


def test_a_script_that_handles_the_signal_itself_goes_on_doing_so() -> None:
    assert run("handled", signal.SIGTERM) == (7, ["the training script handles SIGTERM itself"])
    code, lines = run("waited-for", signal.SIGTERM)
    assert (code, lines) == (-signal.SIGTERM, ["something else in this process waits for signals"])


def test_the_end_of_a_forked_child_is_its_own() -> None:
    assert run("forks") == (0, ["None", "-15", "goes on"])


def test_last_words_that_fail_do_not_keep_a_process_alive() -> None:
    assert run("fails", signal.SIGTERM)[0] == EXIT_CODE


def test_a_thread_cannot_take_the_signal_over() -> None:
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(Grace(lambda: None, lambda code: None).begin()))
    thread.start()
    thread.join()
    assert found == ["training does not run in the main thread of its process"]
