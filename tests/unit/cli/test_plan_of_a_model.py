# SPDX-License-Identifier: Apache-2.0
"""``moetion plan`` from a model's shape and parallel sizes: Megatron's flags, presets, machines, refusals."""

from __future__ import annotations

import argparse

import pytest
from plan_command import document, plan

from megatron_moetion import cli

MIXTRAL = "--preset mixtral-8x7b --nodes 8 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8"
"""On 64 GPUs; 25 M and 705 M parameters a rank by hand, without embeddings."""
BATCH = "--global-batch-size 256 --seq-length 4096"
BY_HAND = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --vocab-size 32000 --swiglu --disable-bias-linear --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --num-experts 8 --moe-router-topk 2 "
    "--use-distributed-optimizer --nodes 8 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8"
)


@pytest.fixture(autouse=True)
def usual_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_preset_and_its_flags_by_hand_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    preset, by_hand = document(MIXTRAL, capsys), document(BY_HAND, capsys)
    assert (preset["model"].pop("name"), by_hand["model"].pop("name")) == ("mixtral-8x7b", "the model")
    assert preset == by_hand
    model = preset["model"]
    assert (model["total_parameters"], model["world_size"]) == (46_702_792_704, 64)
    assert (model["dense_shards"], model["expert_shards"], model["busiest_stage"]) == (16, 2, 3)
    assert [stage["num_experts"] for stage in model["stages"]] == [8, 8, 8, 8]
    state = preset["state"]
    layer = 4096 * (4096 * 2 + 1024 * 2) + 8 * 4096 + 2 * 4096
    assert state["dense_parameters"] == (8 * layer + 4096 + 32000 * 4096) // 16
    assert state["expert_parameters"] == 8 * 3 * 4096 * 14336 // 2
    assert (state["num_experts"], state["ranks_per_node"]) == (8, 8)


def test_one_way_serves_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    there = "--iteration-s 3 --gb-per-s 3 --node-memory-gib 1000"
    model = document(f"{MIXTRAL} {there}", capsys)
    state = model["state"]
    rank = (
        f"--dense-parameters {state['dense_parameters']} --expert-parameters {state['expert_parameters']} "
        f"--experts {state['num_experts']} {there}"
    )
    assert document(rank, capsys) == {**model, "model": None}


def test_flags_change_what_a_preset_says(capsys: pytest.CaptureFixture[str]) -> None:
    v3 = "--preset deepseek-v3 --nodes 128 --expert-model-parallel-size 64 --pipeline-model-parallel-size 16"
    uneven = f"{v3} --decoder-last-pipeline-num-layers 1"
    with_prediction = document(uneven, capsys)["model"]
    without = document(f"{uneven} --mtp-num-layers 0", capsys)["model"]
    assert with_prediction["total_parameters"] == without["total_parameters"]
    assert (with_prediction["prediction_parameters"] > 11e9, without["prediction_parameters"]) == (True, 0)
    assert with_prediction["stages"][-1]["num_experts"] == 2 * without["stages"][-1]["num_experts"]
    whole = document(f"{MIXTRAL} --swiglu --num-experts 16", capsys)["model"]
    assert whole["total_parameters"] > 1.9 * 46e9


def test_without_the_distributed_optimizer_each_rank_holds_all_of_its_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = document(BY_HAND.replace("--use-distributed-optimizer", ""), capsys)
    stage = found["model"]["stages"][found["model"]["busiest_stage"]]
    assert found["state"]["dense_parameters"] == stage["dense_parameters"]
    assert found["state"]["expert_parameters"] == stage["expert_parameters"]


def test_flags_of_gradients_and_moments_are_megatrons_too(capsys: pytest.CaptureFixture[str]) -> None:
    more = "--grad-reduce-in-bf16 --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp8"
    state = document(f"{MIXTRAL} {more}", capsys)["state"]
    assert (state["gradient_bytes"], state["exp_avg_bytes"], state["exp_avg_sq_bytes"]) == (2, 2, 1)
    assert document(f"{MIXTRAL} --accumulate-allreduce-grads-in-fp32", capsys)["state"]["gradient_bytes"] == 4


def test_a_model_without_experts_has_no_mode_popularity(capsys: pytest.CaptureFixture[str]) -> None:
    dense = "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --vocab-size 50257 --nodes 2"
    found = document(f"{dense} --max-position-embeddings 1024", capsys)
    assert found["model"]["total_parameters"] == found["model"]["active_parameters"] == 354_871_296
    assert "popularity" not in {mode["mode"] for mode in found["modes"]}
    assert "experts" not in plan(f"{dense} --max-position-embeddings 1024", capsys).split("K, M, G, T")[0]


def test_an_iteration_from_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    """6 floating-point operations a parameter and token, the embedding aside, and those of attention's scores."""
    found = document(f"{MIXTRAL} {BATCH} --mfu 0.4 --machine dgx-h100", capsys)
    tokens = 256 * 4096
    parameters = 12_879_925_248 - 32000 * 4096
    attention = 32 * 6 * 32 * 128 * 4096
    seconds = tokens * (6 * parameters + attention) / (0.4 * 989e12 * 64)
    assert found["model"]["iteration_s"] == pytest.approx(seconds)
    assert found["resources"]["link_bytes"] == pytest.approx(seconds * 50e9 / 8 * 0.5, abs=1)
    assert found["resources"]["node_bytes"] == 1024 << 30
    given = document(f"{MIXTRAL} {BATCH} --mfu 0.4 --peak-tflops 989 --nic-gb-per-s 50", capsys)
    assert given["resources"]["link_bytes"] == found["resources"]["link_bytes"]


def test_all_interfaces_of_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    one = document(f"{MIXTRAL} --machine dgx-h100 --iteration-s 2", capsys)["resources"]["link_bytes"]
    all_of_them = document(f"{MIXTRAL} --machine dgx-h100 --iteration-s 2 --interfaces 8", capsys)["resources"]
    assert (one, all_of_them["link_bytes"]) == (6_250_000_000, 50_000_000_000)
    node = document(f"{MIXTRAL} --nic-gb-per-s 50 --iteration-s 2 --gpus-per-node 4", capsys)["resources"]
    assert node["link_bytes"] == 2 * 6_250_000_000


def test_the_heading_says_what_was_reckoned_with(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan(f"{MIXTRAL} {BATCH} --mfu 0.4 --machine dgx-h100", capsys).splitlines()
    assert lines[:4] == [
        "mixtral-8x7b: 46.7B parameters, 12.9B active",
        "64 GPUs on 8 nodes: TP 1, PP 4, CP 1, EP 8, ETP 1",
        "ranks of stage 3 of 0 to 3 hold most: the state of 29.2M dense parameters (a",
        "share of 16) and 705M of its 8 experts (a share of 2)",
    ]
    assert lines[4] == "iteration: 3.3 s (MFU 40%); a rank may send 9.61 GiB in it"
    assert max(len(line) for line in lines[:-1]) <= 80
    assert lines[-1].startswith("Mode 'full' fits")


def test_odds_of_lost_nodes_are_those_of_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    sixteen = MIXTRAL.replace("--nodes 8", "--nodes 16")
    found = document(sixteen, capsys)["model"]["survival"]
    assert found["lost_nodes"] == pytest.approx({"1": 1.0, "2": 1 - 8 / 120, "3": 448 / 560})
    assert (found["lost_domain"], found["nodes_with_two_copies_in_a_domain"]) == (None, 0)
    assert "\nOdds that all state survives lost nodes: 100% of 1, 93.3% of 2, 80.0% of 3" in plan(sixteen, capsys)
    triple = plan(f"{sixteen} --replicas 2", capsys)
    assert "\nOdds that all state survives lost nodes: 100% of 1, 100% of 2, 98.6% of 3" in triple
    pair = plan(MIXTRAL.replace("--nodes 8", "--nodes 4"), capsys)
    assert "100% of 1, 66.7% of 2, 0% of 3" in pair
    alone = document(f"{MIXTRAL} --replicas 0 --nodes-per-domain 4", capsys)["model"]["survival"]
    assert (alone["lost_nodes"], alone["lost_domain"]) == ({"1": 0.0, "2": 0.0, "3": 0.0}, 0.0)


def test_odds_of_a_lost_failure_domain(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\nand one of 2 failure domains: 100%" in plan(f"{MIXTRAL} --nodes-per-domain 4", capsys)
    shared = f"{MIXTRAL} --nodes-per-domain 5"
    assert "\nand one of 2 failure domains: 50.0%; 2 nodes have two copies in one" in plan(shared, capsys)
    found = document(shared, capsys)["model"]["survival"]
    assert (found["lost_domain"], found["nodes_with_two_copies_in_a_domain"]) == (0.5, 2)
    assert "failure domains" not in plan(f"{MIXTRAL} --nodes-per-domain 8", capsys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--nodse 8", "unknown: --nodse (did you mean --nodes?)"),
        ("--num-layer 3 --lr 3e-4", "unknown: --num-layer (did you mean --num-layers?), --lr\n"),
        ("--moe-topk 3", "unknown: --moe-topk"),
        ("stray", "unknown: stray"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(
    change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", *MIXTRAL.split(), *change.split()])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert len(shown) < 500, "usage is short"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (MIXTRAL.replace("--nodes 8", ""), "--nodes is needed with a model"),
        ("--nodes 8 --dense-parameters 1M", "--nodes needs a model"),
        ("--nodes-per-domain 8 --dense-parameters 1M", "--nodes-per-domain needs a model"),
        (f"{MIXTRAL} --nodes-per-domain 0", "--nodes-per-domain is 0; it must be at least 1"),
        ("--mfu 0.4 --dense-parameters 1M", "--mfu needs a model"),
        ("--tensor-model-parallel-size 2 --dense-parameters 1M", "--tensor-model-parallel-size needs a model"),
        (f"{MIXTRAL} --dense-parameters 1M", "--dense-parameters is of one rank's state"),
        (f"{MIXTRAL} --experts 8", "--experts is of one rank's state"),
        ("--num-layers 4 --nodes 2", "--hidden-size is needed: a whole number of at least 1"),
        (MIXTRAL.replace("--nodes 8", "--nodes 1"), "1 replica(s) need 2 nodes and there are 1: give --replicas 0"),
        (MIXTRAL.replace("--nodes 8", "--nodes 9"), "72 GPUs are no multiple of 32 (expert 8 x expert tensor 1 x"),
        (f"{MIXTRAL} --moe-router-topk 9", "--moe-router-topk 9 is more than --num-experts 8"),
        (f"{MIXTRAL} --experts-per-snapshot 9", "--experts-per-snapshot 9 is more than the 8 experts of a rank"),
        (f"{MIXTRAL} --tensor-model-parallel-size 0", "--tensor-model-parallel-size is 0; it must be at least 1"),
        (f"{MIXTRAL} --num-layers 33", "33 layers are no multiple of 4 pipeline stages; say how they are split"),
        (f"{MIXTRAL} --num-layers -4", "--num-layers is needed: a whole number of at least 1"),
        (f"{MIXTRAL} --num-experts 12", "--num-experts 12 is no multiple of --expert-model-parallel-size 8"),
        (f"{MIXTRAL} --tensor-model-parallel-size 16 --num-attention-heads 24 --kv-channels 128 --num-query-groups 8",
         "no multiple of 512"),
        (f"{MIXTRAL} --moe-layer-freq __import__('os')", "--moe-layer-freq is \"__import__('os')\"; it must be"),
        (f"{MIXTRAL} --moe-layer-freq [1]*999999999", "--moe-layer-freq is '[1]*999999999'; it must be"),
        (f"{MIXTRAL} --moe-layer-freq [1]*31", "--moe-layer-freq [1]*31 has 31 layers and --num-layers is 32"),
        (f"{MIXTRAL} --moe-layer-freq 0", "--moe-layer-freq is '0'; it must be"),
        (f"{MIXTRAL} --pipeline-model-parallel-layout Et*32L", "1 chunks of --pipeline-model-parallel-layout 'Et*32L'"),
        (f"{MIXTRAL} --pipeline-model-parallel-layout Et|t|t|tL", "has 4 times 't' and --num-layers is 32"),
        (f"{MIXTRAL} --pipeline-model-parallel-layout Ex|L", "must be made of E, t, m, L and |"),
        (f"{MIXTRAL} --pipeline-model-parallel-layout E(t*9999999)*9L", "has more than 20000 layers"),
        (f"{MIXTRAL} --mfu 0.4", "--mfu needs --global-batch-size too"),
        (f"{MIXTRAL} --mfu 0.4 {BATCH}", "--mfu needs --peak-tflops, or --machine, too"),
        (f"{MIXTRAL} --mfu 40 {BATCH} --machine dgx-h100", "--mfu is 40.0; it is a share, such as 0.4"),
        (f"{MIXTRAL} --mfu 0.4 --iteration-s 3", "--iteration-s and --mfu both say how long"),
        (f"{MIXTRAL} --iteration-s 3", "give both"),
        (f"{MIXTRAL} --nic-gb-per-s 50", "give both"),
        (f"{MIXTRAL} --nic-gb-per-s 50 --gb-per-s 5", "--gb-per-s and --nic-gb-per-s both say how fast"),
        (f"{MIXTRAL} --interfaces 2", "--interfaces 2 is of a --machine"),
        (f"{MIXTRAL} --machine dgx-h100 --interfaces 9", "--interfaces is 9; dgx-h100 has 1 to 8"),
        (f"{MIXTRAL} --position-embedding-type learned_absolute", "--max-position-embeddings is needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments.split(), "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_flags_are_megatrons_own() -> None:
    """Each flag of the model and of parallel sizes is one of Megatron-LM's, stored under the same name."""
    arguments = pytest.importorskip("megatron.training.arguments", reason="the wheel of this version has no trainer")
    theirs = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(theirs)
    names = {option: action.dest for action in theirs._actions for option in action.option_strings}
    ours = argparse.ArgumentParser()
    cli.plan.add(ours.add_subparsers())
    groups = [g for p in _commands(ours) for g in p._action_groups if "by Megatron's flags" in (g.title or "")]
    assert len(groups) == 2
    found = {action.option_strings[0]: action.dest for group in groups for action in group._group_actions}
    del found["--preset"]
    assert len(found) > 40
    assert {flag: names.get(flag) for flag in found} == found


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(commands.choices.values())
