# SPDX-License-Identifier: Apache-2.0
"""One contract over every channel: the queues that tests use, and gloo between two processes (started once)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import Network, ToyFabric, together

sys.path.insert(0, str(Path(__file__).parent))

from channel_cases import CHANNEL_CASES, FABRIC_CASES, lost_peer

GLOO_ONLY = ("alone", "silent_peer", "together_again", "lost_peer", "lost_gather")


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, what went wrong in each case: empty where nothing did."""
    folder = tmp_path_factory.mktemp("gloo")
    program = Path(__file__).with_name("channel_cases.py")
    results = [folder / f"rank{rank}.json" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(folder / "store"), str(results[rank])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(r.exists() for r in results), "\n".join(errors)
    return [json.loads(r.read_text()) for r in results]


@pytest.mark.dist
@pytest.mark.parametrize("case", [*(c.__name__ for c in (*CHANNEL_CASES, *FABRIC_CASES)), *GLOO_ONLY])
def test_gloo(gloo: list[dict[str, str]], case: str) -> None:
    assert [found[case] for found in gloo if case in found] == [""] * sum(case in found for found in gloo)
    assert case in gloo[0]


@pytest.mark.parametrize("case", CHANNEL_CASES, ids=lambda c: c.__name__)
def test_queues(case: object) -> None:
    assert callable(case)
    network = Network(2, timeout_s=5)
    together(*(lambda r=r: case(network.channel(r), r) for r in range(2)))  # type: ignore[misc]


@pytest.mark.parametrize("case", FABRIC_CASES, ids=lambda c: c.__name__)
def test_a_fabric_of_queues(case: object) -> None:
    assert callable(case)
    network = Network(2, timeout_s=5)
    together(*(lambda r=r: case(ToyFabric(network, r, (0, 1))) for r in range(2)))  # type: ignore[misc]


def test_queues_lose_a_peer() -> None:
    lost_peer(Network(2, timeout_s=0.1).channel(0), 0)
