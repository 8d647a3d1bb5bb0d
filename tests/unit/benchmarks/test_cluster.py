# SPDX-License-Identifier: Apache-2.0
"""The cluster model against closed forms; that it repeats itself, and loses no byte."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import simpy

import benchmarks.cluster.__main__ as cluster
from benchmarks.cluster import calibrate, ours, papers, routing, sparsity
from benchmarks.cluster.faults import Faults, Protection, simulate_faults
from benchmarks.cluster.resources import Shared
from benchmarks.cluster.run import simulate
from benchmarks.cluster.snapshots import Agreement, Policy, Ranks, Toll
from benchmarks.cluster.training import Cluster, Machines, Work
from megatron_moetion.config import MoetionConfig
from megatron_moetion.plan.costs import RankState

FAST = 1e15
"""Bytes a second: as good as no limit."""
STATE = RankState(dense_parameters=20_000, expert_parameters=200_000, num_experts=16, replicas=1, ranks_per_node=2)
CONFIG = MoetionConfig(staleness_cap=16, lost_token_budget=0.0)


def world(machines: int, link_bytes_per_s: float = FAST, processors: int | None = None) -> Machines:
    return Machines(machines=machines, ranks=2, processors=processors, link_bytes_per_s=link_bytes_per_s)


def policy(mode: str, schedule: str = "eager") -> Policy:
    return Policy(mode=mode, schedule=schedule, state=STATE, period=8, config=CONFIG)


# -- what flows share ----------------------------------------------------------------------------------------


def test_flows_share_evenly_and_none_gets_more_than_it_can_take():
    env = simpy.Environment()
    shared = Shared(env, 2.0, most_each=1.0)
    ends: dict[str, float] = {}

    def flow(name, begin, amount, streams=1):
        yield env.timeout(begin)
        yield shared.use(amount, streams)
        ends[name] = env.now

    for args in (("alone", 0, 1.0), ("first", 10, 2.0), ("four", 11, 1.0, 4)):
        env.process(flow(*args))
    env.run()
    assert ends["alone"] == pytest.approx(1.0)  # at most 1 a second although there are 2
    # From 11 on five streams share 2 a second: 0.4 each; both need 1 more.
    assert ends["first"] == pytest.approx(13.5)
    assert ends["four"] == pytest.approx(13.5)
    assert shared.served == pytest.approx(1 + 2 + 4)


def test_a_link_that_is_shared_keeps_messages_as_long_as_queueing_theory_says():
    """Processor sharing with Poisson arrivals: a message of duration s stays s / (1 - load) on average."""
    env = simpy.Environment()
    link, chance, stays = Shared(env, 1.0), np.random.default_rng(1), []
    load = 0.6

    def message():
        began = env.now
        yield link.use(1.0)
        stays.append(env.now - began)

    def arrivals():
        for _ in range(20_000):
            yield env.timeout(chance.exponential(1 / load))
            env.process(message())

    env.process(arrivals())
    env.run()
    assert np.mean(stays) == pytest.approx(1 / (1 - load), rel=0.05)
    assert link.busy_s / env.now == pytest.approx(load, rel=0.03)
    assert link.served == pytest.approx(20_000)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 1), (2, 8), (4, 8), (8, 3)])
def test_a_pipeline_takes_what_its_bubble_says(stages, micro_batches):
    work = Work(stages=stages, micro_batches=micro_batches, forward_s=0.01, backward_s=0.02, fixed_s=0.05)
    found = simulate(world(stages), work, iterations=2, settling=1)
    assert found.iteration_s == pytest.approx((micro_batches + stages - 1) * 0.03 + 0.05)


def test_a_saturated_link_sets_the_time_of_an_iteration():
    """Each micro batch is sent forward and comes back, one rank behind the other: 2 x 2 ranks x bytes at the link."""
    nbytes, rate = 1_000_000, 1e6
    work = Work(stages=1, micro_batches=3, forward_s=1e-6, backward_s=1e-6, collectives=2, collective_bytes=nbytes)
    found = simulate(world(2, rate), work, iterations=2, settling=0)
    assert found.iteration_s == pytest.approx(3 * 2 * 2 * 2 * nbytes / rate, rel=1e-4)
    assert found.link_busy == pytest.approx(1.0, abs=1e-3)


def test_processors_that_ranks_share_slow_them_down():
    work = Work(stages=1, micro_batches=4, forward_s=0.1, backward_s=0.1)
    assert simulate(world(2, processors=2), work, iterations=1, settling=0).iteration_s == pytest.approx(1.6)
    assert simulate(world(2, processors=4), work, iterations=1, settling=0).iteration_s == pytest.approx(0.8)


# -- snapshots -----------------------------------------------------------------------------------------------

PIPELINE = Work(stages=2, micro_batches=8, forward_s=0.02, backward_s=0.04, fixed_s=0.05, message_bytes=100_000)


@pytest.mark.parametrize("mode", ["full", "exact", "popularity"])
@pytest.mark.parametrize("schedule", ["eager", "steady", "bubble"])
def test_snapshots_are_free_where_nothing_is_scarce(mode, schedule):
    off = simulate(world(2), PIPELINE)
    found = simulate(world(2), PIPELINE, policy(mode, schedule))
    assert found.iteration_s == pytest.approx(off.iteration_s, rel=1e-6)
    assert found.whole == 1.0
    assert found.sent_bytes == pytest.approx(policy(mode).snapshot_bytes(4 if mode == "popularity" else 0), rel=0.2)


def test_every_byte_that_is_sent_crosses_the_link_once():
    env = simpy.Environment()
    cluster = Cluster(env, world(2, 50e6), PIPELINE)
    agreement = Agreement()
    ranks = [
        Ranks(env, policy("full"), Toll(), agreement, cluster.links[m], cluster.processors[m], 2) for m in range(2)
    ]
    cluster.train(list(ranks), 10)
    env.run(env.now + 10)  # what is on its way arrives
    messages = 10 * PIPELINE.micro_batches * PIPELINE.message_bytes
    for link, each in zip(cluster.links, ranks, strict=True):
        assert link.served == pytest.approx(2 * (messages + each.fates.sent_bytes))
        assert each.fates.sent_bytes == each.fates.packed_bytes
        assert len(each.fates.whole_s) + len(each.fates.dropped) == 10


def test_a_link_that_snapshots_saturate_slows_training_and_waiting_for_gaps_does_not():
    rate = 8e6
    off = simulate(world(2, rate), PIPELINE)
    eager = simulate(world(2, rate), PIPELINE, policy("full", "eager"))
    bubble = simulate(world(2, rate), PIPELINE, policy("full", "bubble"))
    assert eager.iteration_s > 1.1 * off.iteration_s
    assert bubble.iteration_s < 1.02 * off.iteration_s
    assert bubble.lost_iterations > eager.lost_iterations  # what is not in the way arrives later


def test_two_runs_are_the_same():
    one, two = (simulate(world(2, 8e6, 2), PIPELINE, policy("popularity", "bubble"), Toll(byte_s=1e-9)) for _ in "ab")
    assert one == two


def test_stages_and_machines_must_agree():
    with pytest.raises(ValueError, match="2 stages on 3 machines"):
        simulate(world(3), PIPELINE)


# -- faults --------------------------------------------------------------------------------------------------

SAFE = Protection(iteration_s=1.0, useful_s=1.0, replicas=None)


@pytest.mark.parametrize(("interval", "restart_s"), [(100, 0.0), (300, 0.0), (300, 120.0)])
def test_without_interference_ettr_is_the_closed_form(interval, restart_s):
    """Memoryless faults: work of duration w between snapshots takes M exp(r / M) (exp(w / M) - 1) on average."""
    mtbf = 1000.0
    found = simulate_faults(
        replace(SAFE, interval=interval, restart_s=restart_s), Faults(mtbf_s=mtbf, nodes=4), number=40_000
    )
    expected = interval / (mtbf * math.exp(restart_s / mtbf) * (math.exp(interval / mtbf) - 1))
    assert found.ettr == pytest.approx(expected, rel=0.06)


def test_slower_iterations_and_faults_that_are_rare():
    found = simulate_faults(replace(SAFE, iteration_s=1.25), Faults(mtbf_s=1e7, nodes=4), number=2000)
    assert found.ettr == pytest.approx(1 / 1.25, rel=1e-4)


def test_what_is_done_again_may_be_faster():
    slow, fast = (
        simulate_faults(replace(SAFE, interval=300, replay_share=share), Faults(mtbf_s=1000, nodes=4), number=20_000)
        for share in (1.0, 0.1)
    )
    assert fast.ettr > slow.ettr + 0.03


def test_the_same_seed_gives_the_same_faults_and_another_one_others():
    faults = Faults(mtbf_s=600, nodes=8, rebuild_s=300)
    protection = Protection(iteration_s=1.0, useful_s=1.0, restart_s=10)
    assert simulate_faults(protection, faults, seed=1) == simulate_faults(protection, faults, seed=1)
    assert simulate_faults(protection, faults, seed=1) != simulate_faults(protection, faults, seed=2)


def test_state_is_lost_when_a_group_goes_before_its_copies_are_there_again():
    """With 2 nodes and a rebuild of r, the other node is lost within it with probability (1 - exp(-r / M)) / 2."""
    protection = Protection(iteration_s=1.0, useful_s=1.0)
    faults = Faults(mtbf_s=1000.0, nodes=2, rebuild_s=200.0)
    found = simulate_faults(protection, faults, number=20_000)
    expected = (1 - math.exp(-0.2)) / 2
    assert found.from_disk / found.faults == pytest.approx(expected, rel=0.1)
    assert simulate_faults(replace(protection, replicas=None), faults).from_disk == 0


# -- published comparisons, sparsity, routing ------------------------------------------------------------------


def test_moevements_window_is_the_shortest_that_fits():
    given, _ = papers.data()
    parameters = given["parameters"] / (given["nodes"] * given["gpus_a_node"])
    for budget in (12.1, 7.1, 5.4, 3.01):  # bytes a parameter and iteration; 2 + 10 / W are needed
        found = papers.window(given, parameters, 1.0, budget * parameters, operators=60)
        assert 2 + 10 / found <= budget + 1e-6
        assert found == 1 or 2 + 10 / (found - 1) > budget


def test_published_figures_are_modelled_or_a_reason_is_given():
    for row in papers.rows(number=50):
        assert row.why
        assert row.modelled is None or row.modelled > 0
    by_name = {f"{r.paper}: {r.what}": r for r in papers.rows(number=50)}
    assert by_name["GEMINI: state survives 2 of 16 nodes lost, groups of 2"].error == pytest.approx(0, abs=1e-3)


def test_edges_are_where_the_choice_of_a_run_changes():
    for panel in sparsity.PANELS[::3]:
        for parameters in (1e8, 1.5e9):
            edges = {m: float(s[0]) for m, s in sparsity.edges(panel, np.array([parameters])).items()}
            forms = sparsity.costs(panel.state(parameters))
            for iteration_s in (0.05, 0.5, 5.0, 50.0, 500.0):
                if any(abs(iteration_s / edge - 1) < 0.03 for edge in edges.values()):
                    continue
                expected = next((m for m, edge in edges.items() if iteration_s >= edge), sparsity.NOTHING)
                assert sparsity.chosen(forms, panel.resources(iteration_s)) == expected


def test_with_even_routing_a_choice_by_tokens_is_a_round_and_no_better():
    even = routing.ROUTING["exactly even"]
    by_tokens, in_turn, by_chance = (
        routing.at_risk(policy, even, snapshots=600) for policy in ("unsaved-tokens", "sequential", "random")
    )
    assert by_tokens == pytest.approx(routing.even_bound())
    assert in_turn == pytest.approx(routing.even_bound())
    assert by_chance > 1.7 * routing.even_bound()
    skewed = routing.ROUTING["Zipf 1.5"]
    assert routing.at_risk("unsaved-tokens", skewed, snapshots=600) < 0.8 * routing.at_risk(
        "sequential", skewed, snapshots=600
    )


# -- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pp", "ep"), [(2, 2), (1, 4)])
def test_what_the_model_itself_has_measured_is_found_again(pp, ep):
    """Configurations made with known numbers: fitting them gives predictions of the others, not the numbers.

    The median of three iterations jumps as a snapshot ends in one or the other, so the fit stops a little early.
    """
    true = {
        "micro_batch_s": 0.08,
        "fixed_s": 0.15,
        "weight": 2.0,
        "link_share": 0.9,
        "snapshot_s": 0.02,
        "byte_s": 5e-9,
    }
    state = replace(STATE, dense_parameters=250_000, expert_parameters=2_500_000, num_experts=32)
    of = calibrate.Traffic(micro_batch_bytes=524_288, rest_bytes=0.0 if pp > 1 else 2e6, state=state)

    def measured(batch, rate):
        configuration = {"pp": pp, "ep": ep, "batch": batch, "rate_mbit": rate}
        times = {arm: calibrate.predict(configuration, arm, true, of) for arm in calibrate.FITTED}
        return {"configuration": configuration, "arms": {arm: {"block_s": [s]} for arm, s in times.items()}}

    found = calibrate.fit([measured(4, None), measured(12, None), measured(8, 100.0)], of)
    unseen = {"pp": pp, "ep": ep, "batch": 8, "rate_mbit": 150.0}
    for arm in calibrate.FITTED:
        expected = calibrate.predict(unseen, arm, true, of)
        assert calibrate.predict(unseen, arm, found, of) == pytest.approx(expected, rel=0.06)


def test_committed_measurements_can_be_calibrated_with():
    sets = cluster._sets(cluster.MEASURED)
    assert sorted(sets) == ["PP 1 x EP 4", "PP 2 x EP 2", "PP 2 x EP 2 in earlier sweeps"]
    for title, measured in sets.items():
        known = [m for m in measured if m["configuration"]["is_known"]]
        assert len(known) >= 3
        assert len(known) < len(measured)
        traffic = calibrate.traffic(known)
        if title == "PP 1 x EP 4":  # dispatch and combine, two layers, both ways; half the ranks are on the other host
            assert traffic.micro_batch_bytes > 8 * 524_288 / 2
        else:  # hidden states, and headers of packets
            assert traffic.micro_batch_bytes == pytest.approx(524_288, rel=0.02)
        assert traffic.state.bytes_a_parameter * traffic.state.parameters == pytest.approx(133e6 / 4, rel=0.02)


def test_what_is_measured_says_where_and_how(tmp_path, monkeypatch):
    def measure(pp, ep, path, *, cycles):
        path.write_text(json.dumps([{"configuration": {"pp": pp, "ep": ep}, "cycles": cycles}]))

    monkeypatch.setattr("benchmarks.cluster.measure.measure", measure)
    cluster._measure(tmp_path / "measured.json", quick=True)
    found = json.loads((tmp_path / "measured.json").read_text())
    assert [c["configuration"]["pp"] for c in found["configurations"]] == [pp for pp, _ in cluster.LAYOUTS]
    assert found["command"].startswith("python -m benchmarks.cluster testbed --measure")
    assert found["hardware"]["cores"]
    assert found["date"]


def test_our_modes_on_a_small_cluster_cost_more_the_more_they_send():
    found = ours.modes(
        ours.Cluster(name="small", nodes=4, pcie_bytes_per_s=25e9, node_share=1.0),
        world(2, 2e7),
        PIPELINE,
        STATE,
        restart_s=10.0,
        mtbf_s={"1 h": 3600.0},
    )
    assert [each.mode.split()[0] for each in found] == ["full", "exact", "popularity"]
    assert all(each.ettr["1 h, restart"] < each.ettr["1 h"] <= 1 for each in found)
    full, popularity = (each.seen.sent_bytes / each.seen.whole for each in (found[0], found[-1]))
    assert full > popularity, "for each snapshot that is whole in the end"
    assert found[0].node_bytes > found[-1].node_bytes
