# SPDX-License-Identifier: Apache-2.0
"""How a process ends: at once after an exception, by itself where nobody called ``close``. Real gloo, real exits."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_moetion.store.sharedfile import peek_arena

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]

HERE = Path(__file__).parent
TIMEOUT_S = 60


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-endings-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(ending: str, store: Path) -> list[subprocess.Popen[str]]:
    """Both ranks of a loop that ends so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for r in range(2)]
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parents[1]), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "own_loop.py"), ending, str(store), str(TIMEOUT_S)],
            env=os.environ | common | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]


def end(process: subprocess.Popen[str]) -> tuple[str, float]:
    """What a rank printed, and seconds from where it left its loop to where it was gone."""
    output, _ = process.communicate(timeout=150)
    gone = time.time()
    assert "left " in output, output
    return output, gone - float(output.split("left ")[1].split()[0])


def test_an_exception_ends_the_process_although_a_peer_never_answers(store: Path) -> None:
    ranks = start("raises", store)
    try:
        output, seconds = end(ranks[0])
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 1, output
    assert "CUDA out of memory, say" in output
    assert seconds < TIMEOUT_S / 4, f"it lived on for {seconds:.1f} s; its peers' time limit is {TIMEOUT_S} s"


@pytest.mark.parametrize("ending", ["closes", "forgets", "destroys"])
def test_a_loop_that_ends_is_gone_soon_with_its_last_snapshot_whole(store: Path, ending: str) -> None:
    ranks = start(ending, store)
    outputs, seconds = zip(*(end(rank) for rank in ranks), strict=True)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert max(seconds) < TIMEOUT_S / 2, seconds
    forgotten = ending != "closes"
    assert all(("ended without session.close()" in output) == forgotten for output in outputs), outputs
    assert "[moetion] rank 0 iteration 0: mode full" in outputs[0]  # an own loop sees what the runtime says
    for owner in range(2):
        page = peek_arena(store / "own" / f"node{owner}" / f"rank{owner:05d}.arena")[1]
        assert max(r.iteration for r in page.records) == 4


def test_whatever_fails_nothing_stays_hooked(store: Path) -> None:
    ranks = start("refused", store)
    outputs = [end(rank)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [output.count("close raised") for output in outputs] == [3, 3]
