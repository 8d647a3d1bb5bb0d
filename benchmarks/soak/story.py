# SPDX-License-Identifier: Apache-2.0
"""Which faults happen where, from a seed. Pure.

Kinds that NVIDIA's resiliency extension has too are named as there. A name with ``+SIGKILL`` is a fault beside which a
rank of the same host is killed, so that a recovery meets what the fault has left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from benchmarks.soak.trainers import HOSTS, RANKS_PER_HOST
from megatron_moetion.observe.fault import KINDS as INSIDE

IN_TRAINING = (
    *("before-select", "mid-pack", "before-commit", "mid-replication"),
    *("held-dropped", "held-received", "held-listed"),
)
IN_RECOVERY = ("survey", "fetch", "restore", "restored")
GAP = (3, 6)
"""Iterations between faults."""
APART = 16
"""Iterations that memory of two hosts is hurt apart at least: redundancy is complete again by then."""
FIRST = 6
"""No fault before this iteration, nor in so many at the end."""
HANG_TIMEOUT_S = 15
LONG_S = HANG_TIMEOUT_S + 6.0
"""Until ranks of both sides of a link have ended themselves."""

HURTS_MEMORY = {
    *("STORE_DELETED", "STORE_DELETED+SIGKILL", "BIT_FLIP+SIGKILL"),
    *("NODE_MEMORY_LOST", "HOST_LOST", "POWER_CUT"),
}
HURTS_PACKETS = {"LINK_LOSS", "LINK_DAMAGE"}
NEEDS_TESTBED = {
    *HURTS_PACKETS, "LINK_DOWN", "LINK_DOWN_LONG", "LINK_SLOW", "POWER_CUT", "STORE_FULL", "STORE_FULL+SIGKILL",
}  # fmt: skip
LASTS_S = {
    "SIGSTOP_SIGCONT": (0.2, 3.0),
    "STORE_FULL": (1.0, 3.0),
    "STORE_FULL+SIGKILL": (2.0, 6.0),
    "LINK_DOWN": (0.3, 2.5),
    "LINK_DOWN_LONG": (LONG_S, LONG_S),
    "LINK_SLOW": (1.0, 3.0),
    "LINK_LOSS": (1.0, 3.0),
    "LINK_DAMAGE": (1.0, 3.0),
}
"""Of the kinds that end by themselves: shortest and longest."""
DECK = (
    *["SIGKILL"] * 6, *["SIGKILL in recovery"] * 3, "SIGKILL of two ranks", "SIGTERM", "SIGINT", "WORKLOAD_EXC",
    "OS_ABORT", "SEGFAULT", "LOCK_GIL", "SIGSTOP", *["SIGSTOP_SIGCONT"] * 4, *["STORE_FULL"] * 2, "STORE_FULL+SIGKILL",
    *["STORE_DELETED"] * 2, "STORE_DELETED+SIGKILL", *["BIT_FLIP+SIGKILL"] * 2, "NODE_MEMORY_LOST", "AGENT_SIGKILL",
    "HOST_LOST", "POWER_CUT", *["LINK_DOWN"] * 3, "LINK_DOWN_LONG", *["LINK_SLOW"] * 3, *["LINK_LOSS"] * 3,
    *["LINK_DAMAGE"] * 3,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. ``ranks`` are hit at ``point`` of ``iteration``; where ``point`` is empty, once that has ended."""

    number: int
    kind: str
    iteration: int
    """-1: while the fault before it is recovered from."""
    ranks: tuple[int, ...]
    point: str = ""
    seconds: float = 0.0
    """How long it lasts; 0: it is done at once."""

    @property
    def host(self) -> int:
        """That is hit."""
        return self.ranks[0] // RANKS_PER_HOST

    @property
    def inside(self) -> str:
        """What the process does to itself; empty: the fault comes from outside."""
        name = self.kind.split(" ")[0].split("_SIGCONT")[0]
        return name if name in INSIDE else ""

    @property
    def in_recovery(self) -> bool:
        """Whether it hits a recovery."""
        return self.iteration < 0

    @property
    def coordinates(self) -> list[str]:
        """As ``--moetion-inject-fault`` has them, without the attempt."""
        return [f"{rank}:{self.iteration}:{self.point}:{self.inside}" for rank in self.ranks if self.inside]


def story(seed: int, iterations: int, left_out: Collection[str], deck: Sequence[str] = DECK) -> list[Fault]:
    """The faults of a run of so many iterations, in order. The deck is shuffled, and again when it is used up.

    ``left_out``: kinds that cannot be done here.
    """
    chance, cards, faults = Random(seed), list[str](), list[Fault]()
    iteration, hurt_at, hurt_host = FIRST, -APART, 0
    while iteration <= iterations - FIRST:
        if not cards:
            cards = shuffled([kind for kind in deck if kind not in left_out], chance)
        kind = cards.pop(0)
        host = chance.randrange(HOSTS)
        if kind in HURTS_MEMORY:
            if iteration - hurt_at < APART:
                host = hurt_host
            hurt_at, hurt_host = iteration, host
        faults.append(draw(len(faults), kind, iteration, host, chance))
        if cards and cards[0].endswith("in recovery"):
            continue  # that one has no iteration of its own
        iteration += chance.randint(*GAP)
    return faults


def shuffled(cards: Collection[str], chance: Random) -> list[str]:
    """In any order in which what hits a recovery comes right after what causes one."""
    first = [kind for kind in cards if not kind.endswith("in recovery")]
    chance.shuffle(first)
    later = [kind for kind in cards if kind.endswith("in recovery")]
    causes = [kind for kind in first if causes_restart(kind)]
    for kind, cause in zip(later, chance.sample(causes, min(len(later), len(causes))), strict=False):
        first.insert(first.index(cause) + 1, kind)
    return first


def causes_restart(kind: str) -> bool:
    """Whether training cannot go on after it. Others may need a restart too, or not."""
    return kind not in {
        *("SIGSTOP_SIGCONT", "STORE_FULL", "STORE_DELETED"),
        *("LINK_DOWN", "LINK_SLOW", "LINK_LOSS", "LINK_DAMAGE"),
    }


def draw(number: int, kind: str, iteration: int, host: int, chance: Random) -> Fault:
    """One fault of a kind, whose rank, point and length are left to chance."""
    rank = host * RANKS_PER_HOST + chance.randrange(RANKS_PER_HOST)
    ranks = (rank, (rank + RANKS_PER_HOST) % (HOSTS * RANKS_PER_HOST)) if kind == "SIGKILL of two ranks" else (rank,)
    in_recovery = kind.endswith("in recovery")
    fault = Fault(
        number=number,
        kind=kind,
        iteration=-1 if in_recovery else iteration,
        ranks=ranks,
        point=chance.choice(IN_RECOVERY if in_recovery else IN_TRAINING),
        seconds=round(chance.uniform(*LASTS_S.get(kind, (0.0, 0.0))), 2),
    )
    # A fault from outside comes when an iteration has ended, at no point of a rank's.
    return fault if fault.inside else replace(fault, point="")
