# SPDX-License-Identifier: Apache-2.0
"""What of a model's and an optimizer's settings cannot be captured exactly, by name, before iteration 1. Pure.

Optimizers are refused by class in ``chain.py``, parameters in ``quantised.py``. Field names are those of megatron-core
0.16 and 0.19; a field that one of them lacks is one that nobody has set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore.chain import is_elementwise
from megatron_moetion.mcore.layout import MoeBlock
from megatron_moetion.mcore.router import CapacityRouter
from megatron_moetion.units import Role, Unit, UnitKind

IN_BUFFERS = "moetion_state_is_in_buffers"
"""An attribute by which the author of a router says so."""

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


def refuse_unsupported(
    model: Sequence[DistributedDataParallel],
    config: Any,
    links: Sequence[MegatronOptimizer],
    blocks: Sequence[MoeBlock],
    *,
    log_steps: bool,
) -> None:
    """Raise ``UnsupportedState`` for what ``config``, a ``TransformerConfig``, or a link's ``OptimizerConfig`` asks.

    ``blocks`` are the MoE layers of ``model``. ``log_steps`` says whether steps are to be replayed (mode ``exact``).
    """
    refuse_sharded_wrappers(model)
    _refuse_quantisation(config)
    _refuse_optimizer_instances(model)
    _refuse_weight_rematerialisation(config)
    _refuse_query_key_clipping(config, log_steps=log_steps)
    for link in links:
        _refuse_graphed_step(link)
        if isinstance(link, DistributedOptimizer):
            _refuse_shared_gradients(link, log_steps=log_steps)
            _refuse_held_mains(config, link)
        if log_steps:
            _refuse_steps_that_do_not_repeat(link, config)
    for block in blocks:
        _refuse_unknown_router(block)


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
    scaled = {region.together for unit in units for region in unit.regions if region.role is Role.SCALE}
    holders: dict[str, set[str]] = {}
    for unit in units:
        for region in unit.regions:
            if region.together in scaled:
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


def refuse_sharded_wrappers(model: Sequence[Any]) -> None:
    """``UnsupportedState`` for data parallelism that shards parameters, ``ConfigError`` for what is none of Megatron's.

    Classes are compared exactly: one that is made from Megatron's may synchronise in a way of its own.
    """
    for chunk in model:
        name, module = type(chunk).__name__, type(chunk).__module__
        settings = getattr(chunk, "ddp_config", None)
        flags = [f for f in ("use_megatron_fsdp", "use_custom_fsdp") if getattr(settings, f, False)]
        if ".fsdp." in module or flags:
            raise UnsupportedState(
                f"Megatron-FSDP ({', '.join(flags) or name}) is not supported: it shards parameters in buffers of its "
                f"own. Train with --use-distributed-optimizer and without --use-megatron-fsdp"
            )
        if name == "TorchFullyShardedDataParallel":
            raise UnsupportedState(
                f"torch FSDP2 ({name}) is not supported: parameters are DTensors there. Train with "
                f"--use-distributed-optimizer and without --use-torch-fsdp2"
            )
        if type(chunk) is not DistributedDataParallel:
            kind = " (a kind of DistributedDataParallel)" if isinstance(chunk, DistributedDataParallel) else ""
            raise ConfigError(
                f"attach(model=...) holds {name}{kind}; every chunk must be wrapped in "
                f"megatron.core.distributed.DistributedDataParallel itself: what another class does with parameters "
                f"and gradients is not known"
            )


def _refuse_optimizer_instances(model: Sequence[DistributedDataParallel]) -> None:
    instances = max(getattr(chunk.ddp_config, "num_distributed_optimizer_instances", 1) for chunk in model)
    if instances > 1:
        raise UnsupportedState(
            f"{instances} instances of the distributed optimizer are not supported: ranks of different instances hold "
            f"equal state, and restoring them is not tested. Set --num-distributed-optimizer-instances 1"
        )


def _refuse_weight_rematerialisation(config: Any) -> None:
    sizes = {n: getattr(config, n, 1) for n in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")}
    if any(size not in (None, 1) for size in sizes.values()):
        raise UnsupportedState(
            f"generalised tensor parallelism ({', '.join(f'{n}={size}' for n, size in sizes.items())}) is not "
            f"supported: which ranks hold equal state is not tested with it. Set the number of weight shards "
            f"(--tensor-parallel-num-weight-shards) to the tensor parallel size"
        )


def _refuse_query_key_clipping(config: Any, *, log_steps: bool) -> None:
    if not getattr(config, "qk_clip", False):
        return
    if log_steps:
        raise UnsupportedState(
            "qk_clip is not supported in mode 'exact': it changes parameters after the step. Take mode 'full' with "
            "fp32 parameters, or train without --qk-clip"
        )
    if config.params_dtype is not torch.float32:
        raise UnsupportedState(
            f"qk_clip is not supported with {config.params_dtype} parameters: it clips parameters and their fp32 main "
            f"values apart, and a recovery makes the ones from the others. Train without --qk-clip"
        )


def _refuse_graphed_step(link: MegatronOptimizer) -> None:
    if getattr(link.config, "optimizer_cuda_graph", False):
        raise UnsupportedState(
            "--optimizer-cuda-graph is not supported: a step that is replayed as a graph calls no hook, so that "
            "snapshots would not know when state changes. Leave it out"
        )


def _refuse_steps_that_do_not_repeat(link: MegatronOptimizer, config: Any) -> None:
    """Mode ``exact`` repeats steps on one rank at a time, from gradients as they lie in DDP's buffers after a step."""
    inner = link.optimizer
    name = type(inner).__name__
    if not is_elementwise(inner):
        sizes = (config.tensor_model_parallel_size, config.expert_tensor_parallel_size or 1)
        mode = getattr(inner, "tp_mode", getattr(inner, "mode", None))  # in 0.19, and in 0.16
        if max(sizes) > 1 and mode != "blockwise":
            raise UnsupportedState(
                f"{name} with tensor parallel size {sizes[0]} (experts: {sizes[1]}) and muon_tp_mode="
                f"{mode!r} is not supported in mode 'exact': its step talks to other ranks, which "
                f"may replay other steps. Take --muon-tp-mode blockwise, or mode 'full'"
            )
    if getattr(inner, "weight_decay_method", None) == "l2" and any(g.get("weight_decay") for g in inner.param_groups):
        raise UnsupportedState(
            f"{name} with weight_decay_method='l2' is not supported in mode 'exact': its step adds the decay to the "
            f"gradients that are to be logged. Take decoupled weight decay, or mode 'full'"
        )


def _refuse_unknown_router(block: MoeBlock) -> None:
    router = block.module.router
    is_megatrons = type(router).__module__.startswith("megatron.core.")
    if isinstance(router, TopKRouter):
        if is_megatrons or type(router) is CapacityRouter or getattr(router, IN_BUFFERS, False):
            return
        kind = f"{type(router).__name__}, a kind of TopKRouter,"
        remedy = f"If so, say it with a class attribute {IN_BUFFERS} = True"
    else:
        kind, remedy = type(router).__name__, "Make it a subclass of TopKRouter"
    raise UnsupportedState(
        f"{block.prefix}: the router {kind} is not supported: it is not known whether all that it keeps from step to "
        f"step is in parameters and buffers. {remedy}, or take TopKRouter or CapacityRouter"
    )
