# SPDX-License-Identifier: Apache-2.0
"""Megatron's own ``pretrain()`` takes our communicator as an argument, before there is a model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]
HERE = Path(__file__).parent


@pytest.mark.proves("Megatron's own pretrain() with p2p_communicator", "traffic")
@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="this Megatron comes without its training loop"
)
def test_messages_of_the_official_loop_are_seen_and_none_of_its_functions_is_replaced(tmp_path: Path) -> None:
    """Two stages, four iterations, recorded from the second one on: activations one way, gradients the other."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parents[1]),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "official_pretrain.py"), str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:]
    found = [json.loads(next(line for line in text.splitlines() if line.startswith('{"sent"'))) for text in said]
    nbytes = 16 * 32 * 4  # one micro batch: tokens, hidden size, fp32
    for stage in found:
        assert [n for n in stage["sent"] if n] == [nbytes] * (3 * 2)
        assert stage["replaced"] == []
    assert len(found[1]["losses"]) == 4 * 2
