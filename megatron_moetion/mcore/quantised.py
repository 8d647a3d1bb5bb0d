# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's quantised parameters, and the state that delayed scaling quantises with.

A quantised parameter is a wrapper around its bytes and scales and has no memory of its own. It is never captured: it
is made from the fp32 main parameters again (``parameters.py``). That is exact where the quantised value is a function
of the main values alone (MXFP8, blockwise and current scaling). Delayed scaling also takes a scale that follows from
the largest values of earlier steps: those scales and histories are captured as buffers of their modules.

Nothing of Transformer Engine is imported: its tensors and modules are known by the names of their classes and of the
modules that define these. Sources: ``pytorch/quantization.py``, ``module/base.py`` and ``tensor/`` of Transformer
Engine 2.20; ``fp8_utils.py`` and ``distrib_optimizer.py`` of megatron-core 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.chain import layer_wise

KNOWN_CLASSES = ("Float8Tensor", "Float8BlockwiseQTensor", "MXFP8Tensor")
"""Of tensor, current and delayed scaling; of blocks of 128; of blocks of 32."""
_GROUPED = "GroupedTensor"
"""One weight for all experts of a layer, quantised or not."""
_PAYLOAD = (
    "_data", "_scale_inv", "_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv",
    "rowwise_data", "scale_inv", "columnwise_data", "columnwise_scale_inv",
)  # fmt: skip
"""Attributes with the bytes and scales of a quantised tensor."""
_SCALING = ("scaling_fwd", "scaling_bwd")
_SCALING_TENSORS = ("scale", "amax_history")
_MODULES = {"Linear": 1, "LayerNormLinear": 1, "LayerNormMLP": 2, "GroupedLinear": None}
"""Modules of Transformer Engine with scales, and how many products each computes; None: as many as it says."""
_WITHOUT_SCALES = ("DotProductAttention",)
"""Modules that quantise only where a setting that is refused asks for it."""


def quantised_class(parameter: nn.Parameter) -> str | None:
    """The name of the class of a quantised parameter, None for a plain one.

    Raises ``UnsupportedState`` for tensors of other classes, which may keep anything beside their values.
    """
    if type(parameter) in (nn.Parameter, torch.Tensor):
        return None
    name = type(parameter).__name__
    is_known = _is_of_transformer_engine(type(parameter))
    if is_known and name == _GROUPED:
        data = (getattr(parameter, each, None) for each in ("rowwise_data", "columnwise_data"))
        return name if any(d is not None and d.dtype is torch.uint8 for d in data) else None
    if is_known and name in KNOWN_CLASSES:
        return name
    raise UnsupportedState(
        f"a parameter is a {name} of {type(parameter).__module__}, which MoEtion does not know how to make again from "
        f"the optimizer's main parameters; known are plain tensors and Transformer Engine's {', '.join(KNOWN_CLASSES)}"
    )


def refuse_parameters(model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Raise ``UnsupportedState`` for quantised parameters of ``model`` that a recovery could not make again."""
    is_layer_wise = bool(layer_wise(optimizer))
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            found = quantised_class(parameter)
            if found is None:
                continue
            if not parameter.requires_grad:
                raise UnsupportedState(
                    f"{name} is a frozen {found}: no optimizer holds its values, and its quantised bytes are not "
                    f"captured. Keep frozen parameters in bf16, outside of Megatron's fp8 model init"
                )
            if is_layer_wise:
                raise UnsupportedState(
                    f"{name} is a {found} and there is a LayerWiseDistributedOptimizer: it exchanges parameters that "
                    f"are not quantised, and no call of it quantises them from its main parameters. Leave "
                    f"--fp8-param-gather and Megatron's fp8 model init out, or take --optimizer adam with "
                    f"--use-distributed-optimizer"
                )
            config = chunk.ddp_config
            if not (config.use_distributed_optimizer and config.fp8_param_gather):
                raise UnsupportedState(
                    f"{name} is a {found} and --fp8-param-gather with --use-distributed-optimizer is not in force: "
                    f"only the distributed optimizer quantises parameters from its main parameters"
                )


def _is_of_transformer_engine(cls: type) -> bool:
    """Whether it is defined there: a class of the same name elsewhere may be anything."""
    return cls.__module__.startswith("transformer_engine.")


def payload(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The live bytes and scales of a quantised parameter by name, for checks; stale transposes are left out.

    Scales of blocks are without the padding that no value uses, and whose bytes nobody sets.
    """
    found = {name: t for name in _PAYLOAD if isinstance(t := getattr(parameter, name, None), torch.Tensor)}
    for name, (height, width) in _scales(parameter).items():
        if name in found:
            found[name] = found[name][:height, :width]
    transpose = getattr(parameter, "_transpose", None)
    if isinstance(transpose, torch.Tensor) and not getattr(parameter, "_transpose_invalid", True):
        found["_transpose"] = transpose
    return found


def _scales(parameter: nn.Parameter) -> dict[str, tuple[int, int]]:
    """How many scales a parameter has in each direction, by the name of the tensor with them; where they are padded."""
    columns = parameter.shape[-1]
    rows = parameter.numel() // columns
    if type(parameter).__name__ == "MXFP8Tensor":
        return {"_rowwise_scale_inv": (rows, columns // 32), "_columnwise_scale_inv": (rows // 32, columns)}
    if getattr(parameter, "_is_2D_scaled", False):
        high, wide = -(-rows // 128), -(-columns // 128)
        return {"_rowwise_scale_inv": (high, wide), "_columnwise_scale_inv": (wide, high)}
    return {}


# -- delayed scaling ----------------------------------------------------------------------------------------------


def create_scaling_state(model: Sequence[DistributedDataParallel], config: Any) -> None:
    """Give every module the scales and histories that its first forward would make, so that they have an address.

    ``config``: the ``TransformerConfig``, with ``fp8_recipe`` ``delayed``. Raises ``UnsupportedState`` for modules of
    Transformer Engine that we do not know.
    """
    with torch.no_grad(), get_fp8_context(config):
        for chunk in model:
            for path, module in chunk.named_modules():
                if hasattr(module, "fp8_meta"):
                    _create(path, module)


def scaling_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where a module keeps the scales and histories of delayed scaling: a holder, the key in it, a name.

    Other recipes, and other modules, have none.
    """
    meta: dict[str, Any] = getattr(module, "fp8_meta", {})
    for direction in _SCALING:
        holder: dict[str, Any] = getattr(meta.get(direction), "__dict__", {})
        for key in _SCALING_TENSORS:
            if isinstance(holder.get(key), torch.Tensor):
                yield holder, key, f"{direction}.{key}"


def _create(path: str, module: Any) -> None:
    names = [c.__name__ for c in type(module).__mro__ if _is_of_transformer_engine(c)]
    if any(name in names for name in _WITHOUT_SCALES):
        return
    known = next((name for name in names if name in _MODULES), None)
    if known is not None:
        module.init_fp8_metadata(num_gemms=_MODULES[known] or module.num_gemms)
    if len(list(scaling_tensors(module))) != len(_SCALING) * len(_SCALING_TENSORS):
        raise UnsupportedState(
            f"{path} is a {type(module).__name__}, whose scales of delayed scaling MoEtion does not know how to find; "
            f"known are {', '.join(_MODULES)} of Transformer Engine 2. Take another --fp8-recipe"
        )
