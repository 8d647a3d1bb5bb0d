# SPDX-License-Identifier: Apache-2.0
"""A whole job of two ranks in one process, one a node, over queues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import Network, ToyFabric, ToyState, scheduler, together

from megatron_moetion.config import MoetionConfig
from megatron_moetion.replicate.witness import NO_WITNESS, Witness
from megatron_moetion.session import Resumed, Session


class Adapter(ToyState):
    """A toy state that knows whose it is."""

    rank = 0


class Job:
    """One attempt of a job: ranks, one a node, that train in step."""

    def __init__(
        self,
        folder: Path,
        attempt: int = 0,
        elements: int = 1500,
        witness: Witness = NO_WITNESS,
        max_restarts: int = 0,
        **settings: object,
    ) -> None:
        ranks = 2
        self.network = Network(ranks, timeout_s=5)
        self.states = [Adapter(num_experts=4, seed=r, elements=elements) for r in range(ranks)]
        for rank, state in enumerate(self.states):
            state.rank = rank
        fields = {"store": str(folder), "run_id": "job", "ranks_per_node": 1, "pack_threads": 1, "timeout_s": 5,
                  "chunk_bytes": 4096, "mode": "full", **settings}  # fmt: skip
        self.witness = witness
        self.max_restarts = max_restarts
        self.config = MoetionConfig(**fields)  # type: ignore[arg-type]
        self.sessions: list[Session] = together(*(lambda r=r: self._session(r, attempt) for r in range(ranks)))  # type: ignore[misc]
        self.iteration = 0

    def _session(self, rank: int, attempt: int) -> Session:
        ranks = len(self.states)
        return Session(
            config=self.config,
            adapter=self.states[rank],
            fabric=ToyFabric(self.network, rank, tuple(range(ranks))),
            topology="toy",
            scheduler=scheduler(),
            environment={
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": str(attempt),
                "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            },
            tokens=self.states[rank] if self.config.mode == "popularity" else None,
            witness=self.witness,
        )  # fmt: skip

    def start(
        self, load: Callable[[], int | None] | None = None, newest: Callable[[], int | None] | None = None
    ) -> list[Resumed | None]:
        found = together(*(lambda s=s: s.start(load, newest) for s in self.sessions))  # type: ignore[misc]
        self.iteration = self.sessions[0].stable_iteration
        return found

    def train(self, steps: int) -> list[bytes]:
        """The ranks' state after the last step."""
        for _ in range(steps):
            self.iteration += 1

            def step(rank: int, iteration: int = self.iteration) -> None:
                session, state = self.sessions[rank], self.states[rank]
                session.before_optimizer_step()
                state.step(iteration)
                session.on_step_end(iteration)
                pipeline = session._pipeline
                assert pipeline is not None
                pipeline.drain()  # so that what is whole does not depend on the machine's load

            together(*(lambda r=r: step(r) for r in range(len(self.sessions))))  # type: ignore[misc]
        return [s.image() for s in self.states]

    def crash(self) -> None:
        """The processes end; what they wrote stays."""
        for session in self.sessions:
            assert session._pipeline is not None
            assert session._arenas is not None
            session._pipeline.close()
            session._arenas.close()

    def drop(self, monkeypatch: pytest.MonkeyPatch, rank: int, iterations: set[int]) -> None:
        """That rank's packs are late at these iterations."""
        packer = self.sessions[rank]._packer
        pack = packer.pack
        monkeypatch.setattr(packer, "pack", lambda *a: None if self.iteration in iterations else pack(*a))
