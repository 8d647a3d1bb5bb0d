# SPDX-License-Identifier: Apache-2.0
"""One rank of the bundled trainer, from its command line to its exit code, without the seconds of an import."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch  # noqa: F401

from megatron_moetion.mcore import cpu_device

cpu_device.install()

# isort: split
from megatron_moetion.mcore import attach  # noqa: F401
from megatron_moetion.pretrain import checkpoint, loop  # noqa: F401
from megatron_moetion.pretrain.launch import run


def main(argv: Sequence[str], die_in_save: int | None, environment: Mapping[str, str]) -> int:
    """``die_in_save``: rank 0 is killed when all of the checkpoint of this iteration is written but the tracker."""
    os.environ.update(environment)
    if die_in_save is not None:
        checkpoint.write_tracker = _killing_at(die_in_save, checkpoint.write_tracker)
    return run(argv)


def _killing_at(iteration: int, write: Any) -> Any:
    def written(root: Any, of: int) -> None:
        if of == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        write(root, of)

    return written
