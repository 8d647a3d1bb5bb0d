# SPDX-License-Identifier: Apache-2.0
"""A restart with other flags: what is refused by name, what is listed, and what nobody needs to hear of."""

from __future__ import annotations

import argparse

import pytest

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import build_parser, parse_arguments
from megatron_moetion.pretrain.flags import EFFECTS, RECORD_BYTES, Effect, compare, record
from megatron_moetion.pretrain.progress import Progress, RunState
from megatron_moetion.snapshot.host_state import decode, encode, size_bound

CPU = Machine(world_size=4, has_gpu=False)
BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-2 --num-experts 8 --expert-model-parallel-size 2"
)


def parsed(flags: str = "") -> argparse.Namespace:
    return parse_arguments(f"{BASE} {flags}".split(), CPU)


def told(flags: str, before: str = "", *, same_run: bool = True) -> str:
    return compare(record(parsed(before)), record(parsed(flags)), same_run=same_run)


def test_every_flag_has_an_effect_and_every_effect_a_flag() -> None:
    """Whoever adds a flag has to say what a restart with another value of it means."""
    known = {action.dest for action in build_parser()._actions}
    assert {name for name in known if name != "help" and not name.startswith("moetion")} == set(EFFECTS)


REFUSED = {
    "--num-attention-heads 8": "--num-attention-heads 4 -> 8",
    "--moe-router-topk 1 --moe-router-pre-softmax": "--moe-router-topk 2 -> 1, --moe-router-pre-softmax not given",
    "--disable-bias-linear": "--disable-bias-linear not given -> given",
    "--seed 99": "--seed 1234 -> 99",
    "--mock-data": "--mock-data not given -> given",
    "--hidden-dropout 0": "--hidden-dropout 0.1 -> 0.0",
    "--bf16": "--bf16 not given -> given",
    "--moe-expert-capacity-factor 1.5 --moe-token-dispatcher-type alltoall": "capacity-factor not given -> 1.5",
}  # fmt: skip
OF_ANOTHER_MODEL = list(REFUSED)[:3]


@pytest.mark.parametrize("flags", REFUSED)
def test_another_run_is_refused_by_name_with_both_values(flags: str) -> None:
    with pytest.raises(ConfigError) as caught:
        told(flags)
    assert REFUSED[flags] in str(caught.value)
    assert "go back to the flags" in str(caught.value)
    assert "another --moetion-run-id" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", REFUSED)
def test_from_a_checkpoint_on_disk_another_run_may_begin_but_not_another_model(flags: str) -> None:
    if flags in OF_ANOTHER_MODEL:
        with pytest.raises(ConfigError, match="the checkpoint is of another model: --"):
            told(flags, same_run=False)
    else:
        line = told(flags, same_run=False)
        assert line.startswith("flags changed since the checkpoint was saved: --")
        assert REFUSED[flags] in line


def test_what_acts_is_listed_in_one_line() -> None:
    line = told("--lr 2e-3 --lr-decay-style cosine --min-lr 1e-3 --adam-beta1 0.8 --clip-grad 0.5 --weight-decay 0.1")
    assert line == (
        "flags changed since the last start: --lr 0.01 -> 0.002, --min-lr 0.0 -> 0.001, "
        "--lr-decay-style linear -> cosine, --weight-decay 0.01 -> 0.1, --clip-grad 1.0 -> 0.5, --adam-beta1 0.9 -> 0.8"
    )


def test_a_default_that_follows_from_another_flag_is_listed_too() -> None:
    assert told("--train-iters 20").endswith(": --lr-decay-iters 10 -> 20, --train-iters 10 -> 20")
    assert told("--train-iters 20 --lr-decay-iters 10").endswith(": --train-iters 10 -> 20")


@pytest.mark.parametrize("flags", ["", "--log-interval 1 --eval-iters 0 --save x --save-interval 2 --exit-interval 4"])
def test_what_does_not_matter_is_not_mentioned(flags: str) -> None:
    assert told(flags) == ""


def test_a_longer_run_over_an_indexed_dataset_may_shuffle_it_otherwise(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    prefix = tmp_path_factory.mktemp("data") / "text"
    for end in (".bin", ".idx"):
        prefix.with_suffix(end).touch()
    data = f"--data-path {prefix}"
    assert "in another order" in told(f"{data} --train-iters 20", data)
    assert "in another order" not in told(f"{data} --lr 1e-3", data)


def test_a_flag_that_one_of_the_two_programs_does_not_know_is_not_compared() -> None:
    now = record(parsed())
    assert compare(now.replace(b'"seed":1234', b'"sead":1234'), now, same_run=True) == ""


@pytest.mark.parametrize(
    "flags", ["", "--lr-decay-style inverse-square-root", "--moe-aux-loss-coeff " + "1e-3 " * 4000]
)
def test_the_size_of_state_does_not_depend_on_the_flags(flags: str) -> None:
    """Else arenas would be refused for a flag that may change, before anybody compares flags."""
    assert len(record(parsed(flags))) == RECORD_BYTES
    states = [RunState(Progress(), record(parsed(f))).state_dict() for f in ("", flags)]
    assert size_bound(states[0]) == size_bound(states[1]) < 16 << 10


def test_long_values_are_told_apart_by_all_of_them() -> None:
    many = "--moe-aux-loss-coeff " + "1e-3 " * 60
    line = told(f"{many} 2e-3", f"{many} 3e-3")
    assert "sha256" in line
    assert len(line) < 500
    assert told(many, many) == ""


# -- as state of the trainer --------------------------------------------------------------------------------------


def run_state(flags: str = "", **progress: int) -> tuple[Progress, RunState]:
    counters = Progress(**progress)
    return counters, RunState(counters, record(parsed(flags)))


def recovered(state: RunState) -> dict[str, object]:
    return decode(encode(state.state_dict()))


def test_flags_and_counters_come_back() -> None:
    _, before = run_state("--lr 2e-3", iteration=8, consumed_train_samples=64, evaluated=5)
    progress, now = run_state()
    now.load_state_dict(recovered(before))
    assert (now.iteration, progress.consumed_train_samples, progress.evaluated) == (8, 64, 5)
    assert now.flags_changed == "flags changed since the last start: --lr 0.002 -> 0.01"
    assert now.state_dict()["flags"] == record(parsed()), "the next restart is compared with this start"


def test_a_refused_start_leaves_the_counters() -> None:
    _, before = run_state("--seed 5", iteration=8)
    progress, now = run_state()
    with pytest.raises(ConfigError, match="--seed 5 -> 1234"):
        now.load_state_dict(recovered(before))
    assert progress == Progress()


def test_a_checkpoint_from_before_flags_were_kept_is_loaded() -> None:
    progress, now = run_state(evaluated=3)
    now.load_checkpoint(
        {"iteration": 4, "consumed_train_samples": 32, "consumed_valid_samples": 0, "skipped_iterations": 0}
    )
    assert now.flags_changed == ""
    assert (progress.iteration, progress.evaluated) == (4, -1)


def test_moetion_flags_are_the_runtimes_to_check() -> None:
    assert told("--moetion --moetion-mode full", "") == ""
    assert Effect.RUN not in {EFFECTS.get(name) for name in ("moetion", "moetion_mode")}
