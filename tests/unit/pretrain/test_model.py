# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core takes every model that the flags allow, with and without Transformer Engine, which is stood in for."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import quickstart
import torch
from gpu_check import training
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from benchmarks import gpu_step
from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.pretrain.model import transformer_config

GPUS = Machine(world_size=4, has_gpu=True, packages=frozenset({"transformer_engine", "grouped_gemm"}))
BASE = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 --seq-length 8 --micro-batch-size 1 "
    "--train-iters 1 --lr 1e-3"
)
MOE = "--num-experts 4 --moe-ffn-hidden-size 32"
GRID = {
    "implementation": ("--transformer-impl local", "--transformer-impl transformer_engine"),
    "activation": ("", "--swiglu"),
    "bias": ("", "--disable-bias-linear"),
    "norm": ("", "--normalization RMSNorm"),
    "position": ("", "--position-embedding-type learned_absolute"),
    "precision": ("", "--bf16", "--fp16"),
    "parallel": ("", "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"),
    "heads": ("", "--group-query-attention --num-query-groups 2"),
    "experts": (
        "",
        MOE,
        f"{MOE} --expert-model-parallel-size 2 --moe-layer-freq 2",
        f"{MOE} --moe-grouped-gemm",
        f"{MOE} --moe-shared-expert-intermediate-size 32",
        f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.5 "
        "--moe-pad-expert-input-to-capacity --moe-grouped-gemm",
        f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type flex",
    ),
}


class Linear(torch.nn.Module):
    """In place of Megatron's and Transformer Engine's, one expert's or all experts' alike."""

    def __init__(self, *sizes: Any, bias: bool, skip_bias_add: bool, **settings: Any) -> None:
        super().__init__()
        inputs, outputs = [size for size in sizes if isinstance(size, int)][-2:]
        dtype = settings["config"].params_dtype
        self.weight = torch.nn.Parameter(torch.ones(outputs, inputs, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.ones(outputs, dtype=dtype)) if bias else None
        self.adds_bias = not skip_bias_add

    def forward(self, inputs: torch.Tensor, tokens_per_expert: Any = None) -> tuple[torch.Tensor, Any]:
        output = torch.nn.functional.linear(inputs, self.weight, self.bias if self.adds_bias else None)
        left = None if self.adds_bias else self.bias
        return output, left if tokens_per_expert is None or left is None else [left]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's configuration asks for Transformer Engine's presence in one place only."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *args, **kwargs: None)


def run_layers(args: Any, config: Any) -> None:
    """Build and run what the fusions of this configuration are asked of: dense layers, experts and shared experts."""
    submodules = MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    groups = SimpleNamespace(ep=None, expt_tp=None, tp=None)
    tokens = torch.ones(3, config.hidden_size, dtype=config.params_dtype)
    probabilities = torch.full((3,), 0.5)
    if args.num_experts is None or args.moe_layer_freq > 1:
        MLP(config, submodules)(tokens)
    if args.num_experts is None:
        return
    if args.moe_grouped_gemm and args.transformer_impl == "transformer_engine":
        TEGroupedMLP(1, config, submodules, groups)(tokens, torch.tensor([3]), probabilities)
    elif not args.moe_grouped_gemm:
        expert = MLP(config, submodules, is_expert=True, input_size=16, ffn_hidden_size=32)
        expert(tokens, per_token_scale=probabilities)
    if args.moe_shared_expert_intermediate_size is not None:
        SharedExpertMLP(config, submodules, gate=False, pg_collection=groups)(tokens)


@pytest.mark.filterwarnings("ignore")
def test_what_the_flags_allow_megatron_builds_and_runs(engine: None) -> None:
    """Each combination is refused with its flags, or is built and runs with the fusions that it gets."""
    allowed: set[tuple[str, str]] = set()
    ran: set[Any] = set()
    with torch.compiler.set_stance("force_eager"):
        for flags in itertools.product(*GRID.values()):
            try:
                args = parse_arguments(f"{BASE} {' '.join(flags)}".split(), GPUS)
            except ConfigError:
                continue
            config = transformer_config(args)
            layers = (
                config.bias_activation_fusion,
                config.bias_dropout_fusion,
                config.params_dtype,
                *flags[:3],
                flags[8],
            )
            if layers not in ran:
                ran.add(layers)
                run_layers(args, config)
            allowed |= {(flags[0], flag) for flag in flags[1:]}
    every = {(impl, flag) for impl in GRID["implementation"] for values in list(GRID.values())[1:] for flag in values}
    # Torch's norms do not run in sequence parallel.
    assert every - allowed == {("--transformer-impl local", GRID["parallel"][1])}


CHECKED = {
    "quickstart": ([*quickstart.MODEL_FLAGS, "--train-iters", "60"], quickstart.RANKS),
    "train": (training.MODEL_FLAGS, 1),
    **{layout.name: ([*training.MODEL_FLAGS, *layout.flags], layout.ranks) for layout in training.LAYOUTS},
    **{f"step, {name}": (f"{gpu_step.COMMON} {m.flags}".split(), 1) for name, m in gpu_step.MODELS.items()},
}
"""Every model that the scripts train on a GPU machine, and on how many ranks."""


ENGINE = "transformer_engine"
INSTALLED = [("local", ()), ("local", (ENGINE,)), ("local", ("grouped_gemm", "apex")), (ENGINE, (ENGINE,))]
"""An implementation, and what is installed beside torch."""


@pytest.mark.parametrize(("implementation", "packages"), INSTALLED)
@pytest.mark.parametrize("model", CHECKED)
def test_scripts_ask_a_gpu_machine_for_models_that_can_be_built(
    engine: None, model: str, implementation: str, packages: tuple[str, ...]
) -> None:
    flags, ranks = CHECKED[model]
    machine = Machine(world_size=ranks, has_gpu=True, packages=frozenset(packages))
    args = parse_arguments([*flags, "--transformer-impl", implementation], machine)
    with torch.compiler.set_stance("force_eager"):
        transformer_config(args)


def test_the_step_of_the_check_has_a_model_of_more_than_a_billion_parameters() -> None:
    def parameters(model: str) -> int:
        flags = f"{gpu_step.COMMON} {gpu_step.MODELS[model].flags}".split()
        args = parse_arguments(flags, Machine(world_size=1, has_gpu=True))
        experts = args.num_experts * 2 * args.hidden_size * args.moe_ffn_hidden_size
        return int(args.num_layers * (experts + 4 * args.hidden_size**2))

    assert parameters("whole") >= 10**9
    assert parameters("small") >= 10**8


def test_fusions_are_on_where_they_exist(engine: None) -> None:
    def fusions(flags: str) -> tuple[bool, bool]:
        config = transformer_config(parse_arguments(f"{BASE} {flags}".split(), GPUS))
        return config.bias_activation_fusion, config.bias_dropout_fusion

    assert fusions("") == fusions("--swiglu --disable-bias-linear") == (True, True)
    assert fusions(f"{MOE} --swiglu --disable-bias-linear --moe-grouped-gemm") == (True, True)
    assert fusions(f"{MOE} --moe-grouped-gemm") == (False, False)
    assert fusions(MOE) == fusions(f"{MOE} --swiglu") == fusions("--disable-bias-linear") == (False, True)
    assert fusions("--transformer-impl local") == (False, False)


FIRST_ROUTER_FORWARD = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
sys.modules["transformer_engine"] = None
from megatron_moetion.mcore import cpu_device
from megatron_moetion.pretrain import launch

launch.visible_gpus.__defaults__ = (Path(sys.argv[1]), Path(sys.argv[1]))
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index: "a GPU"
torch.cuda.current_device = lambda: "cpu"
from megatron_moetion.pretrain import loop

def pretrain(args, place, source):
    torch.compiler.set_stance("force_eager")
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=4,
                               use_cpu_initialization=True, moe_router_load_balancing_type="none")
    router = TopKRouter(config, SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None))
    probs, _ = router.routing(router.gating(torch.ones(3, 1, 8)))
    probs.sum().backward()
    print("routed", tuple(probs.shape), "CPU path installed:", cpu_device.is_installed())

loop.pretrain = pretrain
sys.exit(launch.run(sys.argv[2:]))
"""


def test_the_first_router_runs_on_a_gpu_without_transformer_engine(tmp_path: Any) -> None:
    """The launch of a rank with a GPU, up to the model: nothing of the CPU path may be needed for it."""
    (tmp_path / "0000:01:00.0").touch()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_ROUTER_FORWARD, str(tmp_path), *training.MODEL_FLAGS],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "routed (3, 4) CPU path installed: False" in done.stdout, done.stderr
    assert "> GPU path on" in done.stdout
