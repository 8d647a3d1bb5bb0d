# SPDX-License-Identifier: Apache-2.0
"""From a process that a launcher started to a connected rank: flags, device, process groups, last words, exit code.

Nothing of torch is imported before the device is chosen.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import textwrap
import time
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from megatron_moetion.config import STANDBY, MoetionConfig
from megatron_moetion.ending import lead, say_last
from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.mcore.argument_checks import Machine, check_arguments
from megatron_moetion.mcore.arguments import moetion_config, read_arguments
from megatron_moetion.pretrain.process import Process

GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
DEVICE_FOLDER = Path("/dev")
SPEAKER_LIMIT_S = 5.0
"""For the one rank of a node that says what all its ranks have found."""


def visible_gpus(environ: Mapping[str, str], folder: Path = GPU_FOLDER, devices: Path = DEVICE_FOLDER) -> int:
    """GPUs that the driver shows and ``CUDA_VISIBLE_DEVICES`` leaves: those before the first entry that is none.

    Sandboxes that have no ``/proc/driver`` have device files.
    """
    listed = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    present = max(listed, sum(1 for _ in devices.glob("nvidia[0-9]*")))
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    # SLURM writes NoDevFiles, people write -1, to hide them all.
    named = takewhile(re.compile(r"\s*(\d+|GPU-.*|MIG-.*)").fullmatch, chosen.split(","))
    return min(present, sum(1 for _ in named))


def takes_gpu(device: str, gpus: int, process: Process) -> bool:
    """Whether this rank computes on a GPU, by ``--device`` and the number of GPUs that it sees.

    ``ConfigError`` where there are some but not one for each rank. A single one may be this rank's own, since some
    launchers show a rank no other; ranks that share it find that out when they connect.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if 1 < gpus < process.local_world_size:
        raise ConfigError(
            f"{gpus} GPUs for the {process.local_world_size} ranks of this machine: mend it or leave it out, start "
            f"{gpus} ranks on each (torchrun --nproc-per-node {gpus}), or let all train on the CPU with --device cpu"
        )
    return True


def check_nodes(config: MoetionConfig, world_size: int, local_world_size: int) -> None:
    """Raise placement's ``ConfigError`` where the launch has too few nodes for the replicas, before anything is built.

    Ranks that do not divide into nodes are left to the store, which knows the real nodes.
    """
    # Imported here only: a run without --moetion loads nothing of the checkpointing runtime.
    from megatron_moetion.replicate import placement

    per_node = config.ranks_per_node or local_world_size
    if world_size % per_node == 0:
        replicas, nodes = max(config.replicas, 0), config.coding_nodes
        enough = per_node * (nodes or replicas + 1)
        placement.place([str(rank // per_node) for rank in range(min(world_size, enough))], replicas, (), nodes)


def settings(
    argv: Sequence[str], process: Process, environ: MutableMapping[str, str]
) -> tuple[argparse.Namespace, bool]:
    """The flags, checked against each other and this machine, and whether this rank computes on a GPU.

    Hides the GPUs from torch on the CPU path, so it must run before torch is imported. Raises ``ConfigError``.
    """
    args = read_arguments(argv)
    # Where GPUs are demanded torch alone is asked, later: not every machine shows them where the driver usually does.
    on_gpu = args.device == "gpu" or takes_gpu(args.device, visible_gpus(environ), process)
    check_arguments(args, Machine.here(process.world_size, on_gpu))
    if args.moetion:
        check_nodes(moetion_config(args), process.world_size, int(environ.get("LOCAL_WORLD_SIZE", "1")))
    if not on_gpu:
        why = "GPUs left alone (--device cpu)" if args.device == "cpu" else "no GPU"
        _announce(process, f"CPU path on {socket.gethostname()}: {process.local_world_size} rank(s), {why}")
        environ["CUDA_VISIBLE_DEVICES"] = ""
    return args, on_gpu


def require_gpus(process: Process) -> None:
    """Raise ``ConfigError`` unless torch can use a GPU for this rank, whatever the driver shows."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not usable:
        raise ConfigError(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can use no GPU of this machine: install "
            "a build that fits the driver, mend the machine, or let all ranks train on the CPU with --device cpu"
        )
    takes_gpu("gpu", usable, process)
    _announce(
        process,
        f"GPU path on {socket.gethostname()}: {process.local_world_size} rank(s), {torch.cuda.get_device_name(0)}",
    )


def run(argv: Sequence[str]) -> int:
    """The whole program on this rank. Returns the exit code; a user's mistake is one line, not a traceback."""
    if os.environ.get(STANDBY):
        from megatron_moetion.warm.waiting import await_job

        try:
            await_job(os.environ)
        except MoetionError as error:
            complain(error, Process.from_environment(os.environ), os.environ)
            return error.exit_code
    process = Process.from_environment(os.environ)
    try:
        args, on_gpu = settings(argv, process, os.environ)
    except ConfigError as error:
        # The ranks of a node read the same flags on the same machine, and read them again at every restart.
        error.shared = True
        complain(error, process, os.environ)
        return error.exit_code
    if args.moetion and (restarts := moetion_config(args).warm_restarts):
        return _stay_warm(args, on_gpu, process, restarts)
    if os.environ.get(STANDBY):
        complain(ConfigError(f"{STANDBY} is set: that needs --moetion-warm-restarts"), process, os.environ)
        return ConfigError.exit_code
    return _train(args, on_gpu)


def _stay_warm(args: argparse.Namespace, on_gpu: bool, process: Process, restarts: int) -> int:
    """As the parent of this rank, which is forked from here; see ``warm``."""
    from megatron_moetion.warm.stay import stay

    try:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question to CUDA itself would make a context
        _load(on_gpu)
        from megatron_moetion.pretrain.ahead import load_ahead
        from megatron_moetion.warm.launch import Launch

        source = load_ahead(args)
        timeout = timedelta(minutes=args.distributed_timeout_minutes)
        return stay(lambda: lead(partial(_train, args, on_gpu, source)), Launch.here(restarts, timeout))
    except MoetionError as error:
        complain(error, process, os.environ)
        return error.exit_code


def _train(args: argparse.Namespace, on_gpu: bool, source: Any = None) -> int:
    """``source``: of samples, where it is there already."""
    process = Process.from_environment(os.environ)
    try:
        if on_gpu:
            require_gpus(process)
    except ConfigError as error:
        error.shared = True
        complain(error, process, os.environ)
        return error.exit_code
    try:
        _load(on_gpu)
        from megatron_moetion.pretrain.loop import pretrain

        pretrain(args, process, source)
    except MoetionError as error:
        complain(error, process, os.environ)
        return error.exit_code
    return 0


def _load(on_gpu: bool) -> None:
    """Import Megatron-Core, on the CPU path with CUDA's names redirected."""
    if not on_gpu:
        from megatron_moetion.mcore import cpu_device

        cpu_device.install()
    from megatron_moetion.mcore.engine_names import bind_engine_names

    bind_engine_names()
    _quiet_deprecations()


def complain(error: MoetionError, process: Process, environ: Mapping[str, str]) -> None:
    """One line on standard error: once a node for an error that all its ranks have, else from each rank that has it."""
    if error.shared and process.local_rank:
        # A launcher that sees this process end ends the others, the one that speaks too. It never waits that long
        # where the launcher sees the other end.
        time.sleep(SPEAKER_LIMIT_S)
        return
    text = str(error)
    if isinstance(error, ConfigError) and _said_before(text, environ):
        text = f"as before: {textwrap.shorten(text, 60)}"
    say_last(text, process.rank)


def _said_before(text: str, environ: Mapping[str, str]) -> bool:
    """Whether the attempt before this one ended with the same words.

    ``torchrun`` restarts what cannot work too. It keeps a folder for each attempt, side by side; the words are left
    beside them.
    """
    folder = Path(environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    if not folder.name.startswith("attempt_"):
        return False
    note = folder.with_name(f"rank{environ['RANK']}-said.txt")
    try:
        said = note.is_file() and note.read_text() == text
        note.write_text(text)
    except OSError:
        return False
    return said


def _announce(process: Process, text: str) -> None:
    if process.local_rank == 0:
        print(f"> {text}", flush=True)


def main(argv: Sequence[str]) -> NoReturn:
    """The whole process; see ``lead``."""
    lead(partial(run, argv))


def _quiet_deprecations() -> None:
    """Megatron-Core uses names that newer torch will rename; nobody who trains can change that."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
