# SPDX-License-Identifier: Apache-2.0
"""State that a checkpoint has replaced is brought back to where it was captured from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moetion.mcore.cpu_adam import FusedAdam
from megatron_moetion.mcore.homes import Homes
from megatron_moetion.mcore.optimizer_state import create_state
from megatron_moetion.mcore.shards import held


class Replacing(FusedAdam):
    """Makes all of its state anew when it loads, as the one of Transformer Engine does."""

    def load_state_dict(self, state_dict: Any) -> None:
        self.state.clear()
        self._scales.clear()
        super().load_state_dict(state_dict)


def optimizer_of(params: list[torch.nn.Parameter], **how: Any) -> Replacing:
    moments = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float16}
    found = Replacing(params, lr=1e-2, master_weights=True, use_decoupled_grad=True, **{**moments, **how})
    create_state(found)
    return found


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (5, 64)]


def places(optimizer: FusedAdam, params: list[torch.nn.Parameter]) -> list[int]:
    return [h.find().data_ptr() for p in params for h in held(optimizer, p)]


def bits(optimizer: FusedAdam, params: list[torch.nn.Parameter]) -> list[bytes]:
    return [h.find().view(torch.uint8).numpy().tobytes() for p in params for h in held(optimizer, p)]


@pytest.mark.parametrize("master", [{}, {"store_param_remainders": True}, {"master_weight_dtype": torch.float16}])
def test_loaded_state_moves_back_with_its_scales(master: dict[str, Any]) -> None:
    params = parameters(1)
    optimizer = optimizer_of(params, **master)
    for param in params:
        param.decoupled_grad = torch.ones(param.shape)
    optimizer.step()
    homes, before = Homes([optimizer]), places(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = bits(optimizer, params)
    assert not set(before) & set(places(optimizer, params))
    homes.bring_back()
    assert places(optimizer, params) == before
    assert bits(optimizer, params) == loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_before_the_first_step_main_values_are_those_of_loaded_parameters(dtype: torch.dtype) -> None:
    params, other = parameters(1), parameters(2)
    optimizer = optimizer_of(params, master_weight_dtype=dtype)
    homes, before = Homes([optimizer]), places(optimizer, params)
    for param, loaded in zip(params, other, strict=True):
        param.data.copy_(loaded)
    homes.bring_back()
    fresh = optimizer_of(other, master_weight_dtype=dtype)
    assert bits(optimizer, params) == bits(fresh, other)
    assert places(optimizer, params) == before


def test_after_a_step_main_values_are_their_own() -> None:
    params = parameters(1)
    optimizer = optimizer_of(params)
    for param in params:
        param.decoupled_grad = torch.ones(param.shape)
    optimizer.step()
    homes, before = Homes([optimizer]), bits(optimizer, params)
    params[0].data.zero_()
    homes.bring_back()
    assert bits(optimizer, params) == before


def test_torch_s_optimizers_are_left_alone() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(params)
    create_state(optimizer)
    homes = Homes([optimizer])
    state = dict(optimizer.state[params[0]])
    homes.bring_back()
    assert all(optimizer.state[params[0]][k] is v for k, v in state.items())
