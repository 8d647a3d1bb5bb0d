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
from megatron_moetion.pretrain import checkpoint, loop
from megatron_moetion.pretrain.launch import run


def main(argv: Sequence[str], die_in_save: int | None, poison: list[int] | None, environment: Mapping[str, str]) -> int:
    """``die_in_save``: rank 0 is killed when all of the checkpoint of this iteration is written but the tracker.

    ``poison``: a rank and an iteration, after which one of its parameters is no number.
    """
    os.environ.update(environment)
    if poison is not None and environment["RANK"] == str(poison[0]):
        loop.Trainer.train_step = _poisoned_after(poison[1], loop.Trainer.train_step)  # type: ignore[method-assign]
    if die_in_save is not None:
        checkpoint.write_tracker = _killing_at(die_in_save, checkpoint.write_tracker)
    return run(argv)


def _killing_at(iteration: int, write: Any) -> Any:
    def written(root: Any, of: int) -> None:
        if of == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        write(root, of)

    return written


def _poisoned_after(iteration: int, step: Any) -> Any:
    def stepped(trainer: loop.Trainer) -> Any:
        result = step(trainer)
        if trainer.progress.iteration == iteration:
            masters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
            for parameter in (next(trainer.model[0].parameters()), masters[0]):
                parameter.data.view(-1)[0] = float("nan")
        return result

    return stepped
