# SPDX-License-Identifier: Apache-2.0
"""The independent checker: a naive model of what a run promises, told of events and asked after each of them.

It knows nothing of the production code. State it knows from ``truth``, arenas from ``reader``.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from megatron_moetion.sim import truth
from megatron_moetion.sim.reader import Capture, Contents, Way, mark_of, read, ways

DENSE, FROZEN, HOST = "layers.0.dense", "frozen", "host"
BUFFERS, GRADIENT = f"{DENSE}.buffers", ".grad"
"""In mode ``exact``: what a unit has beside weights, and what names of gradients end with."""
STEP_LIMIT_S = 60.0
"""What ``on_step_end`` may take at most: the limits of all waits in it."""
THREADS_MAX = 200
ATTEMPT_LIMIT_S = 900.0
"""What an attempt may take beyond its steps."""
CALM_ITERATIONS = 25
"""Without a fault for so long, the stable iteration is close, and redundancy is back."""
LAG_MAX = 12


class Violation(Exception):
    """A promise was broken."""


_Ways = dict[tuple[int, str], dict[int, list[frozenset[str]]]]
"""By rank and unit, and by iteration: the memories that each way to have the capture takes."""


def _no_ways() -> _Ways:
    return defaultdict(lambda: defaultdict(list))


@dataclass(frozen=True)
class _Have:
    """What memory has of the present history, at least and at most.

    The bytes of a gradient of zeros do not tell of which history it is. Its epoch does, where all histories of that
    epoch are one up to there.
    """

    units: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Of each rank."""
    least: _Ways = field(default_factory=_no_ways)
    most: _Ways = field(default_factory=_no_ways)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the checker has to know of a run's shape."""

    ranks: int
    replicas: int
    mode: str
    experts: int
    dense_bytes: int
    expert_bytes: int
    frozen: Mapping[int, bytes]


@dataclass(frozen=True)
class Claim:
    """A recovery goes back to ``stable`` or later, while at most ``losses`` memories are lost since ``since_s``.

    Damage counts since ``launched_s``, when the attempt was launched: what it has verified at its start, and what was
    captured since then, nobody looks at again before the next recovery.
    """

    stable: int
    losses: int
    since_s: float
    launched_s: float
    why: str
    domain_of: Mapping[str, str] = field(default_factory=dict)
    """By memory: where no two copies of a state are in one failure domain, those of a domain are lost as one."""


@dataclass(kw_only=True)
class Begun:
    """What the ranks of one attempt have said about their start."""

    iteration: int
    recovered: bool
    epoch: int
    launched_s: float
    ranks: set[int] = field(default_factory=set)
    lost_tokens: int = 0
    captured: dict[tuple[int, int], int] = field(default_factory=dict)
    """By rank and expert: the iteration that its bytes are of (mode ``popularity``)."""


@dataclass(kw_only=True)
class _Round:
    began_s: float
    known: dict[int, int] = field(default_factory=dict)
    full: dict[int, bool] = field(default_factory=dict)
    at_home: dict[int, bool] = field(default_factory=dict)


class Checker:
    """One run's. All methods raise ``Violation``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.checks = 0
        self.chain: list[bytes] = [truth.START]
        """The marks of the present history, by iteration."""
        self.marks: dict[int, set[bytes]] = defaultdict(set, {0: {truth.START}})
        """Of all histories."""
        self.losses: list[tuple[float, str, str]] = []
        """When memory was lost or damaged, whose, and how."""
        self.deleted: set[str] = set()
        """Memories whose store was deleted, and has not been made again since."""
        self.claims: list[Claim] = []
        self.had_baseline = False
        self.consented = False
        """A person has agreed to begin from nothing."""
        self.on_disk: dict[int, tuple[bytes, ...]] = {}
        """Checkpoints on disk: by iteration, the history that led there."""
        self.reachable = (-1, -1)
        """What memory held at the launch of this attempt, by a naive look: at least, and at most."""
        self.vetoed: set[int] = set()
        self.replicas = model.replicas
        self.group_nodes = model.replicas + 1
        """Nodes that keep copies, or fragments, of each other."""
        self._begun: Begun | None = None
        self._recoveries: list[Begun] = []
        """Those that the present history has been through."""
        self._launched_s = 0.0
        self._domain_of: Mapping[str, str] = {}
        """Of the memories of this attempt, where the nodes of each domain are few enough to lie in different groups."""
        self._newest_stable = 0
        """That any rank has ever known, or recovered."""
        self._stable: dict[int, int] = {}
        self._pages: dict[int, int] = {}
        self._rounds: dict[int, _Round] = {}
        self._heard = -1
        self._words: dict[tuple[bytes, int, str], bytes] = {}
        """State by mark, rank and unit, in mode ``exact``."""
        self._before: dict[bytes, bytes] = {}
        """By mark: the one that it came from."""
        self._chains: dict[int, list[list[bytes]]] = defaultdict(list)
        """By epoch: the histories that were made in it."""

    # -- attempts --------------------------------------------------------------------------------------

    def launching(self, now_s: float, images: Sequence[tuple[str, bytes]], domains: Mapping[str, str]) -> None:
        """All processes are gone, and new ones are about to start on these arenas (place, bytes).

        ``domains``: the failure domain of each node's memory, empty where none are known.
        """
        most = max(Counter(domains.values()).values(), default=0)
        self._domain_of = domains if most <= len(domains) // self.group_nodes else {}
        newest = max(self._stable.values(), default=len(self.chain) - 1)
        self._newest_stable = max(self._newest_stable, newest)
        self._begun, self._launched_s = None, now_s
        self._stable, self._pages, self._rounds, self._heard = {}, {}, {}, -1
        found = [(place, contents) for place, image in images if (contents := read(image)) is not None]
        is_undamaged = all(how == "lost" for _, _, how in self.losses)
        if is_undamaged and len(found) != len(images):
            raise Violation("an arena that nobody damaged cannot be read")
        for place, contents in found if is_undamaged else ():
            if contents.stable > self._newest_stable:
                raise Violation(
                    f"{place} calls {contents.stable} stable, and the newest ever was {self._newest_stable}"
                )
        there = list(ways(found))
        if is_undamaged:
            self._check_bytes(there)
        have = self._have([contents for _, contents in found], there)
        self.reachable = self._newest(have.units, have.least), self._newest(have.units, have.most)
        if is_undamaged:
            self._check_claims(have, {_memory(place) for place, _ in images})

    def lost(self, now_s: float, memory: str, how: str) -> None:
        """A node's memory is lost (``lost``) or damaged (``damaged``)."""
        self.losses.append((now_s, memory, how))

    def started(
        self,
        now_s: float,
        rank: int,
        *,
        iteration: int,
        recovered: bool,
        epoch: int,
        mark: bytes,
        state: Mapping[str, bytes],
        counts: Sequence[int],
        lost_tokens: int,
    ) -> bool:
        """A rank trains from here on. ``state``: the bytes of its units; ``counts``: its token counters.

        Whether it is the last one.
        """
        self.checks += 1
        begun = self._begun
        if begun is None:
            begun = self._begun = Begun(
                iteration=iteration,
                recovered=recovered,
                epoch=epoch,
                launched_s=self._launched_s,
                lost_tokens=lost_tokens,
            )
            self._judge_start(begun)
            if recovered:
                self.chain = self.chain[: iteration + 1]
            else:
                self.chain = list(self.on_disk[iteration]) if iteration else [truth.START]
            self._chains[epoch].append(self.chain)
        here = (begun.iteration, begun.recovered, begun.epoch)
        if (iteration, recovered, epoch) != here:
            raise Violation(f"rank {rank} starts at {(iteration, recovered, epoch)}, others at {here}")
        if rank in begun.ranks:
            raise Violation(f"rank {rank} has started twice")
        begun.ranks.add(rank)
        if lost_tokens != begun.lost_tokens:
            raise Violation(f"rank {rank} reports {lost_tokens} lost tokens, others {begun.lost_tokens}")
        self._check_state(begun, rank, iteration, mark, state, counts)
        if len(begun.ranks) == self.model.ranks:
            self._check_losses(begun)
            self.had_baseline = True
            self.consented = False
            why = "all ranks have started"
            since_s = begun.launched_s
            self.claims = [Claim(iteration, self.replicas, since_s, since_s, why, self._domain_of)]
        return len(begun.ranks) == self.model.ranks

    def all_have_started(self, images: Sequence[tuple[str, bytes]]) -> None:
        """The last rank has, on these arenas: copies are complete again."""
        if all(how == "lost" for _, _, how in self.losses):
            found = [(place, contents) for place, image in images if (contents := read(image)) is not None]
            have = self._have([contents for _, contents in found], ways(found))
            self._check_claims(have, {_memory(place) for place, _ in images})

    def _judge_start(self, begun: Begun) -> None:
        floor = self.floor()
        if begun.recovered:
            if floor is not None and begun.iteration < floor.stable:
                raise Violation(f"recovered {begun.iteration}, and {floor} stands; losses {self.losses[-5:]}")
            least, most = self.reachable
            if begun.iteration > most:
                raise Violation(f"recovered {begun.iteration}, and memory held {most} at most")
            is_sure = not self.vetoed and not any(
                how == "damaged" or since_s >= self._launched_s for since_s, _, how in self.losses
            )
            if is_sure and begun.iteration < least:
                raise Violation(f"recovered {begun.iteration}, and memory held {least}")
            newest = max(self.on_disk, default=-1)
            if newest > begun.iteration:
                raise Violation(f"recovered {begun.iteration} from memory, and disk has {newest}")
        elif begun.iteration:
            if begun.iteration not in self.on_disk:
                raise Violation(f"began at {begun.iteration}, which is not on disk")
            if floor is not None and begun.iteration < floor.stable:
                raise Violation(f"loaded {begun.iteration} from disk, and {floor} stands; losses {self.losses[-5:]}")
        elif self.had_baseline and not self.consented:
            raise Violation("began from nothing, and there was a state to lose")

    def stable_history(self) -> tuple[bytes, ...]:
        """The present history, as far as some rank knows it to be stable."""
        stable = max(self._stable.values(), default=max((c.stable for c in self.claims), default=0))
        return tuple(self.chain[: stable + 1])

    def is_past(self, history: Sequence[bytes]) -> bool:
        """Whether the present history has gone on from this one."""
        return tuple(self.chain[: len(history)]) == tuple(history)

    def floor(self) -> Claim | None:
        """The strongest claim that still stands."""
        standing = [c for c in self.claims if len({c.domain_of.get(m, m) for m in self._lost_for(c)}) <= c.losses]
        return max(standing, key=lambda c: c.stable, default=None)

    def _lost_for(self, claim: Claim) -> set[str]:
        """Memories that a claim has to do without."""
        since_s = {"lost": claim.since_s, "damaged": claim.launched_s}
        return {memory for at_s, memory, how in self.losses if at_s >= since_s[how]} | self.deleted

    def gave_up(self, text: str) -> None:
        """A start has ended with: nothing can be recovered."""
        floor = self.floor()
        if floor is not None:
            raise Violation(f"nothing recoverable, and {floor} stands; losses {self.losses[-5:]}: {text}")
        if not self.had_baseline and not self.losses:
            raise Violation(f"nothing recoverable, and there was nothing to lose: {text}")

    # -- steps -----------------------------------------------------------------------------------------

    def stepped(self, rank: int, attempt: int, iteration: int, mark: bytes) -> None:
        """A rank has made a training step."""
        if iteration == len(self.chain):
            expected = truth.mark_after(self.chain[-1], iteration, attempt)
            self.chain.append(expected)
            self.marks[iteration].add(expected)
            self._before[expected] = self.chain[-2]
        elif iteration > len(self.chain):
            raise Violation(f"rank {rank} makes step {iteration} after {len(self.chain) - 1}")
        if self.chain[iteration] != mark:
            raise Violation(f"rank {rank} is in another history at iteration {iteration}")

    def before_save(self, now_s: float, rank: int, round_number: int, *, is_full: bool, at_home: bool) -> None:
        """A rank is about to say what it holds. ``is_full``: all of its holders count at this moment.

        ``at_home``: no other rank is, or is asked to be, a holder of it.
        """
        entry = self._rounds.setdefault(round_number, _Round(began_s=now_s))
        entry.full[rank], entry.at_home[rank] = is_full, at_home

    def saved(
        self,
        rank: int,
        round_number: int,
        *,
        stable: int,
        on_page: int,
        heard: int,
        redundancy: int,
        is_full: bool,
        at_home: bool,
        took_s: float,
        num_threads: int,
    ) -> None:
        """It has. ``heard``: the last round whose result it knows, with which ``redundancy`` came."""
        self.checks += 1
        if took_s > STEP_LIMIT_S:
            raise Violation(f"rank {rank} waited {took_s:.1f} s in on_step_end")
        if num_threads > THREADS_MAX:
            raise Violation(f"rank {rank} has {num_threads} threads")
        if stable < self._stable.get(rank, -1) or on_page < self._pages.get(rank, -1):
            raise Violation(f"T went back on rank {rank}: {stable} ({on_page}) after {self._stable}, {self._pages}")
        if on_page > stable:
            raise Violation(f"rank {rank} has written {on_page} as stable, and knows {stable}")
        self._stable[rank], self._pages[rank] = stable, on_page
        entry = self._rounds.get(round_number)
        if entry is not None:
            entry.known[rank] = stable
            entry.full[rank] &= is_full
            entry.at_home[rank] &= at_home
        if heard > self._heard:
            self._heard = heard
            self._claim(heard, stable, redundancy)

    def _claim(self, heard: int, stable: int, redundancy: int) -> None:
        """The newest report replaces all before it."""
        entry = self._rounds.get(heard)
        if entry is None or len(entry.known) < self.model.ranks:
            return
        apart = self._domain_of if all(entry.at_home.values()) else {}

        def claim(stable: int, losses: int, why: str, apart: Mapping[str, str]) -> None:
            since = entry.began_s, self._launched_s
            self.claims.append(Claim(stable, losses, *since, f"{why} in round {heard}", apart))

        self.claims = []
        claim(stable, 0, "stable", {})
        if all(entry.full.values()):
            claim(stable, self.replicas, "all holders count", apart)
        if redundancy:
            claim(min(entry.known.values()), redundancy, "redundancy said", apart)

    def saved_on_disk(self, iteration: int) -> None:
        """A checkpoint of this iteration is complete."""
        self.on_disk[iteration] = tuple(self.chain[: iteration + 1])

    def vetoes(self, iteration: int) -> None:
        """A rank has called this iteration unhealthy."""
        self.vetoed |= {iteration - 1, iteration}

    def calm(self, rank: int, iteration: int, stable: int, redundancy: int, *, is_found: bool) -> None:
        """Nothing has gone wrong for long. ``is_found``: whether the rank's arena stands under its name."""
        if not is_found:
            raise Violation(f"no fault for long, and a restart would not find the arena of rank {rank}")
        if iteration - stable > LAG_MAX:
            raise Violation(f"no fault for long, and rank {rank} is at {iteration} with {stable} stable")
        if redundancy < self.replicas:
            raise Violation(f"no fault for long, and rank {rank} has redundancy {redundancy} of {self.replicas}")

    # -- state -----------------------------------------------------------------------------------------

    def _check_losses(self, begun: Begun) -> None:
        """Shards of an expert are of one iteration, and tokens trained since then are reported as lost, once."""
        self._recoveries = [r for r in self._recoveries if r.iteration < begun.iteration] if begun.recovered else []
        for (rank, expert), captured in begun.captured.items():
            if captured != begun.captured.get((rank % 2, expert)):
                raise Violation(f"shards of expert {expert} of rank {rank} come from two iterations: {begun.captured}")
        lost = 0
        for (rank, expert), captured in begun.captured.items():
            before = [(r.captured.get((rank, expert), r.iteration), r.iteration) for r in self._recoveries]
            for i in range(captured + 1, begun.iteration + 1):
                if not any(a < i <= b for a, b in before):
                    lost += truth.tokens(rank, i, expert)
        if lost != begun.lost_tokens:
            raise Violation(f"{lost} tokens were lost, and {begun.lost_tokens} were reported")
        self._recoveries.append(begun)

    def _check_state(
        self,
        begun: Begun,
        rank: int,
        iteration: int,
        mark: bytes,
        state: Mapping[str, bytes],
        counts: Sequence[int],
    ) -> None:
        if mark != self.chain[iteration]:
            raise Violation(f"rank {rank} resumes iteration {iteration} of another history")
        if list(counts) != self._counts(rank, iteration):
            raise Violation(f"rank {rank} has token counts {list(counts)} at {iteration}")
        for name, data in state.items():
            expected = self._state(rank, name, iteration)
            if data == expected:
                continue
            if self.model.mode != "popularity" or ".experts." not in name:
                raise Violation(f"rank {rank} has wrong bytes in {name} at iteration {iteration}")
            captured = next((c for c in range(iteration - 1, -1, -1) if data == self._state(rank, name, c)), None)
            if captured is None:
                raise Violation(f"rank {rank} has bytes of no iteration of this history in {name} at {iteration}")
            expert = int(name.rpartition(".")[2]) % self.model.experts
            begun.captured[rank, expert] = captured

    def _state(self, rank: int, unit: str, iteration: int) -> bytes:
        if unit == FROZEN:
            return self.model.frozen[rank]
        return self._bytes_at(self.chain[iteration], iteration, rank, unit)

    def _bytes_at(self, mark: bytes, iteration: int, rank: int, unit: str) -> bytes:
        """What a unit of weights holds at this mark."""
        nbytes = self.model.dense_bytes if unit == DENSE else self.model.expert_bytes
        if self.model.mode != "exact":
            return truth.contents(mark, rank, unit, nbytes)
        steps = []
        while mark != truth.START and (mark, rank, unit) not in self._words:
            steps.append(mark)
            mark = self._before[mark]
        is_first = mark == truth.START
        words = truth.contents(mark, rank, unit, nbytes) if is_first else self._words[mark, rank, unit]
        for i, after in enumerate(reversed(steps), iteration - len(steps) + 1):
            words = truth.stepped(words, truth.gradient(after, rank, unit, nbytes, i), i)
            self._words[after, rank, unit] = words
        return words

    def _counts(self, rank: int, iteration: int) -> list[int]:
        return [sum(truth.tokens(rank, i, e) for i in range(1, iteration + 1)) for e in range(self.model.experts)]

    # -- arenas ----------------------------------------------------------------------------------------

    def _check_bytes(self, there: Iterable[Way]) -> None:
        """Whole or invisible: what pages list, and what any fragments that are enough make together, once was so."""
        for way in there:
            capture = way.capture
            self.checks += 1
            if not any(self._is_of(way.contents, capture, mark) for mark in self.marks[capture.iteration]):
                where = " and ".join(way.places)
                raise Violation(f"{capture.unit} of iteration {capture.iteration} has other bytes in {where}")

    def _check_claims(self, have: _Have, memories: set[str]) -> None:
        """What a claim says holds whichever memories are lost, and not only for those that chance has taken.

        A checkpoint on disk may be newer: who has loaded it needs nothing of what memory held before.
        """
        on_disk = max((i for i, history in self.on_disk.items() if self.is_past(history)), default=-1)
        for claim in self.claims:
            group = {memory: claim.domain_of.get(memory, memory) for memory in memories}
            gone = self._lost_for(claim)
            lost = {claim.domain_of.get(memory, memory) for memory in gone}
            left = sorted({*group.values()} - lost)
            if len(lost) > claim.losses:
                continue
            for more in combinations(left, min(claim.losses - len(lost), len(left))):
                self.checks += 1
                without = {*gone, *(memory for memory in memories if group[memory] in {*lost, *more})}
                newest = self._newest(have.units, have.most, without)
                if max(newest, on_disk) < claim.stable:
                    raise Violation(
                        f"{claim}, and without {sorted(without)} memory holds {newest}, disk {on_disk} at most"
                    )

    def _is_of(self, contents: Contents, capture: Capture, mark: bytes) -> bool:
        """Whether a capture has the bytes of this mark."""
        owner, name, i = contents.owner, capture.unit, capture.iteration
        if name == HOST:
            try:
                return mark_of(capture.data) == mark
            except (ValueError, KeyError, struct.error):
                return False
        if name == FROZEN:
            return capture.data.startswith(self.model.frozen[owner])
        if name == BUFFERS:
            return self._has_counts(owner, capture.data, i)
        unit, start = _place(contents, name.removesuffix(GRADIENT))
        nbytes = self.model.dense_bytes if unit == DENSE else self.model.expert_bytes
        if name.endswith(GRADIENT):
            if capture.is_zero and truth.is_skipped(i):
                return True
            expected = truth.gradient(mark, owner, unit, nbytes, i)
        else:
            expected = self._bytes_at(mark, i, owner, unit)
        size = min(dict(contents.units)[name], nbytes - start)
        if not capture.data.startswith(expected[start : start + size]):
            return False
        has_counts = name == DENSE and self.model.mode != "exact"
        return not has_counts or self._has_counts(owner, capture.data[-(-nbytes // 64) * 64 :], i)

    def _has_counts(self, rank: int, data: bytes, iteration: int) -> bool:
        return list(struct.unpack_from(f"<{self.model.experts}q", data)) == self._counts(rank, iteration)

    def _have(self, found: Sequence[Contents], there: Iterable[Way]) -> _Have:
        """What is of the present history."""
        have = _Have()
        for contents in found:
            have.units[contents.owner] |= {name for name, _ in contents.units}
        for way in there:
            i, key = way.capture.iteration, (way.contents.owner, way.capture.unit)
            if i < len(self.chain) and self._is_of(way.contents, way.capture, self.chain[i]):
                memories = frozenset(map(_memory, way.places))
                have.most[key][i].append(memories)
                if not way.capture.is_zero or self._is_known(way.capture):
                    have.least[key][i].append(memories)
        return have

    def _is_known(self, capture: Capture) -> bool:
        """Whether all histories of a capture's epoch are the present one, up to its iteration."""
        upto = slice(capture.iteration + 1)
        chains = self._chains.get(capture.epoch, [])
        return bool(chains) and all(chain[upto] == self.chain[upto] for chain in chains)

    def _newest(self, units: Mapping[int, set[str]], there: _Ways, without: Collection[str] = ()) -> int:
        """The newest iteration of which every unit of every rank is there without these memories; -1: none."""
        have: dict[tuple[int, str], set[int]] = defaultdict(set)
        for key, iterations in there.items():
            have[key] = {i for i, found in iterations.items() if any(way.isdisjoint(without) for way in found)}
        ranks = range(self.model.ranks)
        for i in range(len(self.chain) - 1, -1, -1):
            if all(units[r] and all(self._is_there(have, r, name, i) for name in units[r]) for r in ranks):
                return i
        return -1

    def _is_there(self, have: Mapping[tuple[int, str], set[int]], rank: int, name: str, iteration: int) -> bool:
        """Whether memory has what this unit of a rank needs for this iteration."""
        if name == FROZEN:
            return bool(have[rank, name])
        if self.model.mode == "popularity" and ".experts." in name:
            common = set.intersection(*(have[r, name] for r in range(rank % 2, self.model.ranks, 2)))
            return any(c <= iteration for c in common)
        if self.model.mode != "exact" or name in (HOST, BUFFERS):
            return iteration in have[rank, name]
        if name.endswith(GRADIENT):
            return True  # those that a unit of weights needs are looked for with it
        base = max((c for c in have[rank, name] if c <= iteration), default=None)
        return base is not None and all(i in have[rank, name + GRADIENT] for i in range(base + 1, iteration + 1))


def _place(contents: Contents, name: str) -> tuple[str, int]:
    """The unit that a slice of mode ``exact`` is of, and its first byte there."""
    unit, mark, turn = name.partition("#")
    before = [n for n, _ in contents.units if mark and n.partition("#")[0] == unit and not n.endswith(GRADIENT)]
    sizes = dict(contents.units)
    return unit, sum(sizes[n] for n in before if int(n.partition("#")[2]) < int(turn))


def _memory(place: str) -> str:
    """Whose memory it is in."""
    return place.partition("/")[0]
