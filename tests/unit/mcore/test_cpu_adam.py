# SPDX-License-Identifier: Apache-2.0
"""FusedAdam computes what torch computes, bit for bit, and keeps its step where Megatron-Core looks for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_moetion.mcore.cpu_adam import FusedAdam, join, split
from megatron_moetion.mcore.shards import held

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


# -- as a precision-aware optimizer; beside the real one in tests/te/test_fused_adam.py ------------------------------

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
MASTERS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"master_weight_dtype": FP16},
    "remainders": {"store_param_remainders": True},
}


def precise(params: list[torch.nn.Parameter], **how: Any) -> FusedAdam:
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "master_weights": True}
    return FusedAdam(groups(params), use_decoupled_grad=True, **{**settings, **how})


def in_bf16() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters()]


def decoupled_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.decoupled_grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step - 3)


def raw(optimizer: FusedAdam, param: torch.Tensor) -> dict[str, bytes]:
    return {h.name: h.find().contiguous().view(torch.uint8).numpy().tobytes() for h in held(optimizer, param)}


def test_an_fp32_value_is_a_bf16_and_its_lower_half_without_loss() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F7FFFFF, -0x80000000, -0x7FFF8000])
    values = torch.cat([bits, edges]).to(torch.int32).view(FP32)
    upper, lower = split(values)
    assert (upper.dtype, lower.dtype) == (BF16, torch.int16)
    assert torch.equal(join(upper, lower).view(torch.int32), values.view(torch.int32))
    finite = values[values.isfinite() & (values.abs() < 3e38)]
    error = (split(finite)[0].double() - finite.double()).abs()
    nearest = (finite.bfloat16().double() - finite.double()).abs()
    assert torch.equal(error, nearest), "the upper half is the nearest bf16 number; of two, the one away from zero"


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize(("first", "second"), [(FP32, FP32), (BF16, BF16), (FP16, FP32), (FP8, FP16), (FP8, FP8)])
def test_state_has_the_types_that_were_asked_for_and_follows_adamw(
    master: str, first: torch.dtype, second: torch.dtype
) -> None:
    params, theirs = in_bf16(), [torch.nn.Parameter(p.detach().bfloat16().float()) for p in parameters()]
    ours = precise(params, exp_avg_dtype=first, exp_avg_sq_dtype=second, **MASTERS[master])
    reference = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(2, STEPS):
        decoupled_gradients(params, step)
        for mine, other in zip(params, theirs, strict=True):
            other.grad = mine.decoupled_grad.clone()
        ours.step()
        reference.step()
    for mine, other in zip(params, theirs, strict=True):
        state = ours.state[mine]
        kept = {"fp32": FP32, "fp16": FP16, "remainders": torch.int16}[master]
        assert {k: v.dtype for k, v in state.items()} == {
            "exp_avg": first, "exp_avg_sq": second, "master_param": kept,
        }  # fmt: skip
        scaled = {k for k, v in {"exp_avg": first, "exp_avg_sq": second}.items() if v is not FP32}
        assert set(ours._scales.get(mine, {})) == scaled | ({"master_param"} if master == "fp16" else set())
        exact = {FP32: 1e-6, BF16: 2e-2, FP16: 2e-3, FP8: 1e-1}
        for name, dtype in (("exp_avg", first), ("exp_avg_sq", second)):
            wanted = reference.state[other][name]
            error = (ours.get_unscaled_state(mine, name) - wanted).abs().max() / wanted.abs().max()
            assert error < exact[dtype], (name, error)
        value = join(mine.detach(), state["master_param"]) if kept is torch.int16 else None
        value = ours.get_unscaled_state(mine, "master_param") if value is None else value
        assert torch.allclose(value, other, atol=1e-6 if {first, second} <= {FP32} and master != "fp16" else 5e-2)
        assert torch.allclose(mine.float(), value, rtol=2**-8, atol=1e-3)


def test_remainders_and_fp32_main_values_go_the_same_way() -> None:
    with_remainders, with_mains = in_bf16(), in_bf16()
    one = precise(with_remainders, store_param_remainders=True, exp_avg_dtype=BF16, exp_avg_sq_dtype=BF16)
    other = precise(with_mains, exp_avg_dtype=BF16, exp_avg_sq_dtype=BF16)
    for step in range(STEPS):
        for params, optimizer in ((with_remainders, one), (with_mains, other)):
            decoupled_gradients(params, step)
            optimizer.step()
    for a, b in zip(with_remainders, with_mains, strict=True):
        whole = join(a.detach(), one.state[a]["master_param"])
        assert torch.equal(whole, other.state[b]["master_param"])
        assert torch.equal(b.detach(), whole.bfloat16())


def test_an_fp32_parameter_is_its_own_main_value() -> None:
    params = parameters()
    optimizer = precise(params, store_param_remainders=True)
    before = [p.detach().clone() for p in params]
    decoupled_gradients(params, 3)
    optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert not torch.equal(param, start)
        assert torch.equal(optimizer.state[param]["master_param"], start), "made once, and never updated"


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("moments", [FP32, BF16, FP16, FP8])
def test_what_a_checkpoint_brings_back_is_written_in_place(master: str, moments: torch.dtype) -> None:
    params = in_bf16()
    optimizer = precise(params, exp_avg_dtype=moments, exp_avg_sq_dtype=moments, **MASTERS[master])
    decoupled_gradients(params, 3)
    optimizer.step()
    places = [h.find().data_ptr() for p in params for h in held(optimizer, p)]
    saved = copy.deepcopy(optimizer.state_dict())
    wanted = {n: {k: v.clone() for k, v in s.items()} for n, s in saved["state"].items()}
    assert {v.dtype for s in wanted.values() for v in s.values()} <= {FP32, torch.int16}
    decoupled_gradients(params, 4)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert [h.find().data_ptr() for p in params for h in held(optimizer, p)] == places
    for number, param in enumerate(params):
        for name, value in wanted[number].items():
            found = optimizer.get_unscaled_state(param, name)
            assert torch.allclose(found.float(), value.float(), rtol=1e-6), "a scale may be one bit off"


def test_only_the_gradients_that_it_reads_are_zeroed() -> None:
    params = in_bf16()
    optimizer = precise(params)
    decoupled_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.decoupled_grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.decoupled_grad is None for p in params)
    before = raw(optimizer, params[0])
    optimizer.step()
    assert before == {} != raw(optimizer, params[0]), "without a gradient there is state, and no update"


def test_types_that_no_fused_optimizer_has_are_refused() -> None:
    for how in ({"master_weight_dtype": BF16}, {"exp_avg_dtype": torch.int8}, {"exp_avg_sq_dtype": torch.float64}):
        with pytest.raises(ValueError, match="main values are fp32 or fp16"):
            FusedAdam(parameters(), **how)
    with pytest.raises(ValueError, match="amsgrad True"):
        FusedAdam(parameters(), amsgrad=True)
