# SPDX-License-Identifier: Apache-2.0
"""Command-line flags: Megatron-LM's names and meanings, and ``--moetion-*`` made from ``MoetionConfig``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_moetion.config import MoetionConfig, flag_of
from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.argument_checks import Machine, check_arguments

MOETION_PREFIX = "moetion_"
LOAD_BALANCING_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")


class _Parser(argparse.ArgumentParser):
    """Raises ``ConfigError`` instead of printing usage and exiting, so that one rank can report it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(argv: Sequence[str], machine: Machine) -> argparse.Namespace:
    """Flags to a checked namespace with the derived sizes filled in.

    Raises ``ConfigError`` for unknown, missing or contradictory flags.
    """
    args = read_arguments(argv)
    check_arguments(args, machine)
    return args


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Flags as they were given; ``check_arguments`` goes on. Raises ``ConfigError`` for unknown and missing flags."""
    args = build_parser().parse_args(argv)
    check_moetion_flags(args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser with all flags, in groups."""
    parser = _Parser(
        prog="pretrain_gpt_moe.py",
        description="Train a GPT with Mixture-of-Experts layers on Megatron-Core.",
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("model"))
    _add_moe(parser.add_argument_group("mixture of experts"))
    _add_parallelism(parser.add_argument_group("parallelism"))
    _add_precision(parser.add_argument_group("precision and memory"))
    _add_training(parser.add_argument_group("training"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_data(parser.add_argument_group("data"))
    _add_output(parser.add_argument_group("logging, evaluation and checkpoints"))
    add_moetion_arguments(parser)
    return parser


def moetion_config(args: argparse.Namespace) -> MoetionConfig:
    """The settings that were given; every other field keeps its default. Raises ``ConfigError``.

    Where checkpoints on disk go, and how often, is as for Megatron-LM, unless it is said.
    """
    flags = dict(vars(args))
    if flags.get("save_retain_interval") or flags.get("dataloader_save"):
        flags.setdefault(MOETION_PREFIX + "save", "off")  # what Megatron-LM does with its own checkpoints alone
    for name in ("save", "save_interval"):
        if flags.get(name):
            flags.setdefault(MOETION_PREFIX + name, flags[name])
    names = [f.name for f in dataclasses.fields(MoetionConfig)]
    return MoetionConfig(**{n: flags[MOETION_PREFIX + n] for n in names if MOETION_PREFIX + n in flags})


def check_moetion_flags(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for settings that cannot be, and for ``--moetion-*`` without ``--moetion``."""
    if args.moetion:
        moetion_config(args)
        return
    flags = [flag_of(name) for name in vars(args) if name.startswith(MOETION_PREFIX)]
    if flags:
        raise ConfigError(f"{', '.join(flags)} given without --moetion; add --moetion, or drop the flag")


def _add_model(group: Any) -> None:
    group.add_argument("--num-layers", type=int, required=True, help="transformer layers")
    group.add_argument("--hidden-size", type=int, required=True)
    group.add_argument("--ffn-hidden-size", type=int, help="default: 4 x hidden size")
    group.add_argument("--num-attention-heads", type=int, required=True)
    group.add_argument("--kv-channels", type=int, help="default: hidden size / attention heads")
    group.add_argument("--group-query-attention", action="store_true")
    group.add_argument("--num-query-groups", type=int, default=1)
    group.add_argument("--seq-length", type=int, required=True)
    group.add_argument("--max-position-embeddings", type=int, help="default: the sequence length")
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"), default="rope")
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    group.add_argument("--swiglu", action="store_true", help="gated linear units with SiLU")
    group.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--attention-dropout", type=float, default=0.1)
    group.add_argument("--hidden-dropout", type=float, default=0.1)
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")
    group.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="default: transformer_engine where it is installed and there is a GPU",
    )


def _add_moe(group: Any) -> None:
    group.add_argument("--num-experts", type=int, help="experts of each MoE layer; without it the model is dense")
    group.add_argument("--moe-layer-freq", type=int, default=1, help="one MoE layer every N layers")
    group.add_argument("--moe-ffn-hidden-size", type=int, help="of one expert; default: --ffn-hidden-size")
    group.add_argument("--moe-shared-expert-intermediate-size", type=int)
    group.add_argument("--moe-router-topk", type=int, default=2)
    group.add_argument("--moe-router-pre-softmax", action="store_true", help="softmax before the top k are chosen")
    group.add_argument(
        "--moe-router-load-balancing-type", nargs="+", choices=LOAD_BALANCING_TYPES, default=["aux_loss"]
    )
    group.add_argument("--moe-aux-loss-coeff", type=float, nargs="+", default=[0.0])
    group.add_argument("--moe-z-loss-coeff", type=float)
    group.add_argument("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax")
    group.add_argument("--moe-router-enable-expert-bias", action="store_true")
    group.add_argument("--moe-router-bias-update-rate", type=float, default=1e-3)
    group.add_argument("--moe-expert-capacity-factor", type=float, help="without it, or negative: no token is dropped")
    group.add_argument("--moe-pad-expert-input-to-capacity", action="store_true")
    group.add_argument("--moe-token-drop-policy", choices=("probs", "position"), default="probs")
    group.add_argument("--moe-token-dispatcher-type", choices=("allgather", "alltoall", "flex"), default="allgather")
    group.add_argument("--moe-grouped-gemm", action="store_true")


def _add_parallelism(group: Any) -> None:
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, metavar="N")
    group.add_argument("--expert-model-parallel-size", type=int, default=1)
    group.add_argument("--expert-tensor-parallel-size", type=int, help="default: the tensor parallel size")
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--overlap-param-gather", action="store_true")
    group.add_argument("--distributed-timeout-minutes", type=int, default=10)
    group.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the CPU where a machine has no GPU"
    )


def _add_precision(group: Any) -> None:
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--fp16", action="store_true")
    group.add_argument(
        "--accumulate-allreduce-grads-in-fp32",
        action="store_true",
        help="on with --bf16, unless --grad-reduce-in-bf16 is given",
    )
    group.add_argument("--grad-reduce-in-bf16", action="store_true", help="reduce gradients as bf16")
    group.add_argument("--loss-scale", type=float, help="constant; without it fp16 scales dynamically")
    group.add_argument("--initial-loss-scale", type=float, default=2.0**32)
    group.add_argument("--min-loss-scale", type=float, default=1.0)
    group.add_argument("--loss-scale-window", type=float, default=1000)
    group.add_argument("--hysteresis", type=int, default=2)
    group.add_argument("--recompute-granularity", choices=("full", "selective"))
    group.add_argument("--recompute-method", choices=("uniform", "block"))
    group.add_argument("--recompute-num-layers", type=int)


def _add_training(group: Any) -> None:
    group.add_argument("--micro-batch-size", type=int, required=True)
    group.add_argument("--global-batch-size", type=int, help="default: micro batch size x data parallel size")
    group.add_argument("--train-iters", type=int, required=True)
    group.add_argument("--exit-interval", type=int, help="leave when the iteration is a multiple of this")
    group.add_argument(
        "--iterations-to-skip",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="iterations, counted from 1, whose batch is taken and left: no step, no evaluation, no checkpoint",
    )
    group.add_argument("--seed", type=int, default=1234)


def _add_optimizer(group: Any) -> None:
    group.add_argument("--lr", type=float, required=True)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument(
        "--lr-decay-style", choices=("constant", "linear", "cosine", "inverse-square-root"), default="linear"
    )
    group.add_argument("--lr-decay-iters", type=int, help="default: --train-iters")
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--lr-warmup-init", type=float, default=0.0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--adam-eps", type=float, default=1e-8)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data-path",
        nargs="+",
        help="indexed datasets: a prefix, or weight and prefix in turn; "
        "without it, and without --mock-data: Python's standard library, byte by byte",
    )
    group.add_argument("--split", default="969,30,1", help="train,valid,test weights for --data-path")
    group.add_argument("--data-cache-path", help="folder for the indices of --data-path")
    group.add_argument("--mock-data", action="store_true", help="synthetic sequences")
    group.add_argument(
        "--vocab-size", type=int, default=256, help="token ids of --data-path (one end-of-document id is added)"
    )


def _add_output(group: Any) -> None:
    group.add_argument("--log-interval", type=int, default=100)
    group.add_argument("--eval-interval", type=int, default=1000)
    group.add_argument("--eval-iters", type=int, default=100, help="0: no evaluation")
    group.add_argument("--tensorboard-dir")
    group.add_argument("--metrics-path", metavar="FILE", help="append one JSON line an iteration")
    group.add_argument("--save", metavar="DIR", help="folder for torch_dist checkpoints")
    group.add_argument("--save-interval", type=int)
    group.add_argument("--load", metavar="DIR", help="folder of an earlier --save")


def add_moetion_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--moetion`` and one ``--moetion-*`` flag for each field of ``MoetionConfig``; returns the parser.

    It is an ``extra_args_provider`` of Megatron-LM, or a part of one. ``moetion_config`` reads what was parsed.
    """
    group = parser.add_argument_group("MoEtion: in-memory checkpoints")
    group.add_argument("--moetion", action="store_true", help="keep checkpoints in the cluster's memory")
    for field in dataclasses.fields(MoetionConfig):
        text = argparse.SUPPRESS if field.metadata.get("expert") else field.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            keywords["action"] = "store_true"
        else:
            keywords["type"] = type(field.default)
            keywords |= {k: v for k, v in field.metadata.items() if k in ("choices", "metavar")}
        group.add_argument(flag_of(MOETION_PREFIX + field.name), dest=MOETION_PREFIX + field.name, **keywords)
    return parser
