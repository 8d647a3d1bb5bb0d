# SPDX-License-Identifier: Apache-2.0
"""What is trained: a small model, by the bundled trainer or by Megatron-LM's own ``pretrain()``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RANKS_PER_HOST = 2
HOSTS = 2
HASH_EVERY = 10
"""Iterations between hashes of the whole training state."""
_SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-experts 8 --moe-router-topk 2 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer --lr 1e-2 --lr-decay-style cosine "
    "--log-interval 1 --distributed-timeout-minutes 1"
)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """``{losses}`` in ``program`` and ``flags`` is the file that gets a line for each step."""

    program: str
    flags: str
    warm: str
    """The module that its ranks are forked from."""
    field: str
    """Of a line: every bit of the loss."""


TRAINERS = {
    "bundled": Trainer(
        program="pretrain_gpt_moe.py",
        flags=f"{_SHAPE} --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16 --moe-ffn-hidden-size 64 "
        "--micro-batch-size 1 --global-batch-size 2 --attention-dropout 0.1 --hidden-dropout 0.1 "
        "--eval-interval 50 --eval-iters 1 --metrics-path {losses}",
        warm="benchmarks.soak.warm_bundled",
        field="loss_hex",
    ),
    "megatron-lm": Trainer(
        program="tests/dist/megatron_lm_on_cpu.py {losses} tests/dist/megatron_lm_gpt.py",
        flags=f"{_SHAPE} --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
        "--moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 2 "
        "--disable-bias-linear --transformer-impl local --distributed-backend gloo --no-bias-gelu-fusion "
        "--no-bias-dropout-fusion --no-masked-softmax-fusion --no-persist-layer-norm "
        "--no-gradient-accumulation-fusion --no-rope-fusion --use-cpu-initialization --tokenizer-type NullTokenizer "
        "--vocab-size 127 --mock-data --split 90,5,5 --num-workers 0 --eval-interval 1000 --eval-iters 0",
        warm="benchmarks.soak.warm_official",
        field="loss",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One execution of an iteration, as the rank that has its loss tells."""

    iteration: int
    loss: str
    time_s: float
    """When it ended, Unix time."""
    attempt: int
    """As its process counts restarts; a node that came later counts from its own start."""


def read_steps(trainer: Trainer, lines: list[str]) -> list[Step]:
    """From whole lines of the file of losses; those of validation are left out."""
    notes = [json.loads(line) for line in lines]
    return [
        Step(iteration=n["iteration"], loss=n[trainer.field], time_s=n["time"], attempt=n["attempt"])
        for n in notes
        if trainer.field in n
    ]


class Lines:
    """Whole lines that were appended to files since the last look; a line that is cut short waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[str]:
        """The lines that are new."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        return whole[0].decode(errors="replace").splitlines()
