# SPDX-License-Identifier: Apache-2.0
"""Published comparisons, as models. What is assumed, and what was published, is in ``papers.json``, with its source.

The models of other systems are ours, made from what is published of them. No formula here is attributed to a paper
unless it is said so. A figure that is not reproduced stays as it is, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cluster.faults import Faults, Outcome, Protection, simulate_faults
from benchmarks.cluster.sparsity import published
from megatron_moetion.plan.presets import MACHINES
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.survival import odds

DATA = Path(__file__).with_name("papers.json")
MTBF_S = {"10 min": 600.0, "19 min": 1140.0, "30 min": 1800.0, "1 h": 3600.0, "2 h": 7200.0}
NUM_FAULTS = 4000
MICRO_BATCHES = 16
"""Assumed, on larger clusters."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure and ours."""

    what: str
    paper: str
    unit: str
    published: float
    modelled: float | None
    """None: it cannot be modelled from what is known."""
    why: str
    """What it rests on; where the two differ, the reason."""

    @property
    def error(self) -> float | None:
        """Relative to what was published."""
        return None if self.modelled is None else self.modelled / self.published - 1


def data() -> tuple[dict[str, float], dict[str, Mapping[str, Any]]]:
    """Assumptions by name, and what was published."""
    found = json.loads(DATA.read_text())
    return {name: a["value"] for name, a in found["assumptions"].items()}, found["published"]


# -- other systems, as models --------------------------------------------------------------------------------


def window(
    given: Mapping[str, float], parameters: float, iteration_s: float, bytes_per_s: float, operators: int = 64
) -> int:
    """MoEvement's window: the fewest iterations whose worst slot fits an iteration, for a rank's equal operators.

    Its published search: of A active operators, 12 bytes a parameter for these and 2 for the others must fit.
    """
    each = parameters / operators
    full, frozen = given["bytes_a_parameter"], given["frozen_bytes_a_parameter"]
    for active in range(operators, 0, -1):
        if (full * active + frozen * (operators - active)) * each <= iteration_s * bytes_per_s:
            return math.ceil(operators / active)
    return operators


def best(make: Callable[[int], Protection], faults: Faults, number: int) -> tuple[int, Outcome]:
    """The interval with the highest ETTR, of powers of 1.3; ``make``: an interval's ``Protection``."""
    intervals = sorted({round(1.3**n) for n in range(30)})
    tried = ((i, simulate_faults(make(i), faults, number=number)) for i in intervals)
    return max(tried, key=lambda pair: pair[1].ettr)


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The models of other systems on one cluster: seconds that a whole checkpoint takes, by where it goes."""

    iteration_s: float
    to_memory_s: float
    """To another node's memory, over all of a node's bandwidth."""
    to_store_s: float
    window: int
    replay_share: float
    """MoEvement: time of a replayed iteration of one stage, without the pipeline's bubble."""

    def gemini(self, interval: int) -> Protection:
        """All state into another node's memory; in the gaps, so that it costs only what does not fit its interval."""
        late_s = max(0.0, self.to_memory_s - interval * self.iteration_s)
        return Protection(
            iteration_s=self.iteration_s + late_s / interval,
            useful_s=self.iteration_s,
            interval=interval,
            delay_s=self.to_memory_s,
        )

    def checkfreq(self, interval: int) -> Protection:
        """All state to storage beside training; the next one waits for the one before."""
        late_s = max(0.0, self.to_store_s - interval * self.iteration_s)
        return Protection(
            iteration_s=self.iteration_s + late_s / interval,
            useful_s=self.iteration_s,
            interval=interval,
            delay_s=self.to_store_s,
            replicas=None,
        )

    def moevement(self, overhead: float = 0.02) -> Protection:
        """A window is whole at its end and is gone back to; until the next one is, so 1.5 windows on average."""
        return Protection(
            iteration_s=self.iteration_s * (1 + overhead),
            useful_s=self.iteration_s,
            interval=self.window,
            delay_s=self.window * self.iteration_s,
            replay_share=self.replay_share,
        )


def peers(given: Mapping[str, float]) -> Peers:
    """On the cluster of MoEvement's evaluation."""
    state = given["parameters"] * given["bytes_a_parameter"]
    bubble = given["micro_batches"] / (given["micro_batches"] + given["stages"] - 1)
    rank_link = given["node_bytes_per_s"] / given["gpus_a_node"]
    parameters = given["parameters"] / (given["nodes"] * given["gpus_a_node"])
    return Peers(
        iteration_s=given["iteration_s"],
        to_memory_s=state / given["nodes"] / given["node_bytes_per_s"],
        to_store_s=state / given["store_bytes_per_s"],
        window=window(given, parameters, given["iteration_s"], rank_link / 2),
        replay_share=bubble,
    )


# -- the table -----------------------------------------------------------------------------------------------


def rows(number: int = NUM_FAULTS) -> list[Row]:
    """Every published figure that we know of, with ours; ``number`` of faults in a run."""
    given, known = data()
    modelled = _modelled(given, number)
    assert set(modelled) == set(known), "every published figure has a model, or a reason why there is none"
    return [
        Row(
            what=str(of["what"]),
            paper=str(of["paper"]),
            unit=str(of["unit"]),
            published=float(of["value"]),
            modelled=modelled[name][0],
            why=modelled[name][1],
        )
        for name, of in known.items()
    ]


def _modelled(given: Mapping[str, float], number: int) -> dict[str, tuple[float | None, str]]:
    model, faults = peers(given), Faults(mtbf_s=600.0, nodes=int(given["nodes"]), node_share=0.0)
    nodes = [str(n) for n in range(int(given["gemini_nodes"]))]
    groups = place(nodes, 1)
    ring = replace(
        groups,
        holders=tuple(((n + 1) % len(nodes),) for n in range(len(nodes))),
        groups=(tuple(range(len(nodes))),),
    )
    gemini_state = given["gemini_parameters"] * given["bytes_a_parameter"]
    from_store_s = gemini_state / given["gemini_store_bytes_per_s"]
    from_memory_s = gemini_state / given["gemini_nodes"] / given["gemini_node_bytes_per_s"]
    length = 3
    hours_s = given["hours"] * 3600
    rank_parameters = given["parameters"] / (given["nodes"] * given["gpus_a_node"])
    pcie = window(given, rank_parameters, given["iteration_s"], given["pcie_bytes_per_s"])
    found = {mtbf: _ettr(model, replace(faults, mtbf_s=MTBF_S[mtbf]), number) for mtbf in ("10 min", "19 min", "2 h")}
    blocked = 1 + model.to_memory_s / given["iteration_s"]
    recovery_s = 1.5 * model.window * given["iteration_s"] * model.replay_share
    interval_of = {name: f"every {each[1]} iterations" for name, each in found["10 min"].items()}
    moc = 1 / (1 + 4.7)
    return {
        "gemini_survives_2": (float(odds(groups, 2)), "the product's placement and its odds"),
        "gemini_survives_3": (float(odds(groups, 3)), "the product's placement and its odds"),
        "gemini_ring_2": (float(odds(ring, 2)), "the product's odds of a ring"),
        "gemini_retrieval": (
            from_store_s / from_memory_s,
            "bytes over bandwidth at both ends; a real transfer over 400 Gbit/s does not reach the line's rate",
        ),
        "gemini_frequency": (None, "the iteration's time is not in what we could read; 8 fits one of 60 s"),
        "moc_size": (
            1 - given["moc_expert_share"] * (1 - 1 / given["moc_experts"]),
            "MoC's own equation with its own shares; the paper's figure is not explained by it",
        ),
        "moevement_saved": (1 - (2 + 10 / length) / 12, "a window of 3, its largest iteration; 0.61 on average"),
        "moevement_memory": ((length - 1) / 12, "a window of 3, equal operators"),
        "moevement_recovery_s": (
            recovery_s,
            f"1.5 windows of {model.window} (by the network, 2 peers; by PCIe alone the search gives {pcie}), replayed "
            f"by one stage without the bubble; the iteration's time is inferred, and a shorter one fits",
        ),
        "gemini_slowdown": (
            blocked,
            f"if nothing overlaps; {max(1.0, model.to_memory_s / given['iteration_s']):.2f} if all does. The published "
            f"figure needs more bytes, or less than the line's rate",
        ),
        "checkfreq_ettr_10m": (
            found["10 min"]["CheckFreq"][0],
            f"at the interval that is best for it, {interval_of['CheckFreq']}; the published seconds of recovery fit "
            f"an interval of some 200, which is not in what we could read",
        ),
        "gemini_ettr_10m": (
            found["10 min"]["GEMINI"][0],
            f"at the interval that is best for it, {interval_of['GEMINI']}; the published seconds fit one of 60 to 86",
        ),
        "gemini_ettr_2h": (found["2 h"]["GEMINI"][0], "the same"),
        "moc_ettr_10m": (moc, "1 / (1 + 470% of overhead), without recoveries: they are not in what we could read"),
        "moevement_ettr_10m": (found["10 min"]["MoEvement"][0], "2% of overhead as published, the recovery above"),
        "checkfreq_consistent": (1 - 13086 / hours_s, "13,086 s of 12 h, no overhead"),
        "gemini_consistent": ((1 - 4627 / hours_s) / 1.15, "4,627 s of 12 h, 15% of overhead"),
        "moevement_consistent": ((1 - 241 / hours_s) / 1.02, "241 s of 12 h, 2% of overhead"),
        "goodput_checkfreq": (
            found["19 min"]["MoEvement"][0] / found["19 min"]["CheckFreq"][0],
            "as for ETTR: CheckFreq at its best interval",
        ),
        "goodput_gemini": (
            found["19 min"]["MoEvement"][0] / found["19 min"]["GEMINI"][0],
            "as for ETTR: GEMINI at its best interval loses little",
        ),
        "goodput_moc": (None, "how MoC's share of experts grows in that run is not in what we could read"),
        "v1_smaller": (
            1 / (1 - given["expert_share"] * (1 - 1 / 19)),
            "1 of 19 experts of this model's ranks; 9 needs an expert share of 0.89 and no expert at all, or 0.94 "
            "and 1 of 19. How v1 chooses is not public: this is our mode's arithmetic",
        ),
        "v1_frequency": (None, "v1's cluster and iteration are not public"),
    }


def _ettr(model: Peers, faults: Faults, number: int) -> dict[str, tuple[float, int]]:
    """ETTR and interval of each system."""
    checkfreq, gemini = best(model.checkfreq, faults, number), best(model.gemini, faults, number)
    moevement = simulate_faults(model.moevement(), faults, number=number)
    return {
        "CheckFreq": (checkfreq[1].ettr, checkfreq[0]),
        "GEMINI": (gemini[1].ettr, gemini[0]),
        "MoEvement": (moevement.ettr, model.window),
    }


def peers_at_scale(given: Mapping[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """ETTR of the other systems' models on the same runs: by run, by system, by MTBF."""
    machine = MACHINES["dgx-h100"]
    found = {}
    for run in published():
        link = machine.interface_gb_per_s * 1e9
        node_bytes = run.state.parameters * given["bytes_a_parameter"] * machine.gpus
        model = Peers(
            iteration_s=run.iteration_s,
            to_memory_s=node_bytes / link,
            to_store_s=node_bytes / given["store_bytes_per_s_a_node"],
            window=window(
                given, run.state.parameters, run.iteration_s, link / machine.gpus / 2, max(run.state.num_experts, 1)
            ),
            replay_share=MICRO_BATCHES / (MICRO_BATCHES + 1),
        )
        trace_s = given["mtbf_trace_s"] * 16384 / (run.nodes * machine.gpus)
        of_run: dict[str, dict[str, float]] = {}
        for name, mtbf in (MTBF_S | {"trace": trace_s}).items():
            faults = Faults(mtbf_s=mtbf, nodes=run.nodes, node_share=0.0)
            for system, (ettr, _) in _ettr(model, faults, NUM_FAULTS // 4).items():
                of_run.setdefault(system, {})[name] = ettr
        found[run.name] = of_run
    return found
