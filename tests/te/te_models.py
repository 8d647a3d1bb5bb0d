# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that builds models of Transformer Engine's modules, and examines what is captured of each.

Kernels do not run here: ``cpu_kernels`` stands in for the forward passes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engine

engine.pretend()

# isort: split
import cpu_kernels
import megatron_trainer
from megatron_trainer import WORLD_SIZE, Model, Trainer, _examine, _tear_down, as_modelled, join
from torch import distributed as dist
from toy_trainer import Notes

from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.pretrain.corpus import MockCorpus
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.report import Reporter
from megatron_moetion.pretrain.startup import form_groups

cpu_kernels.install()

_UNFUSED = {
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
_TE = "--transformer-impl transformer_engine --moe-grouped-gemm --use-distributed-optimizer --bf16"


def _model(flags: str, **config: Any) -> Model:
    return Model(flags=f"{_TE} {flags}", config=_UNFUSED | config)


_DP = "--expert-model-parallel-size 2"
_PP = f"{_DP} --pipeline-model-parallel-size 2"
CASES = {
    "grouped, a weight for each expert": _model(f"{_DP} --swiglu --disable-bias-linear"),
}


def main(folder: Path, environment: Mapping[str, str]) -> int:
    """Examine all cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for name, model in CASES.items():
        trainer = _build(rank, model)
        notes.write("case", name=name, **_examine(trainer, count_tokens=True))
        _tear_down()
    dist.barrier()
    return 0


def _build(rank: int, model: Model) -> Trainer:
    """Flags are checked as on a machine with a GPU."""
    args = parse_arguments(f"{megatron_trainer.MODEL} {model.flags}".split(), Machine.here(WORLD_SIZE, has_gpu=True))
    form_groups(args, Process(rank=rank, world_size=WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE))
    with as_modelled(model):
        source = MockCorpus(seq_length=args.seq_length, seed=args.seed)
        trainer = Trainer(args, source, Reporter(args, active=False, attempt=0))
    for chunk in trainer.model:
        chunk.train()
    return trainer
