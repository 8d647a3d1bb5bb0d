# SPDX-License-Identifier: Apache-2.0
"""What the quickstart's runs wrote, made into ``summary.json``. Pure: no processes, no clock.

A run's ``metrics.jsonl`` holds one JSON document a line, appended by the rank that knows the loss:
``{"iteration", "loss", "loss_hex", "grad_norm", "time", "attempt"}`` for a training step and
``{"iteration", "validation_loss"}`` for an evaluation. ``report.jsonl`` holds the events of the checkpointing
runtime: ``recovered`` after each recovery, ``summary`` at the end of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """A run did not do what it should; the message says which run and what."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The loss of a node, as the driver caused it."""

    iteration: int
    """The newest iteration that was logged when the node was lost."""
    time: float
    """Unix time of the kill, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run left behind."""

    name: str
    steps: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Training steps in the order written; after a recovery iterations repeat, with a higher ``attempt``."""
    validation_loss: float | None
    events: tuple[Mapping[str, Any], ...] = ()
    fault: Fault | None = None

    def curve(self) -> dict[int, float]:
        """Loss by iteration. A later attempt overwrites what it trained again."""
        return {int(step["iteration"]): float(step["loss"]) for step in self.steps}

    def curve_of_attempt(self, attempt: int) -> dict[int, float]:
        """Loss by iteration, as one attempt (0 is the first) saw it."""
        return {int(s["iteration"]): float(s["loss"]) for s in self.steps if s.get("attempt", 0) == attempt}

    def event(self, name: str) -> Mapping[str, Any] | None:
        """The newest event of that name, if any."""
        found = [event for event in self.events if event.get("event") == name]
        return found[-1] if found else None

    def last_completed_before_fault(self) -> int:
        """The last iteration of the first attempt."""
        return max(self.curve_of_attempt(0), default=0)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a file that may still be growing: an unfinished or torn line is left out."""
    documents = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            document = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(document, dict):
            documents.append(document)
    return documents


def read_run(name: str, folder: Path, fault: Fault | None = None) -> Run:
    """Reads ``metrics.jsonl`` and ``report.jsonl`` of one run."""
    metrics = read_json_lines(folder / "metrics.jsonl")
    validation = [float(m["validation_loss"]) for m in metrics if "validation_loss" in m]
    return Run(
        name=name,
        steps=tuple(m for m in metrics if "loss" in m),
        validation_loss=validation[-1] if validation else None,
        events=tuple(read_json_lines(folder / "report.jsonl")),
        fault=fault,
    )


def differences(run: Run, reference: Run) -> dict[int, float]:
    """Distance of the losses by iteration; exactly 0.0 only where the two are bitwise equal."""
    mine, theirs = _exact_losses(run.steps), _exact_losses(reference.steps)
    if set(mine) != set(theirs):
        missing = sorted(set(theirs) - set(mine)) or sorted(set(mine) - set(theirs))
        raise RunError(
            f"only one of the runs '{run.name}' and '{reference.name}' logs the iterations {_short(missing)}"
        )
    return {i: _distance(mine[i], theirs[i]) for i in sorted(mine)}


def unequal_iterations(run: Run, reference: Run, attempts: Iterable[int] | None = None) -> list[int]:
    """Iterations at which any attempt (or one of ``attempts``) logged a loss that is not bitwise the reference's."""
    wanted = None if attempts is None else set(attempts)
    theirs = _exact_losses(reference.steps)
    steps = [s for s in run.steps if wanted is None or s.get("attempt", 0) in wanted]
    return sorted({int(s["iteration"]) for s in steps if _exact_loss(s) != theirs.get(int(s["iteration"]))})


def recovery_seconds(run: Run) -> dict[str, float]:
    """Seconds of each phase, in order, from the kill until the first step after the recovery is done.

    The runtime reports its own phases, from the survey on, when the state is restored. Before them, ``detect`` lasts
    from the kill until the new process exists, and ``restart`` until it begins the survey; after them comes
    ``first_step``, until the first step is logged. So the phases add up to the time without training.
    """
    recovered = run.event("recovered")
    if recovered is None or run.fault is None:
        raise RunError(f"run '{run.name}' reports no recovery")
    restored = float(recovered["time"])
    started = max(run.fault.time, float(recovered["process_start"]))  # the system's start times are rounded
    steps = [float(step["time"]) for step in run.steps if float(step["time"]) > restored]
    if not steps:
        raise RunError(f"run '{run.name}' logs no step after its recovery")
    phases = {name: float(seconds) for name, seconds in recovered["phases_s"].items()}
    phases = {
        "detect": started - run.fault.time,
        "restart": max(0.0, restored - started - sum(phases.values())),
        **phases,
        "first_step": min(steps) - restored,
    }
    return {name: round(seconds, 3) for name, seconds in phases.items()}


def summarise(run: Run, reference: Run) -> dict[str, Any]:
    """One entry of ``summary.json``: a run that lost a node beside the fault-free one."""
    recovered = run.event("recovered")
    if recovered is None or run.fault is None:
        raise RunError(f"run '{run.name}' reports no recovery")
    totals = run.event("summary") or {}
    resumed_from = int(recovered["iteration"])
    curve, fault_free = run.curve(), reference.curve()
    distances = differences(run, reference)
    return {
        "mode": run.name,
        "iterations": max(curve),
        "killed_at_iteration": run.fault.iteration,
        "resumed_from_iteration": resumed_from,
        "lost_iterations": run.last_completed_before_fault() - resumed_from,
        "recovery_seconds": recovery_seconds(run),
        "snapshot_bytes_full": totals.get("snapshot_bytes_full"),
        "snapshot_bytes_mean": totals.get("snapshot_bytes_mean"),
        "final_loss": curve[max(curve)],
        "fault_free_final_loss": fault_free[max(fault_free)],
        "loss_curve_max_abs_diff": max(distances.values()),
        "validation_loss": run.validation_loss,
        "fault_free_validation_loss": reference.validation_loss,
        "plt": totals.get("plt", recovered.get("plt")),
    }


def check(run: Run, reference: Run) -> None:
    """Holds a run to its mode's promise; raises ``RunError`` with what was broken.

    ``full`` and ``exact``: every loss of every attempt and the validation loss are bitwise the fault-free run's.
    ``popularity``: so are all losses before the fault, because a snapshot never changes training.
    """
    exact = run.name in ("full", "exact")
    unequal = unequal_iterations(run, reference, None if exact else {0})
    if unequal:
        when = "bitwise equal to" if exact else "bitwise equal, before the fault, to"
        raise RunError(f"run '{run.name}' is not {when} the fault-free run: iterations {_short(unequal)} differ")
    if exact and run.validation_loss != reference.validation_loss:
        raise RunError(
            f"run '{run.name}' ends with validation loss {run.validation_loss}, the fault-free run with "
            f"{reference.validation_loss}; they must be equal"
        )


def _exact_losses(steps: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {int(step["iteration"]): _exact_loss(step) for step in steps}


def _exact_loss(step: Mapping[str, Any]) -> float:
    """``loss_hex`` is the loss bit for bit (``float.hex``); the decimal number stands in where it is missing."""
    return float.fromhex(step["loss_hex"]) if "loss_hex" in step else float(step["loss"])


def _distance(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b)


def _short(iterations: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in iterations[:5])
    return shown if len(iterations) <= 5 else f"{shown} and {len(iterations) - 5} more"
