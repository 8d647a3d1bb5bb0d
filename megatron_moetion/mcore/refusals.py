# SPDX-License-Identifier: Apache-2.0
"""What of a model's and an optimizer's settings cannot be captured exactly, by name, before iteration 1. Pure.

Optimizers are refused by class in ``chain.py``. Field names are those of megatron-core 0.16 and 0.19; a name that a
release does not have is off there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore.chain import is_elementwise
from megatron_moetion.mcore.layout import MoeBlock
from megatron_moetion.mcore.router import CapacityRouter

IN_BUFFERS = "moetion_state_is_in_buffers"
"""An attribute by which the author of a router says so."""


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
    if getattr(config, "fp8", None):
        raise UnsupportedState("--fp8-format is not supported: quantised parameters carry scales beside their bytes")
    refuse_sharded_wrappers(model)
    _refuse_optimizer_instances(model)
    _refuse_weight_rematerialisation(config)
    _refuse_query_key_clipping(config, log_steps=log_steps)
    for link in links:
        _refuse_graphed_step(link)
        if log_steps:
            _refuse_steps_that_do_not_repeat(link, config)
            _refuse_second_norms(model, link)
    for block in blocks:
        _refuse_unknown_router(block)
    if log_steps and any(link.config.reuse_grad_buf_for_mxfp8_param_ag for link in links):
        raise UnsupportedState(
            "--reuse-grad-buf-for-mxfp8-param-ag is not supported in mode 'exact': it overwrites gradients "
            "before they are logged"
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
        if max(sizes) > 1 and link.config.muon_tp_mode != "blockwise":
            raise UnsupportedState(
                f"{name} with tensor parallel size {sizes[0]} (experts: {sizes[1]}) and muon_tp_mode="
                f"{link.config.muon_tp_mode!r} is not supported in mode 'exact': its step talks to other ranks, which "
                f"may replay other steps. Take --muon-tp-mode blockwise, or mode 'full'"
            )
    if getattr(inner, "weight_decay_method", None) == "l2" and any(g.get("weight_decay") for g in inner.param_groups):
        raise UnsupportedState(
            f"{name} with weight_decay_method='l2' is not supported in mode 'exact': its step adds the decay to the "
            f"gradients that are to be logged. Take decoupled weight decay, or mode 'full'"
        )


def _refuse_second_norms(model: Sequence[DistributedDataParallel], link: MegatronOptimizer) -> None:
    """Gradients in fp32 are clipped where they lie; of others the norm is logged, and there is room for one."""
    parameters = [p for chunk in model for p in chunk.parameters() if hasattr(p, "main_grad")]
    names = {
        p.grad_norm_group
        for p in parameters
        if p.main_grad.dtype is not torch.float32 and hasattr(p, "grad_norm_group")
    }
    if names and link.config.clip_grad > 0:
        raise UnsupportedState(
            f"gradients that are clipped by a norm of their own (mtp_detach_heads: {', '.join(sorted(names))}) are not "
            f"supported in mode 'exact' where they are reduced in less than fp32: one norm a step is logged. Leave "
            f"--grad-reduce-in-bf16 out, set --clip-grad 0, or take mode 'full'"
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
