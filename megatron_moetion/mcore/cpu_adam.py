# SPDX-License-Identifier: Apache-2.0
"""Adam for machines without a GPU, shaped like the fused optimizers that Megatron-Core is written for.

``torch.optim.AdamW`` keeps one ``step`` per parameter; the ``FusedAdam`` of Apex and Transformer Engine
keeps one per parameter group. Megatron-Core's checkpoint code expects the latter: with torch's AdamW a
``torch_dist`` checkpoint loads wrongly. This class has the fused layout and torch's arithmetic, bit for bit.

As a precision-aware optimizer (main values of its own, or moments in less than fp32) it is the twin of Transformer
Engine's: the same arguments, state and scales, and the arithmetic of ``transformer_engine/common/multi_tensor/adam.cu``
(2.20) in fp32, one rounding for each operation as it is written there. Two things cannot be known without a GPU: where
the compiler contracts a product and a sum into one operation, and how the device's square root and division round
(correctly, unless it was built with fast math). The last bit may therefore differ from a GPU's. And one thing differs
on purpose: a group without parameters takes no step here, and Transformer Engine counts one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_FP8 = torch.float8_e4m3fn
_LARGEST = {torch.float16: torch.finfo(torch.float16).max / 2.0, torch.uint8: torch.finfo(_FP8).max}
"""What the largest element of a scaled state becomes; uint8 stands for FP8 (E4M3)."""
_MASTER_DTYPES = (torch.float32, torch.float16)
_MOMENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_LOWER_HALF = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Scalars of one step. Each is rounded to fp32, as where it becomes an argument of the kernel."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Counts from 1."""
    decoupled: bool = True
    """AdamW; else L2 regularisation."""
    bias_correction: bool = True

    def fp32(self, name: str) -> float:
        """The field of this name, rounded."""
        return _fp32(getattr(self, name))

    def correction(self, name: str) -> float:
        """What the moment of this beta is divided by."""
        return _fp32(1 - self.fp32(name) ** self.step) if self.bias_correction else 1.0


def fused_update(
    rates: Rates,
    grad: torch.Tensor,
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None = None,
) -> None:
    """One step of one parameter, in place: tensors of one shape, of fp32, bf16 or fp16.

    With ``master`` (fp32) the parameter is the rounded main value, and its own value is not read.
    """
    value = (param if master is None else master).float().clone()
    moment, variance = exp_avg.float().clone(), exp_avg_sq.float().clone()
    _adam(rates, grad.float(), value, moment, variance)
    for tensor, new in ((exp_avg, moment), (exp_avg_sq, variance), (param, value), (master, value)):
        if tensor is not None:
            tensor.copy_(new)


def fused_update_with_remainder(
    rates: Rates,
    grad: torch.Tensor,
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    remainder: torch.Tensor,
) -> None:
    """The same where the fp32 main value is the bf16 parameter and 16 bits more (int16), both in place."""
    value = join(param, remainder)
    moment, variance = exp_avg.float().clone(), exp_avg_sq.float().clone()
    _adam(rates, grad.float(), value, moment, variance)
    upper, lower = split(value)
    for tensor, new in ((exp_avg, moment), (exp_avg_sq, variance), (param, upper), (remainder, lower)):
        tensor.copy_(new)


def join(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The fp32 values of bf16 ``upper`` and int16 ``lower``: a negative remainder says that ``upper`` is rounded up."""
    low = lower.int()
    bits = (upper.view(torch.int16).int() - (low < 0).int()) * _LOWER_HALF + (low & (_LOWER_HALF - 1))
    return bits.view(torch.float32)


def split(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other way: fp32 values as bf16, a half rounded up, and the lower 16 bits of their own as int16."""
    bits = value.view(torch.int32)
    lower = bits.to(torch.int16)
    upper = ((bits >> 16) + (lower < 0).int()).to(torch.int16)
    return upper.view(torch.bfloat16), lower


class Float8State(torch.Tensor):
    """FP8 (E4M3) values with one scale; the tensor itself is their codes, uint8.

    It has what Transformer Engine's ``Float8Tensor`` has, under the same names: ``_data``, the codes; ``_scale_inv``,
    what they are multiplied by; ``_quantizer``, with the ``scale`` that values were multiplied by, and the largest of
    their absolute values as ``amax``; all but the codes are fp32 of one element.
    """

    # Operations give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _data: torch.Tensor
    _scale_inv: torch.Tensor
    _quantizer: _Quantizer

    @staticmethod
    def zeros_like(tensor: torch.Tensor) -> Float8State:
        """Zeros of that shape, with a scale of 1."""
        codes = torch.zeros_like(tensor, dtype=torch.uint8)
        found = torch.Tensor._make_subclass(Float8State, codes)
        one = torch.ones(1, dtype=torch.float32, device=tensor.device)
        found._data, found._scale_inv = codes, one
        found._quantizer = _Quantizer(scale=one.clone(), amax=torch.zeros_like(one))
        return found


def quantize(state: Any, values: torch.Tensor) -> None:
    """Fp32 ``values`` into a ``Float8State``, in place, with its quantizer's scale; too large ones become the largest.

    A real ``Float8Tensor`` will do, too.
    """
    scale, largest = state._quantizer.scale, _LARGEST[torch.uint8]
    state._data.copy_((values * scale).clamp(-largest, largest).to(_FP8).view(torch.uint8))
    state._scale_inv.copy_(scale.reciprocal())
    state._quantizer.amax.copy_(torch.maximum(state._quantizer.amax, values.abs().max()))


def dequantize(state: Any) -> torch.Tensor:
    """The values of a ``Float8State``, or a real ``Float8Tensor``, in fp32."""
    return state._data.view(_FP8).float() * state._scale_inv


@dataclass(kw_only=True, eq=False)
class _Quantizer:
    scale: torch.Tensor
    amax: torch.Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam/AdamW whose only per-parameter state is ``exp_avg`` and ``exp_avg_sq``.

    A group's ``step`` is an int, absent until the group's first step; a group without parameters never gets one.

    With ``master_weights`` a parameter has a ``master_param`` too: of ``master_weight_dtype``, or with
    ``store_param_remainders`` and a bf16 parameter int16, the lower half of an fp32 value whose upper half is the
    parameter. uint8 stands for FP8. What is not fp32 has an entry in ``_scales``, fp32 of one element, by parameter and
    name. ``use_decoupled_grad`` reads ``decoupled_grad`` of each parameter, of any type, instead of ``grad``. All that
    is as in Transformer Engine's optimizer. FP8 moments of zeros alone have a scale of zero and become NaN there, and
    here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if capturable or amsgrad:
            raise ValueError(
                f"capturable is {capturable} and amsgrad {amsgrad}: there are no CUDA graphs on a CPU, and no fused "
                "optimizer has AMSGrad; leave both off"
            )
        if master_weight_dtype not in _MASTER_DTYPES or not {exp_avg_dtype, exp_avg_sq_dtype} <= {*_MOMENT_DTYPES}:
            raise ValueError(
                f"main values of {master_weight_dtype} and moments of {exp_avg_dtype} and {exp_avg_sq_dtype}: main "
                f"values are fp32 or fp16, and moments fp32, fp16, bf16 or uint8, which stands for FP8"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.bias_correction = bias_correction
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights and master_weight_dtype is torch.float32
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self.is_precision_aware = master_weights or {exp_avg_dtype, exp_avg_sq_dtype} != {torch.float32}
        self._scales: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is refused, as in the fused optimizers."""
        if closure is not None:
            raise ValueError("FusedAdam.step takes no closure")
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, self._has_remainder(param))
                grad = getattr(param, "decoupled_grad" if self.use_decoupled_grad else "grad", None)
                if grad is None:
                    continue
                if self.is_precision_aware:
                    self._update_scaled(param, grad, group)
                else:
                    self._update(param, grad, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that ``step`` reads, or make them zero."""
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        for param in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:
                param.decoupled_grad = None
            elif getattr(param, "decoupled_grad", None) is not None:
                param.decoupled_grad.zero_()

    @torch.no_grad()
    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """The state that the first step of a parameter would find."""
        self._create(param, "exp_avg", self.name_to_dtype_map["exp_avg"])
        self._create(param, "exp_avg_sq", self.name_to_dtype_map["exp_avg_sq"])
        if self.master_weights:
            dtype = torch.int16 if store_param_remainders else self.name_to_dtype_map["master_param"]
            self._create(param, "master_param", dtype)
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.detach().float().clone())

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """A state in fp32, and remainders as int16: the tensor itself where it is of that type, else a copy."""
        state = self.state[param][state_name]
        if isinstance(state, Float8State):
            return dequantize(state)
        if state.dtype is torch.float16:
            return state.float().mul_(self._scales[param][state_name])
        return state if state.dtype is torch.int16 else state.float()

    @torch.no_grad()
    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Take fp32 values for a state, and int16 for remainders; the state is made if there is none."""
        has_remainder = state_name == "master_param" and self._has_remainder(param)
        dtype = torch.int16 if has_remainder else self.name_to_dtype_map[state_name]
        if state_name not in self.state[param]:
            self._create(param, state_name, dtype)
        state = self.state[param][state_name]
        if dtype not in _LARGEST:
            state.copy_(unscaled_state)
            return
        scale = self._scales[param][state_name]
        scale.copy_(torch.div(unscaled_state.abs().max(), torch.tensor(_LARGEST[dtype])))
        if isinstance(state, Float8State):
            state._quantizer.scale.copy_(scale.reciprocal())
            quantize(state, unscaled_state)
        else:
            state.copy_(unscaled_state * torch.where(scale > 0, scale.reciprocal(), 0.0))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with what ``get_unscaled_state`` returns in place of what is stored."""
        found = super().state_dict()
        if self.is_precision_aware:
            for number, param in self._numbered().items():
                if number in found["state"]:
                    names = found["state"][number]
                    found["state"][number] = {name: self.get_unscaled_state(param, name) for name in names}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What ``state_dict`` returned. State that exists is written in place."""
        if not self.is_precision_aware:
            super().load_state_dict(dict(state_dict))
            return
        kept = {param: dict(state) for param, state in self.state.items()}
        super().load_state_dict({**state_dict, "state": {}})
        for number, param in self._numbered().items():
            self.state[param] = kept.get(param, {})
            for name, value in state_dict["state"].get(number, {}).items():
                self.set_scaled_state(param, name, value if value.dtype is torch.int16 else value.float())

    def _numbered(self) -> dict[int, torch.Tensor]:
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))

    def _has_remainder(self, param: torch.Tensor) -> bool:
        return self.store_param_remainders and param.dtype is torch.bfloat16

    def _create(self, param: torch.Tensor, name: str, dtype: torch.dtype) -> None:
        plain = param.detach()
        is_fp8 = dtype is torch.uint8
        self.state[param][name] = Float8State.zeros_like(plain) if is_fp8 else torch.zeros_like(plain, dtype=dtype)
        if self.name_to_dtype_map[name] is not torch.float32:
            self._scales.setdefault(param, {})[name] = torch.ones(1, dtype=torch.float32, device=param.device)

    def _update_scaled(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """One step between unscaling and scaling. bf16 moments are neither: the kernel itself reads and writes them."""
        rates = Rates(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=group["step"],
            decoupled=self.adam_w_mode,
            bias_correction=self.bias_correction,
        )
        state = {name: self.get_unscaled_state(param, name) for name in self.state[param]}
        moments = state["exp_avg"], state["exp_avg_sq"]
        if self._has_remainder(param):
            fused_update_with_remainder(rates, grad, param, *moments, state["master_param"])
        else:
            # The main value of an fp32 parameter is left as it was made: such a parameter is its own.
            has_master = self.master_weights and param.dtype is not torch.float32
            fused_update(rates, grad, param, *moments, state["master_param"] if has_master else None)
        for name, value in state.items():
            if self.name_to_dtype_map[name] is not torch.float32:
                self.set_scaled_state(param, name, value)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """The same operations in the same order as torch's single-tensor AdamW (Adam without ``adam_w_mode``)."""
        state = self.state[param]
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        lr, weight_decay, step = group["lr"], group["weight_decay"], float(group["step"])
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if self.bias_correction else (1.0, 1.0)

        if weight_decay:
            if self.adam_w_mode:
                param.mul_(1 - lr * weight_decay)
            else:
                grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = lr / correction1
        denominator = (exp_avg_sq.sqrt() / math.sqrt(correction2)).add_(group["eps"])
        param.addcdiv_(exp_avg, denominator, value=-step_size)


def _adam(rates: Rates, grad: torch.Tensor, value: torch.Tensor, moment: torch.Tensor, variance: torch.Tensor) -> None:
    """The kernel's arithmetic, in place on fp32 ``value``, ``moment`` and ``variance``."""
    beta1, beta2, decay = rates.fp32("beta1"), rates.fp32("beta2"), rates.fp32("weight_decay")
    if not rates.decoupled:
        grad = grad + value * decay
    moment.mul_(beta1).add_(grad * _fp32(1 - beta1))
    variance.mul_(beta2).add_(grad * _fp32(1 - beta2) * grad)
    denominator = (variance / rates.correction("beta2")).sqrt_().add_(rates.fp32("eps"))
    update = moment / rates.correction("beta1") / denominator
    if rates.decoupled:
        update += value * decay
    value.sub_(update * rates.fp32("lr"))


def _fp32(number: float) -> float:
    """The nearest number that fp32 has."""
    return float(np.float32(number))
