# SPDX-License-Identifier: Apache-2.0
"""The one orchestrator: calls the parts of a run in order, and decides nothing.

Policies are in ``modes``, ``select``, ``recover/plan.py`` and ``replicate/placement.py``; effects in ``snapshot``,
``store`` and ``replicate``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from megatron_moetion.errors import ConfigError, DeviceFault, UnsupportedState
from megatron_moetion.modes.mode import Remark
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.run.running import Running, freeze
from megatron_moetion.select.book import ExpertState


class Session:
    """In-memory checkpointing of one rank, from its baseline or recovery on.

    Call ``before_optimizer_step`` in a hook on the optimizer, ``on_step_end`` after each iteration, ``close`` at the
    end. All calls come from the training thread.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self._is_open = True

    @property
    def stable_iteration(self) -> int:
        """The newest iteration that manifests call whole on every rank and its replicas.

        It outlives this process: an iteration that ranks have only just agreed on counts once it is written down.
        """
        run = self.running
        if self._is_open:
            run.pipeline.wait_until_released()
        return run.arenas.own.page.stable

    @property
    def writes_checkpoints(self) -> bool:
        """Whether checkpoints on disk are written beside training, which need not stop for them."""
        return self.running.releases.writes

    def before_optimizer_step(self) -> None:
        """Return once live state may be written; a late snapshot is dropped. Called by the optimizer hook.

        On a GPU copies already enqueued finish first: training's stream waits there, and the host does not.
        """
        if self._is_open:
            self.running.pipeline.finish_packing(self.running.max_stall_s)

    def on_step_end(self, iteration: int, *, healthy: bool = True, stepped: bool = True) -> None:
        """Take this iteration's snapshot. State must stay as it is until the next optimizer step.

        ``iteration`` counts completed iterations and must be the same on all ranks. Everything that draws random
        numbers or moves the position in the data between two steps, an evaluation for instance, comes before it: a
        resume does not repeat it. Does not raise for a failed snapshot, which is dropped, counted and logged once;
        raises ``ProtectionLost`` where snapshots have stopped for good and ``max_unprotected_iterations`` have passed,
        ``ConfigError`` after ``close``. Waits for no other rank.

        ``healthy``: False where the loss or the gradients of this iteration are not what they should be, on this rank
        at least. Neither the state after this iteration, nor the one before it, from which the loss came, becomes
        stable then, unless it is. A recovery takes them only where nothing else can be recovered.

        ``stepped``: False where the loop took no optimizer step in this iteration (``--iterations-to-skip``, an empty
        batch), on all ranks alike. Such an iteration has a snapshot as any other, and mode ``exact`` no hole. Whether a
        loss scaler skipped a step that the loop asked for is seen without it.

        The order of events is a contract (``docs/architecture.md`` says why each stands where it does):

        1. ``scheduler.cut``: the timeline of the iteration ends, and windows are derived.
        2. ``adapter.after_step``, if there was a step: counters and averages that are state move for the last time.
        3. ``protection.watch``: the distance to the stable iteration is judged, also where no snapshot is due.
        4. ``pipeline.finish``: the last snapshot is packed or dropped.
        5. ``upkeep.check``: deleted files are put back while no thread packs.
        6. ``mode.packed``, then for modes that wait ``pipeline.catch_up``.
        7. ``agreement.poll``: all results that have come, each with ``mode.settle``.
        8. ``mode.exchange``: other messages between ranks.
        9. ``mode.note_step``: the optimizer's step enters the log, and with it the host state.
        10. ``packer.freeze``: state that changes before the next optimizer step is copied.
        11. ``mode.given_up``, ``mode.recoverable``, ``mode.vote``, ``agreement.start``, ``mode.contributed``.
        12. ``summary.state_hash``, where one is due.
        13. ``mode.contents``: the snapshot's units are chosen.
        14. ``adapter.moved``: addresses are checked right before they are read.
        15. ``releases.take``, ``pipeline.submit``: arenas release what ``settle`` allowed and nobody still copies, then
            units are packed and replicated.
        """
        run = self._open()
        if (unread := run.scheduler.cut(iteration, is_typical=stepped)) is not None:
            text = f"a timeline of training cannot be read and is left out, as others will be: {unread}"
            run.journal.warn_once("timeline", iteration, text)
        if stepped:
            run.adapter.after_step()
        run.protection.watch(iteration, run.agreement.stable, run.pipeline.ended)
        if not healthy:
            run.protection.note_unhealthy(iteration)
            self._veto((iteration - 1, iteration))
        if iteration % run.interval:
            return
        captured = run.pipeline.finish()
        run.upkeep.check(iteration)
        run.mode.packed(captured)
        if run.mode.waits_for_replication:
            with run.scheduler.urgent():
                run.pipeline.catch_up(run.max_stall_s)
        self._learn()
        problem = self._agree(iteration, stepped=stepped)
        if not healthy:
            problem = Skip(reason="unhealthy")
        run.probe("before-select", iteration)
        contents, remark = run.mode.contents(iteration)
        self._say(iteration, remark)
        if not isinstance(contents, Skip):
            if problem is None and (moved := run.adapter.moved()):
                problem = Skip(reason="moved", details=moved)
            if problem is not None:
                why = problem.details or problem.reason
                text = f"snapshots are dropped, iteration {run.agreement.stable} stays: {why}"
                run.journal.warn_once(problem.reason, iteration, text)
                contents = problem
        run.pipeline.submit(iteration, contents, run.releases.take())
        run.summary.drops(iteration, run.pipeline)
        for kind, text in run.pipeline.remarks():
            run.journal.warn_once(f"{kind} {iteration}", iteration, text)

    def _veto(self, iterations: Sequence[int]) -> None:
        """Before anything else: a crash may follow at once, and memory holds these iterations as any others."""
        run = self.running
        run.agreement.veto(iterations)
        unwritten = run.vetoes.add(i for i in iterations if i > run.agreement.stable)
        if unwritten is not None:
            text = f"a recovery may go on from this iteration or the one before, which are not healthy: {unwritten}"
            run.journal.warn_once("vetoes", max(iterations), text)

    def _learn(self) -> None:
        """Hear the results of agreements that have come, and what they allow arenas to release."""
        run = self.running
        for agreed in run.agreement.poll():
            settled = run.mode.settle(agreed)
            if agreed.is_news:
                run.releases.learn(settled)
            run.journal.hear(agreed.notes)

    def _agree(self, iteration: int, *, stepped: bool) -> Skip | None:
        """Why this step cannot be captured, None if it can."""
        run = self.running
        run.mode.exchange(iteration)
        missed = run.mode.note_step(iteration, run.agreement.newest, stepped=stepped)
        unfrozen = self._freeze()
        rounds = run.pipeline.rounds | dict.fromkeys(run.mode.given_up(), False)
        recoverable = set(run.mode.recoverable(rounds))
        vote = run.mode.vote(run.scheduler.carries(run.coding.share))
        self._say(iteration, vote.remark)
        number = run.agreement.start(
            iteration,
            rounds=rounds,
            recoverable=recoverable,
            vote=vote.mask,
            redundancy=self._redundancy(recoverable),
            notes=run.journal.take_notes(),
        )
        run.mode.contributed(number, run.packer)
        run.summary.state_hash(iteration, run.adapter)
        if unfrozen is not None:
            return Skip(reason="freeze", details=unfrozen)
        return Skip(reason="missed", details=missed) if missed is not None else None

    def _redundancy(self, recoverable: Collection[int]) -> int:
        """Of the stable iteration, and of any that this round may make the stable one: the least."""
        run = self.running
        stable = run.agreement.stable
        return min(run.pipeline.redundancy(i) for i in {stable, *(i for i in recoverable if i > stable)})

    def _freeze(self) -> str | None:
        """Copy the state that cannot wait; returns why that is not possible, None if it is."""
        run = self.running
        try:
            freeze(run.packer, run.adapter, run.mode)
        except (UnsupportedState, DeviceFault) as error:
            return str(error)
        return None

    def scalars(self) -> dict[str, float]:
        """Numbers for a dashboard, this rank's."""
        run = self._open()
        counts = run.pipeline.counts
        return {
            "moetion/stable-lag-iterations": float(run.agreement.newest - run.agreement.stable),
            "moetion/redundancy": float(run.pipeline.redundancy(run.agreement.stable)),
            "moetion/redundancy-least": float(run.agreement.redundancy),
            "moetion/snapshot-bytes": counts.bytes_committed / max(counts.committed, 1),
            "moetion/snapshots-dropped": float(sum(counts.dropped.values())),
            "moetion/unhealthy-iterations": float(run.protection.unhealthy),
            "moetion/zero-bytes": counts.zero_bytes / max(counts.committed, 1),
            "moetion/captures-left-out": float(sum(counts.left_out.values())),
            "moetion/waited-s": counts.waited_s,
            "moetion/waited-for-device-s": counts.waited_for_device_s + run.packer.waited_s,
            **run.mode.scalars(),
            **run.scheduler.scalars(),
        }

    def experts(self) -> tuple[ExpertState, ...]:
        """Tokens at risk and lost, of each expert of this rank's layers; empty except in mode ``popularity``."""
        return self.running.mode.experts()

    def drain(self) -> None:
        """Wait until every snapshot that was begun is whole or dropped, and agreed on as far as it was. Bounded."""
        if self._is_open:
            run = self.running
            with run.scheduler.urgent():  # no iteration goes on, in which there would be windows
                run.pipeline.drain()
            if run.agreement.wait(run.timeout_s):  # else a rank is away, and one wait is enough
                run.mode.wait(run.timeout_s)

    def close(self) -> None:
        """Finish the snapshots under way, report, and close everything. The arenas stay for the next start.

        Where no other launch could find them again, because torchrun has made up the run's name, they are removed when
        this process ends, if all ranks have closed. Collective, except while an exception is being handled: see
        ``abandon``, which waits for no rank.
        """
        if not self._is_open:
            return
        if sys.exc_info()[0] is not None:
            self.abandon()
            return
        self._is_open = False
        run = self.running
        with run.undo:
            with run.scheduler.urgent():
                run.pipeline.drain()
            run.releases.finish(min(run.save_limit_s, run.timeout_s))
            newest, stable = run.agreement.newest, run.agreement.stable
            is_whole = run.summary.at_end(newest, run.pipeline, run.mode.layers(run.packer), stable)
        if is_whole:
            run.forget()

    def abandon(self, wait_s: float = 0.0) -> bool:
        """Stop without waiting for other ranks, in a process that is about to end.

        ``wait_s`` is for the snapshots under way; the result is whether they were done by then. Memory that the threads
        may still use stays until the process has ended.
        """
        if not self._is_open:
            return True
        self._is_open = False
        run = self.running
        run.undo.pop_all()
        is_done = run.pipeline.abandon(wait_s)
        run.leaving.close()
        run.fabric.abandon()
        return is_done

    def _open(self) -> Running:
        if not self._is_open:
            raise ConfigError("the session was closed; on_step_end() cannot follow close()")
        return self.running

    def _say(self, iteration: int, remark: Remark | None) -> None:
        if remark is not None:
            self.running.journal.warn_once(remark.kind, iteration, remark.text)
