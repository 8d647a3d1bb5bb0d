# SPDX-License-Identifier: Apache-2.0
"""What flags demand of each other and of the machine. Every refusal names the flags and their values."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.config import flag_of
from megatron_moetion.errors import ConfigError

CAPACITY_LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the checks need to know of where the run takes place."""

    world_size: int
    has_gpu: bool
    packages: frozenset[str] = frozenset()
    """Optional packages that can be imported: ``transformer_engine``, ``grouped_gemm``, ``apex``."""

    @classmethod
    def here(cls, world_size: int, has_gpu: bool) -> Machine:
        """This machine."""
        optional = ("transformer_engine", "grouped_gemm", "apex")
        found = frozenset(name for name in optional if importlib.util.find_spec(name) is not None)
        return cls(world_size=world_size, has_gpu=has_gpu, packages=found)


def check_arguments(args: argparse.Namespace, machine: Machine) -> None:
    """Check all flags against each other and fill in the sizes that follow from them.

    Sets ``data_parallel_size``, ``num_microbatches``, ``virtual_pipeline_model_parallel_size`` and the
    defaults that depend on other flags. Raises ``ConfigError``.
    """
    _check_ranges(args)
    _fill_defaults(args, machine)
    _check_model(args)
    _check_parallelism(args, machine)
    _check_normalization(args, machine)
    _check_batch(args)
    _check_layers(args)
    if args.num_experts is None:
        _check_dense(args)
    else:
        _check_moe(args, machine)
    _check_precision(args)
    _check_optimizer(args)
    _check_recompute(args)
    _check_data_and_output(args)


def _refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_ranges(args: argparse.Namespace) -> None:
    positive: Sequence[str] = (
        "num_layers hidden_size num_attention_heads seq_length micro_batch_size tensor_model_parallel_size "
        "pipeline_model_parallel_size expert_model_parallel_size moe_router_topk moe_layer_freq vocab_size "
        "make_vocab_size_divisible_by log_interval eval_interval distributed_timeout_minutes num_query_groups"
    ).split()
    optional: Sequence[str] = (
        "ffn_hidden_size kv_channels max_position_embeddings num_experts moe_ffn_hidden_size global_batch_size "
        "num_layers_per_virtual_pipeline_stage expert_tensor_parallel_size lr_decay_iters save_interval "
        "exit_interval recompute_num_layers moe_shared_expert_intermediate_size"
    ).split()
    values = vars(args)
    for name in [*positive, *(n for n in optional if values[n] is not None)]:
        _refuse_if(values[name] < 1, f"{flag_of(name)} is {values[name]}; it must be at least 1")
    for name in "train_iters eval_iters lr_warmup_iters lr min_lr weight_decay clip_grad".split():
        _refuse_if(values[name] < 0, f"{flag_of(name)} is {values[name]}; it must not be negative")
    for name in ("attention_dropout", "hidden_dropout"):
        _refuse_if(not 0 <= values[name] < 1, f"{flag_of(name)} is {values[name]}; it must be in [0, 1)")


def _fill_defaults(args: argparse.Namespace, machine: Machine) -> None:
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    args.lr_decay_iters = args.lr_decay_iters or max(args.train_iters, 1)
    if args.moe_expert_capacity_factor is not None and args.moe_expert_capacity_factor < 0:
        args.moe_expert_capacity_factor = None
    can_use_engine = machine.has_gpu and "transformer_engine" in machine.packages
    if args.transformer_impl is None:
        args.transformer_impl = "transformer_engine" if can_use_engine else "local"
    _refuse_if(
        args.transformer_impl == "transformer_engine" and not can_use_engine,
        "--transformer-impl transformer_engine needs a GPU and the package transformer_engine; use local",
    )


def _check_model(args: argparse.Namespace) -> None:
    if args.kv_channels is None:
        _refuse_if(
            bool(args.hidden_size % args.num_attention_heads),
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {args.num_attention_heads}",
        )
    _refuse_if(
        args.seq_length > args.max_position_embeddings,
        f"--seq-length {args.seq_length} is longer than --max-position-embeddings {args.max_position_embeddings}",
    )
    _refuse_if(
        args.group_query_attention and bool(args.num_attention_heads % args.num_query_groups),
        f"--num-attention-heads {args.num_attention_heads} is not divisible by "
        f"--num-query-groups {args.num_query_groups}",
    )


def _check_parallelism(args: argparse.Namespace, machine: Machine) -> None:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    expert, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    _refuse_if(
        not machine.has_gpu and max(tensor, expert_tensor) > 1,
        f"--tensor-model-parallel-size {tensor} (--expert-tensor-parallel-size {expert_tensor}) needs a GPU: with it "
        "MoE layers need sequence parallelism, which the normalisation that runs on a CPU does not support; "
        "use 1, and pipeline or expert parallelism instead",
    )
    _refuse_if(
        bool(machine.world_size % (tensor * pipeline)),
        f"world size {machine.world_size} is not divisible by --tensor-model-parallel-size {tensor} x "
        f"--pipeline-model-parallel-size {pipeline}",
    )
    _refuse_if(
        bool(machine.world_size % (expert_tensor * expert * pipeline)),
        f"world size {machine.world_size} is not divisible by --expert-tensor-parallel-size {expert_tensor} x "
        f"--expert-model-parallel-size {expert} x --pipeline-model-parallel-size {pipeline}",
    )
    _refuse_if(
        bool(args.num_attention_heads % tensor),
        f"--num-attention-heads {args.num_attention_heads} is not divisible by --tensor-model-parallel-size {tensor}",
    )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    _refuse_if(
        bool(groups % tensor) and bool(tensor % groups),
        f"--num-query-groups {groups} is neither a multiple nor a divisor of --tensor-model-parallel-size {tensor}",
    )
    _refuse_if(
        args.sequence_parallel and tensor == 1,
        "--sequence-parallel splits over the tensor parallel group, but --tensor-model-parallel-size is 1",
    )
    args.data_parallel_size = machine.world_size // (tensor * pipeline)


def _check_normalization(args: argparse.Namespace, machine: Machine) -> None:
    """Without Transformer Engine, Megatron-Core takes Apex's LayerNorm where it is installed, else torch's norms."""
    if args.transformer_impl == "transformer_engine":
        return
    apex = "apex" in machine.packages
    _refuse_if(
        apex and args.normalization == "RMSNorm",
        "--normalization RMSNorm with --transformer-impl local: Apex is installed, and Megatron-Core then takes its "
        "LayerNorm for the last norm; use LayerNorm, or --transformer-impl transformer_engine",
    )
    _refuse_if(
        args.sequence_parallel and not apex,
        "--sequence-parallel with --transformer-impl local: torch's normalisation does not support it; "
        "install Apex, or use --transformer-impl transformer_engine",
    )


def _check_batch(args: argparse.Namespace) -> None:
    micro, replicas = args.micro_batch_size, args.data_parallel_size
    args.global_batch_size = args.global_batch_size or micro * replicas
    _refuse_if(
        bool(args.global_batch_size % (micro * replicas)),
        f"--global-batch-size {args.global_batch_size} is not divisible by --micro-batch-size {micro} x "
        f"data parallel size {replicas}",
    )
    args.num_microbatches = args.global_batch_size // (micro * replicas)


def _check_layers(args: argparse.Namespace) -> None:
    layers, pipeline = args.num_layers, args.pipeline_model_parallel_size
    per_virtual = args.num_layers_per_virtual_pipeline_stage
    args.virtual_pipeline_model_parallel_size = None
    _refuse_if(
        bool(layers % pipeline),
        f"--num-layers {layers} is not divisible by --pipeline-model-parallel-size {pipeline}",
    )
    if per_virtual is None:
        return
    name = f"--num-layers-per-virtual-pipeline-stage {per_virtual}"
    _refuse_if(pipeline == 1, f"{name} needs --pipeline-model-parallel-size of at least 2; it is 1")
    per_rank = layers // pipeline
    _refuse_if(
        bool(per_rank % per_virtual) or per_rank == per_virtual,
        f"{name} must split the {per_rank} layers of a pipeline rank (--num-layers {layers} / "
        f"--pipeline-model-parallel-size {pipeline}) into at least 2 equal parts",
    )
    _refuse_if(
        bool(args.num_microbatches % pipeline),
        f"{name}: the interleaved schedule needs the number of micro batches, {args.num_microbatches} "
        f"(--global-batch-size {args.global_batch_size} / (--micro-batch-size {args.micro_batch_size} x data parallel "
        f"size {args.data_parallel_size})), to be divisible by --pipeline-model-parallel-size {pipeline}",
    )
    args.virtual_pipeline_model_parallel_size = per_rank // per_virtual


def _check_dense(args: argparse.Namespace) -> None:
    _refuse_if(
        args.expert_model_parallel_size > 1,
        f"--expert-model-parallel-size {args.expert_model_parallel_size} needs --num-experts",
    )
    _refuse_if(
        args.moe_expert_capacity_factor is not None,
        f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor} needs --num-experts",
    )
    _refuse_if(args.moe_grouped_gemm, "--moe-grouped-gemm needs --num-experts")


def _check_moe(args: argparse.Namespace, machine: Machine) -> None:
    experts, parallel = args.num_experts, args.expert_model_parallel_size
    _refuse_if(
        bool(experts % parallel), f"--num-experts {experts} is not divisible by --expert-model-parallel-size {parallel}"
    )
    _refuse_if(
        args.moe_router_topk > experts, f"--moe-router-topk {args.moe_router_topk} is more than --num-experts {experts}"
    )
    _refuse_if(
        args.moe_router_topk == 1 and args.moe_router_score_function == "softmax" and not args.moe_router_pre_softmax,
        "--moe-router-topk 1 needs --moe-router-pre-softmax: softmax over one chosen expert is always 1",
    )
    _refuse_if(
        args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
        f"--tensor-model-parallel-size {args.tensor_model_parallel_size} with --num-experts needs --sequence-parallel",
    )
    _refuse_if(
        args.transformer_impl == "local"
        and args.add_bias_linear
        and max(parallel, args.expert_tensor_parallel_size) == 1,
        f"--expert-model-parallel-size {parallel} with --transformer-impl local: Megatron-Core cannot train experts "
        "with biases that are not spread over ranks; add --disable-bias-linear",
    )
    _check_expert_biases(args)
    _check_grouped_gemm(args, machine)
    _check_flex(args, machine)
    _check_routing(args)


def _check_expert_biases(args: argparse.Namespace) -> None:
    if not args.add_bias_linear:
        return
    _refuse_if(
        args.expert_tensor_parallel_size > 1,
        f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size} (default: --tensor-model-parallel-size): "
        "Megatron-Core does not split experts with biases; use 1, or add --disable-bias-linear",
    )
    _refuse_if(
        args.moe_shared_expert_intermediate_size is not None,
        f"--moe-shared-expert-intermediate-size {args.moe_shared_expert_intermediate_size}: Megatron-Core's shared "
        "experts have no biases; add --disable-bias-linear",
    )


def _check_grouped_gemm(args: argparse.Namespace, machine: Machine) -> None:
    if not args.moe_grouped_gemm:
        return
    package = "grouped_gemm" if args.transformer_impl == "local" else "transformer_engine"
    _refuse_if(
        not machine.has_gpu or package not in machine.packages,
        f"--moe-grouped-gemm with --transformer-impl {args.transformer_impl} needs a GPU and the package {package} "
        "(transformer_engine for --transformer-impl transformer_engine); drop the flag",
    )
    _refuse_if(
        args.transformer_impl == "local" and (args.add_bias_linear or not args.bf16),
        "--moe-grouped-gemm with --transformer-impl local needs --disable-bias-linear and --bf16",
    )


def _check_flex(args: argparse.Namespace, machine: Machine) -> None:
    if args.moe_token_dispatcher_type != "flex":
        return
    _refuse_if(
        not machine.has_gpu,
        "--moe-token-dispatcher-type flex needs a GPU with DeepEP or HybridEP; use alltoall or allgather",
    )
    _refuse_if(
        args.expert_model_parallel_size * args.expert_tensor_parallel_size == 1,
        "--moe-token-dispatcher-type flex needs --expert-model-parallel-size or --expert-tensor-parallel-size above 1; "
        "use alltoall or allgather",
    )
    _refuse_if(
        args.moe_pad_expert_input_to_capacity,
        "--moe-token-dispatcher-type flex does not pad: drop --moe-pad-expert-input-to-capacity, or use alltoall",
    )


def _check_routing(args: argparse.Namespace) -> None:
    kinds, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    _refuse_if(
        len(kinds) != len(coefficients) and len(kinds) > 1,
        f"--moe-router-load-balancing-type names {len(kinds)} losses, --moe-aux-loss-coeff {len(coefficients)}",
    )
    _refuse_if(
        kinds == ["sinkhorn"] and coefficients[0] != 0,
        f"--moe-aux-loss-coeff {coefficients[0]}: --moe-router-load-balancing-type sinkhorn has no auxiliary loss; "
        "drop the coefficient",
    )
    factor = args.moe_expert_capacity_factor
    if factor is not None:
        wrong = [kind for kind in kinds if kind not in CAPACITY_LOAD_BALANCING]
        _refuse_if(
            bool(wrong),
            f"--moe-expert-capacity-factor {factor} works with --moe-router-load-balancing-type "
            f"{', '.join(CAPACITY_LOAD_BALANCING)}; it is {', '.join(wrong)}",
        )
        _refuse_if(
            args.moe_token_dispatcher_type == "allgather",
            f"--moe-expert-capacity-factor {factor} works with --moe-token-dispatcher-type alltoall or flex; "
            "it is allgather",
        )
    _refuse_if(
        args.moe_pad_expert_input_to_capacity and factor is None,
        "--moe-pad-expert-input-to-capacity needs --moe-expert-capacity-factor",
    )
    _refuse_if(
        args.moe_router_enable_expert_bias and args.moe_router_score_function != "sigmoid",
        "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid; "
        f"it is {args.moe_router_score_function}",
    )


def _check_precision(args: argparse.Namespace) -> None:
    _refuse_if(args.fp16 and args.bf16, "--fp16 and --bf16 exclude each other; give one")
    _refuse_if(
        args.loss_scale is not None and not (args.fp16 or args.bf16),
        f"--loss-scale {args.loss_scale} needs --fp16 or --bf16",
    )
    if args.grad_reduce_in_bf16:
        _refuse_if(not args.bf16, "--grad-reduce-in-bf16 needs --bf16")
        _refuse_if(
            args.accumulate_allreduce_grads_in_fp32,
            "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other; give one",
        )
    elif args.bf16:
        args.accumulate_allreduce_grads_in_fp32 = True


def _check_optimizer(args: argparse.Namespace) -> None:
    _refuse_if(args.min_lr > args.lr, f"--min-lr {args.min_lr} is above --lr {args.lr}")
    _refuse_if(args.lr_warmup_init > args.lr, f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}")
    _refuse_if(
        args.lr_warmup_iters >= args.lr_decay_iters,
        f"--lr-warmup-iters {args.lr_warmup_iters} must be less than --lr-decay-iters {args.lr_decay_iters} "
        "(default: --train-iters)",
    )
    if args.overlap_param_gather:
        _refuse_if(not args.use_distributed_optimizer, "--overlap-param-gather needs --use-distributed-optimizer")
        _refuse_if(not args.overlap_grad_reduce, "--overlap-param-gather needs --overlap-grad-reduce")


def _check_recompute(args: argparse.Namespace) -> None:
    granularity, method, layers = args.recompute_granularity, args.recompute_method, args.recompute_num_layers
    if granularity == "full":
        _refuse_if(method is None, "--recompute-granularity full needs --recompute-method uniform or block")
        _refuse_if(layers is None, "--recompute-granularity full needs --recompute-num-layers")
    else:
        given = "--recompute-method" if method is not None else "--recompute-num-layers"
        _refuse_if(
            method is not None or layers is not None,
            f"{given} needs --recompute-granularity full; it is {granularity}",
        )


def _check_data_and_output(args: argparse.Namespace) -> None:
    _refuse_if(args.mock_data and args.data_path is not None, "--mock-data and --data-path exclude each other")
    if args.data_path is not None:
        prefixes = args.data_path if len(args.data_path) == 1 else args.data_path[1::2]
        _refuse_if(
            len(args.data_path) > 1 and bool(len(args.data_path) % 2),
            f"--data-path takes one prefix, or weight and prefix in turn; it was given {len(args.data_path)} values",
        )
        missing = [p + end for p in prefixes for end in (".bin", ".idx") if not Path(p + end).is_file()]
        _refuse_if(bool(missing), f"--data-path: no such file: {', '.join(missing)}")
    _refuse_if(
        args.save_interval is not None and args.save is None,
        f"--save-interval {args.save_interval} needs --save",
    )
    _refuse_if(
        args.load is not None and not Path(args.load).is_dir() and args.load != args.save,
        f"--load {args.load}: no such folder",
    )
