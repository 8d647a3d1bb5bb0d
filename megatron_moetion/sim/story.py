# SPDX-License-Identifier: Apache-2.0
"""A seed's story: the run and its faults, the line that repeats it, and a shorter story that fails too."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_moetion.sim.cluster import Shape
from megatron_moetion.sim.faults import Fault, draw
from megatron_moetion.sim.run import Outcome, run

RUNS_MAX = 80
"""Runs that shortening a story may take."""
_CODING_NODES_MIN = 4
"""Of the smallest group that has fragments."""
_MODES = ("full", "popularity", "exact")


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that decides a run. ``kept``: the faults that take place, by number; None: all."""

    seed: int
    ranks: int
    mode: str = "any"
    copies: str = "whole"
    """What nodes keep of each other: ``whole`` copies, ``fragments`` where there are nodes enough, or ``any``: the seed
    decides."""
    faults: int = 60
    kinds: tuple[str, ...] = ()
    """Of its faults; none named: all."""
    kept: tuple[int, ...] | None = None
    domains: int = 0
    """Failure domains that nodes are in; 0: none are known."""
    state: str = "host"
    """Where state lies: in ``host`` memory, on a ``device``, or ``any``: the seed decides."""

    @property
    def shape(self) -> Shape:
        """The run: what is not given follows from the seed."""
        chance = random.Random(self.seed ^ 0x5A9E)
        mode = chance.choice(_MODES)
        per_node = chance.choice([n for n in (1, 1, 2, 4) if self.ranks % n == 0 and self.ranks // n > 1] or [1])
        nodes = self.ranks // per_node
        schedule = chance.choice(("eager", "eager", "steady", "bubble"))
        replicas = min(chance.choice((1, 1, 1, 2)), nodes - 1)
        save_every = chance.choice((0, 0, 11))
        coding_nodes = 0
        if nodes >= _CODING_NODES_MIN and self.copies != "whole":
            chance = random.Random(self.seed ^ 0xF4A6)  # of its own: whole copies are the same story with and without
            if self.copies == "fragments" or chance.random() < 0.25:
                coding_nodes = chance.randint(_CODING_NODES_MIN, min(nodes, 6))
                replicas = chance.randint(2, coding_nodes - 2)
        return Shape(
            ranks=self.ranks,
            mode=mode if self.mode == "any" else self.mode,
            ranks_per_node=per_node,
            replicas=replicas,
            coding_nodes=coding_nodes,
            schedule=schedule,
            save_every=save_every,
            domains=self.domains,
            on_device=self.state == "device"
            or (self.state == "any" and random.Random(self.seed ^ 0xDE1).random() < 0.5),
        )

    def all_faults(self) -> list[Fault]:
        """The faults that are drawn."""
        return draw(self.seed, self.shape, self.faults, kinds=self.kinds)

    def chosen(self) -> list[Fault]:
        """Those that take place."""
        found = self.all_faults()
        return found if self.kept is None else [found[n] for n in self.kept]

    def play(self) -> Outcome:
        """What becomes of it. The process's hashes of strings do not matter, nor does the machine."""
        return run(self.seed, self.shape, self.chosen())

    @property
    def line(self) -> str:
        """What repeats it, in a shell."""
        kinds = f" --kinds {','.join(self.kinds)}" if self.kinds else ""
        domains = f" --domains {self.domains}" if self.domains else ""
        copies = "" if self.copies == "whole" else f" --copies {self.copies}"
        state = "" if self.state == "host" else f" --state {self.state}"
        kept = "" if self.kept is None else f" --keep {','.join(map(str, self.kept)) or 'none'}"
        return (
            f"moetion simulate --first {self.seed} --seeds 1 --ranks {self.ranks} --mode {self.mode} "
            f"--faults {self.faults}{state}{copies}{domains}{kinds}{kept}"
        )


def shortened(story: Story, say: Callable[[str], None] = lambda text: None) -> Story:
    """A story of as few faults as can be found, which fails too: parts are left out as long as that does no harm."""
    numbers = list(range(len(story.all_faults())) if story.kept is None else story.kept)
    runs, size = 0, max(1, len(numbers) // 2)
    while numbers and runs < RUNS_MAX:
        start, is_shorter = 0, False
        while start < len(numbers) and runs < RUNS_MAX:
            rest = [*numbers[:start], *numbers[start + size :]]
            runs += 1
            if replace(story, kept=tuple(rest)).play().problem is not None:
                numbers, is_shorter = rest, True
                say(f"{len(numbers)} faults are enough")
            else:
                start += size
        if size == 1 and not is_shorter:
            break
        size = max(1, size // 2)
    return replace(story, kept=tuple(numbers))


def pin(number: int) -> None:
    """Have this process run on one processor: its threads take turns, and handing over is cheap then."""
    able: Sequence[int] = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {able[number % len(able)]})
