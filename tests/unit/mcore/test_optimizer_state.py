# SPDX-License-Identifier: Apache-2.0
"""The step count that an optimizer keeps for each parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.optimizer_state import steps


def link(*counts: Any) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(state={n: {"step": count} for n, count in enumerate(counts)}))


@pytest.mark.parametrize(
    "counts",
    [(3,), (3.0, 3), (torch.tensor(3.0),), (torch.tensor([3.0]), torch.tensor(3)), (torch.tensor(3.0), 3)],
    ids=["int", "numbers", "tensor", "tensors of two shapes", "tensor and number"],
)
def test_one_count_is_read_however_it_is_kept(counts: tuple[Any, ...]) -> None:
    assert steps(link(*counts)) == 3.0


def test_no_count_is_none_and_different_counts_are_refused() -> None:
    assert steps(link()) is None
    with pytest.raises(UnsupportedState, match=r"different numbers of steps: \[2.0, 3.0\]"):
        steps(link(torch.tensor(2.0), torch.tensor(3.0)))
