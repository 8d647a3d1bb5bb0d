# SPDX-License-Identifier: Apache-2.0
"""What a launcher tells a process of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Process:
    """The numbers of this process, from the launcher's environment; a single process without one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Process:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``."""
        world_size = int(environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        )
