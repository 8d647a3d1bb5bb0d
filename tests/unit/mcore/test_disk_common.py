# SPDX-License-Identifier: Apache-2.0
"""The common part of an exported checkpoint, and what Megatron-LM looks for in one."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moetion.mcore.disk_common import _common_of_optimizers, common_part, common_state, random_states


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


FLAGS: dict[str, Any] = {"num_layers": 4, "no_save_rng": True, "consumed_train_samples": 0, "ckpt_format": "torch"}
GUIDE: dict[str, Any] = {
    "sizes": {"world": 8, "pipeline": 2, "tensor": 2}, "ranks": {"pipeline": 1, "tensor": 0, "data_context": 0},
    "flags": FLAGS, "optimizers": [{"link": "DistributedOptimizer"}],
}  # fmt: skip
STATE: dict[str, Any] = {
    "optimizers": [DENSE], "scheduler": 40, "given": {"scheduler": {"max_lr": 0.1}},
    "user": {"iteration": 5, "operations": 7e9, "consumed_train_samples": 40, "skipped_train_samples": 8},
    "rng": {
        "torch": b"1", "cuda": b"2", "tracker": {"one": b"3"}, "numpy": ("MT19937", bytes(16), 0, 0, 0.0),
        "python": (3, bytes(8), None),
    },
}  # fmt: skip


def test_megatron_lm_finds_its_args_with_the_samples_of_the_iteration() -> None:
    found = common_state([common_part(3, GUIDE, STATE)], 5)
    assert vars(found["args"]) == {
        "num_layers": 4, "ckpt_format": "torch_dist", "no_save_rng": None, "no_save_optim": None,
        "consumed_train_samples": 40, "skipped_train_samples": 8,
    }  # fmt: skip
    assert (found["iteration"], found["num_floating_point_operations_so_far"]) == (5, 7e9)


def test_a_loop_without_its_flags_has_none() -> None:
    found = common_state([common_part(3, {**GUIDE, "flags": None}, STATE)], 5)
    assert not {"args", "num_floating_point_operations_so_far"} & found.keys()


def test_megatron_lm_finds_random_states_by_pipeline_and_tensor_rank() -> None:
    assert [s.unique_key for s in random_states(3, GUIDE, STATE)] == ["rng_state/shard_3_8", "rng_state/shard_1.0_2.2"]
    (one,) = random_states(3, GUIDE, STATE)[1].data
    assert one["torch_rng_state"].tolist() == [*b"1"]
    replica = {**GUIDE, "ranks": {**GUIDE["ranks"], "data_context": 1}}
    for guide in (replica, {**GUIDE, "flags": None}):
        assert [s.unique_key for s in random_states(3, guide, STATE)] == ["rng_state/shard_3_8"]


def test_random_states_that_megatron_lm_would_gather_are_left_out_and_not_asked_for() -> None:
    guide = {**GUIDE, "flags": {**FLAGS, "data_parallel_random_init": True}}
    assert len(random_states(3, guide, STATE)) == 1
    assert common_state([common_part(3, guide, STATE)], 5)["args"].no_save_rng is True
