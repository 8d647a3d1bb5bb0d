# SPDX-License-Identifier: Apache-2.0
"""The CPU twin of the precision-aware optimizer beside the real one: the same state, scales and steps.

Of the real one everything runs but its kernels: Adam's, and the conversion to and from FP8. The twin's stand in.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_moetion.mcore import cpu_device

if os.environ.get("MOETION_REQUIRE_TE") != "1":
    pytest.skip("needs Transformer Engine and a process of its own: MOETION_REQUIRE_TE=1", allow_module_level=True)

# isort: split
import transformer_engine.pytorch  # noqa: F401 - before Megatron-Core, which looks whether it can be imported
import transformer_engine_torch as kernels
from transformer_engine.pytorch.optimizers import FusedAdam as RealAdam
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

# isort: split
from megatron_moetion.mcore.cpu_adam import (
    FusedAdam,
    Rates,
    dequantize,
    fused_update,
    fused_update_with_remainder,
    quantize,
)
from megatron_moetion.mcore.homes import Homes
from megatron_moetion.mcore.optimizer_state import create_state
from megatron_moetion.mcore.shards import held

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
MASTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp32": {"master_weights": True},
    "fp16": {"master_weights": True, "master_weight_dtype": torch.float16},
    "remainders": {"master_weights": True, "store_param_remainders": True},
}
PARAMETERS = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    (parameter, master, first, second)
    for parameter, master, first, second in itertools.product(PARAMETERS, MASTERS, DTYPES, DTYPES)
    if (master, first, second) != ("none", torch.float32, torch.float32)  # not precision-aware: as torch's AdamW
]
STEPS = 4


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 tensors on the CPU, by the arithmetic of the twin."""
    cpu_device.install()

    def make_empty(self: Float8Quantizer, shape: Sequence[int], **how: Any) -> Float8Tensor:
        return Float8Tensor(
            shape=tuple(shape), dtype=torch.float32, data=torch.empty(tuple(shape), dtype=torch.uint8),
            fp8_scale_inv=self.scale.reciprocal(), fp8_dtype=self.dtype, quantizer=self, device="cpu",
        )  # fmt: skip

    monkeypatch.setattr(Float8Quantizer, "make_empty", make_empty)
    monkeypatch.setattr(kernels, "quantize", lambda values, quantizer, state, noop: quantize(state, values))
    monkeypatch.setattr(kernels, "dequantize", lambda state, dtype: dequantize(state))


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (1, 7, 1000, 64)]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}, {"params": []}]


def with_twin_kernels(optimizer: RealAdam) -> RealAdam:
    def adam(update: Any, chunk: int, flag: Any, lists: Any, *scalars: Any) -> None:
        lr, beta1, beta2, eps, step, mode, has_correction, decay = scalars
        rates = Rates(
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, step=step, decoupled=mode == 1,
            bias_correction=has_correction == 1,
        )  # fmt: skip
        for tensors in zip(*lists, strict=True):
            update(rates, *tensors)

    optimizer.multi_tensor_adam = lambda *args: adam(fused_update, *args)
    optimizer.multi_tensor_adam_param_remainder = lambda *args: adam(fused_update_with_remainder, *args)
    return optimizer


def both(case: tuple[Any, ...], **more: Any) -> list[tuple[list[torch.nn.Parameter], Any]]:
    """The real optimizer and the twin, each with parameters of its own."""
    dtype, master, first, second = case
    how = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "use_decoupled_grad": True, **MASTERS[master], **more}
    how |= {"exp_avg_dtype": first, "exp_avg_sq_dtype": second}
    real, ours = parameters(dtype), parameters(dtype)
    return [(real, with_twin_kernels(RealAdam(groups(real), **how))), (ours, FusedAdam(groups(ours), **how))]


def image(params: list[torch.nn.Parameter], optimizer: Any) -> list[tuple[Any, ...]]:
    """All bits of parameters and state, and how each tensor is called and shaped."""
    found: list[tuple[Any, ...]] = [(bits(p),) for p in params]
    for number, param in enumerate(params):
        for h in held(optimizer, param):
            tensor = h.find()
            found.append((number, h.name, h.role, tensor.dtype, tuple(tensor.shape), bits(tensor)))
        scales = optimizer._scales.get(param, {})
        found.append((number, {name: (s.dtype, tuple(s.shape), bits(s)) for name, s in scales.items()}))
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def set_gradients(params: list[torch.nn.Parameter], dtype: torch.dtype, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.decoupled_grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (step - 2)).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.proves("Precision-aware optimizer, the real FusedAdam of Transformer Engine", "inventory")
def test_fresh_state_is_the_same(case: tuple[Any, ...]) -> None:
    found = []
    for params, optimizer in both(case):
        create_state(optimizer)
        found.append(image(params, optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_lead_to_the_same_bits(case: tuple[Any, ...], gradients: torch.dtype) -> None:
    (real, theirs), (mine, ours) = both(case, adam_w_mode=case[0] is not torch.float16)
    for optimizer in (theirs, ours):
        create_state(optimizer)
    for step in range(STEPS):
        before = image(real, theirs)
        for params, optimizer in ((real, theirs), (mine, ours)):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            set_gradients(params, gradients, step)
            optimizer.step()
            optimizer.zero_grad()
            assert params[0].decoupled_grad is None
        assert before != image(real, theirs) == image(mine, ours)
    assert [g["step"] for g in theirs.param_groups[:2]] == [g["step"] for g in ours.param_groups[:2]] == [STEPS] * 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_holds_and_brings_back_the_same(case: tuple[Any, ...]) -> None:
    (real, theirs), (mine, ours) = both(case)
    for params, optimizer in ((real, theirs), (mine, ours)):
        set_gradients(params, torch.float32, 1)
        optimizer.step()
    saved, own = theirs.state_dict()["state"], ours.state_dict()["state"]
    assert {n: {k: bits(t.float()) for k, t in s.items()} for n, s in saved.items()} == {
        n: {k: bits(t.float()) for k, t in s.items()} for n, s in own.items()
    }
    for params, optimizer in ((real, theirs), (mine, ours)):
        homes, places = Homes([optimizer]), addresses(params, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        homes.bring_back()
        assert addresses(params, optimizer) == places
    # The real one makes its FP8 tensors anew, from what happens to lie in memory: that is in their largest value.
    assert without_amax(image(real, theirs)) == without_amax(image(mine, ours))


def addresses(params: list[torch.nn.Parameter], optimizer: Any) -> list[int]:
    return [h.find().data_ptr() for param in params for h in held(optimizer, param)]


def without_amax(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [entry for entry in found if not str(entry[1:2]).endswith(".amax',)")]
