# SPDX-License-Identifier: Apache-2.0
"""What ``moetion report`` makes of traces: a Gantt chart, and how much replication overlapped training's traffic."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.errors import NOT_OURS, ConfigError
from megatron_moetion.observe.lanes import TRAFFIC, Lane
from megatron_moetion.observe.trace import LANES

FORMATS = (".pdf", ".png", ".svg")
_TRAFFIC_LANES = frozenset(lane.value for lane in TRAFFIC)
_COLORS = {
    Lane.COMPUTE: "#c9d7e8", Lane.WAIT: "#ececec", Lane.PIPELINE: "#2a6fbb", Lane.ALL_TO_ALL: "#7a4fb5",
    Lane.GRADIENT: "#b5547a", Lane.PARAMETER: "#8a8f2a", Lane.D2H: "#d98324", Lane.REPLICATION: "#d1342f",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A span of a trace, in seconds of the host's monotonic clock."""

    rank: int
    lane: str
    begin_s: float
    end_s: float
    value: int
    """Bytes; on the lane ``iteration`` its number."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One rank's replication in some iterations, and its overlap with training's traffic."""

    rank: int
    replicated_bytes: int
    beside_traffic_s: float
    """Seconds in which slices and training's own sends were under way at once."""
    replicating_s: float


def read_traces(folder: Path) -> list[Bar]:
    """All spans below a folder; a truncated trace is read as far as it goes. ``ConfigError`` if there is none."""
    return [bar for path in _traces(folder) for bar in _read(path)]


def traced_ranks(folder: Path) -> set[int]:
    """Ranks with a trace below a folder, also those that were killed before anything was in it."""
    found = (re.match(r"rank(\d+)\.", path.name) for path in _traces(folder))
    return {int(match[1]) for match in found if match}


def _traces(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.trace.json"))
    if not paths:
        raise ConfigError(f"{folder} holds no *.trace.json; train with --moetion-trace-dir {folder}")
    return paths


def _read(path: Path) -> list[Bar]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; move it away, or make it readable") from error
    found = []
    for line in lines:
        text = line.strip().rstrip(",")
        if text in ("[", "]", ""):
            continue
        try:
            event: Any = json.loads(text)
        except (ValueError, RecursionError):
            break  # the process was killed in the middle of this line
        try:
            if event["ph"] == "X":
                found.append(_bar(event))
        except (StopIteration, *NOT_OURS) as error:
            raise ConfigError(f"{path} is not a trace of this version: {text[:80]}; move it away") from error
    return found


def _bar(event: dict[str, Any]) -> Bar:
    begin = float(event["ts"]) / 1e6
    return Bar(
        rank=int(event["pid"]),
        lane=LANES[event["tid"]],
        begin_s=begin,
        end_s=begin + float(event["dur"]) / 1e6,
        value=int(next(iter(event["args"].values()))),
    )


def between_iterations(bars: Sequence[Bar], first: int, last: int) -> list[Bar]:
    """The spans that overlap iterations ``first`` to ``last``, of the ranks that traced any of these.

    ``ConfigError`` if no rank did.
    """
    found: list[Bar] = []
    for rank in sorted({b.rank for b in bars}):
        mine = [b for b in bars if b.rank == rank]
        wanted = [b for b in mine if b.lane == "iteration" and first <= b.value <= last]
        if not wanted:
            continue
        begin, end = min(b.begin_s for b in wanted), max(b.end_s for b in wanted)
        found += wanted
        found += [b for b in mine if b.lane != "iteration" and b.begin_s < end and b.end_s > begin]
    if not found:
        known = sorted(b.value for b in bars if b.lane == "iteration")
        span = f"{known[0]} to {known[-1]}" if known else "none"
        raise ConfigError(f"no rank has an iteration in {first} to {last}; the traces hold {span}")
    return found


def middle_iterations(bars: Sequence[Bar]) -> tuple[int, int]:
    """Two iterations from the middle of a trace: the first ones are not typical."""
    numbers = sorted({b.value for b in bars if b.lane == "iteration"})
    if not numbers:
        raise ConfigError("the traces hold no whole iteration yet")
    middle = numbers[len(numbers) // 2]
    return middle, min(middle + 1, numbers[-1])


def overlap_with_traffic(bars: Sequence[Bar]) -> list[Overlap]:
    """For each rank, how long its replication and training's sends were under way together."""
    found = []
    for rank in sorted({b.rank for b in bars}):
        mine = [b for b in bars if b.rank == rank]
        slices = [b for b in mine if b.lane == "replication"]
        traffic = [b for b in mine if b.lane in _TRAFFIC_LANES and b.value]
        together = sum(max(0.0, min(a.end_s, b.end_s) - max(a.begin_s, b.begin_s)) for a in slices for b in traffic)
        found.append(
            Overlap(
                rank=rank,
                replicated_bytes=sum(b.value for b in slices),
                beside_traffic_s=together,
                replicating_s=sum(b.end_s - b.begin_s for b in slices),
            )
        )
    return found


def draw(bars: Sequence[Bar], path: Path) -> None:
    """A Gantt chart, one block of lanes a rank; the format follows the file's ending, one of ``FORMATS``."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"cannot draw {path}; its name must end in {', '.join(FORMATS)}")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'megatron-moetion[plots]'") from error
    ranks = sorted({b.rank for b in bars})
    lanes = [lane for lane in LANES if lane != "iteration" and any(b.lane == lane for b in bars)]
    first = min((b for b in bars if b.lane == "iteration"), key=lambda b: b.begin_s)
    origin = first.begin_s
    height = 0.26 * len(lanes) * len(ranks) + 1.2
    figure, axis = pyplot.subplots(figsize=(13, height), layout="constrained")
    labels, places = [], []
    for block, rank in enumerate(ranks):
        for row, lane in enumerate(lanes):
            y = -(block * (len(lanes) + 1) + row)
            spans = [(b.begin_s - origin, b.end_s - b.begin_s) for b in bars if (b.rank, b.lane) == (rank, lane)]
            axis.broken_barh(spans, (y - 0.42, 0.84), color=_COLORS[Lane(lane)], linewidth=0)
            labels.append(f"rank {rank}  {lane}" if row == 0 else lane)
            places.append(y)
        for bar in (b for b in bars if b.rank == rank and b.lane == "iteration"):
            top, bottom = -(block * (len(lanes) + 1)) + 0.6, -(block * (len(lanes) + 1) + len(lanes) - 1) - 0.6
            axis.vlines([bar.begin_s - origin, bar.end_s - origin], bottom, top, color="#444444", linewidth=0.8)
            if block == 0:
                middle = (bar.begin_s + bar.end_s) / 2 - origin
                axis.text(middle, 0.75, f"iteration {bar.value}", ha="center", va="bottom", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_ylim(min(places) - 0.8, 1.9)
    axis.set_xlabel(f"seconds since iteration {first.value} began")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file with -o") from error
    finally:
        pyplot.close(figure)
