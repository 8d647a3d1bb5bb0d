# SPDX-License-Identifier: Apache-2.0
"""``torchrun ... -m megatron_moetion.megatron_lm pretrain_gpt.py FLAGS --moetion``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.megatron_lm.seams import install
from megatron_moetion.pretrain.launch import complain, lead
from megatron_moetion.pretrain.process import Process

HELP = ("-h", "--help")
USAGE = "usage: python -m megatron_moetion.megatron_lm SCRIPT [FLAGS ...], SCRIPT being Megatron-LM's pretrain_gpt.py"


def run(argv: Sequence[str]) -> int:
    """Run a script of Megatron-LM as Python would, with recovery if its flags ask for it. Returns the exit code."""
    if argv and argv[0] in HELP:
        print(USAGE)
        return 0
    try:
        run_script(argv)
    except MoetionError as error:
        complain(error, Process.from_environment(os.environ), os.environ)
        return error.exit_code
    return 0


def run_script(argv: Sequence[str]) -> None:
    """``argv`` is the script and its flags. ``ConfigError`` where there is no such script."""
    if not argv or not Path(argv[0]).is_file():
        raise ConfigError(f"{argv[0]} is no file; {USAGE}" if argv else USAGE)
    script, *flags = argv
    sys.argv = list(argv)
    sys.path.insert(0, str(Path(script).resolve().parent))  # first, so that its own Megatron is the one
    if asks_for_moetion(flags):
        install()
    runpy.run_path(script, run_name="__main__")


def asks_for_moetion(flags: Sequence[str]) -> bool:
    """Whether a command line has flags of MoEtion, or wants to know of them."""
    return any(flag in HELP or flag.startswith("--moetion") for flag in flags)


if __name__ == "__main__":
    lead(partial(run, sys.argv[1:]))
