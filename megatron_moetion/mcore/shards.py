# SPDX-License-Identifier: Apache-2.0
"""The live optimizer tensors behind each parameter, for every Megatron optimizer that ``chain`` lets pass.

A *shard* is what this rank's optimizer holds of one model parameter: a flat span of it, as main values and moments, in
fp32 or as a precision-aware optimizer stores them. Sources: the groups of ``DistributedOptimizer`` and its
``_get_model_param_range_map``, the parameter groups of ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer``
(megatron-core 0.16 and 0.19), and ``FusedAdam`` of Transformer Engine 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.chain import is_elementwise
from megatron_moetion.mcore.optimizer_state import MASTER_KEY
from megatron_moetion.units import Role

_STATE_ROLES = {
    "exp_avg": Role.EXP_AVG,
    "exp_avg_sq": Role.EXP_AVG_SQ,
    "momentum_buffer": Role.EXP_AVG,
    "moment2_buffer": Role.EXP_AVG_SQ,
    MASTER_KEY: Role.MASTER,
}
_SCALED_DTYPES = (torch.float16, torch.uint8)
"""What has a scale. Transformer Engine keeps one beside bf16 too, which nothing reads or writes."""
_RAW_NAMES = ("", ".scale_inv", ".scale", ".amax")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Elements [start, end) of the flattened ``parameter``; ``tensors`` are live, flat or of the parameter's shape."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    tensors: dict[Role, torch.Tensor]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name, live tensors of one element that belong to all elements of the shard; with any, a shard is indivisible:
    the scale of a part of it follows from all of it in each step."""
    is_whole: bool = False
    """A step needs all of it: the optimizer does not work element by element."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """One tensor of an optimizer's state."""

    name: str
    role: Role
    find: Callable[[], torch.Tensor]
    """Looks it up where the optimizer keeps it. A loaded checkpoint may have replaced the tensor, or its container."""


def shards(link: MegatronOptimizer) -> Iterator[Shard]:
    """Every shard of one optimizer, in the order of its parameter groups."""
    if isinstance(link, DistributedOptimizer):
        # Not by model_param_group_index_map: its positions are wrong in groups with parameters of both precisions.
        groups = zip(link.model_fp32_groups, link.model_float16_groups, link.optimizer.param_groups, strict=True)
        for fp32, float16, group in groups:
            for parameter, main in zip((*fp32, *float16), group["params"], strict=True):
                span = link._get_model_param_range_map(parameter)["param"]
                yield _shard(link, parameter, main, span.start, span.end)
    elif isinstance(link, Float16OptimizerWithFloat16Params):
        for models, mains in zip(link.float16_groups, link.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                yield _shard(link, parameter, main, 0, parameter.numel())
        for parameters in link.fp32_from_fp32_groups:
            for parameter in parameters:
                yield _shard(link, parameter, parameter, 0, parameter.numel())
    else:
        for group in link.optimizer.param_groups:
            for parameter in group["params"]:
                yield _shard(link, parameter, parameter, 0, parameter.numel())


def held(optimizer: torch.optim.Optimizer, main: torch.Tensor) -> Iterator[Held]:
    """All state of one of its parameters as plain tensors, step count aside. ``UnsupportedState`` for unknown state."""
    for key, value in optimizer.state[main].items():
        if key == "step":
            continue
        if key not in _STATE_ROLES or not isinstance(value, torch.Tensor) or value.shape != main.shape:
            raise UnsupportedState(
                f"{type(optimizer).__name__} keeps {key!r} for a parameter of shape {tuple(main.shape)}, which "
                f"MoEtion does not know how to capture; known are {', '.join(_STATE_ROLES)}"
            )
        raw = raw_tensors(value)
        role = Role.REMAINDER if raw[0].dtype is torch.int16 else _STATE_ROLES[key]
        for number, suffix in enumerate(_RAW_NAMES[: len(raw)]):
            yield Held(
                name=key + suffix,
                role=Role.SCALE if number else role,
                find=partial(_raw, optimizer, main, key, number),
            )
        if raw[0].dtype in _SCALED_DTYPES:
            if key not in getattr(optimizer, "_scales", {}).get(main, {}):
                raise UnsupportedState(
                    f"{type(optimizer).__name__} keeps {key!r} in {raw[0].dtype} and no scale of it that MoEtion finds"
                )
            yield Held(name=f"{key}.factor", role=Role.SCALE, find=partial(_scale, optimizer, main, key))


def raw_tensors(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a state consists of: itself, or the codes and scales of an FP8 tensor. (Its transpose nobody reads.)"""
    quantizer = getattr(value, "_quantizer", None)
    if quantizer is None:
        return (value,)
    fp8: Any = value
    return fp8._data, fp8._scale_inv, quantizer.scale, quantizer.amax


def _raw(optimizer: torch.optim.Optimizer, main: torch.Tensor, key: str, number: int) -> torch.Tensor:
    return raw_tensors(optimizer.state[main][key])[number]


def _scale(optimizer: Any, main: torch.Tensor, key: str) -> torch.Tensor:
    found: torch.Tensor = optimizer._scales[main][key]
    return found


def copy_main_to_model(link: MegatronOptimizer) -> None:
    """Model parameters of this rank's shards from the main parameters (nothing to do for plain fp32)."""
    if isinstance(link, MixedPrecisionOptimizer):
        link._copy_main_params_to_model_params()
    for group in link.optimizer.param_groups:
        for parameter in group["params"]:
            if (master := _whole_master(link.optimizer, parameter)) is not None:
                parameter.copy_(master)  # Megatron leaves this to the optimizer's next step


def _whole_master(optimizer: torch.optim.Optimizer, main: torch.Tensor) -> torch.Tensor | None:
    """The main value in the optimizer's own state that a model parameter is the rounded copy of; None: no such one.

    Not with remainders, which lack the upper half. Not in fp16: the parameter was rounded from the fp32 value before
    that. Not beside an fp32 parameter, which is its own main value; the other one is never updated.
    """
    master = optimizer.state[main].get(MASTER_KEY) if main in optimizer.state else None
    is_whole = master is not None and master.dtype is torch.float32 and main.dtype is not torch.float32
    return master if is_whole else None


def _shard(link: MegatronOptimizer, parameter: torch.nn.Parameter, main: torch.Tensor, start: int, end: int) -> Shard:
    optimizer = link.optimizer
    has_own_master = MASTER_KEY in optimizer.state[main]
    if has_own_master and hasattr(main, "_quantizer"):
        raise UnsupportedState(
            f"{type(optimizer).__name__} updates {type(main).__name__} parameters itself (--fp8-recipe delayed with "
            f"--use-precision-aware-optimizer and FP8 parameters): their bytes and scales are no function of the main "
            f"values; use another recipe, or leave --fp8-param-gather off"
        )
    tensors: dict[Role, torch.Tensor] = {}
    if not has_own_master:
        tensors[Role.MASTER] = main.detach()
    elif _whole_master(optimizer, main) is None:
        tensors[Role.MODEL] = main.detach()
    scales: dict[str, torch.Tensor] = {}
    for found in held(optimizer, main):
        if found.role is Role.SCALE:
            scales[found.name] = found.find()
        else:
            tensors[found.role] = found.find()
    for role, tensor in tensors.items():
        if tensor.numel() and not tensor.data_ptr():
            raise UnsupportedState(
                f"the {role.name} of a parameter of shape {tuple(parameter.shape)} is a {type(tensor).__name__}, whose "
                "bytes are in other tensors; use --use-distributed-optimizer, whose main values are plain tensors"
            )
        if not tensor.is_contiguous() or tensor.numel() != end - start:
            raise UnsupportedState(f"the {role.name} of a shard [{start}, {end}) has shape {tuple(tensor.shape)}")
    whole = not is_elementwise(optimizer)
    return Shard(parameter=parameter, start=start, end=end, tensors=tensors, scales=scales, is_whole=whole)
