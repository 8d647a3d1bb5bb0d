# SPDX-License-Identifier: Apache-2.0
"""When a pipeline's message is on the wire: the real communicator, and peers that let each other wait."""

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
    """And not when the call returns that sends it and waits for an answer, whichever of the two was posted first."""
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
        said = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    first, second = (json.loads(text.splitlines()[-1]) for text in said)
    assert first["lane"] == second["lane"] == "pipeline"
    assert first["accepted"] - first["begin"] > 0.6 * LATE_S
    assert second["accepted"] - second["begin"] < 0.4 * LATE_S
    assert second["end"] - second["accepted"] > 0.6 * LATE_S
