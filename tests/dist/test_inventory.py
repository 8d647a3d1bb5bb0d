# SPDX-License-Identifier: Apache-2.0
"""Real Megatron-Core on four ranks: everything is captured exactly once, and what was captured can be put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery, owned_elements, tiled

from megatron_moetion.modes.recalibration import over_ranks

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

CASES = {
    "pp2 ep2, bf16, distributed, tied": ("DistributedOptimizer, bf16", "Pipeline parallelism", "Tied embeddings"),
    "pp2 ep2, fp32, untied": ("FP32Optimizer", "Untied embeddings"),
    "ep2 dp2, bf16, distributed": ("DistributedOptimizer, bf16", "Expert parallelism"),
    "ep2 dp2, bf16": ("Float16OptimizerWithFloat16Params, bf16",),
    "ep2 dp2, fp32, distributed, overlapped": (
        "DistributedOptimizer, fp32",
        "--overlap-grad-reduce, --overlap-param-gather",
    ),
    "ep4, bf16, expert bias, shared expert": ("Router with expert bias", "Shared experts"),
    "pp2 ep2, fp16, frozen embedding": ("Float16OptimizerWithFloat16Params, fp16", "Frozen parameters"),
    "pp2 ep2 in four stages, bf16, distributed": ("Virtual pipeline stages",),
    "ep2 dp2, bf16, capacity": ("Expert capacity",),
}
"""By what they prove: rows of docs/compatibility.md."""


def proving(level: str) -> list[Any]:
    """The cases, as tests that show that much of their features."""
    return [pytest.param(c, marks=[pytest.mark.proves(f, level) for f in features]) for c, features in CASES.items()]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank noted; all cases run in one launch, because Megatron-Core takes seconds to import."""
    folder: Path = tmp_path_factory.mktemp("megatron")
    with Nursery("megatron") as nursery:
        return nursery.notes(180, folder)


@pytest.fixture
def ranks(notes: list[list[dict[str, Any]]], case: str) -> list[dict[str, Any]]:
    """The ranks' findings in one case."""
    return [next(n for n in of_rank if n.get("name") == case) for of_rank in notes]


@pytest.mark.parametrize("case", proving("inventory"))
def test_every_byte_of_state_is_captured_exactly_once(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["owned"] > 50_000
        assert (found["missed"], found["twice"], found["of_others"]) == (0, 0, 0)
        assert found["moved"] is None
        assert "exp_avg" in found["moved_later"]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_together_hold_every_element_of_every_parameter(ranks: list[dict[str, Any]]) -> None:
    """Shards of the distributed optimizer tile a parameter; without it every rank has all of it."""
    total = tiled(
        ((tensor, role) if found["sharded"] else (tensor, role, rank), start, end)
        for rank, found in enumerate(ranks)
        for tensor, role, start, end in found["spans"]
    )
    assert total == 3 * owned_elements(ranks), "main values and two moments"


@pytest.mark.parametrize("case", CASES)
def test_the_guides_of_all_ranks_place_every_tensor_and_cover_what_a_checkpoint_has(
    ranks: list[dict[str, Any]],
) -> None:
    """``moetion export`` has nothing else to go by."""
    guides = [found["guide"] for found in ranks]
    assert [(g["problem"], g["left_out"]) for g in guides] == [(None, [])] * len(guides)
    views = [v for g in guides for entry in g["parameters"] for v in entry["views"]]
    parts = {(v["key"], tuple(v["global_offset"])): math.prod(v["shape"]) for v in views}
    whole = {v["key"]: math.prod(v["global_shape"]) for v in views}
    assert {key: sum(n for (k, _), n in parts.items() if k == key) for key in whole} == whole
    for found, guide in zip(ranks, guides, strict=True):
        entries = {tensor: guide["parameters"][number] for tensor, number in guide["tensors"].items()}
        stepped = {tensor for tensor, *_ in found["spans"]}
        assert stepped <= {tensor for tensor, entry in entries.items() if entry["views"] and entry["link"] is not None}


@pytest.mark.parametrize("case", proving("recovery"))
def test_scrambled_state_is_restored_bitwise_and_so_is_the_next_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["scrambled"] == [], "nothing of the state may be left as it was"
        assert found["not_restored"] == []
        assert found["step_again"] == found["step"]
        assert not found["step"]["skipped"]
        assert found["differs_after_step"] == []
    assert any("lm loss" in found["step"]["losses"] for found in ranks)


def test_kinds_of_units(notes: list[list[dict[str, Any]]]) -> None:
    cases = {n["name"]: n for n in notes[0] if n["event"] == "case"}
    assert set(cases) == set(CASES)
    assert all(n["kinds"]["HOST"] == 1 and n["kinds"]["EXPERT"] > 0 for n in cases.values())
    assert {name for name, n in cases.items() if n["kinds"]["FROZEN"]} == {"pp2 ep2, fp16, frozen embedding"}
    assert {name for name, n in cases.items() if not n["counts"]} == {"ep2 dp2, bf16"}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_an_expert_is_in_every_snapshot(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert all(".experts." in name for name in found["tensors"]["EXPERT"])
        assert not any(".experts." in name for name in found["tensors"]["DENSE"])
    dense = {name for found in ranks for name in found["tensors"]["DENSE"]}
    expected = ["embedding", "router.weight", "layernorm", "self_attention", "final_layernorm"]
    if "frozen embedding" in str(ranks[0]["name"]):
        expected.remove("embedding")
    if "shared expert" in str(ranks[0]["name"]):
        expected += ["shared_experts", "router.expert_bias"]
    if "capacity" in str(ranks[0]["name"]):
        expected += ["moetion.router", "moetion.tokens_processed"]
    assert [part for part in expected if not any(part in name for name in dense)] == []


REFUSALS = {
    "offloaded": "HybridDeviceOptimizer (--optimizer-cpu-offload) is not supported: its state is split",
    "fp4": "--fp4-format is not supported: NVFP4 parameters, and gradients rounded at random, are untested",
    "unknown state": "FusedAdam keeps 'max_exp_avg_sq' for a parameter of shape",
    "missing chunk": "parameter(s) that the given model chunks do not contain; pass all chunks to attach()",
    "nothing": "",
}


REFUSED = {
    "offloaded": "CPU-offloaded optimizer",
    "fp4": "NVFP4",
    "unknown state": "Optimizer state of unknown names",
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.proves(REFUSED[k], "refused")] if k in REFUSED else []) for k in REFUSALS],
)
def test_state_that_cannot_be_captured_exactly_is_refused(
    notes: list[list[dict[str, Any]]], kind: str, record_property: Callable[[str, Any], None]
) -> None:
    for of_rank in notes:
        message = next(n for n in of_rank if n["event"] == "refusals")[kind]
        record_property("message", message)
        assert REFUSALS[kind] in message
        assert bool(message) == (kind != "nothing")


# -- what is replaced of Megatron ---------------------------------------------------------------------------------

BUCKETS = {f"_ParamAndGradBucketGroup.{when}_{what}_sync" for when in ("start", "finish") for what in ("grad", "param")}
EXPERTS = {f"MoEAllGatherTokenDispatcher.token_{what}" for what in ("dispatch", "combine")}
"""Both as listed in ``mcore/traffic.py``."""
BUCKETS.add("DistributedDataParallel.zero_grad_buffer")
"""As listed in ``mcore/step_watch.py``."""
STEPS = {"ChainedOptimizer.get_grad_norm", "DynamicGradScaler.update"}
"""As listed in ``mcore/steplog.py``."""


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("pp2 ep2, fp16", BUCKETS | EXPERTS | STEPS),
        ("dp4, bf16 gradients", BUCKETS | {"ChainedOptimizer.get_grad_norm"}),
        ("pp2 ep2, fp32", BUCKETS | EXPERTS),
    ],
)
def test_what_is_replaced_of_megatron_is_what_is_listed_and_comes_back(
    notes: list[list[dict[str, Any]]], name: str, listed: set[str]
) -> None:
    """Of all modules and classes that are loaded, and of the objects of the run, which had trained before."""
    for of_rank in notes:
        found = next(n for n in of_rank if n["event"] == "replaced" and n["name"] == name)
        assert [set(during) for during in found["during"]] == [listed] * 2
        assert found["after"] == []


# -- capacity after a recovery ------------------------------------------------------------------------------------

RAISED_FOR = 6


@pytest.mark.proves("Capacity recalibration", "recovery")
@pytest.mark.parametrize("kind", ["by probability", "by position", "padded"])
def test_capacity_is_raised_alike_on_all_ranks_and_falls_back_to_the_base(
    notes: list[list[dict[str, Any]]], kind: str
) -> None:
    """Full recomputation is on: what a forward pass keeps must be kept when it is repeated."""
    ranks = [next(n for n in of_rank if n["event"] == "recalibration" and n["name"] == kind) for of_rank in notes]
    for part in ("before", "first", "on", "again", "second"):
        alike = [[(step["boosts"], step["factors"], step["debt"]) for step in found[part]] for found in ranks]
        assert alike[1:] == alike[:1] * 3, part
    found = ranks[0]
    assert found["why"] is None
    assert all(set(flat(step["boosts"])) == {1.0} and step["beyond"] == 0 for step in found["before"])
    assert found["again"] == found["on"], "a recovery that loses nothing goes on where it was"
    peaks = [max(flat(step["boosts"])) for step in (*found["first"], *found["on"])]
    assert 1.25 >= peaks[0] > peaks[-1] > 1.0 if kind == "padded" else 2.0 >= peaks[0] > 1.0
    assert sum(r["beyond"] for r in (*found["first"], *found["on"])) > 0
    debts = [step["debt"] for step in found["first"]]
    assert debts[0] > debts[1] > 0
    raised = [max(flat(step["boosts"])) > 1 for step in found["second"]]
    assert raised == [True] * RAISED_FOR + [False] * 3, "a new loss starts the clock again; then exactly the base"
    assert all(set(flat(step["boosts"])) == {1.0} for step in found["second"][RAISED_FOR:])
    if kind == "padded":
        assert [max(s["factors"]) for s in found["second"]] == [max(flat(s["boosts"])) for s in found["second"]]
    assert found["closed"] == [[1.0], [1.0]]
    layers = over_ranks(f["tokens"] for f in ranks).values()
    assert [[layer["routed"], layer["processed"]] for layer in layers] == [
        pytest.approx(t) for t in found["everywhere"]
    ]
    assert all(0 < layer["dropped"] == pytest.approx(layer["routed"] - layer["processed"]) for layer in layers)
    # The experts' hook counts tokens on the ranks that compute, the router on those they are from: the sums agree.
    assert sum(f["processed"][0] for f in ranks) == sum(f["processed"][1] for f in ranks) > 0
