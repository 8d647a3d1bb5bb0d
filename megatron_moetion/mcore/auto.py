# SPDX-License-Identifier: Apache-2.0
"""Mode ``auto`` around a training loop: the mode is that of the run's arenas, or is chosen after a few iterations."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.plan.choice import Choice
from megatron_moetion.run.starter import Resumed
from megatron_moetion.run.trial import MEASURED, WARM_UP, Offers, Trial

if TYPE_CHECKING:
    from megatron_moetion.mcore.attach import Attached
    from megatron_moetion.replicate.fabric import SocketFabric
    from megatron_moetion.schedule.scheduler import Scheduler
    from megatron_moetion.select.book import ExpertState
    from megatron_moetion.session import Session

_logger = logging.getLogger("megatron_moetion")


class AutoAttached:
    """As ``Attached``, whose mode is chosen while the first iterations train without snapshots.

    Nothing is lost meanwhile that a run without checkpoints would not lose: a fault before the choice begins anew, or
    from the checkpoint on disk. A run that is restarted, and one that is known to have had a state to lose, chooses at
    once, by memory alone.
    """

    def __init__(
        self,
        *,
        config: MoetionConfig,
        fabric: SocketFabric,
        offers: Offers,
        trial: Trial,
        choose: Callable[[Trial], Choice],
        attach: Callable[[MoetionConfig], Attached],
        is_first: bool,
        undo: ExitStack,
    ) -> None:
        """Takes over ``fabric``, which ``attach`` takes from it. ``is_first``: whether there is nothing to lose yet."""
        self._config = config
        self._fabric = fabric
        self._offers = offers
        self._trial = trial
        self._choose = choose
        self._attach = attach
        self._is_first = is_first
        self._attached: Attached | None = None
        self._iteration = -1
        self._is_open = True
        undo.callback(self._let_go)
        atexit.register(self.abandon)
        undo.callback(atexit.unregister, self.abandon)
        self._undo = undo.pop_all()

    def start(
        self,
        load_persistent: Callable[[], int | None] | None = None,
        newest_persistent: Callable[[], int | None] | None = None,
    ) -> Resumed | None:
        """See ``Attached.start``. The baseline of a run's first start comes with the choice."""
        if not self._is_first:
            self._begin(-1)
            return self._chosen().start(load_persistent, newest_persistent)
        loaded = load_persistent() if load_persistent is not None else None
        self._iteration = loaded or 0
        if self._fabric.rank == 0:
            _logger.info(
                "[moetion] rank 0 iteration %d: mode auto: snapshots begin after %d iterations, which show how long "
                "one takes; a fault before costs what has been trained since this start",
                self._iteration,
                WARM_UP + MEASURED,
            )
        return None

    def on_step_end(self, iteration: int, *, healthy: bool = True, stepped: bool = True) -> None:
        """See ``Session.on_step_end``; or one iteration nearer to the choice."""
        if not self._is_open:
            raise ConfigError("the session was closed; on_step_end() cannot follow close()")
        if self._attached is not None:
            self._attached.on_step_end(iteration, healthy=healthy, stepped=stepped)
            return
        if self._iteration < 0:
            raise ConfigError("call start() before on_step_end()")
        self._iteration = iteration
        if self._trial.step_end(healthy=healthy, stepped=stepped):
            self._begin(iteration)
            self._chosen().begin_at(iteration)

    def restore_rng(self) -> None:
        """See ``Attached.restore_rng``."""
        if self._attached is not None:
            self._attached.restore_rng()

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """See ``Attached``. Empty until the mode is chosen: ask for it in each iteration."""
        return self._attached.pipeline_arguments if self._attached is not None else {}

    @property
    def session(self) -> Session:
        """See ``Attached``."""
        return self._chosen().session

    @property
    def scheduler(self) -> Scheduler:
        """See ``Attached``."""
        return self._chosen().scheduler

    def experts(self) -> tuple[ExpertState, ...]:
        """See ``Session.experts``."""
        return self._attached.experts() if self._attached is not None else ()

    def drain(self) -> None:
        """See ``Session.drain``; before the choice there is nothing to wait for."""
        if self._attached is not None:
            self._attached.drain()

    def scalars(self) -> dict[str, float]:
        """See ``Session.scalars``; empty before the choice."""
        return self._attached.scalars() if self._attached is not None else {}

    @property
    def stable_iteration(self) -> int:
        """See ``Session.stable_iteration``; -1 before the choice."""
        return self._attached.stable_iteration if self._attached is not None else -1

    @property
    def writes_checkpoints(self) -> bool:
        """See ``Session.writes_checkpoints``; False before the choice."""
        return self._attached is not None and self._attached.writes_checkpoints

    def close(self) -> None:
        """See ``Attached.close``."""
        if self._is_open and self._attached is None and self._iteration >= 0 and self._fabric.rank == 0:
            _logger.warning(
                "[moetion] rank 0 iteration %d: the run ended before mode auto had chosen: there is no snapshot",
                self._iteration,
            )
        self._is_open = False
        with self._undo:
            if self._attached is not None:
                self._attached.close()

    def abandon(self, wait_s: float = 0.0) -> bool:
        """See ``Attached.abandon``."""
        self._is_open = False
        with self._undo:
            if self._attached is not None:
                return self._attached.abandon(wait_s)
            self._undo.pop_all()
            self._fabric.abandon()
            return True

    def __enter__(self) -> AutoAttached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _chosen(self) -> Attached:
        if self._attached is None:
            raise ConfigError("mode auto has not chosen yet; there is no session before")
        return self._attached

    def _begin(self, iteration: int) -> None:
        """Choose, and attach in that mode. Collective."""
        choice = self._choose(self._trial)
        if self._fabric.rank == 0:
            left_out = "".join(f"; {mode} is left out: {why}" for mode, why in self._offers.refused.items())
            _logger.info("[moetion] rank 0 iteration %d: mode auto: %s%s", iteration, choice.line, left_out)
        self._attached = self._attach(self._config.in_mode(choice.mode, choice.period))

    def _let_go(self) -> None:
        """Close the fabric, unless a run has taken it over."""
        if self._attached is None:
            self._fabric.close()
