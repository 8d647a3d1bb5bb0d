# SPDX-License-Identifier: Apache-2.0
"""What is compared with what: models, arms, faults, seeds and the margin. Fixed before the runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.02
"""Nats of validation loss. An arm is as good as a run without faults if the 95% interval of its paired difference lies
below this. About 1% of the loss that these models reach; MoC-System calls 0.1% of a loss of 4.9 no difference, over far
more tokens."""
POWER = 0.02
"""The positive control has to be worse than a run without faults by more than this at the lower end of its interval."""

TRAIN_ITERATIONS = 300
FIXED_FAULTS = (60, 120, 180, 240)
"""The work of the iteration after each of them is lost too."""
CONTROL_FAULTS = tuple(range(30, TRAIN_ITERATIONS - 10, 10))
OLD_CHECKPOINT_ITERATIONS = 50
SEEDS = (1, 2, 3, 4, 5)
VALIDATE_EVERY = 25
VALIDATION_BATCHES = 16

_BASE = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --position-embedding-type rope "
    "--ffn-hidden-size 256 --moe-ffn-hidden-size 128 --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--moe-token-dispatcher-type alltoall --moe-router-pre-softmax --micro-batch-size 16 --global-batch-size 16 "
    "--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --eval-iters 0 --use-distributed-optimizer "
    f"--train-iters {TRAIN_ITERATIONS}"
)
WEAK, STRONG = 1e-2, 1e-1
"""Coefficients of the auxiliary loss that balances experts."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to train."""

    name: str
    experts: int
    topk: int = 1
    balancing: float = WEAK
    capacity_factor: float | None = 1.25

    @property
    def flags(self) -> str:
        """For the trainer."""
        capacity = "" if self.capacity_factor is None else f" --moe-expert-capacity-factor {self.capacity_factor}"
        return (
            f"{_BASE} --num-experts {self.experts} --moe-router-topk {self.topk} "
            f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {self.balancing}{capacity}"
        )


CORE = (Model(name="E64", experts=64), Model(name="E8", experts=8))
EXTRA = (
    Model(name="E16", experts=16),
    Model(name="E32", experts=32),
    Model(name="E64-top2", experts=64, topk=2),
    Model(name="E64-balanced", experts=64, balancing=STRONG),
    Model(name="E64-dropless", experts=64, capacity_factor=None),
)
MODELS = {model.name: model for model in (*CORE, *EXTRA)}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to checkpoint, and the faults that it has to live with."""

    name: str
    flags: str | None
    """Of MoEtion; None: no checkpoints."""
    faults: tuple[int, ...] = FIXED_FAULTS
    current_moments: bool = False
    """Optimizer moments come back as they were at the fault, which no checkpoint could do: what is then left of a
    difference is due to stale weights, and no other way to restore moments can do better."""


RECALIBRATED = "--moetion-capacity-recalibration on"
"""Where experts have a capacity: it is refused for a dropless model, whose arms go without."""


def arms(model: Model, seed: int) -> tuple[Arm, ...]:
    """All arms of a model. *Small K* captures E / 32 experts a layer, half of them by popularity."""
    per_layer = max(1, model.experts // 32)
    cap = 2 * model.experts // per_layer
    small = (
        f"--moetion-experts-per-snapshot {2 * per_layer} --moetion-staleness-cap {cap} --moetion-lost-token-budget 0"
    )
    recalibrated = RECALIBRATED if model.capacity_factor is not None else ""
    drawn = random.Random(seed).sample(range(30, TRAIN_ITERATIONS - 20), len(FIXED_FAULTS))
    everywhere = (
        Arm(name="fault-free", flags=None, faults=()),
        Arm(name="recalibrated", flags=recalibrated),
        Arm(name="small-k-recalibrated", flags=f"{small} {recalibrated}"),
        Arm(name="small-k-sequential-recalibrated", flags=f"{small} --moetion-selection sequential {recalibrated}"),
    )
    if model not in CORE:
        return everywhere
    return (
        *everywhere,
        Arm(name="default", flags=""),
        Arm(name="recalibrated-random-faults", flags=recalibrated, faults=tuple(sorted(drawn))),
        Arm(name="small-k", flags=small),
        Arm(name="small-k-current-moments", flags=small, current_moments=True),
        Arm(name="small-k-recalibrated-current-moments", flags=f"{small} {recalibrated}", current_moments=True),
        Arm(
            name="control",
            flags="--moetion-experts-per-snapshot 1 --moetion-staleness-cap 10000 --moetion-lost-token-budget 0",
            faults=CONTROL_FAULTS,
        ),
        *([Arm(name="full", flags="--moetion-mode full")] if seed == SEEDS[0] else []),
    )


def jobs(names: Sequence[str] = ()) -> list[tuple[Model, int]]:
    """Every model and seed, the core grid first."""
    found = [(model, seed) for seed in SEEDS for model in CORE] + [(model, SEEDS[0]) for model in EXTRA]
    return [(m, s) for m, s in found if not names or m.name in names]
