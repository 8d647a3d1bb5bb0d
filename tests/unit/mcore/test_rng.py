# SPDX-License-Identifier: Apache-2.0
"""Every random generator goes on where it was, whether its state was kept as it is or as bytes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moetion.mcore import rng
from megatron_moetion.snapshot.host_state import decode, encode


class Tracker:
    """As Megatron's: a tensor for each stream, or a generator where CUDA graphs are used."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {
            "tensor": torch.Generator().manual_seed(1).get_state(),
            "graph": torch.Generator().manual_seed(2),
        }

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states

    def draw(self) -> list[float]:
        stream = torch.Generator()
        stream.set_state(self.states["tensor"])
        drawn = [torch.rand(1, generator=g).item() for g in (stream, self.states["graph"])]
        self.states["tensor"] = stream.get_state()
        return drawn


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """And a device whose generator is another one than the host's."""
    device = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", device.set_state)
    monkeypatch.setattr(torch.cuda, "rand", lambda: torch.rand(1, generator=device).item(), raising=False)
    tracker = Tracker()
    monkeypatch.setattr(rng, "get_cuda_rng_tracker", lambda: tracker)
    return tracker


def draw(tracker: Tracker) -> list[float]:
    device = torch.cuda.rand()  # type: ignore[attr-defined]
    return [random.gauss(0, 1), np.random.normal(), torch.rand(1).item(), device, *tracker.draw()]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_what_is_drawn_after_loading_is_what_was_drawn_after_the_copy(tracker: Tracker, as_bytes: bool) -> None:
    draw(tracker)  # of the pair of normal numbers that two of them make, the second one is a part of the state
    states = rng.rng_states()
    if as_bytes:
        states = rng.decoded(decode(encode(rng.encoded(states))))
    expected = [draw(tracker) for _ in range(5)]
    for _ in range(2):  # loading leaves the copy as it was
        rng.load_rng_states(states)
        assert [draw(tracker) for _ in range(5)] == expected
