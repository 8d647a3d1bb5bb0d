# SPDX-License-Identifier: Apache-2.0
"""The live optimizer tensors behind each parameter, for every Megatron optimizer that ``chain`` lets pass.

A *shard* is what this rank's optimizer holds of one model parameter: a flat span of it, as fp32 main values
and moments. Sources: ``DistributedOptimizer._get_model_param_range_map`` and the parameter groups of
``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer`` (megatron-core 0.16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.chain import is_elementwise
from megatron_moetion.units import Role

_STATE_ROLES = {
    "exp_avg": Role.EXP_AVG,
    "exp_avg_sq": Role.EXP_AVG_SQ,
    "momentum_buffer": Role.EXP_AVG,
    "moment2_buffer": Role.EXP_AVG_SQ,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Elements [start, end) of the flattened ``parameter``; ``tensors`` are live, flat or of the parameter's shape."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    tensors: dict[Role, torch.Tensor]
    is_whole: bool
    """A step needs all of it: the optimizer does not work element by element."""


def shards(link: MegatronOptimizer) -> Iterator[Shard]:
    """Every shard of one optimizer, in the order of its parameter groups."""
    if isinstance(link, DistributedOptimizer):
        for parameter, (group, position) in link.model_param_group_index_map.items():
            span = link._get_model_param_range_map(parameter)["param"]
            main = link.optimizer.param_groups[group]["params"][position]
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


def copy_main_to_model(link: MegatronOptimizer) -> None:
    """Model parameters of this rank's shards from the main parameters (nothing to do for plain fp32)."""
    if isinstance(link, MixedPrecisionOptimizer):
        link._copy_main_params_to_model_params()


def _shard(link: MegatronOptimizer, parameter: torch.nn.Parameter, main: torch.Tensor, start: int, end: int) -> Shard:
    tensors = {Role.MASTER: main.detach()}
    for key, value in link.optimizer.state[main].items():
        if key == "step":
            continue
        if key not in _STATE_ROLES or not isinstance(value, torch.Tensor) or value.shape != main.shape:
            raise UnsupportedState(
                f"{type(link.optimizer).__name__} keeps {key!r} for a parameter of shape {tuple(main.shape)}, which "
                f"MoEtion does not know how to capture; known are {', '.join(_STATE_ROLES)}"
            )
        tensors[_STATE_ROLES[key]] = value
    for role, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.numel() != end - start:
            raise UnsupportedState(f"the {role.name} of a shard [{start}, {end}) has shape {tuple(tensor.shape)}")
    whole = not is_elementwise(link.optimizer)
    return Shard(parameter=parameter, start=start, end=end, tensors=tensors, is_whole=whole)
