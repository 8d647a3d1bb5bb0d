# SPDX-License-Identifier: Apache-2.0
"""Fuzzing at length: each target in a process of its own, guided by coverage (atheris), with changes of ``mutate.py``.

    scripts/fuzz.sh [TARGET ...] [--executions N] [--seconds S] [--json PATH] [--findings FOLDER] [--unguided]

An input that does what it must not ends its target and is written to the folder. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

EXECUTIONS = 1_000_000
"""Of each target, where nothing else is asked for."""
A_PROCESS = 100_000
"""Executions in one process, at most: each measurement of memory (tracemalloc) costs it some kilobytes for good."""
TRACED_EVERY = 16
"""Of so many executions one has its memory measured; the others have a limit of address space."""
MEMORY = Path("/dev/shm")
"""Targets write small files, which a disk would make slow."""
_HERE = Path(__file__).parent
_SHORT_S = 5.0


def fuzz(name: str, executions: int, seconds: float, findings: Path, report: Path, *, is_guided: bool) -> None:
    """One target, in this process; it ends in here. What was done is written to ``report`` every few seconds."""
    if is_guided:
        import atheris
    with atheris.instrument_imports(include=["megatron_moetion"]) if is_guided else nullcontext():
        from corpus import inputs, keep
        from limits import Finding, execute, limit_address_space, timed
        from mutate import BYTES_MAX, mutate
        from targets import TARGETS
    target = TARGETS[name]
    outcomes: collections.Counter[str] = collections.Counter()
    began, cpu, said = time.monotonic(), time.process_time(), 0.0

    def tell(problem: str | None = None) -> None:
        found = {
            "target": name,
            "executions": outcomes.total(),
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "outcomes": dict(sorted(outcomes.items())),
            "guided": outcomes.total() if is_guided else 0,
            "finding": problem,
        }
        scratch = report.with_suffix(".tmp")
        scratch.write_text(json.dumps(found))
        scratch.rename(report)

    def run(data: bytes) -> None:
        nonlocal said
        number = outcomes.total()
        try:
            outcomes[execute(target, data, traced=number % TRACED_EVERY == 0)] += 1
        except Finding as error:
            where = keep(findings, name, hashlib.sha256(data).hexdigest()[:16], data)
            tell(f"{error}; the input is in {where}")
            raise
        now = time.monotonic()
        is_over = number + 1 >= executions or now - began > seconds
        if is_over or now - said > _SHORT_S:
            said = now
            tell()
        if is_over:
            os._exit(0)  # libFuzzer ends in no other way that runs code of ours

    def change(data: bytes, size_max: int, seed: int) -> bytes:
        return mutate(bytes(data), target.shape, random.Random(seed))[:size_max]

    if not is_guided:
        limit_address_space()
        begin_with, chance = list(inputs(target).values()), random.SystemRandom()
        with timed():
            while True:
                run(change(chance.choice(begin_with), BYTES_MAX, chance.getrandbits(63)))
    with tempfile.TemporaryDirectory() as begin, timed():
        for number, data in enumerate(inputs(target).values()):
            (Path(begin) / str(number)).write_bytes(data)
        options = [f"-max_len={BYTES_MAX}", "-timeout=1000", "-rss_limit_mb=0", "-verbosity=0", "-handle_segv=1"]
        atheris.Setup([sys.argv[0], begin, *options], run, custom_mutator=change)
        limit_address_space()
        atheris.Fuzz()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of arenas, frames, documents and notes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, if none is named")
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="of each target")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the most that one target may take")
    parser.add_argument("--json", type=Path, help="add what was done to this file")
    parser.add_argument("--findings", type=Path, default=Path("out/findings"), help="where inputs go that fail")
    parser.add_argument("--unguided", action="store_true", help="change inputs at random, without atheris")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        fuzz(
            options.targets[0], options.executions, options.seconds, options.findings, options.one,
            is_guided=not options.unguided,
        )  # fmt: skip
        return 0
    from targets import TARGETS

    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    found = []
    with tempfile.TemporaryDirectory(prefix="moetion-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for name in options.targets or TARGETS:
            left, until_s = options.executions, time.monotonic() + options.seconds
            while left > 0 and (left_s := until_s - time.monotonic()) > 0:
                said = in_a_process(name, min(left, A_PROCESS), left_s, Path(folder), options)
                left -= max(1, said["executions"])
                found.append(said)
                outcomes = ", ".join(f"{n:,} {what}" for what, n in said.get("outcomes", {}).items())
                print(f"{name}: {said['executions']:,} executions, {outcomes or said.get('finding')}", flush=True)
                if options.json is not None:
                    add(options.json, said)
                if said.get("finding"):
                    print(f"    {said['finding']}", flush=True)
                    break
    return int(any(said.get("finding") for said in found))


def in_a_process(
    name: str, executions: int, seconds: float, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One target in a process of its own; what was done, and what was found."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, __file__, name, "--executions", str(executions), "--seconds", str(seconds)),
        *("--findings", str(options.findings), "--one", str(report), *(["--unguided"] if options.unguided else [])),
    ]
    ended = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.PIPE, check=False)
    said: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"target": name, "executions": 0}
    if ended.returncode and not said.get("finding"):
        said["finding"] = f"exit code {ended.returncode}: {ended.stderr.decode(errors='replace')[-2000:]}"
    return said


def add(path: Path, said: dict[str, Any]) -> None:
    """To the results of other targets in this file, and to what was done before with this one."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results = {each["name"]: each for each in document.get("results", [])}
    before = results.get(said["target"], {})
    executions = said["executions"] + before.get("value", 0)
    outcomes = collections.Counter(said.get("outcomes", {})) + collections.Counter(before.get("outcomes", {}))
    now = facts()
    results[said["target"]] = {
        "name": said["target"],
        "value": executions,
        "unit": "executions",
        "target": EXECUTIONS,
        "met": executions >= EXECUTIONS and not said.get("finding"),
        **{key: round(said.get(key, 0) + before.get(key, 0), 1) for key in ("seconds", "cpu_seconds", "guided")},
        "outcomes": dict(sorted(outcomes.items())),
        "commits": sorted({*before.get("commits", []), now["commit"]}),
        "finding": said.get("finding"),
    }
    path.write_text(json.dumps({**now, "results": list(results.values())}, indent=1) + "\n")


def facts() -> dict[str, Any]:
    """Of this machine and tree."""
    import datetime
    import importlib.metadata
    import platform

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=_HERE, check=False).stdout.strip()

    guide: dict[str, str] = {}
    dirty = "+" if git("status", "--porcelain", "megatron_moetion") else ""
    with suppress(importlib.metadata.PackageNotFoundError):
        guide = {"atheris": importlib.metadata.version("atheris")}
    return {
        "benchmark": "fuzzing",
        "date": datetime.date.today().isoformat(),
        "hardware": f"one process on a shared virtual machine of {os.cpu_count()} cores",
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "command": "scripts/fuzz.sh",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "torch")},
            **guide,
        },
    }


if __name__ == "__main__":
    sys.path[:0] = [str(_HERE), str(_HERE.parent / "unit"), str(_HERE.parents[1])]
    sys.exit(main())
