# SPDX-License-Identifier: Apache-2.0
"""The common part of an exported checkpoint: optimizers as the loader's expert parallelism wants them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moetion.mcore.disk_common import _common_of_optimizers


def fields(*groups: dict[str, Any], steps: float | None = None, scaler: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"groups": list(groups), "steps": steps, "grad_scaler": scaler}


DENSE = fields({"wd_mult": 1.0, "is_expert_parallel": False, "step": 7}, {"wd_mult": 0.0, "is_expert_parallel": False})
EXPERTS = fields({"wd_mult": 1.0, "is_expert_parallel": True, "step": 7})


def of(*optimizers: dict[str, Any], link: str = "DistributedOptimizer") -> dict[str, Any]:
    """A rank's part."""
    return {"optimizers": list(optimizers), "links": [link] * len(optimizers)}


def experts_in(common: dict[Any, Any]) -> list[bool]:
    return [group["is_expert_parallel"] for group in common["optimizer"]["param_groups"]]


def test_the_fullest_rank_says_what_there_is() -> None:
    """A stage without experts has one optimizer."""
    found = _common_of_optimizers([of(DENSE), of(DENSE, EXPERTS)], None)
    assert [experts_in(found[0]), experts_in(found[1])] == [[False, False], [True]]
    assert {g["step"] for one in found.values() for g in one["optimizer"]["param_groups"]} == {7}


def test_one_optimizer_for_who_has_no_expert_parallelism() -> None:
    found = _common_of_optimizers([of(DENSE, EXPERTS)], 1)
    assert experts_in(found) == [False, False]


def test_two_optimizers_for_who_has() -> None:
    found = _common_of_optimizers([of(DENSE)], 4)
    assert [experts_in(found[0]), experts_in(found[1])] == [[False, False], [True, True]]


@pytest.mark.parametrize(("steps", "expected"), [(5.0, 5), (None, 7)])
def test_steps_stand_in_each_group(steps: float | None, expected: int) -> None:
    """Torch's optimizers count them per parameter, the fused ones per group, and empty groups not at all."""
    found = _common_of_optimizers([of({**DENSE, "steps": steps})], None)
    assert [group["step"] for group in found["optimizer"]["param_groups"]] == [expected, expected]


@pytest.mark.parametrize("link", ["Float16OptimizerWithFloat16Params", "FP32Optimizer"])
def test_optimizers_without_shards_have_a_format_of_their_own(link: str) -> None:
    found = _common_of_optimizers([of({**DENSE, "steps": 5.0}, link=link)], 4)
    for each in found.values():
        inner = each if link == "FP32Optimizer" else each["optimizer"]
        assert inner["state"] == {"common_step": 5.0}
        assert [group["wd_mult"] for group in inner["param_groups"]] == [1.0, 0.0]


def test_a_loss_scaler_is_as_megatron_loads_it() -> None:
    scaler = {"scale": 1024.0, "growth_tracker": 3, "hysteresis_tracker": 2}
    found = _common_of_optimizers([of(fields(scaler=scaler))], None)
    assert found["grad_scaler"]["scale"].tolist() == [1024.0]
    assert found["grad_scaler"]["growth_tracker"] == 3
