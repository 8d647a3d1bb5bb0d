# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures in docs/images anew from what is in benchmarks/results: ``python benchmarks/pictures.py``.

``quickstart.png`` and ``schedule.png`` need a run: ``scripts/quickstart.sh``, and ``moetion report`` over traces.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import exact_mode, replication_overhead
from benchmarks.accuracy_under_faults import tables
from benchmarks.cluster import draw as cluster
from benchmarks.peers import tables as peers
from benchmarks.soak import tables as soak

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OTHERS = ("exact_mode", "accuracy_under_faults", "soak", "peers", "where_sparsity_pays", "cluster_model")
SWEEPS = ("replication_overhead", "replication_overhead_batch8", "replication_overhead_pp1_first")


def draw_all(folder: Path) -> list[Path]:
    """Every picture whose figures are committed, in a folder; returns what was written."""
    for name in SWEEPS:
        replication_overhead.plot(figures(name), folder / f"{name}.png")
    exact_mode.plot(figures("exact_mode"), exact_mode.FULL_SIZE, folder / "exact_mode.png")
    tables.draw(tables.read(RESULTS / "accuracy_under_faults"), folder / "accuracy_under_faults.png")
    soak.draw(soak.read(RESULTS / "soak"), folder / "soak.png")
    peers.draw(peers.read(RESULTS / "peers"), folder / "peers.png")
    cluster.where_sparsity_pays(folder / "where_sparsity_pays.png")
    cluster.model(figures("cluster_testbed"), figures("cluster_routing"), folder / "cluster_model.png")
    return sorted(folder / f"{name}.png" for name in (*SWEEPS, *OTHERS))


def figures(benchmark: str) -> dict[str, float | None]:
    """Values of a benchmark's results by name."""
    document = json.loads((RESULTS / f"{benchmark}.json").read_text())
    return {result["name"]: result["value"] for result in document["results"]}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=ROOT / "docs" / "images", help="default: docs/images")
    print("\n".join(map(str, draw_all(options.parse_args().folder))))
