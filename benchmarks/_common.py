# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: the command line, the JSON document, the table, and honest statistics."""

from __future__ import annotations

import argparse
import compileall
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure. ``value`` is None if it was not measured; ``target`` and ``met`` are None if there is none."""

    name: str
    value: float | None
    unit: str
    target: str | None = None
    met: bool | None = None


def at_least(name: str, value: float, unit: str, target: float) -> Result:
    """A figure that should not be below ``target``."""
    return Result(name=name, value=value, unit=unit, target=f">= {target:g}", met=value >= target)


def at_most(name: str, value: float, unit: str, target: float) -> Result:
    """A figure that should not be above ``target``."""
    return Result(name=name, value=value, unit=unit, target=f"<= {target:g}", met=value <= target)


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="a smaller run, of about a minute on 2 cores")
    options.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    return options


def compile_package() -> None:
    """Leave byte code of the package, as pip does where it installs it.

    Where an environment says that none is to be written, each new process would compile a checkout anew.
    """
    compileall.compile_dir(Path(__file__).parents[1] / "megatron_moetion", quiet=1)


def start_trainer(flags: str, *, on_gpu: bool = False) -> tuple[Any, Any]:
    """This process as one rank of the bundled trainer: its place, and the trainer at iteration 0."""
    if not on_gpu:
        from megatron_moetion.mcore import cpu_device

        cpu_device.install()
    from megatron_moetion.mcore.engine_names import bind_engine_names

    bind_engine_names()

    from megatron_moetion.mcore.argument_checks import Machine
    from megatron_moetion.mcore.arguments import parse_arguments
    from megatron_moetion.pretrain.loop import Trainer
    from megatron_moetion.pretrain.process import Process
    from megatron_moetion.pretrain.report import Reporter
    from megatron_moetion.pretrain.startup import build_source, initialize

    place = Process.from_environment(os.environ)
    args = parse_arguments(flags.split(), Machine.here(place.world_size, on_gpu))
    initialize(args, place)
    return place, Trainer(args, build_source(args), Reporter(args, active=False, attempt=0))


def report(benchmark: str, results: Sequence[Result], json_path: Path | None, notes: Sequence[str] = ()) -> None:
    """Print the table and, if asked, write the JSON document."""
    machine = hardware()
    table = Table(title=f"{benchmark} on {machine['cpu']}, {machine['cores']} cores")
    for column in ("figure", "value", "unit", "target", "met"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for result in results:
        value = "not measured" if result.value is None else f"{result.value:.3g}"
        met = {True: "yes", False: "[red]NO[/red]", None: ""}[result.met]
        table.add_row(result.name, value, result.unit, result.target or "", met)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    if json_path is not None:
        document = {
            "benchmark": benchmark,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "hardware": machine,
            "versions": versions(),
            "command": shlex.join(["python", *_program(sys.argv[0]), *sys.argv[1:]]),
            "results": [asdict(result) for result in results],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=1) + "\n")


def _program(script: str) -> list[str]:
    """How this program is started; a package by its name, since Python puts the path of its main module there."""
    package = Path(script).parent
    return ["-m", f"benchmarks.{package.name}"] if Path(script).name == "__main__.py" else [script]


def hardware() -> dict[str, Any]:
    """The machine, as far as the operating system tells. Unknown facts are null."""
    return {
        "cpu": _proc_value("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what a figure may depend on; null if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in ("megatron-moetion", "megatron-core", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could take: what the kernel calls available, or less where a container is limited."""
    lines = (proc / "meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core sees."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    factor = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * factor[size[-1]] for size in sizes if size[-1:] in factor), default=None)


def median(samples: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """The median, as a Python float."""
    return float(np.median(np.asarray(samples)))


def median_interval(
    samples: Sequence[float] | npt.NDArray[np.float64], confidence: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float]:
    """Confidence interval of the median by the percentile bootstrap; resampling has a fixed seed."""
    values = np.asarray(samples, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, values.size, (num_resamples, values.size))
    medians = np.median(values[picks], axis=1)
    low, high = np.quantile(medians, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def whole_since(attached: Any, began_s: float) -> dict[int, float]:
    """Iterations whose snapshots became whole on this rank and its buddies after ``began_s``, and when; drain first.

    Moments are seconds of the monotonic clock.
    """
    found = attached.session.running.pipeline.whole_since
    return {iteration: moment_s for iteration, moment_s in found.items() if moment_s >= began_s}


def lost_iterations(ranks: Sequence[Sequence[Mapping[str, Any]]], arm: str) -> Counter[int]:
    """Iterations that a fault would have cost, at moments spread evenly over the counted iterations of an arm.

    ``ranks``: each rank's blocks, with ``arm``, ``steps`` (iteration, when it was over) and ``whole`` (see
    ``whole_since``; JSON has made its keys text). A fault goes back to the newest snapshot that is whole on all ranks.
    """
    found: Counter[int] = Counter()
    for blocks in zip(*ranks, strict=True):
        if blocks[0]["arm"] != arm:
            continue
        whole = [{int(i): t for i, t in b["whole"].items()} for b in blocks]
        held = {i: max(w[i] for w in whole) for i in whole[0] if all(i in w for w in whole)}
        numbers = [i for i, _ in blocks[0]["steps"]]
        over = [max(b["steps"][k][1] for b in blocks) for k in range(len(numbers))]
        for moment in np.linspace(over[0], over[-1], 40 * len(over)):
            reached = max(i for i, t in zip(numbers, over, strict=True) if t <= moment)
            newest = max((i for i, t in held.items() if t <= moment), default=None)
            if newest is not None:
                found[max(0, reached - newest)] += 1
    return found


def _proc_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _gpus() -> list[str]:
    if "torch" not in sys.modules:  # a benchmark that uses a GPU has imported it
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
