# SPDX-License-Identifier: Apache-2.0
"""This project, attached as ``docs/own_loop.md`` says."""

from __future__ import annotations

import shutil
import time
from typing import Any

from torch import distributed as dist

import megatron_moetion
from benchmarks._common import whole_since
from benchmarks.peers.systems import Nothing
from megatron_moetion import MoetionConfig
from megatron_moetion.config import DEFAULT_PERIOD


class Full(Nothing):
    """Mode ``full``; one session for each interval, of which the driver uses one at a time."""

    mode = "full"
    has_intervals = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._began_s = time.monotonic()
        self._sessions: dict[int, Any] = {}

    def start(self) -> int | None:
        resumed = None
        for interval in self.intervals if self.has_intervals else (1,):
            config = MoetionConfig(
                mode=self.mode, run_id=f"peers-{interval}", store=str(self.memory), interval=interval
            )
            self._sessions[interval] = megatron_moetion.attach(
                model=self.training.model,
                optimizer=self.training.optimizer,
                opt_param_scheduler=self.training.scheduler,
                config=config,
            )
            resumed = self._sessions[interval].start()
        if resumed is None:
            return None
        self.training.iteration = resumed.iteration
        return int(resumed.iteration)

    def after_step(self, iteration: int, interval: int) -> None:
        if interval in self._sessions:
            self._sessions[interval].on_step_end(iteration)

    def pipeline_arguments(self, interval: int) -> dict[str, Any]:
        session = self._sessions.get(interval)
        return {} if session is None else dict(session.pipeline_arguments)

    def waited_s(self) -> float:
        return sum(session.scalars()["moetion/waited-s"] for session in self._sessions.values())

    def drain(self) -> int:
        for session in self._sessions.values():
            session.drain()
        return sum(len(whole_since(session, self._began_s)) for session in self._sessions.values())

    def leave(self, interval: int) -> None:
        if interval in self._sessions:
            self._sessions.pop(interval).close()
            dist.barrier()  # the last thing that another rank of the host does there is over
            if self.place.local_rank == 0:
                shutil.rmtree(self.memory / f"peers-{interval}")

    def close(self) -> None:
        for session in reversed(self._sessions.values()):
            session.close()


class Exact(Full):
    """Mode ``exact``, which needs every iteration: after some that it was not told of, its chains begin anew."""

    mode = "exact"
    warming = DEFAULT_PERIOD + 4
    has_intervals = False


class Popularity(Full):
    """Mode ``popularity``."""

    mode = "popularity"
