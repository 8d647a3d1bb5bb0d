# SPDX-License-Identifier: Apache-2.0
"""What Muon holds of one parameter: found as a whole, never cut, and refused where it cannot be captured as it is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.inventory import _Builder
from megatron_moetion.mcore.layout import Place
from megatron_moetion.mcore.shards import Shard, shards
from megatron_moetion.units import Role, UnitKind

Say = Callable[[str, object], None]


def held(name: str, **state: torch.Tensor) -> list[Shard]:
    """What an optimizer of this class holds of a matrix of 4 x 6 elements."""
    matrix = torch.nn.Parameter(torch.zeros(4, 6))
    matrix.main_grad = torch.zeros(4, 6)
    inner = type(name, (), {"__module__": "megatron.core.optimizer.emerging_optimizers"})()
    inner.param_groups, inner.state = [{"params": [matrix]}], {matrix: state}
    link = FP32Optimizer.__new__(FP32Optimizer)
    vars(link).update(optimizer=inner, config=SimpleNamespace(), is_stub_optimizer=False)
    return list(shards(link))


def place(start: int, end: int) -> Place:
    unit = "layers.0.experts.1"
    return Place(unit=unit, kind=UnitKind.EXPERT, tensor=f"{unit}.weight1", start=start, end=end, layer=0, expert=1)


def test_momentum_and_second_moment_are_known_and_regions_say_that_they_are_whole() -> None:
    (shard,) = held("TensorParallelAdaptiveMuon", momentum_buffer=torch.ones(4, 6), moment2_buffer=torch.ones(4, 6))
    assert list(shard.tensors) == [Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ]
    assert shard.is_whole
    builder = _Builder()
    builder.add_shard(place(0, 24), shard, with_gradients=True)
    (unit,) = builder.units()
    assert [r.is_whole for r in unit.regions] == [True] * 3 + [False], "state; its gradient goes with it"
    (other,) = held("OfAnotherName", exp_avg=torch.ones(4, 6))
    assert not other.is_whole


@pytest.mark.parametrize(("method", "shape"), [("normuon", (4, 1)), ("namo", (1,))])
@pytest.mark.proves("Adaptive Muon (normuon, namo)", "refused")
def test_a_second_moment_of_another_shape_is_refused(method: str, shape: Any, record_property: Say) -> None:
    state = {"momentum_buffer": torch.ones(4, 6), "moment2_buffer": torch.ones(shape)}
    with pytest.raises(UnsupportedState, match="keeps 'moment2_buffer' for a parameter of shape") as error:
        held("TensorParallelAdaptiveMuon", **state)
    record_property("message", str(error.value))


@pytest.mark.proves("Muon with experts that share one weight, mode exact", "refused")
def test_experts_that_share_a_matrix_cannot_be_replayed_apart(record_property: Say) -> None:
    (shard,) = held("TensorParallelMuon", momentum_buffer=torch.ones(4, 6))
    _Builder().add_shard(place(12, 24), shard, with_gradients=False)
    with pytest.raises(UnsupportedState, match=r"weight1 is a part of a parameter .* take mode 'full'") as error:
        _Builder().add_shard(place(12, 24), shard, with_gradients=True)
    record_property("message", str(error.value))
