# SPDX-License-Identifier: Apache-2.0
"""Expert capacity after a recovery that lost tokens. Pure; works on NumPy arrays and on torch tensors alike.

The formulas are this project's own. A layer whose experts lost tokens owes them. For a while its experts may process
more than their base capacity, so that tokens which would have been dropped are trained on instead; each of them
pays off one token of the debt. More room goes where tokens are dropped, because a stale expert is as a rule a
cold one that stays below its capacity anyway (``docs/accuracy.md`` has the measurement).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CapacityRules:
    """How far and how long capacity is raised."""

    iterations: int
    """H: after so many iterations it is back at the base."""
    max_boost: float = 2.0
    """Most that the capacity of one expert is multiplied by."""
    headroom: float = 0.25
    """Most that the capacities of a layer together grow by; bounds the memory of activations."""


def boosts(load: Any, debt: Any, passed: Any, factor: float, rules: CapacityRules) -> Any:
    """What each expert's base capacity is multiplied by, float[..., E], ``passed`` iterations after the recovery.

    ``load``: tokens routed to each expert an iteration, float[..., E]; ``debt``: tokens still to be made up
    for, float[..., E], summed over a layer's experts here. Base capacity is ``factor`` / E of all routed tokens (an
    iteration's worth: ``factor * load.sum() / E``). 1 everywhere from ``rules.iterations`` on, and in layers without
    debt.
    """
    experts = load.shape[-1]
    routed = load.sum(-1)[..., None]
    owes = debt.sum(-1)[..., None] > 0
    wanted = (load * experts / (factor * routed.clip(1, None))).clip(1.0, rules.max_boost) - 1.0
    left = 1.0 - passed / rules.iterations
    wanted = wanted * owes * (left * (left > 0))
    total = wanted.sum(-1)[..., None]
    allowed = rules.headroom * experts
    return 1.0 + wanted * (allowed / total.clip(allowed, None))


def repaid(debt: Any, beyond: Any) -> Any:
    """The debt, float[..., E], after experts processed ``beyond`` tokens more than base capacity would have admitted.

    What an expert processes first pays its own debt; the rest is taken off the layer's other debts in proportion.
    """
    own = debt - beyond.clip(0, None)
    left = own.clip(0, None)
    surplus = (left - own).sum(-1)[..., None]
    total = left.sum(-1)[..., None]
    return (left * (1.0 - surplus / total.clip(1, None))).clip(0, None)
