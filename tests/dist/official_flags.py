# SPDX-License-Identifier: Apache-2.0
"""Flags of Megatron-LM for a small model on the CPU, with Megatron's own data."""

from __future__ import annotations

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall "
    "--micro-batch-size 1 --lr 1e-2 --lr-decay-style cosine --use-distributed-optimizer --disable-bias-linear "
    "--transformer-impl local --distributed-backend gloo --no-bias-gelu-fusion --no-bias-dropout-fusion "
    "--no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion "
    "--use-cpu-initialization --log-interval 1 --tokenizer-type NullTokenizer --vocab-size 127 --mock-data "
    "--split 90,5,5 --num-workers 0 --distributed-timeout-minutes 2"
)
STAGES = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
