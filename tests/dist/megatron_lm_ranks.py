# SPDX-License-Identifier: Apache-2.0
"""One rank of Megatron's own ``pretrain()`` under the launcher, without the seconds of an import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron_lm_on_cpu import note_losses, save_at_once
from official_pretrain import redirect

# isort: split
from megatron.training import training

from megatron_moetion.mcore import attach  # noqa: F401
from megatron_moetion.megatron_lm.__main__ import run

redirect()
SCRIPT = Path(__file__).with_name("megatron_lm_gpt.py")


def main(folder: Path, argv: Sequence[str], acts: Sequence[Sequence[object]], environment: Mapping[str, str]) -> int:
    """``acts``: rank, iteration and what happens there: the name of a signal, ``late`` or ``leaves``.

    ``elsewhere`` at iteration 0: the rank is on another GPU than ranks without it.
    """
    os.environ.update(environment)
    mine = {iteration: what for rank, iteration, what in acts if str(rank) == environment["RANK"]}
    if mine.pop(0, "") == "elsewhere":
        torch.cuda.current_device = lambda: torch.device("cpu", 0)  # type: ignore[assignment,return-value]
    save_at_once()
    note_losses(folder / "losses.jsonl", partial(act, mine))
    try:
        return run([str(SCRIPT), *argv])
    except SystemExit as leaving:
        print("gone", time.time(), flush=True)
        return int(leaving.code or 0)


def act(mine: Mapping[object, object], iteration: int) -> None:
    match mine.get(iteration):
        case "late":  # the minutes of --exit-duration-in-mins are over
            training._TRAIN_START_TIME -= 24 * 60 * 60
        case "leaves":
            print("left", time.time(), flush=True)
            sys.exit(7)
        case str(name):
            os.kill(os.getpid(), signal.Signals[name])
