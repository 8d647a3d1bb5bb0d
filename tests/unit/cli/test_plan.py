# SPDX-License-Identifier: Apache-2.0
"""``moetion plan``: its table, its JSON, its refusals."""

from __future__ import annotations

import pytest
from plan_command import document, plan

from megatron_moetion import cli

MODEL = "--dense-parameters 1.2e9 --expert-parameters 400M --experts 8"


HUGE = "--dense-parameters 1T --expert-parameters 1T --experts 9999 --period 64 --replicas 3 --lost-token-budget 0.1234"
"""A trillion parameters on one rank: no more than a name of a number is left of it."""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_the_table_has_a_row_for_each_mode_and_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan(MODEL, capsys).splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["full"], ["popularity"], ["exact"])]
    assert [" ".join(row[:2]) if row[0] == "exact" else row[0] for row in rows] == [
        "full", "exact P=2", "exact P=4", "exact P=8", "exact P=16", "exact P=32", "popularity",
    ]  # fmt: skip
    assert rows[0][1:] == ["17.9G", "100%", "17.9G", "107G", "858G", "0", "0", "0", "0"]
    assert rows[3][2:] == ["8.20G", "46%", "8.20G", "238G", "1.86T", "5.96G", "0", "8-16", "0"]
    assert rows[6][1:] == ["14.5G", "81%", "14.5G", "98.4G", "787G", "0", "0", "0", "3.75%"]
    assert "popularity: 2 of 8 experts a snapshot, up to 4 for the budget of lost tokens" in "\n".join(lines)
    assert lines[-1].startswith("To learn which mode and period fit, give --iteration-s")


@pytest.mark.parametrize("model", [MODEL, HUGE], ids=["usual", "huge"])
def test_it_fits_a_terminal_of_80_columns(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    *lines, sentence = plan(f"{model} --iteration-s 2 --gb-per-s 5 --node-memory-gib 1024", capsys).splitlines()
    assert max(len(line) for line in lines) <= 80
    rows = [line for line in lines if line.strip().startswith(("full", "exact P", "popularity "))]
    assert len(rows) == (3 if "--period" in model else 7), "each row is one line"
    assert {len(row.replace("exact P=", "exact-P=").replace(" *", "").split()) for row in rows} == {10}
    assert "…" not in "".join(lines)
    assert len(sentence) > 80, "the sentence is one line, to be searched and copied"


def test_what_does_not_fit_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(f"{MODEL} --iteration-s 2 --gb-per-s 15 --node-memory-gib 2048", capsys)
    rows = {line.split()[1]: line for line in shown.splitlines() if line.split()[:1] == ["exact"]}
    assert " 14.9G! " in rows["P=2"]
    assert " exact P=3 * " in rows["P=3"]
    assert "!" not in rows["P=3"] + rows["P=4"]
    assert " 2.61T!" in rows["P=16"]
    assert "*: recommended; !: does not fit the link, or the memory" in shown
    assert shown.splitlines()[-1].startswith("Mode 'exact' with --moetion-period 3 fits: a rank sends 11.9 of 14.0 GiB")


def test_fragments_take_less_than_whole_copies(capsys: pytest.CaptureFixture[str]) -> None:
    whole, coded = (document(f"{MODEL} --replicas 2 {more}", capsys) for more in ("", "--coding-nodes 5"))
    for one, other in zip(whole["modes"], coded["modes"], strict=True):
        assert other["arena"] == one["arena"]
        assert other["sent_bytes"] == pytest.approx(one["snapshot_bytes"] * 4 / 3, abs=1)
        assert other["rank_bytes"] == pytest.approx(one["rank_bytes"] * (1 + 4 / 3) / 3, abs=8)
    shown = plan(f"{MODEL} --replicas 2 --coding-nodes 5", capsys)
    assert "any 3 of 4 fragments" in shown
    assert "Any 2 nodes of 5 that hold each other's fragments may be lost at once" in shown


def test_json_is_one_document_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(f"{MODEL} --gradients bf16 --replicas 2 --ranks-per-node 4 --host-state-mib 2", capsys)
    assert found["model"] is None
    assert set(found) == {"model", "state", "resources", "most_experts_per_snapshot", "modes", "recommendation"}
    assert found["state"] == {
        "dense_parameters": 1_200_000_000, "expert_parameters": 400_000_000, "num_experts": 8, "gradient_bytes": 2,
        "exp_avg_bytes": 4, "exp_avg_sq_bytes": 4, "host_state_bytes": 2 << 20, "replicas": 2, "coding_nodes": 0,
        "ranks_per_node": 4,
    }  # fmt: skip
    assert found["resources"] == {"link_bytes": None, "node_bytes": None, "device_bytes": None}
    assert found["most_experts_per_snapshot"] == 4
    assert [(m["mode"], m["period"]) for m in found["modes"]] == [
        ("full", 0), ("exact", 2), ("exact", 4), ("exact", 8), ("exact", 16), ("exact", 32), ("popularity", 0),
    ]  # fmt: skip
    for mode in found["modes"]:
        assert set(mode) == {
            "mode", "period", "experts", "snapshot_bytes", "sent_bytes", "arena", "rank", "rank_bytes", "node_bytes",
            "device_bytes", "replayed_steps", "replayed_steps_idle", "share_of_full", "fits_link", "fits_memory",
            "repeated_iterations", "lost_token_share",
        }  # fmt: skip
        assert set(mode["arena"]) == set(mode["rank"]) == {"state_bytes", "log_bytes", "pending_bytes"}
        assert mode["rank_bytes"] == sum(mode["rank"].values()) == 3 * sum(mode["arena"].values())
        assert mode["node_bytes"] == 4 * mode["rank_bytes"]
        assert mode["sent_bytes"] == 2 * mode["snapshot_bytes"]
        assert mode["fits_link"] is mode["fits_memory"] is None
    recommendation = found["recommendation"]
    assert set(recommendation) == {"mode", "period", "experts", "shortage", "sentence"}
    assert (recommendation["mode"], recommendation["period"]) == ("", 0)
    assert recommendation["shortage"] == {"link_bytes": 0, "node_bytes": 0, "device_bytes": 0}


@pytest.mark.parametrize(
    ("first", "second", "nbytes"),
    [("fp32", "fp32", 12), ("bf16", "bf16", 8), ("fp16", "fp16", 8), ("fp8", "fp8", 6), ("fp8", "fp16", 7)],
)
def test_a_precision_aware_optimizer_has_fewer_bytes_a_parameter(
    first: str, second: str, nbytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    how = f"--exp-avg-dtype {first} --exp-avg-sq-dtype {second} --gradients bf16 --period 4"
    found = document(f"{MODEL} {how}", capsys)
    full, exact = found["modes"][0], found["modes"][1]
    assert full["snapshot_bytes"] == pytest.approx(1.6e9 * nbytes, rel=1e-3)
    assert exact["snapshot_bytes"] == pytest.approx(1.6e9 * (nbytes / 4 + 2), rel=1e-3)
    assert exact["rank_bytes"] == pytest.approx(2 * 1.6e9 * (2 * nbytes + 2 * (4 + 6)), rel=1e-3)
    assert (found["state"]["exp_avg_bytes"], found["state"]["exp_avg_sq_bytes"]) == (
        {"fp32": 4, "fp8": 1}.get(first, 2), {"fp32": 4, "fp8": 1}.get(second, 2),
    )  # fmt: skip


def test_json_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    there = "--iteration-s 2 --gb-per-s 10 --share 0.75 --node-memory-gib 2048"
    found = document(f"{MODEL} {there}", capsys)
    assert found["resources"] == {"link_bytes": 15_000_000_000, "node_bytes": 2048 << 30, "device_bytes": None}
    fits = {(m["mode"], m["period"]): (m["fits_link"], m["fits_memory"]) for m in found["modes"]}
    assert fits["full", 0] == (False, True)
    assert fits["exact", 8] == (True, True)
    assert fits["exact", 32] == (True, False)
    assert (found["recommendation"]["mode"], found["recommendation"]["period"]) == ("exact", 3)


def test_half_of_the_link_is_taken_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(f"{MODEL} --iteration-s 2 --gb-per-s 10", capsys)
    assert found["resources"] == {"link_bytes": 10_000_000_000, "node_bytes": None, "device_bytes": None}


def test_one_period_and_one_k(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(f"{MODEL} --period 6 --experts-per-snapshot 3 --lost-token-budget 0", capsys)
    assert [(m["mode"], m["period"], m["experts"]) for m in found["modes"]] == [
        ("full", 0, 0), ("exact", 6, 0), ("popularity", 0, 3),
    ]  # fmt: skip
    assert found["most_experts_per_snapshot"] == 3


@pytest.mark.parametrize("text", ["1500000", "1.5e6", "1500K", "1.5M", "1.5m", "0.0015G", "0.0015B", "0.0000015T"])
def test_counts_with_suffixes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert document(f"--dense-parameters {text}", capsys)["state"]["dense_parameters"] == 1_500_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "give a model: --preset, or --num-layers, --hidden-size"),
        (f"{MODEL} --experts-per-snapshot 9", "--experts-per-snapshot 9 is more than the 8 experts of a rank"),
        ("--dense-parameters many", "--dense-parameters is 'many'; it must be a number such as 1200000, 1.2e6 or 1.2M"),
        ("--dense-parameters 1e999", "--dense-parameters is '1e999'"),
        ("--dense-parameters nan", "--dense-parameters is 'nan'"),
        ("--dense-parameters -5", "--dense-parameters is '-5'"),
        ("--dense-parameters M", "--dense-parameters is 'M'"),
        ("--dense-parameters 0", "nothing to capture"),
        ("--dense-parameters 1M --experts 8", "8 experts with 0 parameters"),
        ("--dense-parameters 1M --expert-parameters 1M", "0 experts with 1000000 parameters"),
        (f"{MODEL} --replicas -1", "replicas: -1"),
        (f"{MODEL} --coding-nodes 4", "--moetion-coding-nodes 4 with --moetion-replicas 1"),
        (f"{MODEL} --ranks-per-node 0", "ranks per node: 0"),
        (f"{MODEL} --host-state-mib 0", "--host-state-mib is 0.0; it must be more than 0"),
        (f"{MODEL} --period 1", "period is 1; it must be from 2 to 64"),
        (f"{MODEL} --period 65", "period is 65; it must be from 2 to 64"),
        (f"{MODEL} --period -2", "period is -2; it must not be negative"),
        (f"{MODEL} --experts-per-snapshot -1", "experts-per-snapshot is -1"),
        (f"{MODEL} --lost-token-budget 2", "lost-token-budget is 2.0"),
        (MODEL.replace("--experts 8", "--experts 80 --experts-per-snapshot 2"), "the cap cannot be kept"),
        (f"{MODEL} --iteration-s 2", "give both"),
        (f"{MODEL} --gb-per-s 2", "give both"),
        (f"{MODEL} --share 0.5", "give these too"),
        (f"{MODEL} --iteration-s 2 --gb-per-s 2 --share 1.5", "--share is 1.5; it must not be more than 1"),
        (f"{MODEL} --iteration-s nan --gb-per-s 2", "--iteration-s is nan"),
        (f"{MODEL} --iteration-s 2 --gb-per-s inf", "--gb-per-s is inf"),
        (f"{MODEL} --node-memory-gib 0", "--node-memory-gib is 0.0"),
    ],
)
@pytest.mark.parametrize("how", ["", " --json"])
def test_wrong_input_is_exit_code_2_and_one_line(
    arguments: str, says: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *(arguments + how).split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", ["--preset gpt-5", "--dense-parameters 1M --gradients fp8", "--dense-parameters 1M --experts x"]
)
def test_wrong_usage_is_exit_code_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", *arguments.split()])
    assert error.value.code == 2
    assert "usage: moetion plan" in capsys.readouterr().err


def test_help_names_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "--help"])
    assert error.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("with the distributed optimizer its share", "over all its layers together", "the size of /dev/shm"):
        assert words in shown
