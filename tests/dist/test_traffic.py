# SPDX-License-Identifier: Apache-2.0
"""When a pipeline's message is on the wire: the real communicator, and a peer that asks for the message late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
HERE = Path(__file__).parent
LATE_S = 0.5


@pytest.mark.parametrize("posting", ["batched", "one by one"])
def test_a_message_is_taken_when_its_receiver_asks_for_it(tmp_path: Path, posting: str) -> None:
    """The sender's call lasts until the answer is there, another half second later."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "late_receiver.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), posting, str(LATE_S)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = ranks[0].communicate(timeout=90)[0]
        assert [r.wait(30) for r in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    span = json.loads(said.splitlines()[-1])
    assert span["lane"] == "pipeline"
    assert 0.6 * LATE_S < span["taken"] - span["begin"]
    assert 0.6 * LATE_S < span["end"] - span["taken"]
