# SPDX-License-Identifier: Apache-2.0
"""From a process that a launcher started to a connected rank: device, flags, process groups, exit code.

Nothing of torch is imported before the device is chosen.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments

GPU_FOLDER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands, from the launcher's environment; a single process without one."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Place:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``."""
        world_size = int(environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        )


def visible_gpus(environ: MutableMapping[str, str], folder: Path = GPU_FOLDER) -> int:
    """GPUs that the driver shows and ``CUDA_VISIBLE_DEVICES`` leaves."""
    present = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return min(present, sum(1 for device in chosen.split(",") if device.strip()))


def choose_device(environ: MutableMapping[str, str], place: Place, gpus: int) -> bool:
    """Whether the ranks of this node use GPUs; without one for each rank, all take the CPU path.

    Hides the GPUs from torch on the CPU path, so it must run before torch is imported.
    """
    if gpus >= place.local_world_size:
        return True
    if place.rank == 0:
        count = f"{gpus} GPU{'' if gpus == 1 else 's'}" if gpus else "no GPU"
        ranks = f"{place.local_world_size} rank{'' if place.local_world_size == 1 else 's'}"
        print(f"> {count} for {ranks}: CPU path", flush=True)
    environ["CUDA_VISIBLE_DEVICES"] = ""
    return False


def run(argv: Sequence[str]) -> int:
    """The whole program on this rank. Returns the exit code; a user's mistake is one line, not a traceback."""
    place = Place.from_environment(os.environ)
    try:
        has_gpu = choose_device(os.environ, place, visible_gpus(os.environ))
        args = parse_arguments(argv, Machine.here(place.world_size, has_gpu))

        import torch

        if has_gpu and not torch.cuda.is_available():
            has_gpu = choose_device(os.environ, place, gpus=0)
            args = parse_arguments(argv, Machine.here(place.world_size, has_gpu))
        if not has_gpu:
            from megatron_moetion.mcore import cpu_device

            cpu_device.install()
        _quiet_deprecations()
        from megatron_moetion.pretrain.loop import pretrain

        pretrain(args, place)
    except ConfigError as error:
        # Every rank parses the same flags and finds the same mistake.
        if place.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except MoetionError as error:
        print(f"error: rank {place.rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    After an error there are process groups whose threads still run, and Python's teardown may be aborted by one of
    them. The code would be lost, by which a job's script tells a mistake from a fault. So there is no teardown then.
    """
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _quiet_deprecations() -> None:
    """Megatron-Core uses names that newer torch will rename; nobody who trains can change that."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
