# SPDX-License-Identifier: Apache-2.0
"""Parts that run the GPU's tests, a sanitizer, or one of the benchmarks, whose figures they keep."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from left_behind import temporary_store

from gpu_check.part import CheckFailed, Figures, Finding, NotRun, Setting, execute, need_gpus, need_store

SANITIZED_CASES = "each_source_alignment or pieces_that_share or scatter_brings"
"""A subset of ``tests/gpu/test_kernels.py``, since the sanitizer makes kernels some hundred times slower."""
UNSUPPORTED = ("Device not supported", "not supported on", "Unable to find a supported device", "LibraryNotLoaded")
"""What compute-sanitizer says of a machine that it cannot work on."""
CONNECTIONS: Mapping[str, Mapping[str, str]] = {
    "1 connection": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    "8 connections": {"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
    "32 connections": {"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    "expandable segments": {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    },
}
"""Environments of the step: hardware queues that streams share, and the allocator that moves its memory."""
TOY_STEP_S = 16.0
"""On a CPU, where the figures mean nothing."""
STEP_START_S = 15.0
"""Less than this is no time to measure a step in."""
SEVERAL = 6
"""Figures that a line of the table names."""


def run_tests(setting: Setting) -> Finding:
    """All tests that need a GPU."""
    need_gpus(setting)
    need_store(setting, 128 << 20)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    environment = {"MOETION_REQUIRE_GPU": "1", "MOETION_TEST_STORE": str(setting.store)}
    text = execute(command, setting.results / "tests" / "log.txt", setting.left_s, environment)
    return Finding(text=text.strip().splitlines()[-1].strip("= "))


def run_sanitizer(setting: Setting) -> Finding:
    """memcheck over part of the kernel tests: every access inside what was allocated, and aligned."""
    need_gpus(setting)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise NotRun("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit")
    # torch's caching allocator would hide a write beyond a tensor inside its own large blocks
    environment = {"MOETION_REQUIRE_GPU": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p",
        "no:cacheprovider", "--timeout", "1200", "tests/gpu/test_kernels.py", "-k",
        f"test_case and ({SANITIZED_CASES}) and not floats",
    ]  # fmt: skip
    log = setting.results / "sanitizer" / "log.txt"
    try:
        text = execute(command, log, setting.left_s, environment)
    except CheckFailed:
        said = log.read_text(errors="replace").splitlines()
        refusal = next((line for line in said if any(words in line for words in UNSUPPORTED)), None)
        if refusal is None:
            raise
        raise NotRun(f"compute-sanitizer cannot work on this machine: {refusal.strip('= ')[:120]}") from None
    summary = next((line for line in reversed(text.splitlines()) if "ERROR SUMMARY" in line), None)
    if summary is None:
        raise CheckFailed("the sanitizer gave no summary, so it checked nothing; see sanitizer/log.txt")
    return Finding(text=summary.strip("= "))


def run_link(question: str) -> Callable[[Setting], Finding]:
    """A part that asks ``benchmarks/gpu_link.py`` one question."""

    def action(setting: Setting) -> Finding:
        device = "cuda:0" if setting.on_gpu else "model:0"
        return told(measure(setting, question, "gpu_link", ["--only", question, "--device", device]))

    return action


def run_arena(setting: Setting) -> Finding:
    """A large arena: seconds to make and to pin it."""
    flags = [] if setting.on_gpu else ["--device", "model:0", "--mib", "64"]
    with temporary_store(setting.store, "check") as store:
        figures = measure(setting, "arena", "gpu_arena", ["--store", str(store), *flags])
    if all(f["value"] is None for f in figures):
        raise NotRun(f"neither memory nor {setting.store} has room for one; see arena/log.txt")
    return told(figures)


def run_step(setting: Setting) -> Finding:
    """The iteration of a model with more than 10^9 parameters, with each mode and without."""
    model = "whole" if setting.on_gpu else "toy"
    return told(step(setting, "step", model, CONNECTIONS["8 connections"]))


def run_connections(setting: Setting) -> Finding:
    """The step of a smaller model, in each of ``CONNECTIONS``."""
    figures: list[Mapping[str, object]] = []
    chosen = dict(list(CONNECTIONS.items())[: 1 if setting.quick else None])
    for number, (name, environment) in enumerate(chosen.items()):
        share = setting.left_s / (len(chosen) - number)
        found = step(setting, f"connections-{number}", "small" if setting.on_gpu else "toy", environment, share)
        figures += [{**figure, "name": f"{name}: {figure['name']}"} for figure in found]
    return told(figures)


def step(
    setting: Setting, name: str, model: str, environment: Mapping[str, str], share_s: float | None = None
) -> Figures:
    """Figures of ``benchmarks/gpu_step.py``, which is told how long it may take."""
    need_store(setting, 64 << 20)
    seconds = 0.85 * (setting.left_s if share_s is None else share_s)
    if not setting.on_gpu:
        seconds = min(seconds, TOY_STEP_S)
    if seconds < STEP_START_S:
        raise NotRun(f"{max(seconds, 0):.0f} s are left, too few to measure a step in")
    flags = ["--model", model, "--seconds", f"{seconds:.0f}", "--device", "gpu" if setting.on_gpu else "cpu"]
    with temporary_store(setting.store, "check") as store:
        variables = {"GLOO_SOCKET_IFNAME": "lo", **environment}
        figures = measure(setting, name, "gpu_step", ["--store", str(store), *flags], variables)
    if not any(f["value"] is not None for f in figures if "over none" in str(f["name"])):
        raise NotRun(f"no mode's arena has room; see {name}/log.txt")
    return figures


def run_benchmark(name: str) -> Callable[[Setting], Finding]:
    """A part that runs one of the older benchmarks."""

    def action(setting: Setting) -> Finding:
        figures = measure(setting, name, name, [])
        if all(f["value"] is None for f in figures):
            if setting.on_gpu:
                raise CheckFailed(f"nothing was measured: it found no GPU that it can use; see {name}/log.txt")
            raise NotRun("needs a GPU")
        return told(figures)

    return action


def measure(
    setting: Setting, name: str, benchmark: str, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> Figures:
    """Run a benchmark; the figures that it wrote."""
    path = setting.results / name / "figures.json"
    command = [sys.executable, f"benchmarks/{benchmark}.py", "--json", str(path), *flags]
    command += ["--quick"] if setting.quick else []
    path.unlink(missing_ok=True)
    execute(command, path.parent / "log.txt", setting.left_s, environment)
    figures: Figures = json.loads(path.read_text())["results"]
    return figures


def told(figures: Figures) -> Finding:
    """Figures with a line for the table: how many targets are met, then values: those that miss theirs come first."""
    judged = sorted((f for f in figures if f["met"] is not None), key=lambda f: bool(f["met"]))
    missed = sum(not f["met"] for f in judged)
    shown = judged or [f for f in figures if f["value"] is not None]
    values = "; ".join(f"{f['name']}: {value_of(f)}" for f in shown[: max(SEVERAL, missed)])
    met = f"{len(judged) - missed} of {len(judged)} targets met: " if judged else ""
    return Finding(text=met + values, figures=figures)


def value_of(figure: Mapping[str, object]) -> str:
    """A figure's value with its unit, and the target that it misses."""
    target = f" (target {figure['target']})" if figure["met"] is False else ""
    return f"{figure['value']:.3g} {figure['unit']}".strip() + target
