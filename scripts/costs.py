# SPDX-License-Identifier: Apache-2.0
"""Writes the table of what MoEtion costs into README.md, from benchmarks/results: ``python scripts/costs.py``.

A test holds the page to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- made by scripts/costs.py -->\n", "<!-- end of what scripts/costs.py makes -->\n"
MODES = {"full": "full", "exact": "exact P 8", "popularity": "popularity"}
"""Columns, and what the results of ``exact_mode`` call them."""
MODEL = "E 64, fp32 gradients"
LINK = "200 Mbit/s"
LETTERS = "abcdefgh"
UNKNOWN = "not measured"

Figures = Mapping[str, float | None]
"""Values of a benchmark's results by name; None: not measured."""


@dataclass(frozen=True)
class Measured:
    """What one benchmark has found."""

    origin: str
    """The command, without what only names its output; the machine and the day."""
    figures: Figures


@cache
def read(benchmark: str) -> Measured:
    """The committed results of a benchmark."""
    document = json.loads((RESULTS / f"{benchmark}.json").read_text())
    command = re.sub(r" --(?:json|plot) \S+| --report-only", "", document["command"])
    machine = document["hardware"]
    return Measured(
        origin=f"`{command}`, {machine['cores']} cores ({machine['cpu']}), {document['date'][:10]}",
        figures={result["name"]: result["value"] for result in document["results"]},
    )


def table() -> str:
    """The table as Markdown, and what was run."""
    rows: list[tuple[str, str, Callable[[Figures, str], str]]] = [
        ("time of an iteration, ratio to none (95%), where training fills both cores", "overhead", on_full_cores),
        ("the same, a smaller model", "exact_mode", with_small_model),
        (f"the same, where each host's link carries {LINK}", "replication_overhead", on_a_slow_link),
        ("bytes of a snapshot, per parameter", "exact_mode", sent_bytes),
        ("host memory, bytes per parameter, for the arena and for each replica", "exact_mode", host_bytes),
        ("iterations that a fault repeats, mean (most)", "exact_mode", repeated),
        ("seconds of a recovery, once processes run", "exact_mode", recovery),
        ("tensors that a recovery brought back otherwise", "exact_mode", changed_tensors),
        ("tokens that experts lost by four faults in 300 iterations", "accuracy_under_faults", lost_tokens),
    ]
    letters: dict[str, str] = {}
    lines = [f"| | {' | '.join(f'`{mode}`' for mode in MODES)} | by |", f"| --- |{' --- |' * (len(MODES) + 1)}"]
    for what, benchmark, cell in rows:
        letter = letters.setdefault(benchmark, LETTERS[len(letters)])
        cells = [cell(read(benchmark).figures, mode) for mode in MODES]
        lines.append(f"| {what} | {' | '.join(cells)} | {letter} |")
    lines.append(f"| all of this on a GPU |{' not yet measured |' * len(MODES)} {LETTERS[len(letters)]} |")
    lines.append("")
    lines += [f"- {letter}: {read(benchmark).origin}" for benchmark, letter in letters.items()]
    lines.append(f"- {LETTERS[len(letters)]}: `scripts/gpu_check.sh RESULTS`")
    return "\n".join(lines) + "\n"


def on_full_cores(figures: Figures, mode: str) -> str:
    """A ratio with its interval."""
    return ratio(figures, f"{mode}: iteration time, ratio to none", f"{mode}: iteration time, ratio to none", 0.0)


def with_small_model(figures: Figures, mode: str) -> str:
    """A ratio with its interval."""
    at = f"{MODEL}: {MODES[mode]}"
    return ratio(figures, f"{at}: iteration time, ratio to none", f"{at}: the same", 0.0)


def on_a_slow_link(figures: Figures, mode: str) -> str:
    """A ratio with its interval, and how many snapshots became whole."""
    at = f"{LINK}: {mode}-bubble"
    found = ratio(figures, f"{at}: slowdown", f"{at}: slowdown", 1.0)
    if found == UNKNOWN:
        return found
    whole = value(figures, f"{at}: snapshots that became whole")
    return found if whole == 1 else f"{found}; {whole:.0%} of the snapshots were whole in time"


def ratio(figures: Figures, middle: str, ends: str, add: float) -> str:
    """A figure and the ends of its interval; ``add`` makes a ratio of a slowdown."""
    if middle not in figures:
        return UNKNOWN
    names = (middle, f"{ends}, lower end of 95%", f"{ends}, upper end of 95%")
    found, low, high = (value(figures, name) + add for name in names)
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def sent_bytes(figures: Figures, mode: str) -> str:
    """Per parameter and iteration."""
    full = value(figures, f"{MODEL}: full: bytes") / value(figures, f"{MODEL}: parameters, all ranks")
    share = value(figures, f"{MODEL}: {MODES[mode]}: bytes, share of full's")
    return f"{full * share:.1f}"


def host_bytes(figures: Figures, mode: str) -> str:
    """Per parameter and copy; the results have two."""
    total = value(figures, f"{MODEL}: {MODES[mode]}: host memory, all ranks, one replica")
    return f"{total / value(figures, f'{MODEL}: parameters, all ranks') / 2:.0f}"


def recovery(figures: Figures, mode: str) -> str:
    """Seconds from the survey to the restored state."""
    at = f"{MODEL}: {MODES[mode]}"
    return f"{value(figures, f'{at}: recovery'):.1f}"


def repeated(figures: Figures, mode: str) -> str:
    """Iterations, over moments spread evenly."""
    at = f"{MODEL}: {MODES[mode]}: moments at which a fault costs"
    shares = [value(figures, f"{at} {iterations} iteration(s)") for iterations in range(3)]
    most = max(iterations for iterations, share in enumerate(shares) if share)
    return f"{sum(iterations * share for iterations, share in enumerate(shares)):.2f} ({most})"


def changed_tensors(figures: Figures, mode: str) -> str:
    """How many of all; mode ``popularity`` does not promise any."""
    begin = f"{MODEL}: {MODES[mode]}: tensors that came back otherwise, of "
    found = [name for name in figures if name.startswith(begin)]
    if not found:
        return "those of stale experts"
    return f"{value(figures, found[0]):.0f} of {int(found[0].removeprefix(begin)):,}"


def lost_tokens(figures: Figures, mode: str) -> str:
    """The share at worst, of models of 64 and 8 experts."""
    arm = {"popularity": "default"}.get(mode, mode)
    if f"E64: {arm}: PLT at worst" not in figures:
        return UNKNOWN
    many, few = (value(figures, f"{model}: {arm}: PLT at worst") for model in ("E64", "E8"))
    return f"at worst {many:.1%} with 64 experts, {few:.1%} with 8"


def value(figures: Figures, name: str) -> float:
    """A figure that was measured."""
    found = figures[name]
    assert found is not None, f"{name} was not measured"
    return found


def written(page: str) -> str:
    """The page with the table of now between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
