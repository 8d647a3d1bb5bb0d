# SPDX-License-Identifier: Apache-2.0
"""Before a machine can stand by for a job, the job has to begin. Torch is imported by a child only."""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

from megatron_moetion.config import ENDPOINT, STANDBY
from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.warm.children import Errand

BEGIN_S = 600.0
"""For the job to begin."""


@dataclass(frozen=True)
class Published:
    """What a machine that stands by knows of a launch."""

    number: int
    """The newest has the largest."""
    text: str

    @property
    def token(self) -> str:
        """What its parents call it."""
        return str(json.loads(self.text)["token"])

    @property
    def environ(self) -> dict[str, str]:
        """What its launcher tells all ranks alike."""
        return {str(name): str(value) for name, value in json.loads(self.text)["environ"].items()}


def await_job(environ: MutableMapping[str, str]) -> None:
    """Where this machine stands by: wait for the job, and take its launcher's environment, as rank 0's.

    A program that chooses its device by itself calls it before it imports torch. ``ConfigError`` where the environment
    names no store, ``ChannelError`` where no job begins.
    """
    if not environ.get(STANDBY):
        return
    if not (endpoint := environ.get(ENDPOINT)):
        raise ConfigError(f"{STANDBY} is set and {ENDPOINT} is not: give it the job's rendezvous endpoint, HOST:PORT")

    def act(say: Callable[[str], None]) -> None:
        from megatron_moetion.replicate.witness import open_endpoint
        from megatron_moetion.warm.launch import await_published

        if found := await_published(open_endpoint(endpoint, timedelta(seconds=BEGIN_S)), 0, BEGIN_S):
            say(found.text)

    text = Errand(act).hear()
    if not text:
        raise ChannelError(
            f"no job has begun at {endpoint} within {BEGIN_S:.0f} s: start it with warm restarts, and with {ENDPOINT} "
            "set to this on all its machines"
        )
    environ.update(Published(0, text).environ | place(0, 0, 1))


def place(rank: int, local_rank: int, ranks_a_place: int) -> dict[str, str]:
    """What a launcher tells a rank of itself alone."""
    numbers = {"RANK": rank, "ROLE_RANK": rank, "LOCAL_RANK": local_rank, "GROUP_RANK": rank // ranks_a_place}
    return {name: str(number) for name, number in numbers.items()}
