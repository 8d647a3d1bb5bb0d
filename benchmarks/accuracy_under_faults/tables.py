# SPDX-License-Identifier: Apache-2.0
"""Paired differences with their intervals, and what goes with them. Pure, but for reading and drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import Result, at_least, at_most
from benchmarks.accuracy_under_faults.study import (
    FIXED_FAULTS,
    MARGIN,
    MODELS,
    OLD_CHECKPOINT_ITERATIONS,
    POWER,
    TRAIN_ITERATIONS,
)
from megatron_moetion.config import MoetionConfig

Run = dict[str, Any]
Runs = Mapping[str, Mapping[str, Mapping[int, Run]]]
"""By model, arm and seed."""

LOST_TOKEN_BUDGET = MoetionConfig().lost_token_budget
BASE = "fault-free"
WITHIN_BUDGET = ("default", "recalibrated", "recalibrated-random-faults")
"""Arms that are expected to be as good as a run without faults."""
OLD = f"restart, {OLD_CHECKPOINT_ITERATIONS} iterations old"
IN_PICTURES = {
    "default": "default settings",
    "recalibrated": "with capacity recalibration",
    "recalibrated-random-faults": "with recalibration, faults at random",
    "small-k": "few experts a snapshot",
    "small-k-recalibrated": "few experts, with recalibration",
    "small-k-sequential-recalibrated": "few experts in turn, with recalibration",
    "small-k-current-moments": "few experts, moments of the fault",
    "small-k-recalibrated-current-moments": "few experts, recalibration, moments of the fault",
    "control": "control: one expert a snapshot, 27 faults",
    OLD: f"restart from a checkpoint {OLD_CHECKPOINT_ITERATIONS} iterations old",
}
"""Arms in words, in the order of the picture."""
SHOWN = (-0.03, 0.07)
"""Nats that the picture shows; what is beyond is written in it."""
_STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t, by degrees of freedom."""


def read(folder: Path) -> Runs:
    """All results in a folder."""
    found: dict[str, dict[str, dict[int, Run]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        found.setdefault(run["model"], {}).setdefault(run["arm"], {})[run["seed"]] = run
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval (Student's t); NaN ends with a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = _STUDENT[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def differences(arms: Mapping[str, Mapping[int, Run]], arm: str) -> list[float]:
    """Validation loss of an arm less that of the same seed without faults; positive is worse."""
    base = arms[BASE]
    if arm == OLD:
        # Work is lost and done again bitwise, so in as many executed iterations the run comes only so far.
        reached = str(TRAIN_ITERATIONS - len(FIXED_FAULTS) * OLD_CHECKPOINT_ITERATIONS)
        return [run["curve"][reached] - run["loss"] for run in base.values() if reached in run["curve"]]
    return [run["loss"] - base[seed]["loss"] for seed, run in arms[arm].items() if seed in base]


def top_share(run: Run) -> float:
    """Share of tokens that the most popular eighth of a layer's experts get, mean over layers."""
    shares = []
    for loads in run["loads"]:
        ordered = sorted(loads, reverse=True)
        shares.append(sum(ordered[: max(1, len(loads) // 8)]) / sum(loads))
    return float(np.mean(shares))


def dropped_share(runs: Sequence[Run], when: str) -> float | None:
    """Tokens dropped, of those routed, at all looks of a kind (``Recalibration``); None where routers do not tell."""
    layers = [t for run in runs for look in run.get("layer_tokens", ()) if look["when"] == when
              for t in look["layers"].values()]  # fmt: skip
    routed = sum(t["routed"] for t in layers)
    return sum(t["dropped"] for t in layers) / routed if routed else None


def order(arms: Mapping[str, Any]) -> list[str]:
    """The arms to show, the restart from an old checkpoint last."""
    return [arm for arm in arms if arm != BASE] + [OLD]


def table(runs: Runs) -> str:
    """Markdown, one table a model."""
    parts = []
    for model, arms in runs.items():
        base = arms.get(BASE, {})
        if not base:
            continue
        losses = [run["loss"] for run in base.values()]
        skew = float(np.mean([top_share(run) for run in base.values()]))
        parts.append(
            f"**{model}**: loss without faults {np.mean(losses):.3f} ({len(losses)} seeds, standard deviation "
            f"{np.std(losses, ddof=1) if len(losses) > 1 else math.nan:.3f}); the most popular eighth of the experts "
            f"get {skew:.0%} of the tokens\n"
        )
        parts.append(
            "| arm | seeds | difference of loss (95%) | PLT at worst | tokens lost | dropped before, after, later "
            "| bytes, full = 1 |"
        )
        parts.append("| --- | --- | --- | --- | --- | --- | --- |")
        for arm in order(arms):
            found = differences(arms, arm)
            if not found:
                continue
            mean, low, high = interval(found)
            ends = "" if math.isnan(low) else f" ({low:+.4f} to {high:+.4f})"
            own = list(arms.get(arm, {}).values())
            plt = f"{max(run['plt'] for run in own):.2%}" if own else "0"
            lost = f"{np.mean([run.get('lost_tokens', 0) for run in own]):,.0f}" if own else "0"
            sizes = [run["bytes"] / run["bytes_full"] for run in own if "bytes" in run]
            size = f"{np.mean(sizes):.3f}" if sizes else ""
            shares = [dropped_share(own, when) for when in ("before", "after", "repaid")]
            dropped = ", ".join(f"{s:.0%}" for s in shares if s is not None)
            parts.append(f"| {arm} | {len(found)} | {mean:+.4f}{ends} | {plt} | {lost} | {dropped} | {size} |")
        parts.append("")
    return "\n".join(parts)


def figures(runs: Runs) -> list[Result]:
    """All differences, and the targets."""
    found: list[Result] = []
    for model, arms in runs.items():
        if BASE not in arms:
            continue
        for arm in order(arms):
            values = differences(arms, arm)
            if not values:
                continue
            mean, low, high = interval(values)
            is_default = arm in WITHIN_BUDGET and len(values) > 1
            name = f"{model}: {arm}: difference of loss"
            found.append(Result(name=name, value=mean, unit="nats"))
            if len(values) > 1:
                found.append(Result(name=f"{name}, lower end", value=low, unit="nats"))
                upper = f"{name}, upper end"
                found.append(
                    at_most(upper, high, "nats", MARGIN) if is_default else Result(name=upper, value=high, unit="nats")
                )
            own = list(arms.get(arm, {}).values())
            if own and "bytes" in own[0]:
                worst = max(run["plt"] for run in own)
                name = f"{model}: {arm}: PLT at worst"
                found.append(
                    at_most(name, worst, "share", LOST_TOKEN_BUDGET)
                    if arm in WITHIN_BUDGET
                    else Result(name=name, value=worst, unit="share")
                )
                size = float(np.mean([run["bytes_full"] / run["bytes"] for run in own]))
                found.append(Result(name=f"{model}: {arm}: full / bytes of a snapshot", value=size, unit="x"))
        found += _comparisons(model, arms)
    return found


def _comparisons(model: str, arms: Mapping[str, Mapping[int, Run]]) -> list[Result]:
    found: list[Result] = []
    control = differences(arms, "control") if "control" in arms else []
    if len(control) > 1:
        _, low, _ = interval(control)
        found.append(at_least(f"{model}: positive control, lower end", low, "nats", POWER))
    repayable = [run["repayable"] for run in arms[BASE].values() if "repayable" in run]
    for name in repayable[0] if repayable else ():
        share = float(np.mean([shares[name] for shares in repayable]))
        found.append(Result(name=f"{model}: share of lost tokens made up for, {name}", value=share, unit="share"))
    if "full" in arms:
        worst = max(abs(d) for d in differences(arms, "full"))
        found.append(at_most(f"{model}: full against fault-free, largest difference", worst, "nats", 0.0))
    ours, theirs = arms.get("small-k-recalibrated", {}), arms.get("small-k-sequential-recalibrated", {})
    both = sorted(set(ours) & set(theirs))
    if both:
        ratios = [theirs[s]["lost_tokens"] / max(ours[s]["lost_tokens"], 1) for s in both]
        found.append(at_least(f"{model}: tokens lost, sequential / unsaved-tokens", min(ratios), "x", 2.0))
    for what, other, words in (
        ("recalibrated", "default", "recalibration on, less off"),
        ("small-k-recalibrated", "small-k", "recalibration on, less off"),
        ("small-k-recalibrated", "small-k-sequential-recalibrated", "unsaved-tokens, less sequential"),
        ("small-k", "small-k-current-moments", "moments as captured, less moments of the fault"),
        (
            "small-k-recalibrated",
            "small-k-recalibrated-current-moments",
            "moments as captured, less moments of the fault",
        ),
    ):
        ours, theirs = arms.get(what, {}), arms.get(other, {})
        both = sorted(set(ours) & set(theirs))
        if len(both) > 1:
            mean, low, high = interval([ours[s]["loss"] - theirs[s]["loss"] for s in both])
            name = f"{model}: {what}: {words}"
            found += [
                Result(name=name, value=mean, unit="nats"),
                Result(name=f"{name}, lower end", value=low, unit="nats"),
                Result(name=f"{name}, upper end", value=high, unit="nats"),
            ]
    return found


def draw(runs: Runs, path: Path) -> None:
    """Differences with their intervals, one panel a model with several seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = [m for m, arms in runs.items() if len(arms.get(BASE, {})) > 1]
    panels = max(len(models), 1)
    fig, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 4.8), squeeze=False, sharey=True, layout="constrained")
    for panel, model in zip(axes[0], models, strict=False):
        arms = runs[model]
        names = [arm for arm in IN_PICTURES if (arm in arms or arm == OLD) and len(differences(arms, arm)) > 1]
        for height, arm in enumerate(reversed(names)):
            values = differences(arms, arm)
            mean, low, high = interval(values)
            if mean > SHOWN[1]:
                panel.annotate(f"{mean:+.2f} →", (SHOWN[1], height), ha="right", va="center", color="tab:blue")
                continue
            panel.plot(values, [height] * len(values), ".", color="0.7", label="one seed")
            panel.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="o", capsize=4, color="tab:blue",
                           label="mean, with its 95% interval")  # fmt: skip
        panel.axvspan(-MARGIN, MARGIN, color="tab:green", alpha=0.12, label=f"margin, {MARGIN} nats")
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_yticks(range(len(names)), [IN_PICTURES[arm] for arm in reversed(names)])
        panel.set_xlim(*SHOWN)
        panel.set_ylim(-0.7, len(names) - 0.3)
        panel.set_xlabel("difference of validation loss (nats)")
        panel.set_title(f"{MODELS[model].experts} experts, {len(arms[BASE])} seeds")
    if models:
        handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
        fig.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=3, fontsize=9, frameon=False)
    fig.suptitle("Training with faults against training without; what stays below the margin is as good")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
