# SPDX-License-Identifier: Apache-2.0
"""Flags carry Megatron-LM's names; what cannot work is refused with the flags and values that clash."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import build_parser, moetion_config, parse_arguments

CPU = Machine(world_size=4, has_gpu=False)
GPU = Machine(world_size=4, has_gpu=True, packages=frozenset({"transformer_engine"}))
BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 "
    "--train-iters 10 --lr 1e-3"
)
MOE = f"{BASE} --num-experts 8 --moe-token-dispatcher-type alltoall --disable-bias-linear"


def parse(flags: str, machine: Machine = CPU) -> argparse.Namespace:
    return parse_arguments(flags.split(), machine)


def test_sizes_that_follow() -> None:
    args = parse(f"{MOE} --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 16")
    assert (args.data_parallel_size, args.num_microbatches) == (2, 4)
    assert (args.ffn_hidden_size, args.moe_ffn_hidden_size, args.max_position_embeddings) == (256, 256, 32)
    assert args.transformer_impl == "local"
    assert args.virtual_pipeline_model_parallel_size is None
    assert parse(BASE).global_batch_size == 8
    assert parse(f"{BASE} --bf16").accumulate_allreduce_grads_in_fp32


def test_virtual_pipeline_stages() -> None:
    flags = f"{BASE} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8"
    assert parse(flags).virtual_pipeline_model_parallel_size == 2


def test_transformer_engine_is_the_default_on_a_gpu() -> None:
    assert parse(MOE, GPU).transformer_impl == "transformer_engine"
    assert parse(f"{MOE} --moe-grouped-gemm", GPU).moe_grouped_gemm


def test_negative_capacity_factor_means_none() -> None:
    assert parse(f"{MOE} --moe-expert-capacity-factor -1").moe_expert_capacity_factor is None


REFUSED = [
    (
        "--pipeline-model-parallel-size 3 --num-layers 6",
        "world size 4 is not divisible",
        "pipeline-model-parallel-size 3",
    ),
    ("--pipeline-model-parallel-size 4 --num-layers 6", "--num-layers 6", "--pipeline-model-parallel-size 4"),
    (
        "--expert-model-parallel-size 4 --pipeline-model-parallel-size 2",
        "world size 4",
        "--expert-model-parallel-size 4",
    ),
    ("--expert-model-parallel-size 4 --num-experts 6", "--num-experts 6", "--expert-model-parallel-size 4"),
    ("--global-batch-size 12", "--global-batch-size 12", "data parallel size 4"),
    ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2", "GPU"),
    ("--fp16 --bf16", "--fp16", "--bf16"),
    ("--moe-router-topk 9", "--moe-router-topk 9", "--num-experts 8"),
    ("--moe-expert-capacity-factor 1.5 --moe-router-load-balancing-type sinkhorn", "capacity-factor 1.5", "sinkhorn"),
    ("--moe-expert-capacity-factor 1.5 --moe-token-dispatcher-type allgather", "capacity-factor 1.5", "allgather"),
    ("--moe-pad-expert-input-to-capacity", "--moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor"),
    ("--moe-grouped-gemm", "--moe-grouped-gemm", "transformer_engine"),
    ("--moe-token-dispatcher-type flex", "flex", "GPU"),
    ("--moe-router-enable-expert-bias", "--moe-router-enable-expert-bias", "sigmoid"),
    ("--overlap-param-gather --overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer"),
    ("--overlap-param-gather --use-distributed-optimizer", "--overlap-param-gather", "--overlap-grad-reduce"),
    ("--num-layers-per-virtual-pipeline-stage 1", "virtual-pipeline-stage 1", "--pipeline-model-parallel-size"),
    ("--recompute-granularity full", "--recompute-granularity full", "--recompute-method"),
    ("--recompute-granularity selective --recompute-num-layers 1", "--recompute-num-layers", "full"),
    ("--min-lr 1", "--min-lr 1.0", "--lr 0.001"),
    ("--lr-warmup-iters 10", "--lr-warmup-iters 10", "--lr-decay-iters 10"),
    ("--save-interval 5", "--save-interval 5", "--save"),
    ("--load /no/such/folder", "--load /no/such/folder", "no such folder"),
    ("--data-path /no/such/data", "--data-path", "/no/such/data.bin"),
    ("--mock-data --data-path x", "--mock-data", "--data-path"),
    ("--loss-scale 8", "--loss-scale 8.0", "--fp16"),
    ("--hidden-size 66", "--hidden-size 66", "--num-attention-heads 4"),
    ("--seq-length 64 --max-position-embeddings 32", "--seq-length 64", "--max-position-embeddings 32"),
    ("--hidden-dropout 1.0", "--hidden-dropout", "1.0"),
    ("--log-interval 0", "--log-interval", "0"),
    ("--no-such-flag 3", "--no-such-flag", "unrecognized"),
    ("--moe-token-drop-policy first", "--moe-token-drop-policy", "first"),
    ("--num-lay 2", "--num-lay", "unrecognized"),
]


@pytest.mark.parametrize(("flags", "first", "second"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(flags: str, first: str, second: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{MOE} {flags}")
    text = str(caught.value)
    assert first in text
    assert second in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


ENGINE, APEX = frozenset({"transformer_engine"}), frozenset({"apex"})
SPLIT = "--tensor-model-parallel-size 2 --sequence-parallel"
BIASED = MOE.replace(" --disable-bias-linear", "")
REFUSED_ON_GPUS = [
    (f"{MOE} {SPLIT} --transformer-impl local", ENGINE, "--sequence-parallel", "Apex"),
    (f"{MOE} --normalization RMSNorm", APEX, "--normalization RMSNorm", "transformer_engine"),
    (f"{BIASED} {SPLIT}", ENGINE, "--expert-tensor-parallel-size 2", "--disable-bias-linear"),
    (f"{BIASED} --moe-shared-expert-intermediate-size 64", ENGINE, "intermediate-size 64", "--disable-bias-linear"),
    (f"{MOE} --moe-grouped-gemm --bf16 --transformer-impl local", ENGINE, "--transformer-impl local", "grouped_gemm"),
    (f"{MOE} --moe-grouped-gemm", frozenset({"grouped_gemm"}), "--moe-grouped-gemm", "--bf16"),
    (f"{MOE} --moe-token-dispatcher-type flex", ENGINE, "flex", "--expert-model-parallel-size"),
    (
        f"{MOE} --moe-token-dispatcher-type flex --expert-model-parallel-size 2 --moe-expert-capacity-factor 2 "
        "--moe-pad-expert-input-to-capacity", ENGINE, "flex", "--moe-pad-expert-input-to-capacity"
    ),
    (
        f"{BASE} --num-attention-heads 12 --hidden-size 96 --group-query-attention --num-query-groups 6 "
        "--tensor-model-parallel-size 4", ENGINE, "--num-query-groups 6", "--tensor-model-parallel-size 4"
    ),
    (
        f"{MOE} --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1", ENGINE, "sinkhorn",
        "--moe-aux-loss-coeff 0.1"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "packages", "first", "second"), REFUSED_ON_GPUS)
def test_refused_although_there_are_gpus(flags: str, packages: frozenset[str], first: str, second: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(flags, Machine(world_size=4, has_gpu=True, packages=packages))
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_missing_flags_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--hidden-size.*--lr"):
        parse("--num-layers 2")


def test_expert_flags_without_experts() -> None:
    with pytest.raises(ConfigError, match="--expert-model-parallel-size 2 needs --num-experts"):
        parse(f"{BASE} --expert-model-parallel-size 2")


def test_interleaving_needs_enough_micro_batches() -> None:
    with pytest.raises(ConfigError, match="number of micro batches, 1"):
        parse(f"{BASE} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1")


def test_experts_with_biases_need_expert_parallelism() -> None:
    flags = f"{BASE} --num-experts 8"
    with pytest.raises(ConfigError, match=r"--expert-model-parallel-size 1.*--disable-bias-linear"):
        parse(flags)
    assert parse(f"{flags} --expert-model-parallel-size 2").add_bias_linear


def test_every_setting_has_a_flag_and_arrives() -> None:
    options = {o for action in build_parser()._actions for o in action.option_strings}
    for field in dataclasses.fields(MoetionConfig):
        assert "--moetion-" + field.name.replace("_", "-") in options
    args = parse(f"{MOE} --moetion --moetion-mode full --moetion-replicas 0 --moetion-allow-fresh --moetion-store /x")
    config = moetion_config(args)
    assert config == MoetionConfig(mode="full", replicas=0, allow_fresh=True, store="/x")
    assert moetion_config(parse(f"{MOE} --moetion")) == MoetionConfig()


def test_settings_without_the_switch_are_refused() -> None:
    with pytest.raises(ConfigError, match="--moetion-mode, --moetion-replicas given without --moetion"):
        parse(f"{MOE} --moetion-mode full --moetion-replicas 1")


def test_bad_settings_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="--moetion-interval is 0"):
        parse(f"{MOE} --moetion --moetion-interval 0")


def test_load_of_a_folder_that_save_will_make(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    assert parse(f"{MOE} --save {folder} --load {folder}").load == str(folder)


def test_settings_for_experts_are_accepted_and_not_shown() -> None:
    shown = build_parser().format_help()
    for flag, value in (
        ("--moetion-chunk-bytes", 8192),
        ("--moetion-in-flight-bytes", 4096),
        ("--moetion-pack-sms", 2),
    ):
        config = moetion_config(parse(f"{MOE} --moetion {flag} {value}", GPU))
        assert getattr(config, flag.removeprefix("--moetion-").replace("-", "_")) == value
        assert flag not in shown
    assert "--moetion-interval" in shown
