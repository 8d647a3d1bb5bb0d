# SPDX-License-Identifier: Apache-2.0
"""``moetion simulate``: the runtime under faults, in a simulated cluster."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_moetion.cli.stores import print_json
from megatron_moetion.errors import ConfigError

if TYPE_CHECKING:  # the simulator loads torch, which no other command needs
    from megatron_moetion.sim.run import Outcome
    from megatron_moetion.sim.story import Story

_STORY_LINES = 40


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "simulate",
        help="run the checkpointing runtime under faults, in a simulated cluster",
        usage="%(prog)s [--seeds N] [--first SEED] [--ranks R] [--mode MODE] [--state STATE] [--copies COPIES] "
        "[--faults N] [--domains D] [--kinds KIND,...] [--keep N,N,...] [--jobs N] [--no-shrink] [--json]",
        description="Run the production code of a job's ranks in one process, with simulated time, network and memory. "
        "A seed decides what goes wrong: killed processes, lost nodes, cut links, damaged memory and messages, and "
        "more. A model that is written apart from the runtime checks the promises. Ends with exit code 1 where one is "
        "broken, after a line that repeats it and the shortest story that was found.",
        epilog="examples: moetion simulate --seeds 100; moetion simulate --seeds 20 --ranks 16 --mode exact",
    )
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="how many seeds (default: 20)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (default: 0)")
    parser.add_argument("--ranks", type=int, default=4, metavar="R", help="ranks of the job, 2 to 64 (default: 4)")
    parser.add_argument(
        "--mode",
        choices=("any", "full", "popularity", "exact"),
        default="any",
        help="snapshot mode; any: the seed decides (default)",
    )
    parser.add_argument(
        "--copies",
        choices=("whole", "fragments", "any"),
        default="whole",
        help="what nodes keep of each other: whole copies (default), fragments, which need 4 nodes and the extra "
        "'coding', or any: the seed decides",
    )
    parser.add_argument(
        "--state",
        choices=("host", "device", "any"),
        default="host",
        help="where state lies: in host memory (default), on a simulated device, or any: the seed decides",
    )
    parser.add_argument("--faults", type=int, default=60, metavar="N", help="faults of a seed (default: 60)")
    parser.add_argument(
        "--domains", type=int, default=0, metavar="D", help="failure domains that nodes are in (default: none)"
    )
    parser.add_argument("--kinds", metavar="KIND,...", help="only faults of these kinds (docs/simulator.md)")
    parser.add_argument("--keep", metavar="N,N,...", help="only these of a seed's faults, by number; none: no fault")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that run seeds (default: 1)")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for a shorter story that fails")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not 2 <= args.ranks <= 64 or args.seeds < 1 or args.faults < 0 or args.jobs < 1:
        raise ConfigError("--ranks is from 2 to 64, --seeds and --jobs at least 1, --faults not negative")
    from megatron_moetion.sim.faults import KINDS
    from megatron_moetion.sim.story import Story, shortened
    from megatron_moetion.snapshot.codec import require_codec

    if args.domains < 0:
        raise ConfigError(f"--domains is {args.domains}; it must not be negative")
    kept, kinds = _numbers(args.keep, args.faults), tuple(filter(None, (args.kinds or "").split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"there is no kind of fault {unknown[0]!r}; there are {', '.join(KINDS)}")
    if args.copies != "whole":
        require_codec()
    if "lose-domain" in kinds and not args.domains:
        raise ConfigError("--kinds lose-domain needs --domains D, the failure domains that nodes are in")
    stories = [
        Story(
            seed=seed,
            ranks=args.ranks,
            mode=args.mode,
            copies=args.copies,
            state=args.state,
            faults=args.faults,
            kinds=kinds,
            kept=kept,
            domains=args.domains,
        )
        for seed in range(args.first, args.first + args.seeds)
    ]
    say = _silent if args.json else _say
    totals, failures, traces, attempts, checks = Counter[str](), list[dict[str, Any]](), list[str](), 0, 0
    with _quiet():
        for story, outcome in _played(stories, args.jobs):
            totals += outcome.faults
            traces.append(f"{outcome.trace:08x}")
            attempts, checks = attempts + outcome.attempts, checks + outcome.checks
            say(
                f"seed {story.seed} ({story.shape.mode}, {story.shape.nodes} nodes, {story.shape.copies_text}): "
                f"{outcome.faults.total()} faults, {outcome.attempts} attempts, trace {outcome.trace:08x}"
                f"{'' if outcome.problem is None else ': FAILED'}"
            )
            if outcome.problem is not None:
                failures.append(_failure(story, outcome, args, shortened, say))
    if args.json:
        print_json(
            {
                "seeds": args.seeds,
                "first": args.first,
                "ranks": args.ranks,
                "mode": args.mode,
                "fault_events": totals.total(),
                "by_kind": dict(sorted(totals.items())),
                "attempts": attempts,
                "checks": checks,
                "traces": traces,
                "failures": failures,
            }
        )
    say(f"{args.seeds} seeds, {totals.total()} fault events, {attempts} attempts, {checks} checks; "
        f"{len(failures)} seeds broke a promise")  # fmt: skip
    return 1 if failures else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the runtime's own lines, of many ranks in many runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """Standard output is for the document."""


def _failure(
    story: Story,
    outcome: Outcome,
    args: argparse.Namespace,
    shortened: Callable[[Story], Story],
    say: Callable[[str], None],
) -> dict[str, Any]:
    say(f"  {outcome.problem}\n  repeat it: {story.line}")
    short = story if args.no_shrink else shortened(story)
    if short is not story:
        again = short.play()
        say(f"  shortest story found: {short.line}\n  {again.problem}")
        say("\n".join(f"    {line}" for line in again.story[-_STORY_LINES:]))
    return {"seed": story.seed, "problem": outcome.problem, "repeat": story.line, "shortest": short.line}


def _played(stories: list[Story], jobs: int) -> Iterator[tuple[Story, Outcome]]:
    if jobs == 1:
        with _pinned():
            yield from zip(stories, map(_play, stories), strict=True)
        return
    context = multiprocessing.get_context("spawn")  # simulated threads and a fork do not go together
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from zip(stories, pool.map(_play_pinned, stories), strict=True)


class _pinned:
    """Within it this process runs on one processor."""

    def __enter__(self) -> None:
        from megatron_moetion.sim.story import pin

        self._before = os.sched_getaffinity(0)
        pin(os.getpid())

    def __exit__(self, *error: object) -> None:
        os.sched_setaffinity(0, self._before)


def _play(story: Story) -> Outcome:
    return story.play()


def _play_pinned(story: Story) -> Outcome:
    from megatron_moetion.sim.story import pin

    logging.disable(logging.CRITICAL)
    pin(story.seed)
    return story.play()


def _numbers(text: str | None, most: int) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(",")) if text != "none" else ()
    except ValueError:
        raise ConfigError(f"--keep is {text!r}; it is numbers of faults, comma separated, or none") from None
    if any(not 0 <= n < most for n in found):
        raise ConfigError(f"--keep is {text!r}; a seed's faults are 0 to {most - 1}: see --faults")
    return found
