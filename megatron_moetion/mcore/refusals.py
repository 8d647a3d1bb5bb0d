# SPDX-License-Identifier: Apache-2.0
"""What of a model's and an optimizer's settings cannot be captured exactly, by name, before iteration 1. Pure.

Classes are refused in ``chain.py``, parameters in ``quantised.py``. Field names are those of megatron-core 0.16 and
0.19; a field that one of them lacks is one that nobody has set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.units import Unit, UnitKind

DELAYED = "delayed"
"""The recipe whose scales are state: they are captured."""
FP8_RECIPES = (DELAYED, "tensorwise", "blockwise", "mxfp8")
"""With the others, what a value is quantised to follows from the values of the same tensor alone."""
_UNTESTED = {
    "fp4": "--fp4-format is not supported: NVFP4 parameters, and gradients rounded at random, are untested",
    "use_kitchen": "use_kitchen is not supported: what its quantisers keep is not known",
    "quant_recipe": "quant_recipe is not supported: layers may have quantisers that keep what is not known",
    "fp8_dot_product_attention": (
        "fp8_dot_product_attention is not supported: attention in FP8 keeps scales of its own under every recipe"
    ),
    "fp8_multi_head_attention": (
        "fp8_multi_head_attention is not supported: attention in FP8 keeps scales of its own under every recipe"
    ),
}
"""Settings of ``TransformerConfig`` that ask for quantised values which are not known to come back exactly."""


def refuse_unsupported(config: Any, links: Sequence[MegatronOptimizer], *, log_steps: bool) -> None:
    """Raise ``UnsupportedState`` for what ``config``, a ``TransformerConfig``, or a link's ``OptimizerConfig`` asks.

    ``log_steps`` says whether steps are to be replayed (mode ``exact``).
    """
    _refuse_quantisation(config)
    if log_steps and getattr(config, "qk_clip", False):
        raise UnsupportedState("qk_clip is not supported in mode 'exact': it changes parameters after the step")
    for link in links:
        if isinstance(link, DistributedOptimizer):
            _refuse_shared_gradients(link, log_steps=log_steps)
            _refuse_held_mains(config, link)


def fp8_recipe(config: Any) -> str | None:
    """The name of the recipe of a ``TransformerConfig``; None without FP8."""
    if not getattr(config, "fp8", None):
        return None
    return str(getattr(config.fp8_recipe, "value", config.fp8_recipe))


def _refuse_quantisation(config: Any) -> None:
    for name, message in _UNTESTED.items():
        if getattr(config, name, None):
            raise UnsupportedState(message)
    recipe = fp8_recipe(config)
    if recipe is not None and recipe not in FP8_RECIPES:
        raise UnsupportedState(
            f"--fp8-recipe {recipe} is not supported: what its quantisers keep between steps is not known; known are "
            f"{', '.join(FP8_RECIPES)}"
        )
    if recipe == DELAYED and getattr(config, "use_transformer_engine_op_fuser", False):
        raise UnsupportedState(
            "--use-transformer-engine-op-fuser is not supported with --fp8-recipe delayed: where fused operations keep "
            "their scales is not known"
        )


def _refuse_shared_gradients(link: MegatronOptimizer, *, log_steps: bool) -> None:
    """``reuse_grad_buf_for_mxfp8_param_ag``: the memory of the gradients is what parameters are gathered in."""
    of_step, of_gather = link.config, link.ddp_config
    for name in ("reuse_grad_buf_for_mxfp8_param_ag", "overlap_param_gather"):
        if of_gather.reuse_grad_buf_for_mxfp8_param_ag and getattr(of_step, name) != getattr(of_gather, name):
            raise UnsupportedState(
                f"{name} is {getattr(of_step, name)} in OptimizerConfig and {getattr(of_gather, name)} in "
                f"DistributedDataParallelConfig: Megatron needs the same in both to gather MXFP8 parameters"
            )
    if log_steps and of_gather.reuse_grad_buf_for_mxfp8_param_ag and not of_gather.overlap_param_gather:
        raise UnsupportedState(
            "--reuse-grad-buf-for-mxfp8-param-ag without --overlap-param-gather is not supported in mode 'exact': the "
            "step itself gathers parameters over the gradients, before they can be logged. With --overlap-param-gather "
            "they stay until the next iteration begins"
        )


def _refuse_held_mains(config: Any, link: MegatronOptimizer) -> None:
    """Delayed scaling with a precision-aware optimizer: the optimizer's own kernel writes the quantised parameters."""
    if link.ddp_config.fp8_param_gather and link.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        raise UnsupportedState(
            f"--use-precision-aware-optimizer with --fp8-param-gather and --fp8-recipe {fp8_recipe(config)} is not "
            f"supported: the optimizer quantises parameters within its step, and no call of Megatron does it again. "
            f"Take --fp8-recipe tensorwise, blockwise or mxfp8"
        )


def refuse_shared_scales(units: Sequence[Unit]) -> None:
    """Raise ``UnsupportedState`` where experts share a scale, so that none can be restored without the others.

    For mode ``popularity``, which restores experts as of different iterations.
    """
    holders: dict[str, set[str]] = {}
    for unit in units:
        for region in unit.regions:
            if region.together:
                holders.setdefault(region.together, set()).add(unit.name)
    experts = {unit.name for unit in units if unit.kind is UnitKind.EXPERT}
    for name, found in holders.items():
        if len(found) > 1 and found & experts:
            raise UnsupportedState(
                f"mode 'popularity' restores experts as of different iterations, and {' and '.join(sorted(found)[:2])} "
                f"share one scale of their fp16 or FP8 optimizer state (at {name}): one weight holds both. Take mode "
                f"'full' or 'exact', or --exp-avg-dtype and --exp-avg-sq-dtype fp32 or bf16 and --main-params-dtype "
                f"fp32, or a weight for each expert"
            )
