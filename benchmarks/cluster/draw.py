# SPDX-License-Identifier: Apache-2.0
"""Pictures of the cluster model, from committed results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.cluster import routing, sparsity

WORDS = {
    "unsaved-tokens": ("popularity: most unsaved tokens", "#D55E00"),
    "sequential": ("sequential: in turn", "#0072B2"),
    "random": ("random", "#999999"),
    "popularity-ema": ("popularity: most recent tokens", "#E69F00"),
}
LETTERS = "ABCD"
"""Published models, in the order of ``sparsity.RUNS``."""
ARMS = {
    "off": ("iteration without snapshots", "#222222", "o"),
    "full-eager": ("full, at once: ratio", "#999999", "s"),
    "popularity-eager": ("popularity, at once: ratio", "#E69F00", "^"),
    "popularity-bubble": ("popularity, in the gaps: ratio", "#D55E00", "D"),
}


def where_sparsity_pays(path: Path) -> None:
    """The mode that a run takes, by state and iteration, one panel for each link and memory; dashed: 8 bytes."""
    pyplot, patches, lines = _matplotlib()
    runs = sparsity.published()
    rows, columns = len(sparsity.NODE_GIB), len(sparsity.NODE_GB_PER_S)
    figure, axes = pyplot.subplots(rows, columns, figsize=(12, 7.6), sharex=True, sharey=True, layout="constrained")
    gib, least, most = sparsity.PARAMETERS * 12 / 2**30, 0.1, 100.0
    for panel in sparsity.PANELS:
        axis = axes[sparsity.NODE_GIB.index(panel.node_gib), sparsity.NODE_GB_PER_S.index(panel.node_gb_per_s)]
        edges = sparsity.edges(panel, sparsity.PARAMETERS)
        if panel.bytes_a_parameter != 12:
            axis.plot(gib, edges["full"], color="black", linestyle="dashed", linewidth=1.3)
            continue
        above = np.full_like(gib, most)
        for mode, colour in zip(sparsity.STRONGEST_FIRST, sparsity.COLOURS, strict=False):
            axis.fill_between(gib, np.minimum(edges[mode], above), above, color=colour, linewidth=0)
            above = np.minimum(edges[mode], above)
        axis.fill_between(gib, least, above, color=sparsity.COLOURS[-1], linewidth=0)
        axis.set_title(f"{panel.node_gb_per_s:g} GB/s and {panel.node_gib} GiB a node", fontsize=10, loc="left")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(gib[0], gib[-1])
        axis.set_ylim(least, most)
        axis.set_xticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
        axis.set_xticks([], minor=True)
        axis.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        for letter, run in zip(LETTERS, runs, strict=True):
            x = run.state.parameters * 12 / 2**30
            axis.plot(x, run.iteration_s, "o", color="white", markeredgecolor="black", markersize=12)
            axis.annotate(letter, (x, run.iteration_s), ha="center", va="center", fontsize=8, fontweight="bold")
    for axis in axes[-1]:
        axis.set_xlabel("state of a rank (GiB, 12 bytes a parameter)")
    for axis in axes[:, 0]:
        axis.set_ylabel("iteration (s)")
    words = ("full: all state", "exact: a slice and all gradients", "popularity: dense state and some experts",
             "nothing fits")  # fmt: skip
    shown = [patches.Patch(color=c, label=w) for c, w in zip(sparsity.COLOURS, words, strict=True)]
    shown.append(lines.Line2D([], [], color="black", linestyle="dashed", label="edge of full at 8 bytes a parameter"))
    shown += [
        lines.Line2D([], [], color="white", marker=f"${letter}$", markerfacecolor="black", markeredgecolor="black",
                     markersize=8, label=run.name)
        for letter, run in zip(LETTERS, runs, strict=True)
    ]  # fmt: skip
    figure.legend(handles=shown, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "The strongest mode that fits, with a snapshot every iteration", fontweight="bold", x=0.01, ha="left"
    )
    _save(pyplot, figure, path)


def model(testbed: Mapping[str, float | None], routed: Mapping[str, float | None], path: Path) -> None:
    """Left: what the model predicts of the testbed. Right: what choosing experts by their tokens is worth."""
    pyplot, _, _ = _matplotlib()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for arm, (words, colour, mark) in ARMS.items():
        pairs = [
            (value, testbed[name.removesuffix(", measured") + ", predicted"])
            for name, value in testbed.items()
            if re.search(rf"^predicted: .*: {arm}, measured$", name)
        ]
        left.plot(*zip(*pairs, strict=True), mark, color=colour, label=words, markersize=5)
    span = np.array([0.45, 6.0])
    left.plot(span, span, color="#444444", linewidth=0.8)
    left.fill_between(span, span * 0.95, span * 1.05, color="#DDDDDD", label="within 5%", linewidth=0)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlim(*span)
    left.set_ylim(*span)
    ticks = [0.5, 1, 2, 3, 4, 6]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ticks([], minor=True)
    left.set_xlabel("measured on the testbed (seconds; ratios)")
    left.set_ylabel("predicted")
    left.set_title("Configurations that the model had not seen", loc="left", fontweight="bold")
    left.legend(frameon=False, fontsize=8.5)
    places, width = np.arange(len(routing.ROUTING)), 0.2
    for number, (policy, (words, colour)) in enumerate(WORDS.items()):
        heights = [routed[f"{kind}: {policy}"] or 0.0 for kind in routing.ROUTING]
        right.bar(places + (number - 1.5) * width, heights, width, color=colour, label=words)
    right.axhline(routing.even_bound(), color="black", linewidth=0.9, linestyle="dashed",
                  label="best possible with even routing")  # fmt: skip
    right.set_xticks(places, [kind.replace(", ", ",\n") for kind in routing.ROUTING])
    right.set_ylabel("tokens that a fault loses (iterations' worth)")
    right.set_title(
        f"{routing.CHOSEN} of {routing.EXPERTS} experts a snapshot: what choice is worth", loc="left", fontweight="bold"
    )
    right.set_ylim(0, 34)
    right.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    _save(pyplot, figure, path)


def _matplotlib():  # noqa: ANN202
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, patches, pyplot

    return pyplot, patches, lines


def _save(pyplot, figure, path: Path) -> None:  # noqa: ANN001
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
