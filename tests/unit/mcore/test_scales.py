# SPDX-License-Identifier: Apache-2.0
"""Scales of a precision-aware optimizer: who holds them, also where one weight is that of several experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.cpu_adam import FusedAdam
from megatron_moetion.mcore.inventory import StateTensors, take_inventory
from megatron_moetion.mcore.layout import Place
from megatron_moetion.mcore.optimizer_state import create_state
from megatron_moetion.mcore.refusals import refuse_shared_scales
from megatron_moetion.mcore.shards import Held, Shard, held
from megatron_moetion.snapshot.gradlog import gradient_log
from megatron_moetion.units import Inventory, Role, UnitKind

EXPERTS, EACH = 3, 200


def places() -> tuple[Place, ...]:
    """One weight of all experts, expert after expert."""
    return tuple(
        Place(
            unit=f"layers.0.experts.{e}", kind=UnitKind.EXPERT, tensor=f"layers.0.experts.{e}.weight1",
            start=e * EACH, end=(e + 1) * EACH, layer=0, expert=e,
        )
        for e in range(EXPERTS)
    )  # fmt: skip


def inventory_of(start: int, end: int, **how: Any) -> tuple[StateTensors, FusedAdam, torch.Tensor]:
    """Of a shard that holds elements [start, end) of that weight."""
    parameter = torch.nn.Parameter(torch.randn(EXPERTS * EACH).bfloat16())
    vars(parameter)["main_grad"] = torch.zeros(EXPERTS * EACH)
    main = torch.nn.Parameter(parameter.detach()[start:end])
    optimizer = FusedAdam([main], master_weights=True, **how)
    create_state(optimizer)
    tensors: dict[Role, torch.Tensor] = {}
    scales = {}
    for found in held(optimizer, main):
        if found.role is Role.SCALE:
            scales[found.name] = found.find()
        else:
            tensors[found.role] = found.find()
    shard = Shard(parameter=parameter, start=start, end=end, tensors=tensors, scales=scales)
    layout: Any = SimpleNamespace(parameters=lambda: [(parameter, places())], buffers=list)
    links: Any = [SimpleNamespace(optimizer=optimizer)]
    found_all = take_inventory(model=[], layout=layout, links=links, shards=[shard], tokens=None, with_gradients=True)
    return found_all, optimizer, main


FP16 = {"exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16}
FP8 = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.uint8}


@pytest.mark.parametrize(("how", "scales"), [(FP16, 2), (FP8, 8), ({"master_weight_dtype": torch.float16}, 1)])
def test_one_scale_of_several_experts_is_captured_once_with_the_first(how: dict[str, Any], scales: int) -> None:
    found, *_ = inventory_of(100, 500, **how)
    first, *others = found.units
    assert [u.expert for u in found.units] == [0, 1, 2]
    assert len([r for r in first.regions if r.role is Role.SCALE]) == scales
    assert not any(r.role is Role.SCALE for unit in others for r in unit.regions)
    assert {r.nbytes for r in first.regions if r.role is Role.SCALE} == {4}
    (name,) = {r.together for unit in found.units for r in unit.regions}
    assert name
    names = [(r.tensor, r.role, r.start) for unit in found.units for r in unit.regions]
    assert len(set(names)) == len(names)


def test_experts_that_share_a_scale_are_refused_where_they_are_restored_one_by_one() -> None:
    found, *_ = inventory_of(100, 500, **FP16)
    with pytest.raises(UnsupportedState, match=r"mode 'popularity' .* layers.0.experts.0 and layers.0.experts.1 share"):
        refuse_shared_scales(found.units)
    for alone in (inventory_of(200, 400, **FP16), inventory_of(100, 500)):
        refuse_shared_scales(alone[0].units)


@pytest.mark.parametrize("period", [2, 3, 7])
def test_mode_exact_takes_what_shares_a_scale_into_one_slice(period: int) -> None:
    found, *_ = inventory_of(100, 500, **FP8)
    log = gradient_log(Inventory(units=found.units), period)
    (number,) = log.log_of
    unit, gradient = log.inventory.units[number], log.inventory.units[log.log_of[number]]
    captured = {(r.address, r.nbytes) for r in unit.regions}
    wanted = {(r.address, r.nbytes) for u in found.units for r in u.regions if r.role is not Role.GRAD}
    assert captured == wanted
    assert sum(r.nbytes for r in gradient.regions) == 4 * 400
    assert {r.unit for r in unit.regions} == {unit.name} != {r.unit for r in gradient.regions}


def test_bf16_has_no_scale_and_is_cut() -> None:
    found, *_ = inventory_of(0, 600, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)
    assert not any(r.together or r.role is Role.SCALE for unit in found.units for r in unit.regions)
    log = gradient_log(Inventory(units=found.units), 4)
    assert len(log.log_of) > EXPERTS


@pytest.mark.parametrize("replace", ["scale", "codes", "container"])
def test_a_tensor_that_was_replaced_is_named(replace: str) -> None:
    found, optimizer, main = inventory_of(0, 600, **FP8)
    assert found.moved() is None
    if replace == "scale":
        optimizer._scales[main]["exp_avg"] = torch.ones(1)
    elif replace == "codes":
        optimizer.state[main]["exp_avg_sq"]._data = torch.zeros(600, dtype=torch.uint8)
    else:
        optimizer.state[main] = {"exp_avg": optimizer.state[main]["exp_avg"]}
    assert {"scale": "exp_avg.factor", "codes": "exp_avg_sq", "container": "exp_avg_sq"}[replace] in str(found.moved())


def test_state_without_the_scale_that_belongs_to_it_is_refused() -> None:
    _, optimizer, main = inventory_of(0, 600, **FP16)
    del optimizer._scales[main]["exp_avg"]
    with pytest.raises(UnsupportedState, match=r"keeps .exp_avg. in torch.float16 and no scale of it"):
        list[Held](held(optimizer, main))
