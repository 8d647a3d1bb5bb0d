# SPDX-License-Identifier: Apache-2.0
"""What a parent knows from the launcher, and the store where parents meet."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed as dist

from megatron_moetion.config import ENDPOINT
from megatron_moetion.errors import ChannelError
from megatron_moetion.rendezvous import HOSTED, agree_on_token, has_come, open_store
from megatron_moetion.replicate.witness import open_endpoint
from megatron_moetion.warm.board import DONE, Board
from megatron_moetion.warm.children import Errand, end, first_line
from megatron_moetion.warm.waiting import Published

MEET_S = 60.0
"""For the parents of all ranks after a fault: large processes take a while to end, and a lost node never comes."""
ANSWER_S = 3.0
"""For the parents of a machine that is there to say so after a fault, before a standby takes its place."""
_CONNECT_S = 1.0
"""For a first connection that nobody answers: a second one has to be there before a machine counts as lost."""
_ANSWER_S_A_RANK = 0.0005
"""More, for a store that has so many to hear."""
_LAUNCHER = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
    HOSTED,
)  # fmt: skip
"""What a launcher tells all ranks alike."""
_LAUNCHES = "moetion/warm/launches"


STORE_TIMEOUT = timedelta(seconds=20)
"""For a store that outlives launches to answer."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a parent knows from the launcher."""

    rank: int
    world_size: int
    environ: Mapping[str, str]
    limit: int
    """Restarts, until they are the launcher's again."""
    timeout: timedelta
    """For the parents to find each other when they begin."""
    meet_s: float = MEET_S
    answer_s: float = ANSWER_S

    @classmethod
    def here(cls, limit: int, timeout: timedelta) -> Launch:
        """From this process's environment."""
        environ = dict(os.environ)
        return cls(
            rank=int(environ.get("RANK", "0")),
            world_size=int(environ.get("WORLD_SIZE", "1")),
            environ=environ,
            limit=limit,
            timeout=timeout,
        )

    def board(self, token: str, generation: int) -> Board:
        """By a connection of its own: none is open where a rank is forked."""
        return self.boards(token)(generation)

    def boards(self, token: str) -> Callable[[int], Board]:
        """Of each generation, by one connection."""
        store = open_store(self.environ, self.rank, self.world_size, self.timeout, connect_s=_CONNECT_S)
        return lambda generation: Board(store, token, generation, self.world_size, self.num_places)

    @property
    def ranks_a_place(self) -> int:
        """Of each machine."""
        return int(self.environ.get("LOCAL_WORLD_SIZE") or self.world_size)

    @property
    def num_places(self) -> int:
        """Machines."""
        return -(-self.world_size // self.ranks_a_place)

    @property
    def place(self) -> int:
        """Of this rank's machine."""
        return self.rank // self.ranks_a_place

    @property
    def patience_s(self) -> float:
        """Until a machine that has not answered is lost."""
        return self.answer_s + self.world_size * _ANSWER_S_A_RANK

    @property
    def has_store(self) -> bool:
        """Whether the launcher's store outlives ranks."""
        return self.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def restarts(self) -> int:
        """The launcher's own, so far."""
        return int(self.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)

    def environment_of(self, generation: int) -> dict[str, str]:
        """What a launcher would have said that counts all restarts: no two attempts of a job have one number."""
        each = self.limit + 1
        allowed = int(self.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
        return {
            "TORCHELASTIC_RESTART_COUNT": str(self.restarts * each + generation),
            "TORCHELASTIC_MAX_RESTARTS": str((allowed + 1) * each - 1),
        }

    def meet(self) -> str:
        """What these parents call their launch. Collective; no connection stays open."""
        store = dist.PrefixStore("moetion/warm", open_store(self.environ, self.rank, self.world_size, self.timeout))
        token = agree_on_token(store, self.rank, self.world_size, self.timeout, self.restarts)
        if self.rank % self.ranks_a_place == 0:
            self.name(token)
        return token

    def name(self, token: str) -> None:
        """This machine has its place from the launch's beginning on."""
        self._names(token).set(str(self.place), self._name)

    def rename(self, place: int, token: str) -> str:
        """This machine has that place from now on; the name of the one that had it."""
        names = self._names(token)
        before = names.get(str(place)).decode()
        names.set(str(place), self._name)
        return before

    def _names(self, token: str) -> dist.Store:
        store = open_store(self.environ, self.rank, self.world_size, self.timeout)
        return dist.PrefixStore(f"moetion/warm/{token}/name", store)

    @property
    def _name(self) -> str:
        return self.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def host_store(self) -> int:
        """A process with the launch's store; ``ChannelError`` where the port is taken."""
        errand = Errand(self._serve_store)
        if errand.hear() != DONE:
            errand.end()
            place = f"{self.environ['MASTER_ADDR']}:{self.environ['MASTER_PORT']}"
            raise ChannelError(f"no store can be opened at {place}: the reason is above")
        return errand.pid

    def _serve_store(self, say: Callable[[str], None]) -> None:
        try:
            store = open_store(self.environ, 0, self.world_size, self.timeout)
        except RuntimeError as error:  # torch raises nothing narrower for a port that is taken
            print(first_line(error), file=sys.stderr, flush=True)
            return
        say(DONE)
        while store is not None:
            signal.pause()


def close_store(pid: int, parent: int) -> None:
    """End the process that hosts it, unless this is a rank, which ends by the same way as its parent."""
    if os.getpid() == parent:
        end(pid)


def publish(launch: Launch, token: str) -> None:
    """Let machines that stand by know of this launch, in a store that outlives launches; a line where that fails."""
    said = {name: launch.environ[name] for name in _LAUNCHER if name in launch.environ}
    try:
        rendezvous = open_endpoint(launch.environ[ENDPOINT], STORE_TIMEOUT)
        number = rendezvous.add(_LAUNCHES, 1)
        rendezvous.set(f"{_LAUNCHES}/{number}", json.dumps({"token": token, "environ": said}))
    except (RuntimeError, ValueError) as error:  # torch raises nothing narrower where nobody listens
        print(f"> no machine can stand by for a lost one: {first_line(error)}", flush=True)


def await_published(rendezvous: dist.Store, after: int, limit_s: float) -> Published | None:
    """The newest launch after this one (0: any); None where there is none in time."""
    number = max(after + 1, rendezvous.add(_LAUNCHES, 0))
    key = f"{_LAUNCHES}/{number}"
    return Published(number, rendezvous.get(key).decode()) if has_come(rendezvous, key, limit_s) else None
