# SPDX-License-Identifier: Apache-2.0
"""What the commands over stores share: their flags, the folders that these name, and words for people."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_moetion.errors import ConfigError
from megatron_moetion.inspect.judge import Copy, Judgement, judge, newest_history
from megatron_moetion.inspect.look import NodeFiles, default_stores, look_at, node_folders


def add_flags(parser: argparse.ArgumentParser, store: str) -> None:
    """``--store`` and ``--json``."""
    parser.add_argument("--store", type=Path, nargs="+", action="extend", metavar="DIR", help=store)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def look_at_run(stores: Sequence[Path] | None, run_id: str) -> list[NodeFiles]:
    """The folders of a run's nodes. ``StoreError`` where there is none."""
    return [look_at(folder, run_id) for folder in node_folders(stores or default_stores(), run_id)]


def judge_run(nodes: Sequence[NodeFiles]) -> Judgement:
    """What the arenas of these nodes add up to, by their manifests."""
    copies = [
        Copy.of(number, arena.spec, arena.page)
        for number, node in enumerate(nodes)
        for arena in node.arenas
        if arena.spec is not None and arena.page is not None
    ]
    return judge(copies, vetoed_on(nodes, copies))


def vetoed_on(nodes: Sequence[NodeFiles], copies: Sequence[Copy]) -> set[int]:
    """Iterations that ranks of these nodes have called unhealthy, in the history that goes on."""
    history = newest_history(copies)
    return set() if history is None else {i for n in nodes for i in n.vetoed(history.lineage, history.epoch)}


def recovery(judged: Judgement) -> dict[str, Any]:
    """What a recovery from these folders alone would find, for a document."""
    return {
        "iteration": judged.iteration if judged.iteration >= 0 and not judged.missing else None,
        "newest_of_ranks_here": judged.iteration if judged.iteration >= 0 else None,
        "missing_ranks": list(judged.missing),
        "copies_least": judged.least_copies,
        "reason": judged.reason,
    }


def recovery_words(judged: Judgement) -> str:
    """The same, for a person."""
    if judged.iteration < 0:
        return f"nothing can be recovered from here: {judged.reason}"
    if judged.missing:
        return (
            f"no copy of rank(s) {numbers(judged.missing)} lies here, so nothing can be recovered from here alone; the "
            f"other {len(judged.ranks)} rank(s) reach iteration {judged.iteration}"
        )
    copies = judged.least_copies
    where = f"each rank has at least {copies} complete {'copy' if copies == 1 else 'copies'} here"
    if not copies:
        where = "some rank has it only in parts, on several nodes"
    return f"a restart from what lies here goes on from iteration {judged.iteration}; {where}"


def print_json(document: Mapping[str, Any]) -> None:
    """One document, on a line."""
    print(json.dumps(document), flush=True)


def console() -> Console:
    """For tables: without colours, so that a file or a pager shows what a terminal does."""
    return Console(highlight=False, color_system=None, soft_wrap=False)


def table(*columns: tuple[str, bool | None]) -> Table:
    """A table of these columns. True: of numbers; None: of text that may take several lines."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, is_number in columns:
        found.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number is not None)
    return found


def say(text: str) -> None:
    """A line for people, as long as it is."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line beside the result."""
    print(f"[moetion] {text}", file=sys.stderr, flush=True)


def size(nbytes: int) -> str:
    """Bytes, for a person."""
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes / 1024:.0f} KiB"


def ago(unix_s: float | None, now_s: float) -> str:
    """How long ago something was."""
    if unix_s is None or not math.isfinite(unix_s):
        return "?"
    seconds = max(0.0, now_s - unix_s)
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def now() -> float:
    """Unix time in seconds."""
    return time.time()


def numbers(found: Iterable[int]) -> str:
    """Numbers in order, as ``0-3, 8``."""
    spans: list[list[int]] = []
    for number in sorted(found):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def positive(flag: str, value: float) -> float:
    """A number that must be more than 0; ``ConfigError``."""
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{flag} is {value:g}; it must be more than 0")
    return value
