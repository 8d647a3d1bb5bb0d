# SPDX-License-Identifier: Apache-2.0
"""Warm restarts of a program of somebody's own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NoReturn

from megatron_moetion.config import STANDBY
from megatron_moetion.ending import lead, say_last
from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.warm.later import LATER
from megatron_moetion.warm.launch import Launch
from megatron_moetion.warm.stay import stay
from megatron_moetion.warm.waiting import await_job

AHEAD = ("megatron_moetion.mcore.attach", *LATER)
"""What every loop imports later."""


def run_warm(main: Callable[[], object], *, restarts: int, timeout: timedelta = timedelta(minutes=10)) -> NoReturn:
    """Run ``main()`` in a process forked from this one, again after each fault of a rank, at most ``restarts`` times.

    Every rank of a launch calls it, as the last line of its program, with the same arguments, and with nothing of CUDA
    called before. What was imported until then is there in each fork; ``main`` forms the process group. It ends this
    process with the code that ``main`` ended with: 0, what ``sys.exit`` was given, 1 for an exception, that of a
    ``MoetionError``. ``timeout`` bounds how long ranks wait for each other when they begin. With ``restarts=0``
    ``main`` runs in this process. Where ``MOETION_STANDBY`` is set, this machine stands by for a lost one.
    """
    lead(partial(_code_of, partial(_run, main, restarts, timeout)))


def _run(main: Callable[[], object], restarts: int, timeout: timedelta) -> int:
    await_job(os.environ)
    if restarts > 0:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question to CUDA itself would make a context
        for name in AHEAD:
            importlib.import_module(name)
        return stay(lambda: lead(partial(_code_of, partial(_main, main))), Launch.here(restarts, timeout))
    if os.environ.get(STANDBY) or restarts < 0:
        raise ConfigError(f"run_warm(restarts={restarts}): it must be 0 or more, and more where {STANDBY} is set")
    return _main(main)


def _main(main: Callable[[], object]) -> int:
    main()
    return 0


def _code_of(program: Callable[[], int]) -> int:
    try:
        return program()
    except MoetionError as error:
        say_last(str(error), int(os.environ.get("RANK", "0")))
        return error.exit_code
