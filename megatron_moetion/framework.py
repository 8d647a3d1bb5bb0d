# SPDX-License-Identifier: Apache-2.0
"""What the runtime needs from a training framework, as protocols. ``mcore`` implements them for Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A rank's training state. Implemented in ``mcore/state.py``."""

    def inventory(self) -> Inventory:
        """Every byte of training state on this rank, as units. Addresses stay valid as long as the adapter lives."""
        ...

    def moved(self) -> str | None:
        """Which tensor is no longer where the inventory says, for a person; None while all are in place."""
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
        """Called after each optimizer step, also one that a loss scaler skipped, before its iteration is captured."""
        ...

    def state_hash(self) -> str:
        """Of all training state on this rank, host state included: equal if and only if every bit is."""
        ...

    def copy_to_model(self) -> None:
        """After a write-back into the regions: copy the optimizer's parameters into the model's. Talks to no rank."""
        ...

    def resync(self) -> None:
        """After ``copy_to_model`` on all ranks: exchange what is sharded. Collective, in training's own groups."""
        ...


class TokenSource(Protocol):
    """Tokens of a rank's experts and routers, which mode ``popularity`` needs. Implemented in ``mcore/tokens.py``."""

    def token_counters(self) -> tuple[TokenCounter, ...]:
        """Tokens processed here since the run began, for each expert of this rank's layers.

        In the same order on all ranks that share the experts, also for experts whose optimizer state is on
        another of these ranks, so that this rank has no unit of them.
        """
        ...

    def counts_tokens(self) -> bool:
        """Whether this rank's token counts belong in sums over all ranks.

        Ranks that hold parts of the same experts by tensor parallelism count the same tokens: one of them says yes.
        """
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

    def capacity_problem(self) -> str | None:
        """Why the capacity of experts cannot be raised, for a person; None if it can."""
        ...

    def recalibrate(self, lost: Mapping[str, int]) -> None:
        """After a recovery: raise the capacity of experts that lost tokens (unit name to tokens, over all ranks).

        Collective. Where there is a ``capacity_problem`` nothing is raised.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StepNote:
    """What became of an iteration's optimizer step."""

    skipped: bool = False
    """There was none, because gradients overflowed or the loop took none, and state is as it was."""
    problem: str | None = None
    """Why it cannot be replayed (there were two), for a person; None if it can."""
    check: Callable[[], str | None] = lambda: None
    """The same of gradients that are gone. Asked by any thread, when the device has done what the step enqueued."""


class StepReplayer(Protocol):
    """Optimizer steps to replay, which mode ``exact`` needs. Implemented in ``mcore/steplog.py``.

    The adapter's inventory has a region with ``Role.GRAD`` for each span of a parameter: the gradient that the step
    used, which must still be there right after it. Its host state holds the inputs of the remembered steps; its host
    unit has no room for them yet, because their number depends on the period.
    """

    @property
    def bytes_a_step(self) -> int:
        """What the host state may grow by for each step that is remembered."""
        ...

    def remember(self, steps: int) -> None:
        """From now on the host state holds the inputs of the last ``steps`` steps."""
        ...

    def note_step(self, iteration: int, *, stepped: bool) -> StepNote:
        """Enter the inputs of this iteration's optimizer step, at its end.

        ``stepped``: False where the loop says that it took none.
        """
        ...

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        """Take the inputs of recent steps from the adapter's host state."""
        ...

    def replay(self, iteration: int) -> bool:
        """Repeat that iteration's step, with the gradients that are in the ``GRAD`` regions now.

        False if it was a skipped one, and nothing changed. ``CorruptArena`` where its inputs are not known.
        """
        ...
