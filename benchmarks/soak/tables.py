# SPDX-License-Identifier: Apache-2.0
"""What a soak has found: figures, a table of faults, a picture. Pure, but for reading records and drawing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._common import Result, at_least, at_most
from benchmarks.soak.judge import NOT_MET, OPEN, RECOVERED, SURVIVED

Record = Mapping[str, Any]
FAULTS_WANTED = 200


def read(folder: Path) -> list[Record]:
    """The runs that are there."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def happened(records: Sequence[Record]) -> list[Mapping[str, Any]]:
    """The faults that happened and that something came of, in all runs."""
    return [fault for record in records for fault in record["faults"] if fault["outcome"] not in (NOT_MET, OPEN)]


def figures(records: Sequence[Record]) -> list[Result]:
    """Of all runs, then of each kind."""
    faults = happened(records)
    ended = [record for record in records if record["ended"]]
    unlike = sum(len(record["wrong"]) for record in records)
    recovered = [f["seconds"] for f in faults if f["outcome"] == RECOVERED]
    results = [
        at_least("faults", len(faults), "faults", FAULTS_WANTED),
        Result(name="runs that came to their end", value=len(ended), unit=f"of {len(records)} runs"),
        at_most("losses and state hashes that differ from the run without faults", unlike, "", 0),
        at_most("faults after which training did not go on", open_ends(records), "faults", 0),
        Result(name="iterations trained", value=sum(r["steps"] for r in records), unit="iterations"),
        Result(name="states compared by hash", value=sum(r["hashes"] for r in records), unit="states"),
        Result(name="recoveries, median", value=median(recovered) if recovered else None, unit="s"),
        Result(name="recoveries, longest", value=max(recovered, default=None), unit="s"),
    ]
    for kind in kinds(faults):
        own = [fault for fault in faults if fault["kind"] == kind]
        again = [fault for fault in own if fault["outcome"] == RECOVERED]
        seconds = [fault["seconds"] for fault in again]
        lost = [fault["lost_iterations"] for fault in again if fault["lost_iterations"] is not None]
        results += [
            Result(name=f"{kind}: faults", value=len(own), unit="faults"),
            Result(name=f"{kind}: recovered", value=len(again), unit="faults"),
            Result(name=f"{kind}: until the first step, median", value=median(seconds) if seconds else None, unit="s"),
            Result(name=f"{kind}: until the first step, longest", value=max(seconds, default=None), unit="s"),
            Result(name=f"{kind}: iterations lost, most", value=max(lost, default=None), unit="iterations"),
        ]
    return results


def kinds(faults: Sequence[Mapping[str, Any]]) -> list[str]:
    """By name."""
    return sorted({fault["kind"] for fault in faults})


def open_ends(records: Sequence[Record]) -> int:
    """Faults that nothing came after, in runs that were not cut short. After the last iteration there is nothing."""
    dangling = [
        fault
        for record in records
        for fault in record["faults"]
        if fault["outcome"] == OPEN and fault["iteration"] < record["iterations"] and not record["cut_short"]
    ]
    return sum(record["stuck"] is not None for record in records) + len(dangling)


def table(records: Sequence[Record]) -> str:
    """Faults by kind, as Markdown."""
    lines = [
        "| fault | faults | recovered: s until the first step, median (longest) | iterations lost, median (most) "
        "| survived: longest step, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    faults = happened(records)
    for kind in kinds(faults):
        own = [fault for fault in faults if fault["kind"] == kind]
        again = [fault for fault in own if fault["outcome"] == RECOVERED]
        stayed = [fault["seconds"] for fault in own if fault["outcome"] == SURVIVED]
        seconds = [fault["seconds"] for fault in again]
        lost = [fault["lost_iterations"] for fault in again if fault["lost_iterations"] is not None]
        cells = [
            f"`{kind}`",
            f"{len(own)}",
            f"{len(again)}: {median(seconds):.1f} ({max(seconds):.1f})" if again else "",
            f"{median(lost):.0f} ({max(lost)})" if lost else "",
            f"{len(stayed)}: {max(stayed):.1f}" if stayed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """Seconds from each fault to the first step after it, by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    faults = [fault for fault in happened(records) if fault["outcome"] == RECOVERED]
    by_kind = {kind: [f["seconds"] for f in faults if f["kind"] == kind] for kind in kinds(faults)}
    order = sorted(by_kind, key=lambda kind: -median(by_kind[kind]))
    figure, axes = pyplot.subplots(figsize=(10, 0.34 * len(order) + 1.6), layout="constrained")
    for row, kind in enumerate(order):
        axes.plot(by_kind[kind], [row] * len(by_kind[kind]), "o", color="#0072B2", alpha=0.45, markersize=5)
        axes.plot(median(by_kind[kind]), row, "|", color="#222222", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(order)), [f"{kind} ({len(by_kind[kind])})" for kind in order])
    axes.set_xlabel("seconds from the fault to the end of the first iteration after it")
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#DDDDDD")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
