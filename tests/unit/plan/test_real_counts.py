# SPDX-License-Identifier: Apache-2.0
"""Parameters by formula are those of real models of Megatron-Core, on each pipeline stage and in its optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion.plan.parallel import Parallel, loads
from megatron_moetion.plan.shape import ModelShape

SCRIPT = Path(__file__).parent / "real_models.py"
SMALL: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1000}
ROPE: dict[str, Any] = {"position_embedding_type": "rope"}
PLAIN: dict[str, Any] = {"add_bias_linear": False, "normalization": "RMSNorm", "swiglu": True, **ROPE}
MOE: dict[str, Any] = {"num_experts": 8, "moe_ffn_hidden_size": 96}
GQA: dict[str, Any] = {"group_query_attention": True, "num_query_groups": 2}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 20, "qk_layernorm": True,
}  # fmt: skip
SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": 48}
PARALLEL: dict[str, Any] = {"world_size": 16, "use_distributed_optimizer": True}


def case(shape: dict[str, Any], **parallel: Any) -> dict[str, Any]:
    return {"shape": {**SMALL, **shape}, "parallel": {**PARALLEL, **parallel}}


CASES = {
    "dense, as Megatron's defaults": case({"max_position_embeddings": 128}),
    "tied, two stages": case({"max_position_embeddings": 128}, pipeline_model_parallel_size=2),
    "grouped queries, own width of heads": case({**PLAIN, **GQA, "kv_channels": 24, "qk_layernorm": True}),
    "bias of queries alone": case({**PLAIN, "add_qkv_bias": True, "untie_embeddings_and_output_weights": True}),
    "tensor parallel": case({**PLAIN, **GQA, "ffn_hidden_size": 160}, tensor_model_parallel_size=2),
    "tensor parallel with biases": case({**ROPE, "swiglu": True}, tensor_model_parallel_size=4),
    "experts with biases": case({**MOE, **ROPE}, expert_model_parallel_size=4),
    "experts in each second layer": case(
        {**PLAIN, **MOE, "moe_layer_freq": "2"}, expert_model_parallel_size=2, pipeline_model_parallel_size=4
    ),
    "experts, tensor and context parallel": case(
        {**PLAIN, **MOE, **GQA},
        expert_model_parallel_size=4, expert_tensor_parallel_size=1, tensor_model_parallel_size=2,
        context_parallel_size=2, pipeline_model_parallel_size=2,
    ),
    "expert tensor parallel": case(
        {**PLAIN, **MOE}, expert_model_parallel_size=2, expert_tensor_parallel_size=2, tensor_model_parallel_size=4
    ),
    "shared experts, dense layers first": case(
        {**PLAIN, **MOE, **SHARED, "moe_layer_freq": "([0]*1+[1]*3)", "untie_embeddings_and_output_weights": True},
        expert_model_parallel_size=4, pipeline_model_parallel_size=2,
    ),
    "latent attention": case({**PLAIN, **MOE, **LATENT, **SHARED}, expert_model_parallel_size=8),
    "latent attention without compressed queries": case({**PLAIN, **LATENT, "q_lora_rank": 0, "qk_layernorm": False}),
    "two chunks a stage": case(
        {**PLAIN, **MOE, "num_layers": 8, "moe_layer_freq": "([0]*3+[1]*5)"},
        pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, expert_model_parallel_size=2,
    ),
    "embedding and loss count as layers": case(
        {**PLAIN, **MOE, "num_layers": 6, "untie_embeddings_and_output_weights": True},
        pipeline_model_parallel_size=4, expert_model_parallel_size=2,
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True,
    ),
    "uneven stages": case(
        {**PLAIN, **MOE, "num_layers": 7, "moe_layer_freq": "([0]*2+[1]*5)"},
        pipeline_model_parallel_size=4, expert_model_parallel_size=2,
        decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=1,
    ),
    "multi-token prediction": case(
        {**PLAIN, **MOE, **LATENT, "mtp_num_layers": 1, "untie_embeddings_and_output_weights": True},
        pipeline_model_parallel_size=2, expert_model_parallel_size=4,
    ),
    "multi-token prediction on one stage, tied": case({**PLAIN, **MOE, "mtp_num_layers": 1}),
    "a layout": case(
        {**PLAIN, **MOE, "num_layers": 7, "untie_embeddings_and_output_weights": True},
        pipeline_model_parallel_size=4, pipeline_model_parallel_layout="Et|(tt|)*2,ttL",
    ),
    "without the distributed optimizer": case({**PLAIN, **MOE}, use_distributed_optimizer=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> dict[str, list[dict[str, int]]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(CASES.values()))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("COUNTS "))
    return dict(zip(CASES, json.loads(line.removeprefix("COUNTS ")), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_each_stage_are_those_of_the_real_model(name: str, real: dict[str, list[dict[str, int]]]) -> None:
    found = loads(ModelShape(**CASES[name]["shape"]), Parallel(**CASES[name]["parallel"]))
    assert len(found) == len(real[name])
    for load, there in zip(found, real[name], strict=True):
        counted = asdict(load)
        for what in ("dense_parameters", "expert_parameters"):
            assert counted[what] == there[what], f"stage {load.stage}: {what}"
        if there["num_experts"] >= 0:
            assert load.num_experts == there["num_experts"]
        # Shards of a buffer are equal once it is padded, by 64 elements a parameter and 128 a shard.
        assert load.dense_owned + load.expert_owned == pytest.approx(there["owned"], rel=0.01, abs=2048)
