# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that builds models of other layers than a GPT's, and examines what is captured of each.

``HybridModel`` has a kind of layer at each place of a pattern; before megatron-core 0.19 it is ``MambaModel``. Its own
list of layers needs Transformer Engine, so attention, MLP and MoE layers are the local ones here. The mixer of a Mamba
layer needs kernels that are written for GPUs: ``Mixer`` stands in for it, inside the real ``MambaLayer``.

``GroupedMLP``, which megatron-core 0.19 no longer has, holds all local experts in two weights. The package
grouped_gemm, which it computes with, needs a GPU: ``multiply_groups`` stands in for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_exact
import torch
from megatron_trainer import WORLD_SIZE, Model, Trainer, _build, _examine, _state, _tear_down, join
from torch import distributed as dist
from toy_trainer import Notes

# isort: split
import expert_marks
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm import mamba_block
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe import experts
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_moetion.pretrain import model as model_module

try:
    from megatron.core.transformer.moe import grouped_gemm_util
except ImportError:  # megatron-core 0.19, which has no GroupedMLP either
    grouped_gemm_util = None

try:
    from megatron.core.models.hybrid import hybrid_block as blocks
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    STACK, SUBMODULES = blocks.HybridStack, blocks.HybridStackSubmodules
    PATTERN, SPEC, BOUNDARY = "hybrid_layer_pattern", "hybrid_stack_spec", "|"
except ImportError:  # megatron-core 0.16
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

    blocks = mamba_block
    STACK, SUBMODULES = blocks.MambaStack, blocks.MambaStackSubmodules
    PATTERN, SPEC, BOUNDARY = "hybrid_override_pattern", "mamba_stack_spec", ""

MIXED = "--expert-model-parallel-size 2 --disable-bias-linear --swiglu --bf16 --use-distributed-optimizer"
CASES = {
    "pp2 ep2, Mamba, attention, MLP and MoE": ("M*E-|ME*E", f"--pipeline-model-parallel-size 2 {MIXED}"),
    "ep2 dp2, a shared expert": ("*EME", f"{MIXED} --moe-shared-expert-intermediate-size 24"),
}
"""The pattern of layers, with the end of a pipeline stage, and flags."""
GROUPED = "ep2 dp2, GroupedMLP"


class Mixer(torch.nn.Module):
    """Parameters shaped like those of ``MambaMixer``, and a causal mean that decays."""

    def __init__(self, config: TransformerConfig, d_model: int, **where: Any) -> None:
        super().__init__()
        self.in_proj = torch.nn.Linear(d_model, 2 * d_model, bias=False)
        self.A_log = torch.nn.Parameter(torch.arange(1.0, d_model + 1).log())
        self.D = torch.nn.Parameter(torch.ones(d_model))
        self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor, **context: Any) -> tuple[torch.Tensor, None]:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        steps = torch.arange(x.shape[0])
        age = (steps[:, None] - steps).clamp(min=0)
        decay = torch.exp(-self.A_log.float().exp()[:, None, None] * age) * (steps[:, None] >= steps)
        mixed = torch.einsum("hts,sbh->tbh", decay, x.float()).to(x.dtype)
        return self.out_proj((mixed + self.D * x) * torch.sigmoid(gate)), None


def main(folder: Path, environment: Mapping[str, str]) -> int:
    """Examine all cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for name, (pattern, flags) in CASES.items():
        with as_hybrid(pattern):
            trainer = _build(rank, f"--num-layers {len(pattern.replace('|', ''))} {flags}")
        notes.write("case", name=name, **examine(trainer))
        _tear_down()
    pattern, flags = CASES[next(iter(CASES))]
    with as_hybrid(pattern):
        notes.write("exact", **lose_everything(rank, f"--num-layers {len(pattern) - 1} {flags}", folder / "store"))
    if hasattr(experts, "GroupedMLP"):
        with with_grouped_gemm():
            trainer = _build(rank, Model(flags=MIXED, config={"moe_grouped_gemm": True}))
            notes.write("case", name=GROUPED, **examine(trainer))
        _tear_down()
    dist.barrier()
    return 0


def examine(trainer: Trainer) -> dict[str, Any]:
    """Beside what is found in all models: tensors by unit, and whether units hold the expert that they should."""
    found = _examine(trainer, count_tokens=True)
    state = _state(trainer)
    inventory = state.inventory()
    units = {u.name: (u.layer, sorted({r.tensor for r in u.regions})) for u in inventory.units}
    marked, mislabelled = expert_marks.mislabelled(trainer.model, trainer.optimizer, inventory)
    state.close()
    return {**found, "units": units, "marked": marked, "mislabelled": mislabelled}


def lose_everything(rank: int, model: Any, store: Path) -> dict[str, Any]:
    """Mode ``exact``: the memory of processes is lost three times, that of a node once. See ``megatron_exact``."""
    megatron_exact.ITERATIONS, megatron_exact.FAULTS = 8, ((4, None), (5, 1), (6, None))
    return megatron_exact._case(rank, model, store)


@contextmanager
def with_grouped_gemm() -> Iterator[None]:
    """While it is entered, grouped_gemm seems to be installed."""
    before = grouped_gemm_util.assert_grouped_gemm_is_available, grouped_gemm_util.ops
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    grouped_gemm_util.ops = SimpleNamespace(gmm=multiply_groups)
    try:
        yield
    finally:
        grouped_gemm_util.assert_grouped_gemm_is_available, grouped_gemm_util.ops = before


def multiply_groups(x: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor, trans_b: bool) -> torch.Tensor:
    """As ``grouped_gemm.ops.gmm``: the rows of each group times the group's matrix."""
    assert not trans_b
    return torch.cat([rows @ weight for rows, weight in zip(x.split(sizes.tolist()), weights, strict=True)])


def local_stack(config: TransformerConfig) -> ModuleSpec:
    """A hybrid model's layers, each a part of the local transformer layer."""
    dense = get_gpt_layer_local_spec().submodules
    moe = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False).submodules
    no_attention = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    mamba = MambaLayerSubmodules(norm=WrappedTorchNorm, mixer=ModuleSpec(module=Mixer), mamba_bda=get_bias_dropout_add)
    layers = {
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=mamba),
        "attention_layer": ModuleSpec(module=TransformerLayer, submodules=dataclasses.replace(dense, **no_mlp)),
        "mlp_layer": ModuleSpec(module=MLPLayer, submodules=dataclasses.replace(dense, **no_attention)),
        "moe_layer": ModuleSpec(module=TransformerLayer, submodules=dataclasses.replace(moe, **no_attention)),
    }
    return ModuleSpec(module=STACK, submodules=SUBMODULES(**layers))


@contextmanager
def as_hybrid(
    pattern: str, stack: Callable[[TransformerConfig], ModuleSpec] = local_stack, norm: Any = WrappedTorchNorm
) -> Iterator[None]:
    """While it is entered, the bundled trainer builds a hybrid model; ``norm`` is the last one."""
    before = model_module.build_chunk, blocks.TENorm
    blocks.TENorm = norm

    def build_chunk(args: argparse.Namespace, config: TransformerConfig, vocab: int, stage: int | None) -> Any:
        more = {} if stage is None else {"vp_stage": stage}
        return HybridModel(
            config=config,
            vocab_size=vocab,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            **{SPEC: stack(config), PATTERN: pattern.replace("|", BOUNDARY)},
            **more,
        )

    model_module.build_chunk = build_chunk
    try:
        yield
    finally:
        model_module.build_chunk, blocks.TENorm = before
