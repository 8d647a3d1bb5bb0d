# SPDX-License-Identifier: Apache-2.0
"""Faults of our own in the production code, which simulated runs must find: the proof that they can fail.

``python tests/sim/mutations.py`` looks for the first seed that finds each of them, and prints one JSON line for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAVING = (0, 1, 2, 4, 6, 10, 14, 16, 17, 18, 19, 21, 23, 25, 27)
"""Seeds whose runs in mode ``full`` save checkpoints on disk."""
EARLY = (12, 13, 19, 33, 36, 47, 51, 60)
"""Seeds that kill a process of the very first start, with the faults that look for its mutation."""
PACKAGE = Path(__file__).parents[2] / "megatron_moetion"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of one file: ``old``, which stands there once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    mode: str = "any"
    """Of the runs that look for it."""
    kinds: str = ""
    """Kinds of faults that look for it, comma separated; none: all."""
    seeds: tuple[int, ...] = ()
    """That look for it; none: those of the command line."""
    state: str = "host"
    """Where state of the runs lies that look for it."""
    domains: int = 0
    """Failure domains of the runs that look for it."""
    copies: str = "whole"
    """What nodes keep of each other in these runs."""
    ranks: int = 0
    """Of these runs; 0: as many as the command line says."""
    review: str = ""
    """The fault of an earlier review that it brings back, by its number there."""

    def mutated(self) -> str:
        """The file's text with the fault."""
        text = (PACKAGE / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has {text.count(self.old)} of {self.old!r}"
        return text.replace(self.old, self.new)


MUTATIONS = (
    Mutation(
        name="copies of a state share a failure domain",
        file="replicate/placement.py",
        old="groups = _apart(where, coding.holders) if replicas and any(where) else _consecutive(",
        new="groups = _consecutive(",
        mode="full",
        kinds="lose-domain,kill",
        domains=2,
    ),
    Mutation(
        name="a holder lists what does not verify",
        file="replicate/holder.py",
        old="if not verify(self._pool, chunk_bytes, addresses, sizes, update.digests, expected).all():",
        new="if not len(verify(self._pool, chunk_bytes, addresses, sizes, update.digests, expected)):",
        mode="full",
    ),
    Mutation(
        name="a survey believes every digest",
        file="recover/survey.py",
        old='found[stored] = verify(pool, chunk_bytes, addresses, sizes, digests, records.table["digest"][stored])',
        new="found[stored] = True",
        mode="full",
        kinds="flip,kill-all",
    ),
    Mutation(
        name="captures of dead histories count",
        file="store/manifest.py",
        old='found[is_old] = records.table["iteration"][is_old] <= min(later, default=_LAST)',
        new="found[is_old] = True",
        kinds="flap-node,late-pack,kill",
    ),
    Mutation(
        name="a recovery does not begin an epoch",
        file="recover/restore.py",
        old='"records": _among(page.records, wanted).replace(epoch=self.plan.epoch),\n'
        '                    "epoch": self.plan.epoch,',
        new='"records": page.records,',
        kinds="kill,kill-all,kill-at",
    ),
    Mutation(
        name="ranks need not all reach T",
        file="recover/plan.py",
        old="iterations=tuple(i for i in self.iterations if i in later.iterations),",
        new="iterations=self.iterations or later.iterations,",
        kinds="kill-at,late-pack,kill",
    ),
    Mutation(
        name="the oldest iteration is chosen, not the newest",
        file="recover/plan.py",
        old="iteration = next((i for i in reach.iterations if i not in vetoed), reach.iterations[0])",
        new="iteration = next((i for i in reach.iterations[::-1] if i not in vetoed), reach.iterations[0])",
        kinds="kill",
    ),
    Mutation(
        name="what one rank recovers counts for all",
        file="replicate/agreement.py",
        old="return [*(a & b for a, b in masks), min(redundancy)]",
        new="return [*(a | b for a, b in masks), min(redundancy)]",
        kinds="late-pack,kill-at,grown,moved,lose-node",
    ),
    Mutation(
        name="bits of a mask are off by one",
        file="replicate/agreement.py",
        old="return next((iteration for k, iteration in enumerate(recent[:WINDOW]) if mask >> k & 1), None)",
        new="return next((iteration for k, iteration in enumerate(recent[:WINDOW]) if mask >> (k + 1) & 1), None)",
        kinds="kill,late-pack",
    ),
    Mutation(
        name="T follows the last result, also back",
        file="replicate/agreement.py",
        old="stable = self.stable if newest is None else max(self.stable, newest)",
        new="stable = self.stable if newest is None else newest - 1",
        kinds="late-pack",
    ),
    Mutation(
        name="snapshots are whole without their holders",
        file="replicate/replication.py",
        old="if iteration not in self._whole and all(iteration in s.whole for s in states):",
        new="if iteration not in self._whole:",
        kinds="cut-then-lose",
    ),
    Mutation(
        name="a mirror is whole up to what it lacks",
        file="replicate/mirror.py",
        old='iterations = iterations[iterations < missing.table["iteration"].min()]',
        new='iterations = iterations[iterations <= missing.table["iteration"].min()]',
        kinds="cut-then-lose",
    ),
    Mutation(
        name="a link that has failed is not made again",
        file="replicate/link.py",
        old="self._pause(self._timing.pause_s(self._in_a_row, self._chance.random()))",
        new="return",
        review="F3",
        kinds="reset",
    ),
    Mutation(
        name="the stable capture is released",
        file="store/retention.py",
        old="is_last[:-1] = is_new[1:] | (unit[1:] != unit[:-1])",
        new="is_last[:-1] = False",
        kinds="kill,kill-at",
    ),
    Mutation(
        name="slots are free before they are dropped",
        file="store/arena.py",
        old="            self._taken[slots] = True\n            return slots",
        new="            return slots",
        kinds="kill",
    ),
    Mutation(
        name="the optimizer does not wait for the copy",
        file="session.py",
        old="self.running.pipeline.finish_packing(self.running.max_stall_s)",
        new="pass",
        kinds="late-pack,kill",
    ),
    Mutation(
        name="state that cannot wait is copied late",
        file="snapshot/packer.py",
        old="        if len(self._frozen_by_host):\n            self._pool.scatter(self._frozen_by_host)",
        new="",
        kinds="kill",
    ),
    Mutation(
        name="every third freeze is left out",
        file="session.py",
        old="        unfrozen = self._freeze()\n",
        new="        unfrozen = self._freeze() if iteration % 3 else None\n",
        kinds="kill",
    ),
    Mutation(
        name="a dropped snapshot counts as taken",
        file="replicate/pipeline.py",
        old="self._mark(iteration, self._outcome.is_there)",
        new="self._mark(iteration, True)",
        kinds="late-pack,grown,moved,kill",
    ),
    Mutation(
        name="what is released is forgotten",
        file="session.py",
        old="run.pipeline.submit(iteration, contents, run.releases.take())",
        new="run.pipeline.submit(iteration, contents, None)",
        kinds="kill",
    ),
    Mutation(
        name="old memory beats newer disk",
        file="recover/disk.py",
        old="if disk.load is None or (in_memory is not None and newest <= in_memory):",
        new="if disk.load is None or in_memory is not None:",
        review="F1",
        mode="full",
        seeds=SAVING,
        kinds="grown,moved,kill",
    ),
    Mutation(
        name="a restart without arenas starts anew by itself",
        file="run/starter.py",
        old="if isinstance(outcome, RecoveryPlan) or not (outcome.began or past.had_baseline or is_unknown):",
        new="if isinstance(outcome, RecoveryPlan) or True:",
        kinds="lose-node,lose-in-recovery",
    ),
    Mutation(
        name="a run that died before its first snapshot cannot start",
        file="run/starter.py",
        old="is_unknown = findings.restarted and not findings.summary.found and not past.is_known",
        new="is_unknown = findings.restarted and not findings.summary.found",
        review="F10",
        seeds=EARLY,
        kinds="kill-at,kill",
    ),
    Mutation(
        name="steps are replayed from the wrong end",
        file="recover/rollforward.py",
        old="for iteration in range(min(captured, default=to), to + 1):",
        new="for iteration in range(to, min(captured, default=to) - 1, -1):",
        mode="exact",
        kinds="kill",
    ),
    Mutation(
        name="a zero gradient keeps the last one",
        file="recover/rollforward.py",
        old="                    packer.clear(unit)\n",
        new="                    pass\n",
        mode="exact",
        kinds="kill",
    ),
    Mutation(
        name="chains end one iteration too early",
        file="store/chains.py",
        old="all(i in logged for i in range(newest + 1, at + 1))",
        new="all(i in logged for i in range(newest + 1, at + 2))",
        mode="exact",
        kinds="kill",
    ),
    Mutation(
        name="a gradient of zeros is logged as that of the iteration before",
        file="snapshot/capture.py",
        old="        zeros = Records.make(len(zero), unit=sorted(zero), iteration=iteration,",
        new="        zeros = Records.make(len(zero), unit=sorted(zero), iteration=iteration - 1,",
        mode="exact",
        kinds="kill",
    ),
    Mutation(
        name="training's stream does not wait for the copies that read live state",
        file="snapshot/device.py",
        old="                self._pool.order_after(self._streams.current(), held_for)",
        new="                pass",
        state="device",
        kinds="kill,late-pack",
    ),
    Mutation(
        name="copies begin before training's stream has come to them",
        file="snapshot/device.py",
        old="            return self._drain(cancel, self._timeout_s)",
        new="            return True",
        state="device",
        kinds="kill,late-pack",
    ),
    Mutation(
        name="commits always write the same page",
        file="store/arena.py",
        old="        self._next_page = 1 - self._next_page\n",
        new="",
        kinds="kill-in-page,kill",
    ),
    Mutation(
        name="a child's word is lost with its connection",
        file="replicate/rounds.py",
        old="self._up(number, payload) for number, payload in sorted(self._said.items())",
        new="self._up(number, payload) for number, payload in sorted(self._said.items())[:0]",
        kinds="reset,cut",
    ),
    Mutation(
        name="a store that was deleted stays so",
        file="session.py",
        old="        run.upkeep.check(iteration)\n",
        new="",
        review="F9",
        kinds="delete-store,kill",
    ),
    Mutation(
        name="one loss more is said to be survived than fragments are left for",
        file="coding.py",
        old="return max(0, parts - self.data + 1)",
        new="return max(0, parts - self.data + 2)",
        copies="fragments",
        ranks=5,
        kinds="kill",
    ),
    Mutation(
        name="holders that lack fragments get none in a recovery",
        file="recover/plan.py",
        old="return [leg for leg in legs if len(leg.rows)]",
        new="return [leg for leg in legs if len(leg.rows) and leg.part.is_whole]",
        copies="fragments",
        ranks=5,
        kinds="lose-node,kill",
    ),
    Mutation(
        name="one fragment too few is enough",
        file="recover/plan.py",
        old="if key not in found and len(numbers) >= data:",
        new="if key not in found and len(numbers) >= data - 1:",
        copies="fragments",
        ranks=5,
        kinds="lose-domain,kill",
        domains=2,
    ),
    Mutation(
        name="fragments are grouped by their own digests",
        file="store/arena.py",
        old="        digests[stored] = self._view[starts[:, None] + np.arange(8)].copy().view(\"<u8\").ravel()\n",
        new="",
        copies="fragments",
        ranks=5,
        kinds="lose-node,kill",
    ),
    Mutation(
        name="fragments of two iterations are put together",
        file="recover/plan.py",
        old="    for (key, _, data, _), numbers in pieces.items():\n",
        new="    for (key, _, data, _), numbers in pieces.items():\n"
        "        others = [ns for (k, *_), ns in pieces.items() if k[0] == key[0]]\n"
        "        numbers = {n: p for ns in [*others, numbers] for n, p in ns.items()}\n",
        copies="fragments",
        ranks=5,
        kinds="cut-then-lose,lose-node,reset",
    ),
    Mutation(
        name="a computed row is that of another fragment",
        file="snapshot/codec.py",
        old="self._driver.encode(rows.tobytes())[number - 1]",
        new="self._driver.encode(rows.tobytes())[self._data]",
        copies="fragments",
        ranks=5,
        kinds="lose-node,kill",
    ),
)  # fmt: skip


@contextmanager
def mutated_package(mutation: Mutation) -> Iterator[Path]:
    """A folder that has the package with this fault; first on ``sys.path`` it is the one that is imported."""
    with tempfile.TemporaryDirectory(prefix="moetion-mutation-") as folder:
        shutil.copytree(PACKAGE, Path(folder) / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / PACKAGE.name / mutation.file).write_text(mutation.mutated())
        yield Path(folder)


def look_for(mutation: Mutation, seeds: Sequence[int], ranks: int, limit_s: float) -> dict[str, Any]:
    """The first of these seeds that finds the fault, in a process of its own, within so many seconds of its time."""
    with mutated_package(mutation) as folder:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            found: dict[str, Any] = {}
            try:
                sys.path.insert(0, str(folder))
                found = _look(mutation, seeds, ranks, limit_s)
            except BaseException:
                found = {"error": traceback.format_exc()[-2000:]}
            os.write(write, json.dumps(found).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        os.waitpid(child, 0)
    found = json.loads(text) if text else {"error": "the process has died"}
    return {"mutation": mutation.name, "file": mutation.file, "review": mutation.review, **found}


def _look(mutation: Mutation, seeds: Sequence[int], ranks: int, limit_s: float) -> dict[str, Any]:
    import logging

    logging.disable(logging.CRITICAL)
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE.name and not n.endswith("._C")]:
        del sys.modules[name]  # a test has imported the package as it is; the compiled module loads once
    from megatron_moetion.sim.story import Story, pin

    pin(os.getpid())
    tried = 0
    for seed in seeds:
        if time.process_time() > limit_s:
            break
        kinds = tuple(filter(None, mutation.kinds.split(",")))
        faults = 20 if kinds else 60
        story = Story(
            seed=seed,
            ranks=mutation.ranks or ranks,
            mode=mutation.mode,
            copies=mutation.copies,
            kinds=kinds,
            faults=faults,
            domains=mutation.domains,
            state=mutation.state,
        )
        tried += 1
        problem = story.play().problem
        if problem is not None:
            return {"seed": seed, "tried": tried, "problem": problem[:300], "repeat": story.line}
    return {"seed": None, "tried": tried}


def main() -> int:
    """Look for all of them, or for those whose names hold a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose names hold one of these")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=60.0, help="of processor time, for each")
    args = parser.parse_args()
    import torch  # noqa: F401  # once, for all forked processes

    missed = 0
    for mutation in MUTATIONS:
        if args.words and not any(word in mutation.name for word in args.words):
            continue
        seeds = mutation.seeds or range(args.first, args.first + args.seeds)
        found = look_for(mutation, seeds, args.ranks, args.limit_s)
        missed += found.get("seed") is None
        print(json.dumps(found), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
