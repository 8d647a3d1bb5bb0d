# SPDX-License-Identifier: Apache-2.0
"""A part of the check: an action with a time limit, that ends in a verdict and figures."""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from left_behind import end

from gpu_check.machine import Machine

ROOT = Path(__file__).resolve().parent.parent.parent
Figures = Sequence[Mapping[str, Any]]
"""Results as the benchmarks write them: name, value, unit, target, met."""


class Outcome(Enum):
    """What became of a part."""

    PASSED = "passed"
    MISSED = "missed"
    """It ran, and a figure misses its target."""
    FAILED = "FAILED"
    LATE = "late"
    NOT_RUN = "not run"

    @property
    def is_good(self) -> bool:
        """Whether nobody needs to look."""
        return self in (Outcome.PASSED, Outcome.NOT_RUN)


class CheckFailed(Exception):
    """A part found something; the message is for the table."""


class Late(Exception):
    """A part was not done within its time limit, and was stopped."""


class NotRun(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a part runs."""

    results: Path
    """Folder of all parts."""
    machine: Machine
    store: Path
    """Folder in memory, for arenas."""
    quick: bool = False
    deadline_s: float = float("inf")
    """Of the monotonic clock."""

    @property
    def on_gpu(self) -> bool:
        """Whether the part runs on a GPU."""
        return self.machine.on_gpu

    @property
    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self.deadline_s - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an action found that went well: a line for the table, and figures."""

    text: str
    figures: Figures = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part. ``limit_s`` is what it is planned to take at most, on one machine with a current GPU."""

    name: str
    about: str
    limit_s: int
    action: Callable[[Setting], Finding]
    by_default: bool = True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one part."""

    part: str
    outcome: Outcome
    seconds: float
    limit_s: float
    finding: str
    figures: Figures = ()


def judge(part: Part, setting: Setting, limit_s: float) -> Verdict:
    """Run one part. ``setting`` gets its deadline here."""
    started = time.monotonic()
    figures: Figures = ()
    try:
        found = part.action(replace(setting, deadline_s=started + limit_s))
        figures, text = found.figures, found.text
        outcome = Outcome.MISSED if any(f["met"] is False for f in figures) else Outcome.PASSED
    except NotRun as reason:
        outcome, text = Outcome.NOT_RUN, str(reason)
    except Late as late:
        outcome, text = Outcome.LATE, str(late)
    except CheckFailed as failure:
        outcome, text = Outcome.FAILED, str(failure)
    except Exception as bug:  # of the check itself: the parts that are left may never have this machine again
        folder = setting.results / part.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "traceback.txt").write_text(traceback.format_exc())
        outcome, text = Outcome.FAILED, f"{type(bug).__name__}: {bug}; see {part.name}/traceback.txt"
    return Verdict(
        part=part.name, outcome=outcome, seconds=time.monotonic() - started, limit_s=limit_s, finding=text,
        figures=figures,
    )  # fmt: skip


def execute(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    *,
    may_fail: bool = False,
) -> str:
    """Run a command with its output in ``log``; returns the output.

    ``CheckFailed`` for an exit code, except with ``may_fail``; ``Late`` at the limit, and all that it started is ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = os.environ | dict(environment or {})
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(limit_s, 0))
        except subprocess.TimeoutExpired as late:
            raise Late(f"stopped, not done in time; see {log.relative_to(log.parents[1])}") from late
        finally:
            end(process)
    text = log.read_text(errors="replace")
    if code and not may_fail:
        said = [line for line in text.splitlines() if line.strip(" =-")] or ["no output"]
        error = next((line for line in said if line.lower().startswith(("error", "[setup] error"))), said[-1])
        raise CheckFailed(f"exit code {code}, see {log.relative_to(log.parents[1])}: {error[:160]}")
    return text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; empty if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def need_gpus(setting: Setting, number: int = 1) -> None:
    """``NotRun`` where the machine has fewer."""
    have = len(setting.machine.gpus)
    if have < number:
        raise NotRun("needs a GPU" if number == 1 else f"needs {number} GPUs, this machine has {have}")


def need_store(setting: Setting, nbytes: int) -> None:
    """``NotRun`` where the store has less room than that."""
    stat = os.statvfs(setting.store)
    free = stat.f_bavail * stat.f_frsize
    if free < nbytes:
        raise NotRun(
            f"{setting.store} has {free / 2**20:,.0f} MiB free and the arenas need {nbytes / 2**20:,.0f}: enlarge it "
            "(docker run --shm-size=...), or give another folder in memory with --store"
        )
