# SPDX-License-Identifier: Apache-2.0
"""``examples/own_loop.py`` as people run it: it loses a node and goes on, bit for bit; documents show its lines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own_loop.md"
EXAMPLE = ROOT / "examples" / "own_loop.py"
ITERATIONS = 14
KILLED_AT = 6
LIMIT_S = 240


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-own-loop-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(output: IO[str], store: Path, mode: str, restarts: int, warm: int = 0) -> subprocess.Popen[str]:
    """Four ranks on two emulated nodes."""
    launcher = "-W ignore -m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts"
    loop = f"--ranks-per-node 2 --run-id own --store {store} --mode {mode} --iterations {ITERATIONS} "
    loop += f"--warm-restarts {warm}"
    return subprocess.Popen(
        [sys.executable, *launcher.split(), str(restarts), str(EXAMPLE), *loop.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(text: str) -> dict[str, str]:
    """Of the last execution of each iteration, all digits."""
    return dict(re.findall(r"iteration (\d+): loss (\d+\.\d+)", text))


def lose_node_1(store: Path) -> None:
    """Its ranks at once, and its memory."""
    node = store / "own" / "node1"
    for note in node.glob("rank*.pid"):
        os.kill(json.loads(note.read_text())["pid"], signal.SIGKILL)
    shutil.rmtree(node)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_the_loop_goes_on_bit_for_bit_after_a_lost_node(tmp_path: Path, store: Path) -> None:
    """With dropout, and a data loader that draws from the generator of the model when it is made, after start().

    torchrun starts the ranks again in one job, warm parents in the other.
    """
    curves = {}
    for name, mode in (("undisturbed", "full"), ("full", "full"), ("exact", "exact")):
        log = tmp_path / name
        with log.open("w") as output:
            job = start(output, store / name, mode, restarts=2 * (name == "full"), warm=2 * (name == "exact"))
            try:
                if name != "undisturbed":
                    deadline = time.monotonic() + LIMIT_S
                    while f"iteration {KILLED_AT}: loss" not in log.read_text():
                        assert job.poll() is None, log.read_text()
                        assert time.monotonic() < deadline, log.read_text()
                        time.sleep(0.02)
                    lose_node_1(store / name)
                code = job.wait(LIMIT_S)
            finally:
                job.kill()
                job.wait()
        text = log.read_text()
        assert code == 0, text
        curves[name] = losses(text)
        if name != "undisturbed":
            assert ("start again from warm parents (1 of 2)" in text) == (name == "exact"), text
            recovered = re.search(r"\[moetion\] rank 0 iteration (\d+): recovered, epoch 1", text)
            assert recovered is not None, text
            assert KILLED_AT - 3 <= int(recovered.group(1)) < ITERATIONS
    assert set(curves["undisturbed"]) == {str(i + 1) for i in range(ITERATIONS)}
    assert curves["full"] == curves["undisturbed"]
    assert curves["exact"] == curves["undisturbed"]


def excerpt() -> str:
    """The lines of the example that the page shows; ``python tests/e2e/test_own_loop.py`` prints them."""
    begin, end = "    # docs/own_loop.md has these lines:\n", "    # Here these lines end.\n"
    lines = EXAMPLE.read_text().partition(begin)[2].partition(end)[0].splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def test_the_page_shows_the_lines_that_run() -> None:
    shown = excerpt()
    assert "megatron_moetion.attach(" in shown
    assert f"```python\n{shown}\n```\n" in PAGE.read_text(), f"{PAGE.name} should show:\n{shown}"


if __name__ == "__main__":
    print(excerpt())
