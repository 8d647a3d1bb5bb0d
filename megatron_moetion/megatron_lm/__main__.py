# SPDX-License-Identifier: Apache-2.0
"""``torchrun ... -m megatron_moetion.megatron_lm pretrain_gpt.py FLAGS --moetion``."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from megatron_moetion.config import STANDBY
from megatron_moetion.ending import lead
from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.megatron_lm.seams import install
from megatron_moetion.pretrain.launch import complain
from megatron_moetion.pretrain.process import Process

HELP = ("-h", "--help")
MODULES = ("megatron.training", "megatron.training.training", "megatron_moetion.mcore.attach")
"""What a parent imports that forks ranks: the script's own imports are mostly among theirs."""
USAGE = "usage: python -m megatron_moetion.megatron_lm SCRIPT [FLAGS ...], SCRIPT being Megatron-LM's pretrain_gpt.py"


def run(argv: Sequence[str]) -> int:
    """Run a script of Megatron-LM as Python would, with recovery if its flags ask for it. Returns the exit code."""
    if argv and argv[0] in HELP:
        print(USAGE)
        return 0
    return _code_of(partial(_begin, argv))


def _begin(argv: Sequence[str]) -> int:
    if os.environ.get(STANDBY):
        from megatron_moetion.warm.waiting import await_job

        await_job(os.environ)
    restarts, timeout = _warm_restarts(argv[1:])
    if restarts > 0:
        return _stay_warm(argv, restarts, timeout)
    if os.environ.get(STANDBY):
        raise ConfigError(f"{STANDBY} is set: that needs --moetion and --moetion-warm-restarts")
    return run_script(argv)


def run_script(argv: Sequence[str]) -> int:
    """``argv`` is the script and its flags. ``ConfigError`` where there is no such script."""
    _stand_in_for(argv)
    runpy.run_path(argv[0], run_name="__main__")
    return 0


def _code_of(program: Callable[[], int]) -> int:
    try:
        return program()
    except MoetionError as error:
        complain(error, Process.from_environment(os.environ), os.environ)
        return error.exit_code


def _stay_warm(argv: Sequence[str], restarts: int, timeout: timedelta) -> int:
    """As the parent of this rank, which is forked from here; see ``warm``."""
    from megatron_moetion.warm.later import LATER
    from megatron_moetion.warm.launch import Launch
    from megatron_moetion.warm.stay import stay

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question to CUDA itself would make a context
    _stand_in_for(argv)
    for name in (*MODULES, *LATER):
        importlib.import_module(name)
    return stay(lambda: lead(partial(_code_of, partial(run_script, argv))), Launch.here(restarts, timeout))


def _stand_in_for(argv: Sequence[str]) -> None:
    """Be what Python is when it runs a script. Safe to call twice."""
    if not argv or not Path(argv[0]).is_file():
        raise ConfigError(f"{argv[0]} is no file; {USAGE}" if argv else USAGE)
    sys.argv = list(argv)
    folder = str(Path(argv[0]).resolve().parent)
    if sys.path[0] != folder:
        sys.path.insert(0, folder)  # first, so that its own Megatron is the one
    if asks_for_moetion(argv[1:]):
        install()


def _warm_restarts(flags: Sequence[str]) -> tuple[int, timedelta]:
    """What the flags say of restarts from a warm parent, and how long ranks wait for each other."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--moetion", action="store_true")
    parser.add_argument("--moetion-warm-restarts", type=int, default=0)
    parser.add_argument("--distributed-timeout-minutes", type=float, default=10)
    found, _ = parser.parse_known_args(flags)
    return found.moetion_warm_restarts if found.moetion else 0, timedelta(minutes=found.distributed_timeout_minutes)


def asks_for_moetion(flags: Sequence[str]) -> bool:
    """Whether a command line has flags of MoEtion, or wants to know of them."""
    return any(flag in HELP or flag.startswith("--moetion") for flag in flags)


if __name__ == "__main__":
    lead(partial(run, sys.argv[1:]))
