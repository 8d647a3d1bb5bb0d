# SPDX-License-Identifier: Apache-2.0
"""Which megatron-core this is, which ones are tested, and every name of it that a run needs.

Nothing of Megatron is imported here before a function is called, so that this can be asked of any version. Names that
only some versions have do not belong into the lists: they are looked up with ``getattr`` where they are used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from megatron_moetion.errors import UnsupportedState

TESTED = ("0.16.1", "0.19.2")

FUNCTIONS = {
    "distributed:DistributedDataParallel.start_param_sync": ("force_sync", "force_dispatch"),
    "distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.finish_param_sync": ("skip_next_bucket_dispatch",),
    "fp8_utils:get_fp8_context": (),
    "parallel_state:get_context_parallel_rank": (),
    "parallel_state:get_context_parallel_world_size": (),
    "parallel_state:get_data_parallel_group": ("with_context_parallel",),
    "parallel_state:get_data_parallel_rank": (),
    "parallel_state:get_data_parallel_world_size": (),
    "parallel_state:get_expert_data_parallel_group": (),
    "parallel_state:get_expert_model_parallel_group": (),
    "parallel_state:get_expert_model_parallel_rank": (),
    "parallel_state:get_expert_model_parallel_world_size": (),
    "parallel_state:get_expert_tensor_parallel_rank": (),
    "parallel_state:get_expert_tensor_parallel_world_size": (),
    "parallel_state:get_pipeline_model_parallel_group": (),
    "parallel_state:get_pipeline_model_parallel_rank": (),
    "parallel_state:get_pipeline_model_parallel_world_size": (),
    "parallel_state:get_tensor_model_parallel_rank": (),
    "parallel_state:get_tensor_model_parallel_world_size": (),
    "parallel_state:get_virtual_pipeline_model_parallel_world_size": (),
    "parallel_state:model_parallel_is_initialized": (),
    "optimizer.clip_grads:clip_grad_by_total_norm_fp32": ("max_norm", "total_norm"),
    "pipeline_parallel.p2p_communication:P2PCommunicator._communicate": (
        "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next", "tensor_shape", "wait_on_reqs",
    ),
    "process_groups_config:ProcessGroupCollection.use_mpu_process_groups": (),
    "transformer.moe.moe_utils:apply_router_token_dropping": (
        "router_topk", "capacity_factor", "drop_policy", "pad_to_capacity",
    ),
    "transformer.moe.moe_utils:get_capacity": ("num_tokens", "num_experts", "capacity_factor"),
    "transformer.moe.router:TopKRouter": ("config", "pg_collection"),
    "transformer.moe.router:TopKRouter.routing": ("padding_mask",),
    "transformer.moe.router:TopKRouter._apply_expert_bias": ("padding_mask",),
}  # fmt: skip
"""What is called of a module of ``megatron.core``, and the arguments that are given by name."""

ATTRIBUTES = {
    "model chunk": (
        "module", "config", "ddp_config", "bucket_groups", "expert_parallel_bucket_groups", "start_param_sync",
        "zero_grad_buffer",
    ),
    "settings of a model chunk": (
        "use_distributed_optimizer", "fp8_param_gather", "overlap_param_gather", "reuse_grad_buf_for_mxfp8_param_ag",
    ),
    "bucket group": (
        "buckets", "ddp_config", "start_grad_sync", "finish_grad_sync", "start_param_sync", "finish_param_sync",
        "param_gather_handle", "param_gather_dispatched", "grad_reduce_handle",
    ),
    "sharded bucket group": ("intra_distributed_optimizer_instance_group",),
    "bucket group without shards": ("data_parallel_group",),
    "bucket": ("param_data", "grad_data"),
    "configuration": (
        "batch_p2p_comm", "pipeline_dtype", "moe_apply_probs_on_input", "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity", "moe_token_drop_policy", "params_dtype", "tensor_model_parallel_size",
        "expert_tensor_parallel_size",
    ),
    "MoE layer": ("layer_number", "local_expert_indices", "router", "experts", "token_dispatcher"),
    "token dispatcher": ("token_dispatch", "token_combine"),
    "router": (
        "routing", "weight", "topk", "num_experts", "tp_dp_cp_group", "_apply_expert_bias",
        "_maintain_float32_expert_bias",
    ),
    "chain of optimizers": ("chained_optimizers", "get_grad_norm"),
    "layer-wise chain of optimizers": ("allgather_params",),
    "optimizer": (
        "is_stub_optimizer", "optimizer", "config", "clip_grad_norm", "get_parameters", "prepare_grads",
    ),
    "settings of an optimizer": (
        "clip_grad", "overlap_param_gather", "reuse_grad_buf_for_mxfp8_param_ag", "use_precision_aware_optimizer",
        "use_precision_aware_optimizer_no_fp8_or_ds_fp8",
    ),
    "optimizer with main parameters": (
        "grad_scaler", "_collect_main_grad_data_for_unscaling", "_copy_main_params_to_model_params",
        "_copy_model_grads_to_main_grads",
    ),
    "optimizer with a loss scaler": ("found_inf",),
    "distributed optimizer": (
        "ddp_config", "model_param_group_index_map", "model_fp32_groups", "model_float16_groups",
        "_get_model_param_range_map", "_copy_main_params_to_param_buffer",
    ),
    "optimizer with fp16 or bf16 parameters": ("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"),
    "loss scaler": ("update", "inv_scale", "state_dict", "load_state_dict"),
    "scheduler": ("num_steps", "step"),
}  # fmt: skip
"""What is read, called or replaced of objects of a run, by what the object is."""

_OPTIMIZERS = {
    "MixedPrecisionOptimizer": "optimizer with main parameters",
    "DistributedOptimizer": "distributed optimizer",
    "Float16OptimizerWithFloat16Params": "optimizer with fp16 or bf16 parameters",
}


def installed() -> str:
    """The version of the megatron-core that is imported, or would be."""
    found = getattr(sys.modules.get("megatron.core"), "__version__", None)
    if found is not None:
        return str(found).split("+")[0]  # a build adds the commit of whatever folder it lies in
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def version_note(version: str) -> str | None:
    """What to say of a megatron-core; None for one whose major and minor version are those of a tested one."""
    if _series(version) in map(_series, TESTED):
        return None
    return f"megatron-core {version} is not tested with MoEtion: {' and '.join(TESTED)} are"


def _series(version: str) -> str:
    """Major and minor version; all of it where it does not begin with them."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found is not None else version


def import_problem(error: ImportError) -> str:
    """What to say where Megatron-Core cannot be imported, or something of it."""
    if error.name is None or error.name.split(".")[0] != "megatron":
        return str(error)
    return f"{error}; this is megatron-core {installed()}, and MoEtion is tested with {' and '.join(TESTED)}"


def require_names(model: Sequence[Any], optimizer: Any, scheduler: Any) -> None:
    """Raise ``UnsupportedState`` for the first name of the lists that this Megatron-Core does not have.

    The arguments are those of ``attach``; objects are not changed.
    """
    problem = next(chain(_missing_functions(), _missing_attributes(model, optimizer, scheduler)), None)
    if problem is not None:
        raise UnsupportedState(
            f"megatron-core {installed()} is not supported: {problem}. MoEtion is tested with "
            f"{' and '.join(TESTED)}; install one of them"
        )


def _missing_functions() -> Iterator[str]:
    for path, arguments in FUNCTIONS.items():
        module, _, name = path.partition(":")
        try:
            function = attrgetter(name)(importlib.import_module(f"megatron.core.{module}"))
        except (ImportError, AttributeError):
            yield f"it has no {name} in megatron.core.{module}"
            continue
        taken = inspect.signature(function).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        unknown = [argument for argument in arguments if argument not in taken and not takes_any]
        if unknown:
            yield f"{name} of megatron.core.{module} takes no argument {unknown[0]!r}"


def _missing_attributes(model: Sequence[Any], optimizer: Any, scheduler: Any) -> Iterator[str]:
    for kind, thing in _objects(model, optimizer, scheduler):
        for name in ATTRIBUTES[kind]:
            if not hasattr(thing, name):
                yield f"the {kind} ({type(thing).__name__}) has no {name!r}"


def _objects(model: Sequence[Any], optimizer: Any, scheduler: Any) -> Iterator[tuple[str, Any]]:
    """Every object of a run that is used beyond its constructor, and what it is. Each before what is found in it."""
    for chunk in model:
        yield "model chunk", chunk
        yield "configuration", chunk.config
        yield "settings of a model chunk", chunk.ddp_config
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            yield "bucket group", group
            sharded = group.ddp_config.use_distributed_optimizer
            yield "sharded bucket group" if sharded else "bucket group without shards", group
            yield from (("bucket", bucket) for bucket in group.buckets)
        for module in chunk.modules():
            names = _class_names(module)
            if "MoELayer" in names:
                yield "MoE layer", module
                yield "token dispatcher", module.token_dispatcher
            elif "TopKRouter" in names:
                yield "router", module
    if scheduler is not None:
        yield "scheduler", scheduler
    yield from _optimizers(optimizer)


def _optimizers(optimizer: Any) -> Iterator[tuple[str, Any]]:
    names = _class_names(optimizer)
    if "ChainedOptimizer" in names:
        yield "chain of optimizers", optimizer
        if "LayerWiseDistributedOptimizer" in names:
            yield "layer-wise chain of optimizers", optimizer
        for link in optimizer.chained_optimizers:
            yield from _optimizers(link)
        return
    if "MegatronOptimizer" not in names:
        return  # ``chain`` refuses it by its class
    yield "optimizer", optimizer
    if optimizer.is_stub_optimizer:
        return
    yield "settings of an optimizer", optimizer.config
    yield from ((kind, optimizer) for name, kind in _OPTIMIZERS.items() if name in names)
    if getattr(optimizer, "grad_scaler", None) is not None:
        yield "optimizer with a loss scaler", optimizer
        yield "loss scaler", optimizer.grad_scaler


def _class_names(thing: Any) -> set[str]:
    return {cls.__name__ for cls in type(thing).__mro__}
