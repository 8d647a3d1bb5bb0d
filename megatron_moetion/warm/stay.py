# SPDX-License-Identifier: Apache-2.0
"""From a process that has imported everything to a parent of a rank, or to a machine that stands by."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from megatron_moetion.config import ENDPOINT, STANDBY
from megatron_moetion.errors import ConfigError
from megatron_moetion.rendezvous import HOSTED
from megatron_moetion.warm.launch import Launch, close_store, publish
from megatron_moetion.warm.parent import Parent
from megatron_moetion.warm.standby import Standby

_CUDA_NOT_INITIALIZED = 3


def stay(program: Callable[[], NoReturn], launch: Launch) -> int:
    """Fork the rank that runs ``program``, as often as it takes; the exit code for the launcher.

    Everything that ranks have in common has been imported before. Collective among the parents. ``ChannelError`` where
    one does not come in time, ``ConfigError`` where there is no launcher, and where this process has what cannot be
    shared with a fork.
    """
    if "MASTER_ADDR" not in launch.environ:
        raise ConfigError("warm restarts need a launcher that sets MASTER_ADDR: start with torchrun")
    if has_called_cuda():
        raise ConfigError(
            "an import of this program has called CUDA, which a forked rank could not use then: start it with "
            "PYTORCH_NVML_BASED_CUDA_CHECK=1 if it only asks whether there is a GPU, or leave warm restarts out"
        )
    if launch.environ.get(STANDBY):
        return Standby(program, launch).run()
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1 and launch.rank == 0:
        print(f"> a warm parent has {threads} threads; set OMP_NUM_THREADS=1 if forked ranks hang", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with ExitStack() as stack:
        stack.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if not launch.has_store:
            if launch.rank == 0:
                stack.callback(close_store, launch.host_store(), os.getpid())
            os.environ[HOSTED] = str(launch.restarts)
            launch = replace(launch, environ={**launch.environ, HOSTED: str(launch.restarts)})
        token = launch.meet()
        if launch.rank == 0 and ENDPOINT in launch.environ:
            publish(launch, token)
        gc.collect()
        gc.freeze()  # memory that the forks share stays shared
        return stack.enter_context(Parent(program, launch, token)).run()


def has_called_cuda() -> bool:
    """Whether anything in this process has initialised CUDA's driver, by torch or past it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != _CUDA_NOT_INITIALIZED
