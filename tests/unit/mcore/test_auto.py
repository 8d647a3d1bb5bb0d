# SPDX-License-Identifier: Apache-2.0
"""Mode auto around real sessions of two ranks, one a node: what is called when, what is measured, what is left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from ends import AT_END
from fabrics import loopback_fabrics
from session_job import Adapter
from support import ManualClock, ManualCondition, blueprint, spanning, together

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, StoreError, UnsupportedState
from megatron_moetion.mcore.attach import Attached, InMode, Loop, tie
from megatron_moetion.replicate.witness import NO_WITNESS, Past, Witness
from megatron_moetion.run.host import Host
from megatron_moetion.run.network import Network
from megatron_moetion.run.prepare import Claimed, claim, settle
from megatron_moetion.run.starter import Resumed
from megatron_moetion.run.trial import MEASURED, WARM_UP
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.schedule.timeline import Lane

CHOSEN_AT = WARM_UP + MEASURED


class State(Adapter):
    """The state of a loop, with what ``MegatronState`` has beside an adapter's."""

    has_trained = False

    @property
    def tokens(self) -> State:
        return self

    def loaded(self) -> None: ...

    def restore_rng(self) -> None: ...

    def close(self) -> None: ...

    def inner_optimizers(self) -> list[Any]:
        return []


@dataclass
class ToyLoop:
    """A ``Loop`` without Megatron. An iteration takes a second of ``clock``, and training sends for ``sends_s`` of it.

    Mode ``exact`` has nothing to replay here.
    """

    state_of_rank: State
    sends_s: float
    troubles: Sequence[Exception] = ()
    """What ``attach`` raises, once each."""
    graphs: Mapping[str, Any] = field(default_factory=dict)
    clock: ManualClock = field(default_factory=ManualClock)
    watched: list[Scheduler] = field(default_factory=list)

    def free_device_bytes(self) -> int | None:
        return None

    def state(self, config: MoetionConfig) -> tuple[State, Any]:
        if config.mode == "exact":
            raise UnsupportedState("nothing can be replayed here")
        return self.state_of_rank, blueprint(config.mode, self.state_of_rank)

    def scheduler(self, config: MoetionConfig, host: Host) -> Scheduler:
        return Scheduler(
            "steady" if config.schedule == "auto" else config.schedule,
            HostStopwatch(self.clock),
            clock=self.clock,
            condition=ManualCondition(self.clock),
            eager_slice_bytes=1 << 20,
            draw=no_drawing,
        )

    def watch(
        self, scheduler: Scheduler, node_of: Sequence[int], undo: ExitStack, communicator: Any = None
    ) -> dict[str, Any]:
        self.watched.append(scheduler)
        undo.callback(self.watched.pop)
        return {"p2p_communicator": communicator or "ours"} if communicator is None else {}

    def attach(
        self, config: MoetionConfig, claimed: Claimed, undo: ExitStack, network: Network | None = None
    ) -> InMode:
        for trouble in self.troubles:
            raise trouble
        state, of_mode = self.state(config)
        scheduler = self.scheduler(config, claimed.host)
        prepared = settle(
            claimed,
            config,
            adapter=state,
            blueprint=of_mode,
            topology="toy",
            scheduler=scheduler,
            network=network,
        )
        return InMode(prepared, cast(Any, state))

    def train(self, iteration: int) -> None:
        self.state_of_rank.step(iteration)
        for scheduler in self.watched:
            with spanning(scheduler.recorder, Lane.GRADIENT, 1 << 20, 1 << 20):
                self.clock.sleep(self.sends_s)
        self.clock.sleep(1 - self.sends_s if self.watched else 1)


class Job:
    """One attempt of a job of two ranks. Settings are those of ``MoetionConfig``."""

    def __init__(
        self,
        store: Path,
        attempt: int = 0,
        *,
        sends_s: float = 0.0,
        witness: Witness = NO_WITNESS,
        loop: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.store = store
        self.states = [State(num_experts=4, seed=rank) for rank in range(2)]
        self.loops = [ToyLoop(state, sends_s, **(loop or {})) for state in self.states]
        fields = {"store": str(store), "run_id": "job", "ranks_per_node": 1, "pack_threads": 1, "timeout_s": 10,
                  "chunk_bytes": 4096, "replicas": 1, **settings}  # fmt: skip
        self.config = MoetionConfig(**fields)
        self.fabrics = loopback_fabrics(2, timeout_s=10)
        self.attempt, self.witness = attempt, witness
        self.iteration = 0
        self.ranks = self.together(self._attach)
        for rank in self.ranks:
            AT_END.callback(rank.abandon)

    def together(self, call: Callable[[int], Any]) -> list[Any]:
        return together(*(lambda r=r: call(r) for r in range(2)))  # type: ignore[misc]

    def _attach(self, rank: int) -> Attached:
        """As ``attach`` does once it is connected."""
        environment = {
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(self.attempt)
        }  # fmt: skip
        host = Host(environment=environment, link_probe_bytes=1 << 16)
        claimed = claim(config=self.config, fabric=self.fabrics[rank], witness=self.witness, host=host)
        return tie(cast(Loop, self.loops[rank]), claimed, ExitStack())

    def start(self, load: Callable[[], int | None] | None = None) -> Resumed | None:
        resumed = self.together(lambda rank: self.ranks[rank].start(load))[0]
        self.iteration = resumed.iteration if resumed is not None else (load() or 0) if load is not None else 0
        return cast("Resumed | None", resumed)

    def train(self, iterations: int, *, stepped: bool = True) -> None:
        for _ in range(iterations):
            self.iteration += 1

            def step(rank: int, iteration: int = self.iteration) -> None:
                self.loops[rank].train(iteration)
                self.ranks[rank].on_step_end(iteration, stepped=stepped)
                self.ranks[rank].drain()

            self.together(step)

    def close(self) -> None:
        self.together(lambda rank: self.ranks[rank].close())

    @property
    def left(self) -> list[str]:
        """What lies in the store."""
        return sorted(path.name for path in self.store.iterdir())


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_moetion")


def chosen_line(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [m for r in caplog.records if "mode auto: mode '" in (m := r.getMessage())]
    return line


def test_a_run_chooses_trains_dies_and_goes_on_in_that_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the order of a run. The network is probed once, and training's own traffic leaves room for all state."""
    job = Job(tmp_path, sends_s=0.1)
    assert job.start() is None
    assert f"snapshots begin after {CHOSEN_AT} iterations" in caplog.text
    job.train(CHOSEN_AT - 1)
    first = job.ranks[0]
    assert (first.stable_iteration, first.scalars(), first.experts()) == (-1, {}, ())
    assert first.pipeline_arguments == {"p2p_communicator": "ours"}
    first.restore_rng()
    with pytest.raises(ConfigError, match="has not chosen yet"):
        _ = first.session
    job.train(1)
    line = chosen_line(caplog)
    assert f"rank 0 iteration {CHOSEN_AT}: mode auto: mode 'full', the strongest that fits" in line
    assert "exact is left out: nothing can be replayed here" in line
    assert "tightest: the network has 0." in line
    assert "of 1.00 s for them at" in line
    assert caplog.text.count("replicas go over lo") == 1
    assert first.stable_iteration == CHOSEN_AT
    job.train(2)
    images = [s.image() for s in job.states]
    assert first.pipeline_arguments == {"p2p_communicator": "ours"}
    for rank in job.ranks:
        rank.session.running.pipeline.close()
        rank.session.running.arenas.close()
    job.fabrics.close()

    again = Job(tmp_path, attempt=1)
    resumed = again.start()
    assert resumed is not None
    assert (resumed.iteration, again.ranks[0].session.running.mode.name) == (CHOSEN_AT + 2, "full")
    assert [s.image() for s in again.states] == images
    again.train(1)
    again.close()


def test_a_network_that_training_never_leaves_takes_the_weakest_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However fast it is: the windows of the measured iterations count, and nothing that snapshots could have."""
    job = Job(tmp_path, sends_s=1.0, schedule="bubble")
    job.start()
    job.train(CHOSEN_AT)
    line = chosen_line(caplog)
    assert "mode 'popularity'" in line
    assert "nothing fits, and it is the weakest" in line
    assert "the network has 0.00 of 1.00 s for them at" in line
    job.train(1)
    assert job.ranks[0].session.running.mode.name == "popularity"
    job.close()


def test_traffic_inside_graphs_is_not_seen_so_half_of_the_link_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path, sends_s=1.0, loop={"graphs": {"cuda_graph_impl": "full_iteration"}})
    job.start()
    job.train(CHOSEN_AT)
    assert "what training sends was not seen, so 50% of that counts" in chosen_line(caplog)
    job.close()


def test_a_first_start_goes_on_from_the_checkpoint_on_disk(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.start(lambda: 30) is None
    job.train(CHOSEN_AT)
    assert job.ranks[0].stable_iteration == 30 + CHOSEN_AT
    job.close()


def test_ranks_that_loaded_different_checkpoints_hear_it_before_they_train(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with pytest.raises(StoreError, match="ranks loaded different persistent checkpoints"):
        job.together(lambda rank: job.ranks[rank].start(lambda: 30 + rank))


@dataclass
class Knows:
    """A witness from the first start on."""

    had_baseline: bool

    def past(self) -> Past:
        return Past(is_known=True, had_baseline=self.had_baseline)

    def note_baseline(self) -> None:
        self.had_baseline = True


def test_a_restart_that_is_known_to_have_had_nothing_to_lose_is_a_first_start(tmp_path: Path) -> None:
    job = Job(tmp_path, attempt=1, witness=Knows(had_baseline=False))
    assert job.start() is None
    job.train(CHOSEN_AT)
    assert job.ranks[0].stable_iteration == CHOSEN_AT
    job.close()


def test_a_restart_that_may_have_had_a_state_chooses_at_once_by_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path, attempt=1, allow_fresh=True)
    assert job.start() is None
    assert job.ranks[0].stable_iteration == 0
    assert "Measured" not in chosen_line(caplog)
    job.train(1)
    job.close()


def test_iterations_without_a_step_do_not_count(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    job.train(2, stepped=False)
    job.train(CHOSEN_AT - 1)
    assert job.ranks[0].stable_iteration == -1
    job.train(1)
    assert job.ranks[0].stable_iteration == CHOSEN_AT + 2
    job.close()


# -- early ends ----------------------------------------------------------------------------------------------------


def test_a_run_that_ends_before_the_choice_says_so_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path)
    job.start()
    job.train(2)
    assert job.left == ["job"]
    job.close()
    assert caplog.text.count("the run ended before mode auto had chosen") == 1
    assert job.left == []
    job.close()
    assert caplog.text.count("the run ended before mode auto had chosen") == 1
    with pytest.raises(ConfigError, match="was closed"):
        job.ranks[0].on_step_end(3)


@pytest.mark.parametrize("iterations", [None, 0, 2])
def test_an_error_before_the_choice_leaves_nothing(tmp_path: Path, iterations: int | None) -> None:
    """Also before ``start``."""
    job = Job(tmp_path)
    if iterations is not None:
        job.start()
        job.train(iterations)

    def fail(rank: int) -> None:
        with suppress(ValueError), job.ranks[rank]:
            raise ValueError("of the loop")

    job.together(fail)
    assert job.left == []


def test_a_choice_that_cannot_be_kept_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, loop={"troubles": [StoreError("no memory")]})
    job.start()
    job.train(CHOSEN_AT - 1)

    def fail(rank: int) -> None:
        with job.ranks[rank]:
            job.ranks[rank].on_step_end(CHOSEN_AT)

    with pytest.raises(StoreError, match="no memory"):
        job.together(fail)
    assert job.left == []


def test_a_state_that_cannot_be_captured_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedState, match="nothing can be replayed here"):
        Job(tmp_path, mode="exact")
    assert list(tmp_path.iterdir()) == []


def test_an_end_without_close_leaves_nothing_that_no_start_needs(tmp_path: Path) -> None:
    """In any mode: a run that has a mode from the start too."""
    job = Job(tmp_path, mode="full")
    assert job.left == ["job"]
    job.together(lambda rank: job.ranks[rank].abandon())
    assert job.left == []


def test_what_an_early_end_leaves_alone_is_a_run_with_something_to_recover(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    job.train(CHOSEN_AT)
    job.close()
    again = Job(tmp_path, attempt=1)
    again.together(lambda rank: again.ranks[rank].abandon())
    third = Job(tmp_path, attempt=2)
    resumed = third.start()
    assert resumed is not None
    assert resumed.iteration == CHOSEN_AT
    third.close()


def test_calls_out_of_order_say_so(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with pytest.raises(ConfigError, match=r"call start\(\) before on_step_end"):
        job.ranks[0].on_step_end(1)
    with pytest.raises(ConfigError, match=r"call start\(\) before restore_rng"):
        job.ranks[0].restore_rng()
