# SPDX-License-Identifier: Apache-2.0
"""What the runtime needs from a training framework, as protocols. ``mcore`` implements them for Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_moetion.units import Inventory


@dataclass(frozen=True, kw_only=True)
class TokenCounter:
    """Where one expert's token count lives: element ``position`` of an int64 ``at_once`` region."""

    expert: str
    """Name of the expert's unit."""
    unit: str
    """Name of the unit that the count is captured with."""
    tensor: str
    position: int


class StateAdapter(Protocol):
    """What the runtime needs from a training framework. Implemented in ``mcore/optimizer.py``."""

    def inventory(self) -> Inventory:
        """Every byte of training state on this rank, as units. Addresses stay valid as long as the adapter lives."""
        ...

    def token_counters(self) -> tuple[TokenCounter, ...]:
        """Tokens processed here since the run began, for each expert of this rank's layers.

        In the same order on all ranks that share the experts, also for experts whose optimizer state is on
        another of these ranks, so that this rank has no unit of them. Empty where tokens are not counted.
        """
        ...

    def moved(self) -> str:
        """Which tensor is no longer where the inventory says, for a person; empty while all are in place."""
        ...

    def counts_tokens(self) -> bool:
        """Whether this rank's token counts belong in sums over all ranks.

        Ranks that hold parts of the same experts by tensor parallelism count the same tokens: one of them says yes.
        """
        ...

    def expert_peers(self) -> tuple[int, ...]:
        """Global ranks that hold shards of the same experts as this rank, itself included."""
        ...

    def host_state(self) -> dict[str, Any]:
        """A JSON-able document of all other state; ``bytes`` values are allowed."""
        ...

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Put back what ``host_state`` returned."""
        ...

    def after_step(self) -> None:
        """Called once an iteration, after the optimizer step and before anything of it is captured."""
        ...

    def routed_tokens(self) -> Mapping[str, int]:
        """Tokens routed on this rank since the run began, dropped ones included, by the name of a layer's dense unit.

        Only layers whose routers tell.
        """
        ...

    def layer_tokens(self) -> Mapping[str, Mapping[str, float]]:
        """Tokens an iteration of late, on this rank, by the name of a layer's dense unit. Talks to no other rank.

        ``routed`` and ``processed``, to be added up over ranks; ``debt``: lost ones of the layer that are still to be
        made up for, the same on all ranks that run it. Only layers whose routers tell.
        """
        ...

    def recalibrate(self, lost: Mapping[str, int]) -> str:
        """After a recovery: raise the capacity of experts that lost tokens (unit name to tokens, over all ranks).

        Collective. Returns why capacity stays as it is, empty if it can be raised.
        """
        ...

    def state_hash(self) -> str:
        """Of all training state on this rank, host state included: equal if and only if every bit is."""
        ...

    def resync(self) -> None:
        """After a write-back into the regions: make model parameters agree with the optimizer's."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepNote:
    """What became of an iteration's optimizer step."""

    skipped: bool = False
    """There was none: gradients overflowed, and state is as it was."""
    problem: str = ""
    """Why it cannot be replayed (two steps, gradients gone), for a person; empty if it can."""


class StepReplayer(Protocol):
    """What mode ``exact`` needs beside ``StateAdapter``. Implemented in ``mcore/optimizer.py``.

    Its ``inventory`` has a region with ``Role.GRAD`` for each span of a parameter: the gradient that the step used,
    which must still be there right after it. The host unit has no room for steps yet: that depends on the period.
    """

    @property
    def bytes_a_step(self) -> int:
        """What the host state may grow by for each step that it tells of."""
        ...

    def remember(self, steps: int) -> None:
        """From now on the host state tells of the last ``steps`` ones."""
        ...

    def note_step(self, iteration: int) -> StepNote:
        """Enter what the optimizer was told in this iteration, at its end, into the host state."""
        ...

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        """Take what the optimizer was told in recent iterations from a host state."""
        ...

    def replay(self, iteration: int) -> bool:
        """Take that iteration's step once more, with the gradients that are in the ``GRAD`` regions now.

        False if it was a skipped one, and nothing changed.
        """
        ...
