# SPDX-License-Identifier: Apache-2.0
"""The model of a cluster: ``python -m benchmarks.cluster testbed|papers|sparsity|routing``.

testbed     fits the model to some measured configurations and predicts the others; ``--measure`` measures them anew
papers      published comparisons as models, and our modes on the same cluster and on larger ones
sparsity    where each mode is the strongest that fits
routing     what choosing experts by their tokens is worth, by how even routing is
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._common import Result, hardware, parser, report
from benchmarks.cluster import calibrate, ours, papers, routing, sparsity

ROOT = Path(__file__).resolve().parent.parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "cluster_measured.json"
RESTART = ROOT / "benchmarks" / "results" / "restart.json"
TOLERANCE = 0.05
LAYOUTS = ((2, 2), (1, 4))
UNITS = {
    "micro_batch_s": "s",
    "fixed_s": "s",
    "weight": "x",
    "link_share": "share",
    "snapshot_s": "s",
    "byte_s": "s/byte",
}


def testbed(args: Any) -> list[Result]:
    """Known configurations, then predicted ones."""
    if args.measure:
        _measure(args.measured, quick=args.quick)
    results = []
    compared: list[tuple[str, calibrate.Compared]] = []
    for title, measured in _sets(args.measured).items():
        known = [m for m in measured if m["configuration"]["is_known"]]
        traffic = calibrate.traffic(known)
        found = calibrate.fit(known, traffic)
        results += [Result(name=f"{title}: {name}", value=value, unit=UNITS[name]) for name, value in found.items()]
        compared += [(title, figure) for each in measured for figure in calibrate.compare(each, found, traffic)]
    for title, each in compared:
        kind = "known" if each.configuration["is_known"] else "predicted"
        rate = each.configuration["rate_mbit"]
        link = "unlimited" if rate is None else f"{rate:g} Mbit/s"
        name = f"{kind}: {title}, {each.configuration['batch']} sequences, {link}"
        unit = "s" if each.arm == "off" else "x"
        results += [
            Result(name=f"{name}: {each.arm}, measured", value=each.measured, unit=unit),
            Result(name=f"{name}: {each.arm}, lowest cycle", value=each.low, unit=unit),
            Result(name=f"{name}: {each.arm}, highest cycle", value=each.high, unit=unit),
            Result(name=f"{name}: {each.arm}, predicted", value=each.predicted, unit=unit),
            Result(
                name=f"{name}: {each.arm}, error",
                value=each.error,
                unit="share",
                target=None if kind == "known" else f"within {TOLERANCE:g}",
                met=None if kind == "known" else abs(each.error) <= TOLERANCE,
            ),
        ]
    return results


def _sets(path: Path) -> dict[str, list[Any]]:
    """What was measured, by what is calibrated together: a layout, on one machine and in one run."""
    measured = json.loads(path.read_text())["configurations"]
    found: dict[str, list[Any]] = {}
    for each in measured:
        configuration = each["configuration"]
        found.setdefault(f"PP {configuration['pp']} x EP {configuration['ep']}", []).append(each)
    large = calibrate.of_sweep("replication_overhead", 48, (None, 100.0))
    small = calibrate.of_sweep("replication_overhead_batch8", 8, (None,))
    return found | {"PP 2 x EP 2 in earlier sweeps": [*large, *small]}


def _measure(path: Path, *, quick: bool) -> None:
    import datetime

    from benchmarks._common import versions
    from benchmarks.cluster.measure import CYCLES, measure

    configurations: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        for pp, ep in LAYOUTS:
            part = Path(scratch) / "part.json"
            measure(pp, ep, part, cycles=1 if quick else CYCLES)
            configurations += json.loads(part.read_text())
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = "python -m benchmarks.cluster testbed --measure"
    document = {"date": now, "hardware": hardware(), "versions": versions(), "command": command}
    path.write_text(json.dumps({**document, "configurations": configurations}, indent=1) + "\n")


def compare_papers(args: Any) -> list[Result]:
    """What was published and what the models give, then our modes."""
    results = []
    for row in papers.rows():
        name = f"{row.paper}: {row.what}"
        results += [
            Result(name=f"{name}: published", value=row.published, unit=row.unit),
            Result(name=f"{name}: modelled", value=row.modelled, unit=row.unit),
            Result(name=f"{name}: relative error", value=row.error, unit="share"),
        ]
    given, _ = papers.data()
    restarts = {r["name"]: r["value"] for r in json.loads(RESTART.read_text())["results"]}
    restart_s = restarts["killed node, torchrun: first new step"]
    results.append(Result(name="restart of a lost node, as measured", value=restart_s, unit="s"))
    for each in (*ours.on_their_cluster(given, restart_s), *([] if args.quick else ours.at_scale(given, restart_s))):
        name, seen = f"{each.cluster}, {each.bytes_a_parameter} bytes, {each.mode}", each.seen
        results += [
            Result(name=f"{name}: iteration", value=seen.iteration_s, unit="s"),
            Result(name=f"{name}: slowdown", value=each.slowdown, unit="share"),
            Result(name=f"{name}: sent by a rank", value=seen.sent_bytes / 1e9, unit="GB/iteration"),
            Result(name=f"{name}: host memory of a node", value=each.node_bytes / 2**30, unit="GiB"),
            Result(name=f"{name}: iterations with a whole snapshot", value=seen.whole, unit="share"),
            Result(name=f"{name}: lost by a fault", value=seen.lost_iterations, unit="iterations"),
            Result(name=f"{name}: T is behind", value=seen.lag_s, unit="s"),
        ]
        results += [Result(name=f"{name}: ETTR, MTBF {m}", value=e, unit="ETTR") for m, e in each.ettr.items()]
    for run, systems in ({} if args.quick else papers.peers_at_scale(given)).items():
        for system, ettr in systems.items():
            name = f"{run}, model of {system}"
            results += [Result(name=f"{name}: ETTR, MTBF {m}", value=e, unit="ETTR") for m, e in ettr.items()]
    return results


def pays(args: Any) -> list[Result]:
    """The shortest iteration in which each mode fits, for published models; and whether the model agrees."""
    results = []
    for run in sparsity.published():
        results.append(Result(name=f"{run.name}: iteration", value=run.iteration_s, unit="s"))
        for panel in sparsity.PANELS:
            for mode, seconds in sparsity.shortest_s(panel, run).items():
                name = (
                    f"{run.name}: {panel.bytes_a_parameter} bytes a parameter, {panel.node_gb_per_s:g} GB/s, "
                    f"{panel.node_gib} GiB: shortest iteration for {mode}"
                )
                results.append(Result(name=name, value=seconds, unit="s"))
    for share, seen in sparsity.checked().items():
        name = f"10 GB/s, {sparsity.CHECKED_PARAMETERS:g} parameters: full at {share:g} of its shortest iteration"
        results += [
            Result(name=f"{name}: slowdown", value=seen.slowdown, unit="share"),
            Result(name=f"{name}: iterations with a whole snapshot", value=seen.whole, unit="share"),
        ]
    return results


def even(args: Any) -> list[Result]:
    """Tokens at risk by policy and routing."""
    results = [Result(name="best possible with even routing", value=routing.even_bound(), unit="iterations' tokens")]
    snapshots = routing.SNAPSHOTS // 3 if args.quick else routing.SNAPSHOTS
    for kind, draw in routing.ROUTING.items():
        for policy in routing.POLICIES_SHOWN:
            value = routing.at_risk(policy, draw, snapshots=snapshots)
            results.append(Result(name=f"{kind}: {policy}", value=value, unit="iterations' tokens"))
    return results


WHAT: dict[str, Callable[[Any], list[Result]]] = {
    "testbed": testbed,
    "papers": compare_papers,
    "sparsity": pays,
    "routing": even,
}


def main() -> int:
    """Do one of them and report."""
    options = parser(__doc__ or "")
    options.add_argument("what", choices=tuple(WHAT))
    options.add_argument("--measure", action="store_true", help="testbed: measure first, as root, half an hour")
    options.add_argument("--measured", type=Path, default=MEASURED, help=f"default: {MEASURED.relative_to(ROOT)}")
    args = options.parse_args()
    report(f"cluster_{args.what}", WHAT[args.what](args), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
