# SPDX-License-Identifier: Apache-2.0
"""Model, optimizer and scheduler of the bundled trainer, built on ``megatron.core`` from parsed flags."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moetion.mcore.chain import links
from megatron_moetion.mcore.optimizer_state import create_state


def params_dtype(args: argparse.Namespace) -> torch.dtype:
    """The dtype of model parameters and of activations between pipeline stages."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def padded_vocab_size(vocab_size: int, args: argparse.Namespace) -> int:
    """The next multiple of ``--make-vocab-size-divisible-by`` times the tensor parallel size."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return int(-(-vocab_size // multiple) * multiple)


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """Megatron-Core's model configuration. Fused kernels are on only with Transformer Engine, and where they exist."""
    fused = args.transformer_impl == "transformer_engine"
    dtype = params_dtype(args)
    fields: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "kv_channels": args.kv_channels,
        "normalization": args.normalization,
        "add_bias_linear": args.add_bias_linear,
        "gated_linear_unit": args.swiglu,
        "init_method_std": args.init_method_std,
        "attention_dropout": args.attention_dropout,
        "hidden_dropout": args.hidden_dropout,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
        "sequence_parallel": args.sequence_parallel,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "recompute_granularity": args.recompute_granularity,
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
        # The interleaved schedule sends while it computes; one direction at a time.
        "overlap_p2p_comm": args.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": args.virtual_pipeline_model_parallel_size is None,
        "variable_seq_lengths": False,
        "gradient_accumulation_fusion": False,
        # Grouped experts add their biases themselves.
        "bias_dropout_fusion": fused and not (args.moe_grouped_gemm and args.add_bias_linear),
        "bias_activation_fusion": fused and _has_fused_activation(args),
        "masked_softmax_fusion": fused,
        "persist_layer_norm": fused,
        "apply_rope_fusion": fused,
        "cuda_graph_scope": [],
    }
    if args.swiglu:
        fields["activation_func"] = torch.nn.functional.silu
    return TransformerConfig(**fields, **_moe_fields(args))


def _has_fused_activation(args: argparse.Namespace) -> bool:
    """GELU has a kernel with a bias only; for experts, which weigh tokens, there is one of SwiGLU without a bias."""
    if args.num_experts is None:
        return bool(args.swiglu or args.add_bias_linear)
    return bool(args.swiglu and not args.add_bias_linear)


def _moe_fields(args: argparse.Namespace) -> dict[str, Any]:
    if args.num_experts is None:
        return {}
    kinds, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    single = len(kinds) == 1
    return {
        "num_moe_experts": args.num_experts,
        "moe_layer_freq": args.moe_layer_freq,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
        "moe_router_topk": args.moe_router_topk,
        "moe_router_pre_softmax": args.moe_router_pre_softmax,
        "moe_router_load_balancing_type": kinds[0] if single else kinds,
        "moe_aux_loss_coeff": coefficients[0] if single else coefficients,
        "moe_z_loss_coeff": args.moe_z_loss_coeff,
        "moe_router_score_function": args.moe_router_score_function,
        "moe_router_enable_expert_bias": args.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": args.moe_router_bias_update_rate,
        "moe_expert_capacity_factor": args.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": args.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": args.moe_token_drop_policy,
        "moe_token_dispatcher_type": args.moe_token_dispatcher_type,
        "moe_grouped_gemm": args.moe_grouped_gemm,
    }


def build_model(args: argparse.Namespace, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks, one a virtual pipeline stage, each wrapped for data parallelism.

    Wires the configuration's gradient hooks to the chunks; ``grad_scale_func`` waits for the optimizer.
    """
    config = transformer_config(args)
    stages: list[int | None] = [None]
    if args.virtual_pipeline_model_parallel_size is not None:
        stages = list(range(args.virtual_pipeline_model_parallel_size))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=args.overlap_grad_reduce,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
        align_param_gather=args.overlap_param_gather and len(stages) > 1,
        # With a loss scaler an overflow is an ordinary event: the step is skipped. With checkpoints in memory the loop
        # looks itself, after the step: a process that ended here could not keep the state before from being recovered.
        check_for_nan_in_grad=not (args.fp16 or args.moetion),
    )
    chunks = []
    for index, stage in enumerate(stages):
        module = build_chunk(args, config, padded_vocab_size(vocab_size, args), stage)
        module.cuda(torch.cuda.current_device())
        if args.bf16 or args.fp16:
            module = Float16Module(config, module)
        chunks.append(DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0))
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        single = len(chunks) == 1
        config.no_sync_func = chunks[0].no_sync if single else [c.no_sync for c in chunks]
        if not single:
            config.grad_sync_func = [c.start_grad_sync for c in chunks]
        if args.overlap_param_gather and not single:
            config.param_sync_func = [c.start_param_sync for c in chunks]
    return chunks


def build_chunk(
    args: argparse.Namespace, config: TransformerConfig, vocab_size: int, stage: int | None
) -> torch.nn.Module:
    """One chunk of the model, not wrapped yet. ``stage`` is its virtual pipeline stage, None without these."""
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        vp_stage=stage,
    )
    if args.moetion and args.moe_expert_capacity_factor is not None:
        from megatron_moetion.mcore.router import use_capacity_router

        use_capacity_router(spec)
    model: torch.nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=stage,
    )
    return model


def build_optimizer(
    args: argparse.Namespace, model: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's optimizer over all chunks and the scheduler of its learning rate and weight decay."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            bf16=args.bf16,
            fp16=args.fp16,
            params_dtype=params_dtype(args),
            loss_scale=args.loss_scale,
            initial_loss_scale=args.initial_loss_scale,
            min_loss_scale=args.min_loss_scale,
            loss_scale_window=args.loss_scale_window,
            hysteresis=args.hysteresis,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
            clip_grad=args.clip_grad,
        ),
        model,
    )
    # With fp16 many steps may be skipped before the first one would create the state; a checkpoint needs it.
    for link in links(optimizer):
        create_state(link.optimizer)
    model[0].config.grad_scale_func = optimizer.scale_loss
    samples = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * samples,
        lr_decay_steps=args.lr_decay_iters * samples,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=max(args.train_iters, 1) * samples,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
