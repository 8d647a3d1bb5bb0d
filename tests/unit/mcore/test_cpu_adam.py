# SPDX-License-Identifier: Apache-2.0
"""FusedAdam computes what torch computes, bit for bit, and keeps its step where Megatron-Core looks for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_moetion.mcore.cpu_adam import FusedAdam

SHAPES = ((7,), (33, 5), (1,), (128, 64))
STEPS = 6


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step - 3)


@pytest.mark.parametrize("decoupled", [True, False])
def test_bit_equal_to_torch_while_lr_and_weight_decay_change(decoupled: bool) -> None:
    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused = FusedAdam(groups(ours), adam_w_mode=decoupled, **settings)
    torch_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = torch_class(groups(theirs), **settings)
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for group in (*fused.param_groups, *reference.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        for optimizer in (fused, reference):
            optimizer.param_groups[0]["weight_decay"] = 0.1 / (step + 1)
        fused.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fused.state[mine][key], reference.state[other][key])
        assert set(fused.state[mine]) == {"exp_avg", "exp_avg_sq"}
    assert [group["step"] for group in fused.param_groups] == [STEPS, STEPS]


def test_a_loaded_state_continues_bitwise() -> None:
    first = parameters()
    optimizer = FusedAdam(first, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        set_gradients(first, step)
        optimizer.step()
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = FusedAdam(second, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, STEPS):
        for params, adam in ((first, optimizer), (second, resumed)):
            set_gradients(params, step)
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parameters_without_gradient_and_empty_groups_stay() -> None:
    params = parameters()
    optimizer = FusedAdam([{"params": params}, {"params": []}], lr=1e-2)
    set_gradients(params[:1], 0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert "step" not in optimizer.param_groups[1]


def test_step_hooks_run() -> None:
    params = parameters()
    optimizer = FusedAdam(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    set_gradients(params, 0)
    optimizer.step()
    assert seen == ["before", "after"]


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        FusedAdam(parameters()).step(lambda: 0.0)


def test_what_newer_megatron_passes_is_taken_where_it_is_off() -> None:
    FusedAdam(parameters(), capturable=False, master_weights=False)
    with pytest.raises(ValueError, match="capturable is True"):
        FusedAdam(parameters(), capturable=True)
