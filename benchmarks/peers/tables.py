# SPDX-License-Identifier: Apache-2.0
"""What the records of all configurations say: figures, tables in Markdown, a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.peers.catalogue import ABSENT, NOTHING, PEERS
from benchmarks.peers.judge import FROM_ZERO, LOSSY_SOUND, OLDER, REFUSED, UNNOTICED, WHOLE

Record = Mapping[str, Any]
Records = Mapping[str, Record]
RARE = 10
SENDS = 0.1
"""Of its state: who sends less over the links for a copy keeps no copy on another host, or one on a disk."""
MISSING = "not measured"
LAYOUTS = {"2x2": "PP 2, EP 2", "1x4": "PP 1, EP 4"}
LINKS = {"free": "free links", "slow": "400 Mbit/s links"}
VERDICTS = {
    UNNOTICED: "**restored unnoticed**",
    WHOLE: "noticed; the replica was taken",
    LOSSY_SOUND: "noticed; a sound copy was taken",
    OLDER: "noticed; an older copy was taken",
    REFUSED: "refused: training did not start",
    FROM_ZERO: "noticed; began from zero",
}


@dataclass(frozen=True)
class Cost:
    """Of one system at one layout and link; each figure is from within one run."""

    iteration_s: float
    """Without copies; median of the blocks' means."""
    each: float
    """Time of an iteration with a copy each iteration, ratio to none; median over cycles."""
    each_cycles: tuple[float, ...]
    """Of all cycles; where there is one alone, to its slowest, its mean and its fastest iteration without copies."""
    rarely: float | None
    """The same with a copy every ``RARE`` iterations; None where the system has no such interval."""
    rarely_cycles: tuple[float, ...]
    stall_s: float
    """Of the training thread, for each iteration with a copy, on the slowest rank; median."""
    whole: float
    """Copies that became whole on all ranks, of those that were begun, where each iteration has one."""
    cpu_s: float
    """All ranks and their helpers, for each whole copy."""
    sent: float
    """Bytes over all links, for each whole copy, beyond training's own."""
    memory: float | None
    """Bytes, all hosts, beyond those of training; None without a run of training alone."""
    state: float
    """Bytes of all ranks."""


def read(folder: Path) -> dict[str, Record]:
    """The records that are there, by configuration."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def cost(record: Record, alone: Record | None, *, rare: bool) -> Cost:
    """Figures of one record; ``alone`` is that of training without any system."""
    ranks = record["ranks"]
    blocks = [[event for event in events if event["event"] == "block"] for events in ranks]
    cycles = sorted({block["cycle"] for block in blocks[0]})

    def of(arm: str, cycle: int) -> list[Mapping[str, Any]]:
        return [b for events in blocks for b in events if (b["arm"], b["cycle"]) == (arm, cycle)]

    def seconds(arm: str, cycle: int) -> float:
        return mean(of(arm, cycle)[0]["seconds"])

    def ratios(arm: str) -> tuple[float, ...]:
        if len(cycles) == 1:
            none = of("off", cycles[0])[0]["seconds"]
            return tuple(seconds(arm, cycles[0]) / each for each in (max(none), mean(none), min(none)))
        return tuple(seconds(arm, cycle) / seconds("off", cycle) for cycle in cycles)

    def added(what: str) -> float:
        """For each iteration of an ``each`` block, all ranks."""
        rates = {
            arm: sum(b[what] for c in cycles for b in of(arm, c)) / sum(of(arm, c)[0]["iterations"] for c in cycles)
            for arm in ("off", "each")
        }
        return rates["each"] - rates["off"]

    stalls = [max(step) for cycle in cycles for step in zip(*(b["stalls"] for b in of("each", cycle)), strict=True)]
    begun = sum(of("each", cycle)[0]["iterations"] for cycle in cycles)
    whole = sum(min(b["whole"] for b in of("each", cycle)) for cycle in cycles) / begun
    each, rarely = ratios("each"), ratios("rarely")
    return Cost(
        iteration_s=median(seconds("off", cycle) for cycle in cycles),
        each=median(each),
        each_cycles=each,
        rarely=median(rarely) if rare else None,
        rarely_cycles=rarely if rare else (),
        stall_s=median(stalls),
        whole=min(1.0, whole),
        cpu_s=added("cpu_s") / whole if whole else float("nan"),
        sent=added("sent") / whole if whole else float("nan"),
        memory=_memory(record) - _memory(alone) if alone is not None else None,
        state=sum(event["state_bytes"] for events in ranks for event in events if event["event"] == "ended"),
    )


def _memory(record: Record) -> float:
    seen = [event for events in record["ranks"] for event in events if event["event"] == "memory"]
    return float(sum(event["private"] + event["shared"] for event in seen))


def costs(records: Records, layout: str, link: str) -> dict[str, Cost]:
    """By system, in the order of the catalogue."""
    alone = records.get(f"{NOTHING}-{layout}-{link}")
    return {
        name: cost(record, alone, rare=peer.rare)
        for name, peer in PEERS.items()
        if (record := records.get(f"{name}-{layout}-{link}")) is not None
    }


def render(records: Records) -> str:
    """All tables, as Markdown."""
    parts = ["### Systems", system_table()]
    for layout, layout_words in LAYOUTS.items():
        for link, link_words in LINKS.items():
            if found := costs(records, layout, link):
                parts += [f"### {layout_words}, {link_words}", cost_table(found)]
    if faults := fault_table(records):
        parts += ["### After a fault (PP 2, EP 2, free links, a copy each iteration)", faults]
    if best := best_table(records):
        parts += ["### The best of each (PP 2, EP 2; free links where none are named)", best]
    if missing := unmeasured(records):
        parts += ["### Not measured yet", missing]
    if ABSENT:
        parts += ["### Not run", absent_table()]
    return "\n\n".join(parts)


def summary(records: Records) -> str:
    """What matters most, one row a system, at PP 2 and EP 2; empty without any."""
    found, rows = {link: costs(records, "2x2", link) for link in LINKS}, []
    for name, peer in PEERS.items():
        faults = [records.get(f"{name}-{kind}") for kind in ("killed-rank", "lost-host", "flipped-bit")]
        if name == NOTHING or peer.variant or not (any(name in of_link for of_link in found.values()) or any(faults)):
            continue
        free, slow = (found[link].get(name) for link in LINKS)
        rows.append(
            [
                peer.title,
                *(_in_short(record, peer.keeps_all) for record in faults[:2]),
                _verdict(faults[2]),
                MISSING if free is None else _range(free.each, free.each_cycles),
                MISSING if slow is None else f"{_range(slow.each, slow.each_cycles)}; {slow.whole:.0%}",
            ]
        )
    head = [
        "system",
        "a rank is killed: iterations lost, state",
        "a host is lost with its memory",
        "one flipped bit in the copy",
        "time with a copy each iteration, ratio to none (range)",
        f"the same, {LINKS['slow']}; copies that became whole",
    ]
    return _markdown(head, rows) if rows else f"{MISSING.capitalize()} yet."


def best_table(records: Records) -> str:
    """Which peer and which mode of ours has the lowest figure of each kind; empty without any."""
    found, slow = (
        {name: each for name, each in costs(records, "2x2", link).items() if name != NOTHING} for link in LINKS
    )
    loads = {name: records[f"{name}-killed-rank"] for name in PEERS if f"{name}-killed-rank" in records}
    kinds: dict[str, dict[str, tuple[float, str]]] = {
        "time with a copy each iteration, ratio to none (range)": _slowdowns(found),
        f"the same, {LINKS['slow']}": _slowdowns(slow),
        f"the same, {LINKS['slow']}, systems that send copies to another host": _slowdowns(
            {n: c for n, c in slow.items() if c.sent > SENDS * c.state}
        ),
        f"time with a copy every {RARE}th iteration, ratio to none (range)": {
            n: (c.rarely, _range(c.rarely, c.rarely_cycles)) for n, c in found.items() if c.rarely is not None
        },
        "stall of the training thread, ms a copy": {n: _plain(c.stall_s * 1e3, 0) for n, c in found.items()},
        f"stall, {LINKS['slow']}": {n: _plain(c.stall_s * 1e3, 0) for n, c in slow.items()},
        "CPU, s a copy": {n: _plain(c.cpu_s, 2) for n, c in found.items() if c.whole},
        "host memory, MB": {n: _plain(c.memory / 1e6, 0) for n, c in found.items() if c.memory is not None},
        "recovery of a killed rank: s in the system": {
            n: _plain(load["load_s"], 2) for n, load in loads.items() if load["resumed"] is not None
        },
    }
    rows = []
    for kind, figures in kinds.items():
        sides = [[n for n in figures if PEERS[n].is_ours is ours] for ours in (False, True)]
        least = [min(side, key=lambda name: figures[name][0], default=None) for side in sides]
        if any(least):
            rows.append([kind, *(f"{figures[n][1]} {PEERS[n].title}" if n else MISSING for n in least)])
    return _markdown(["lower is better", "peers", "ours"], rows) if rows else ""


def _slowdowns(found: Mapping[str, Cost]) -> dict[str, tuple[float, str]]:
    return {name: (each.each, _range(each.each, each.each_cycles)) for name, each in found.items()}


def _plain(value: float, digits: int) -> tuple[float, str]:
    return value, f"{value:.{digits}f}"


def unmeasured(records: Records) -> str:
    """A list of what has no record; empty if there is none."""
    kinds = {
        **{
            f"cost at {layout_words}, {link_words}": {
                name: f"{name}-{layout}-{link}" for name, peer in PEERS.items() if not peer.only_flip
            }
            for layout, layout_words in LAYOUTS.items()
            for link, link_words in LINKS.items()
        },
        **{
            f"after a fault ({kind})": {
                name: f"{name}-{kind}"
                for name, peer in PEERS.items()
                if name != NOTHING and (kind == "flipped-bit" or not peer.only_flip)
            }
            for kind in ("killed-rank", "lost-host", "flipped-bit")
        },
    }
    lines = []
    for kind, wanted in kinds.items():
        missing = [PEERS[name].title for name, record in wanted.items() if record not in records]
        if missing:
            lines.append(f"- {kind}: {'all systems' if len(missing) == len(wanted) else '; '.join(missing)}")
    return "\n".join(lines)


def _in_short(record: Record | None, keeps_all: bool) -> str:
    if record is None:
        return MISSING
    if record["resumed"] is None or record["seconds"] is None:
        return "**not recovered**"
    return f"{record['lost']}, {'bitwise' if record['bitwise'] else '**differs**' if keeps_all else 'older experts'}"


def cost_table(found: Mapping[str, Cost]) -> str:
    """One row a system."""
    rows = []
    for name, each in found.items():
        if name == NOTHING:
            rows.append([PEERS[name].title, _range(each.each, each.each_cycles), "", *[""] * 6])
            continue
        rows.append(
            [
                PEERS[name].title,
                _range(each.each, each.each_cycles),
                "needs each iteration" if each.rarely is None else _range(each.rarely, each.rarely_cycles),
                recommended(name, each),
                f"{each.stall_s * 1e3:.0f}",
                f"{each.whole:.0%}",
                f"{round(each.sent / 1e6) if each.whole else 0}",
                f"{each.cpu_s:.2f}",
                MISSING if each.memory is None else f"{each.memory / 1e6:.0f}",
            ]
        )
    head = [
        "system",
        "a copy each iteration: time, ratio to none (range)",
        f"every {RARE}th",
        "at its own interval",
        "stall, ms",
        "copies that became whole",
        "network, MB a copy",
        "CPU, s a copy",
        "host memory, MB",
    ]
    return _markdown(head, rows)


def recommended(name: str, found: Cost) -> str:
    """Slowdown at the interval that the system's documentation recommends, by what a copy costs."""
    interval = PEERS[name].interval
    if not interval:
        return "none is given"
    if interval == "1":
        return f"1: {found.each:.2f}"
    assert found.rarely is not None
    return f"{interval}: {1 + (found.rarely - 1) * RARE / int(interval):.3f}"


def fault_table(records: Records) -> str:
    """One row a system; empty without any."""
    rows = []
    for name, peer in PEERS.items():
        cells = [_recovered(records.get(f"{name}-{kind}"), peer.keeps_all) for kind in ("killed-rank", "lost-host")]
        flipped = records.get(f"{name}-flipped-bit")
        if name == NOTHING or not (flipped or any(cells)):
            continue
        rows.append([peer.title, *(cell or MISSING for cell in cells), _verdict(flipped)])
    head = [
        "system",
        "a rank is killed: s to the first step (of it in the system), iterations lost, bitwise",
        "a host is lost with its memory: the same",
        "one flipped bit in the copy",
    ]
    return _markdown(head, rows) if rows else ""


def _recovered(record: Record | None, keeps_all: bool) -> str:
    if record is None:
        return ""
    if record["resumed"] is None:
        return f"**not recovered**: {record['problem'].splitlines()[0] if record['problem'] else 'nobody came back'}"
    if record["seconds"] is None:
        return f"**training did not go on**: {_gist(record['problem'])}"
    bitwise = "bitwise" if record["bitwise"] else "**differs**" if keeps_all else "experts are older, by design"
    return f"{record['seconds']:.1f} ({record['load_s']:.2f}), {record['lost']} lost, {bitwise}"


def _gist(problem: str) -> str:
    """The last line of what a rank said, without its number and its error's module."""
    return re.sub(r"^(\s*\[rank\d+\]: *)?(\w+\.)*(?=\w+:)", "", problem.splitlines()[-1]).strip()


def _verdict(record: Record | None) -> str:
    if record is None:
        return MISSING
    return VERDICTS.get(record["verdict"]) or f"{MISSING}: {record['problem'].splitlines()[0]}"


def system_table() -> str:
    """What is run, and how."""
    rows = [[p.title, p.configuration, p.interval or "none is given"] for n, p in PEERS.items() if n != NOTHING]
    return _markdown(["system", "configuration", "copies every so many iterations, by its documentation"], rows)


def absent_table() -> str:
    """Why, and what would help."""
    rows = [[absent.title, absent.reason, absent.unblocked_by] for absent in ABSENT.values()]
    return _markdown(["system", "why not", "what would unblock it"], rows)


def _range(middle: float, cycles: Sequence[float]) -> str:
    return f"{middle:.2f} ({min(cycles):.2f} to {max(cycles):.2f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def draw(records: Records, path: Path) -> None:
    """Slowdown at both intervals, PP 2, on the links that were measured; every ratio a dot, the median a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {link: each for link in LINKS if (each := costs(records, "2x2", link))}
    names = [name for name in PEERS if any(name in each for each in found.values())]
    size = (3.0 + 4.2 * len(found), 0.42 * len(names) + 1.9)
    figure, (panels,) = pyplot.subplots(
        1, len(found), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    arms = (("a copy each iteration", "#D55E00", -0.15), (f"a copy every {RARE}th iteration", "#0072B2", 0.15))
    for panel, link in zip(panels, found, strict=True):
        for row, name in enumerate(names):
            each = found[link].get(name)
            if each is None:
                panel.text(1.03, row, MISSING, va="center", color="#888888", fontsize=8)
                continue
            for (_, color, offset), cycles in zip(arms, (each.each_cycles, each.rarely_cycles), strict=True):
                if cycles:
                    panel.plot(cycles, [row + offset] * len(cycles), "o", color=color, alpha=0.4, markersize=4)
                    panel.plot(median(cycles), row + offset, "|", color=color, markersize=13, markeredgewidth=2.5)
        panel.axvline(1.0, color="#444444", linewidth=0.8)
        panel.set_xscale("log")
        ticks = [1, 1.5, 2, 3, 5, 10, 20]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_title(LINKS[link], loc="left", fontsize=10)
        panel.set_xlabel("time of an iteration, ratio to none")
        panel.grid(axis="x", color="#DDDDDD")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [PEERS[name].title for name in names])
    panels[0].invert_yaxis()
    for words, color, _ in arms:
        panels[0].plot([], [], "o", color=color, label=words)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
