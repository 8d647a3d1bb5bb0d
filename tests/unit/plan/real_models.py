# SPDX-License-Identifier: Apache-2.0
"""Builds real models of Megatron-Core, one rank of each pipeline stage after the other, and counts what they hold.

A process of its own, without other ranks: torch's fake process group stands in for them. Arguments: a JSON list of
cases, each ``{"shape": flags of ModelShape, "parallel": flags of Parallel}``. Prints the counts as JSON, by case and
stage.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megatron_moetion.mcore import cpu_device

cpu_device.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_moetion.plan.parallel import Parallel, stages  # noqa: E402
from megatron_moetion.plan.shape import ModelShape  # noqa: E402

if not isinstance(multi_latent_attention.TELinear, type):  # without Transformer Engine; isinstance() needs a class
    multi_latent_attention.TELinear = type("TELinear", (torch.nn.Module,), {})


class NoScores(torch.nn.Module):
    """Instead of local attention, which cannot be built with keys and values of different widths; no parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def config_of(shape: ModelShape, parallel: Parallel) -> TransformerConfig:
    """Megatron's own configuration, from the flags as Megatron takes them."""
    gqa, moe = shape.group_query_attention, bool(shape.num_experts)
    virtual = parallel.num_virtual_stages_per_pipeline_rank or None
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size or (None if not shape.swiglu else shape.ffn),
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups if gqa else None,
        "kv_channels": shape.kv_channels or None,
        "normalization": shape.normalization,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "gated_linear_unit": shape.swiglu,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "context_parallel_size": 1,  # local attention refuses more; the groups of ranks know of it
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers or None,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers or None,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout or None,
        "pipeline_dtype": torch.float32,
        "mtp_num_layers": shape.mtp_num_layers or None,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    if parallel.pipeline_model_parallel_layout:
        fields["virtual_pipeline_model_parallel_size"] = None
    if shape.swiglu:
        fields["activation_func"] = torch.nn.functional.silu
    if moe:
        every = shape.moe_layer_freq
        fields |= {
            "num_moe_experts": shape.num_experts,
            "moe_layer_freq": int(every) if every.isdigit() else [int(has) for has in shape.has_experts],
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size or None,
            "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size or None,
            "moe_router_topk": shape.moe_router_topk,
            "moe_token_dispatcher_type": "alltoall",
        }
    if shape.multi_latent_attention:
        fields |= {
            "multi_latent_attention": True,
            "q_lora_rank": shape.q_lora_rank or None,
            "kv_lora_rank": shape.kv_lora_rank,
            "qk_head_dim": shape.qk_head_dim,
            "qk_pos_emb_head_dim": shape.qk_pos_emb_head_dim,
            "v_head_dim": shape.v_head_dim,
            "rope_type": "rope",
        }
        return MLATransformerConfig(**fields)
    return TransformerConfig(**fields)


def chunks_of(shape: ModelShape, parallel: Parallel, config: TransformerConfig) -> list[GPTModel]:
    """This rank's model chunks."""
    virtual = config.virtual_pipeline_model_parallel_size
    found = []
    for stage in range(virtual or 1):
        vp = stage if virtual else None
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp
        )
        if shape.multi_latent_attention:
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = NoScores
        mtp = None
        if shape.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp)
        found.append(
            GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=shape.padded_vocab(parallel.tensor_model_parallel_size),
                max_sequence_length=shape.max_position_embeddings or 64,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp),
                share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
                position_embedding_type=shape.position_embedding_type,
                mtp_block_spec=mtp,
                vp_stage=vp,
            )
        )
    return found


def counted(chunks: list[GPTModel], config: TransformerConfig, parallel: Parallel) -> dict[str, int]:
    """Parameters, and those that this rank's optimizer holds."""
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    experts = {id(p) for name, p in named if ".experts." in name and "shared" not in name}
    places = {name.split("local_experts.")[0] + name.split("local_experts.")[1].split(".")[0]: None
              for name, _ in named if "local_experts." in name}  # fmt: skip
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=parallel.use_distributed_optimizer)
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=parallel.use_distributed_optimizer),
        wrapped,
        use_gloo_process_groups=False,
    )
    owned = 0
    for link in getattr(optimizer, "chained_optimizers", [optimizer]):
        owned += sum(p.numel() for group in link.optimizer.param_groups for p in group["params"])
    return {
        "dense_parameters": sum(p.numel() for _, p in named if id(p) not in experts),
        "expert_parameters": sum(p.numel() for _, p in named if id(p) in experts),
        "num_experts": len(places) if len(chunks) == 1 else -1,
        "owned": owned,
    }


def counts(case: dict[str, Any]) -> list[dict[str, int]]:
    """Of the first rank of each pipeline stage."""
    shape, parallel = ModelShape(**case["shape"]), Parallel(**case["parallel"])
    found = []
    for stage in range(len(stages(shape, parallel))):
        rank = stage * (parallel.world_size // parallel.pipeline_model_parallel_size)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank or None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        config = config_of(shape, parallel)
        found.append(counted(chunks_of(shape, parallel, config), config, parallel))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    print("COUNTS " + json.dumps([counts(case) for case in json.loads(sys.argv[1])]))
