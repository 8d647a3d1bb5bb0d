# SPDX-License-Identifier: Apache-2.0
"""The quickstart's picture: what happened to the loss, and how long the recovery took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from quickstart_summary import Run, differences

# Okabe and Ito's palette: told apart also by colour-blind readers.
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED = "#222222", "#8c8c8c", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
PHASES = {
    "detect": ("notice the loss, start processes", GREY),
    "restart": ("import libraries, build the model", "#c4c4c4"),
    "survey": ("read what is in memory", SKY),
    "network": ("measure the network", "#A6761D"),
    "fetch": ("fetch from the other node", BLUE),
    "verify": ("verify", "#CC79A7"),
    "pin": ("pin memory for the GPU", "#8DD3C7"),
    "replicate": ("copy to the other node again", "#B07CC6"),
    "restore": ("write state into the model", GREEN),
    "resync": ("gather parameters", "#F0E442"),
    "epoch": ("note the recovery", BLACK),
    "first_step": ("first iteration", ORANGE),
}
"""What a recovery's phases are called in the picture, and their colours."""
_SHOWN_S = 0.005
"""Phases that are shorter cannot be seen, such as those of a GPU where there is none."""
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def draw(path: Path, reference: Run, runs: Sequence[Run], entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes the picture: one column a run (losses above, distance to the fault-free run below), then the recoveries.

    ``entries`` are the entries of ``summary.json``, in the order of ``runs``.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(6.2 * len(runs), 7.6), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.12)
        grid = figure.add_gridspec(3, len(runs), height_ratios=[4.2, 1.2, 0.55 + 0.5 * len(runs)])
        figure.suptitle(
            "A node is lost in the middle of training; its state comes back from another node's memory "
            "(each mode with its default settings)",
            fontsize=14, fontweight="bold", x=0.012, ha="left",
        )  # fmt: skip
        top: Axes | None = None
        for column, (run, entry) in enumerate(zip(runs, entries, strict=True)):
            losses = figure.add_subplot(grid[0, column], sharey=top)
            top = top or losses
            _draw_losses(losses, reference, run, entry)
            _draw_differences(figure.add_subplot(grid[1, column], sharex=losses), reference, run, entry)
        _draw_recoveries(figure.add_subplot(grid[2, :]), entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(axes: Axes, reference: Run, run: Run, entry: Mapping[str, Any]) -> None:
    killed, resumed = entry["killed_at_iteration"], entry["resumed_from_iteration"]
    before = run.curve_of_attempt(0)
    # From the recovered point on: its own loss is the one that the first attempt saw.
    after = {i: before.get(i, loss) if i == resumed else loss for i, loss in run.curve().items() if i >= resumed}
    axes.plot(*_points(reference.curve()), color=ORANGE, linewidth=6, alpha=0.45, solid_capstyle="round",
              label="fault-free run")  # fmt: skip
    axes.plot(*_points(before), color=BLACK, linewidth=1.6, label="this run, before the fault")
    axes.plot(*_points(after), color=BLUE, linewidth=1.6, label="this run, after the recovery")
    _mark_fault(axes, entry)
    if resumed in before:
        axes.plot([resumed], [before[resumed]], "o", color=GREEN, markersize=9, markeredgecolor="white", zorder=5,
                  label=f"state recovered: iteration {resumed}")  # fmt: skip
    seconds = sum(entry["recovery_seconds"].values())
    lost = entry["lost_iterations"]
    text = (
        f"node 1 is lost at iteration {killed}:\nprocesses and memory gone\n"
        f"training again after {seconds:.0f} s,\n{lost} iteration{'' if lost == 1 else 's'} of work lost"
    )
    axes.annotate(text, xy=(killed, 0.97), xycoords=("data", "axes fraction"), xytext=(10, 0),
                  textcoords="offset points", va="top", color=RED)  # fmt: skip
    axes.set_title(_title(entry), fontweight="bold")
    axes.set_ylabel("training loss (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(0.505, 0.72), fontsize=9)
    axes.tick_params(labelbottom=False)


def _title(entry: Mapping[str, Any]) -> str:
    mean, full = entry["snapshot_bytes_mean"], entry["snapshot_bytes_full"]
    if not mean or not full:
        return f"mode {entry['mode']}"
    share = "all of the state" if mean >= full else f"{100 * mean / full:.0f}% of the state"
    return f"mode {entry['mode']}: {share} every iteration"


def _draw_differences(axes: Axes, reference: Run, run: Run, entry: Mapping[str, Any]) -> None:
    distances = differences(run, reference)
    largest = max(distances.values())
    axes.plot(*_points(distances), color=BLUE, linewidth=1.6)
    _mark_fault(axes, entry)
    axes.set_ylim(-0.04, 1.0) if largest == 0 else axes.set_ylim(-0.04 * largest, 1.45 * largest)
    if largest == 0:
        axes.set_yticks([0.0])
        text, color = "bitwise equal:\nlargest difference 0.0", GREEN
    else:
        text, color = f"largest difference {largest:.2g}", BLUE
    if entry["plt"]:
        text += f"\n{100 * entry['plt']:.2g}% of tokens lost"
    axes.annotate(text, xy=(0.012, 0.94), xycoords="axes fraction", va="top", color=color, fontweight="bold")
    axes.set_ylabel("difference\nto fault-free")
    axes.set_xlabel("iteration")


def _draw_recoveries(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    """One stacked bar a run: the seconds from the kill to the end of the first step, by phase."""
    named: set[str] = set()
    longest = max(sum(e["recovery_seconds"].values()) for e in entries)
    for row, entry in enumerate(entries):
        left = 0.0
        for phase, seconds in entry["recovery_seconds"].items():
            if seconds < _SHOWN_S:
                continue
            label, color = PHASES.get(phase, (phase, BLACK))
            axes.barh(row, seconds, left=left, height=0.62, color=color,
                      edgecolor="white", linewidth=0.8, label=None if phase in named else label)  # fmt: skip
            if seconds > 0.035 * longest:
                axes.text(left + seconds / 2, row, f"{seconds:.1f}", ha="center", va="center", fontsize=9,
                          color="white" if phase in ("fetch", "detect", "restore") else BLACK)  # fmt: skip
            named.add(phase)
            left += seconds
        axes.text(left + 0.008 * longest, row, f"{left:.1f} s", va="center", fontweight="bold")
    axes.set_yticks(range(len(entries)), [f"mode {e['mode']}" for e in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 * longest)
    axes.set_xlabel("seconds since the node was lost")
    axes.set_title("How long it took until training went on", fontweight="bold")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=-(-len(named) // 2),
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.0,
        handletextpad=0.4,
    )


def _mark_fault(axes: Axes, entry: Mapping[str, Any]) -> None:
    """The fault as a line, the iterations that were trained twice as a band."""
    killed, resumed = entry["killed_at_iteration"], entry["resumed_from_iteration"]
    last = resumed + max(entry["lost_iterations"], 0)
    axes.axvline(killed, color=RED, linewidth=1.4, linestyle=(0, (4, 2)))
    if last > resumed:
        axes.axvspan(resumed, last, color=RED, alpha=0.12, linewidth=0)


def _points(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    iterations = sorted(curve)
    return iterations, [curve[i] for i in iterations]
