# SPDX-License-Identifier: Apache-2.0
"""Published models and machines, as flags. Data only; a test holds the models to their published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MODERN: dict[str, Any] = {
    "swiglu": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
_DEEPSEEK_ATTENTION: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
    # https://mistral.ai/news/mixtral-of-experts: 46.7e9 parameters, 12.9e9 of them a token
    "mixtral-8x7b": _MODERN
    | {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "group_query_attention": True,
        "num_query_groups": 8,
        "vocab_size": 32000,
        "num_experts": 8,
        "moe_router_topk": 2,
    },
    # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1/blob/main/config.json, which has 140.6e9 parameters
    # https://mistral.ai/news/mixtral-8x22b: 39e9 of 141e9 parameters a token
    "mixtral-8x22b": _MODERN
    | {
        "num_layers": 56,
        "hidden_size": 6144,
        "ffn_hidden_size": 16384,
        "num_attention_heads": 48,
        "group_query_attention": True,
        "num_query_groups": 8,
        "vocab_size": 32000,
        "num_experts": 8,
        "moe_router_topk": 2,
    },
    # https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
    # https://arxiv.org/abs/2412.19437: 671e9 parameters, 37e9 a token, and one layer for multi-token prediction beside
    "deepseek-v3": _MODERN
    | _DEEPSEEK_ATTENTION
    | {
        "num_layers": 61,
        "hidden_size": 7168,
        "ffn_hidden_size": 18432,
        "num_attention_heads": 128,
        "vocab_size": 129280,
        "num_experts": 256,
        "moe_layer_freq": "([0]*3+[1]*58)",
        "moe_ffn_hidden_size": 2048,
        "moe_shared_expert_intermediate_size": 2048,
        "moe_router_topk": 8,
        "mtp_num_layers": 1,
    },
    # https://huggingface.co/Qwen/Qwen3-235B-A22B/blob/main/config.json
    # https://arxiv.org/abs/2505.09388: 235e9 parameters, 22e9 a token
    "qwen3-235b-a22b": _MODERN
    | {
        "num_layers": 94,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 64,
        "kv_channels": 128,
        "group_query_attention": True,
        "num_query_groups": 4,
        "qk_layernorm": True,
        "vocab_size": 151936,
        "num_experts": 128,
        "moe_ffn_hidden_size": 1536,
        "moe_router_topk": 8,
    },
    # https://huggingface.co/moonshotai/Kimi-K2-Base/blob/main/config.json
    # https://arxiv.org/abs/2507.20534: 1.04e12 parameters, 32e9 a token; the configuration has 1.026e12
    "kimi-k2": _MODERN
    | _DEEPSEEK_ATTENTION
    | {
        "num_layers": 61,
        "hidden_size": 7168,
        "ffn_hidden_size": 18432,
        "num_attention_heads": 64,
        "vocab_size": 163840,
        "num_experts": 384,
        "moe_layer_freq": "([0]*1+[1]*60)",
        "moe_ffn_hidden_size": 2048,
        "moe_shared_expert_intermediate_size": 2048,
        "moe_router_topk": 8,
    },
}
"""Fields of ``ModelShape`` by name."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node, as its data sheet has it."""

    gpus: int
    memory_gib: int
    """Host memory; half of it is the usual size of ``/dev/shm``."""
    interfaces: int
    """Of the fabric between nodes."""
    interface_gb_per_s: float
    """Of one of them, in 10^9 bytes a second and direction."""
    peak_tflops: float
    """Of one GPU, dense, in bf16."""


MACHINES: Mapping[str, Machine] = {
    # https://docs.nvidia.com/dgx/dgxa100-user-guide/ (640 GB model); A100: 312 TFLOPS
    "dgx-a100": Machine(gpus=8, memory_gib=2048, interfaces=8, interface_gb_per_s=25.0, peak_tflops=312.0),
    # https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/
    # core-components.html: eight 400 Gb/s ports, 2 TB of memory; H100 and H200 SXM: 989 TFLOPS
    "dgx-h100": Machine(gpus=8, memory_gib=2048, interfaces=8, interface_gb_per_s=50.0, peak_tflops=989.0),
    "dgx-h200": Machine(gpus=8, memory_gib=2048, interfaces=8, interface_gb_per_s=50.0, peak_tflops=989.0),
    # The same page, and the DGX B200 data sheet: 2 TB of memory unless extended, 2,250 TFLOPS
    "dgx-b200": Machine(gpus=8, memory_gib=2048, interfaces=8, interface_gb_per_s=50.0, peak_tflops=2250.0),
}
