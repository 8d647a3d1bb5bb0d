# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that builds models of Transformer Engine's modules, and examines what is captured of each.

Kernels do not run here: ``cpu_kernels`` stands in for the forward passes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine

engine.pretend()
os.environ["NVTE_GROUPED_LINEAR_SINGLE_PARAM"] = "1"  # without it Transformer Engine ignores moe_single_grouped_*
os.environ["NVTE_CUTEDSL_FUSED_GROUPED_MLP"] = "1"  # and Megatron-Core refuses it without this

# isort: split
import cpu_kernels
import megatron_exact
import megatron_trainer
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_layouts import Mixer, as_hybrid, examine, lose_everything
from megatron_trainer import WORLD_SIZE, Model, Trainer, _state, _tear_down, as_modelled, join
from torch import distributed as dist
from toy_trainer import Notes

from megatron_moetion.errors import UnsupportedState
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
_SINGLE = {"moe_single_grouped_weight": True, "use_transformer_engine_op_fuser": True}
CASES = {
    "hybrid, pp2": _model(f"{_PP} --num-layers 8 --swiglu --disable-bias-linear"),
    "a weight for each expert": _model(f"{_DP} --swiglu --disable-bias-linear"),
    "a weight and a bias for each expert, pp2": _model(_PP),
    "one weight for all experts": _model(f"{_DP} --swiglu --disable-bias-linear --normalization RMSNorm", **_SINGLE),
    "one weight and one bias for all experts, pp2": _model(f"{_PP} --swiglu", **_SINGLE, moe_single_grouped_bias=True),
    "one weight for all experts, a bias for each": _model(f"{_DP} --swiglu", **_SINGLE),
    "one expert a rank": _model("--expert-model-parallel-size 4 --swiglu --disable-bias-linear", **_SINGLE),
    "shared experts": _model(f"{_DP} --swiglu --disable-bias-linear --moe-shared-expert-intermediate-size 24"),
}
_WHOLE = CASES["one weight for all experts"]
CASES["one weight for all experts, no distributed optimizer"] = replace(
    _WHOLE, flags=_WHOLE.flags.replace("--use-distributed-optimizer", "")
)
REFUSED = {
    "frozen": replace(_WHOLE, frozen="decoder.layers.0.mlp.experts."),
    "fp32": replace(_WHOLE, flags=_WHOLE.flags.replace("--use-distributed-optimizer --bf16", "")),
}
EXACT = "one weight and one bias for all experts, pp2"
HYBRID = "M*E-|ME*E"


def hybrid_stack(config: TransformerConfig) -> ModuleSpec:
    """Megatron-Core's own list of a hybrid model's layers, with a stand-in for the mixer of Mamba layers."""
    spec = copy.deepcopy(hybrid_stack_spec)
    spec.submodules.mamba_layer.submodules.mixer = ModuleSpec(module=Mixer)
    return spec


def main(folder: Path, environment: Mapping[str, str]) -> int:
    """Examine all cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for name, model in CASES.items():
        with as_hybrid(HYBRID, hybrid_stack, TENorm) if name.startswith("hybrid") else nullcontext():
            trainer = _build(rank, model)
        notes.write("case", name=name, **examine(trainer))
        _tear_down()
    for name, model in REFUSED.items():
        notes.write("refused", name=name, message=_refusal(rank, model))
        _tear_down()
    megatron_exact._build = _build
    notes.write("exact", **lose_everything(rank, CASES[EXACT], folder / "store"))
    dist.barrier()
    return 0


def _refusal(rank: int, model: Model) -> str:
    """What is said of a model that cannot be captured exactly; empty if nothing is said."""
    try:
        _state(_build(rank, model)).close()
    except UnsupportedState as error:
        return str(error)
    return ""


def _build(rank: int, model: Model) -> Trainer:
    """Flags are checked as on a machine with a GPU."""
    args = parse_arguments(f"{megatron_trainer.MODEL} {model.flags}".split(), Machine.here(WORLD_SIZE, has_gpu=True))
    form_groups(args, Process(rank=rank, world_size=WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE))
    with as_modelled(model):
        source = MockCorpus(seq_length=args.seq_length, seed=args.seed)
        trainer = Trainer(args, source, Reporter(args, active=False, attempt=0))
    for chunk in trainer.model:
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, TEGroupedMLP):
                module._with_fused_impl = False  # it shares the parameters, and only its kernels differ
    return trainer
