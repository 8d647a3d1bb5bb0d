# SPDX-License-Identifier: Apache-2.0
"""Models of the kinds that are trained today: all of their state is captured once, and comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery, owned_elements, tiled

pytestmark = [pytest.mark.dist, pytest.mark.timeout(500)]

Notes = Sequence[Mapping[str, Any]]
"""One rank's."""
Launch = Callable[[str], list[Notes]]
"""From a case to all ranks' notes of it."""

FEATURES = {
    "frozen attention": "Frozen parameters",
    "frozen experts": "Frozen experts",
    "a stage that is frozen": "A pipeline stage without trained parameters",
    "multi-token prediction": "Multi-token prediction (MTP)",
    "multi-token prediction, one layer repeated": "MTP, one layer repeated (mtp_use_repeated_layer)",
    "multi-token prediction, clipped apart": "MTP, heads clipped apart (mtp_detach_heads)",
    "multi-latent attention": "Multi-latent attention (MLA)",
    "multi-latent attention, multi-token prediction": "MLA with MTP",
    "shared expert with a gate": "Shared expert with a gate",
    "router in fp32": "Router in fp32",
    "router in fp64": "Router in fp64",
    "quantile balancing": "Quantile balancing of routers",
    "global auxiliary loss": "Global auxiliary loss",
    "uneven pipeline": "Uneven pipeline (--decoder-first-pipeline-num-layers)",
    "pipeline that counts embedding and loss": "Uneven pipeline (account_for_embedding_in_pipeline_split)",
    "pipeline layout, a stage without layers": "Pipeline layout, a stage without layers",
    "pipeline layout in four stages": "Pipeline layout, virtual stages",
    "dense layers first": "Dense layers before MoE layers",
    "norms of queries and keys, gated attention": "Norms of queries and keys, attention output gate",
    "learned softmax offset": "Learned softmax offset",
}
SPREAD = {
    "tp2 ep2": "Tensor parallelism, sequence parallelism, expert TP 1",
    "tp2 etp2, dp2": "Tensor parallelism, expert TP 2",
    "tp2 etp2, whole optimizers": "Tensor parallelism without distributed optimizer",
    "tp2 etp2 ep2": "Tensor, expert tensor and expert parallelism",
    "tp2 etp2 pp2": "Tensor and pipeline parallelism",
    "cp2 ep2": "Context parallelism",
    "tp2 cp2": "Tensor and context parallelism",
}
NAMES = {
    "multi-token prediction": ("mtp.0.eh_proj", "mtp.1.enorm", "mtp.1.experts.", "mtp.0.moetion.tokens"),
    "multi-token prediction, one layer repeated": ("mtp.0.eh_proj", "mtp.0.experts."),
    "multi-token prediction, clipped apart": ("mtp.0.eh_proj", "mtp.0.experts."),
    "multi-latent attention": ("linear_q_down_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm"),
    "multi-latent attention, multi-token prediction": ("linear_kv_down_proj", "mtp.0.experts."),
    "shared expert with a gate": ("shared_experts.gate_weight",),
    "quantile balancing": ("router.qb_beta", "router.qb_beta_accum", "router.qb_beta_count"),
    "global auxiliary loss": ("router.global_tokens_per_expert", "router.ga_steps"),
    "norms of queries and keys, gated attention": ("q_layernorm", "k_layernorm"),
    "learned softmax offset": ("softmax_offset",),
    "uneven pipeline": tuple(f"layers.{n}.experts." for n in range(4)),
    "pipeline layout in four stages": tuple(f"layers.{n}.experts." for n in range(4)),
    "tp2 etp2 pp2": ("shared_experts.gate_weight",),
}
"""Parts of names that are in the inventory of some rank."""
RECOVERIES = {
    "frozen experts": ("popularity",),
    "a stage that is frozen": ("exact", "popularity"),
    "multi-token prediction": ("exact",),
    "multi-token prediction, clipped apart": ("exact",),
    "multi-latent attention": ("exact",),
    "quantile balancing": ("exact",),
    "pipeline layout, a stage without layers": ("exact", "popularity"),
    "pipeline layout in four stages": ("full",),
    "dense layers first": ("popularity",),
    "tp2 ep2": ("full",),
    "tp2 etp2, dp2": ("exact", "popularity"),
    "tp2 etp2 ep2": ("exact",),
    "cp2 ep2": ("exact",),
}
"""Modes in which a real run loses every process, and then a node's memory too."""


def rows(level: str) -> Iterator[Any]:
    """All cases, each with its row of the table."""
    for name, feature in {**FEATURES, **SPREAD}.items():
        yield pytest.param(name, marks=pytest.mark.proves(feature, level))


def runs(*modes: str) -> Iterator[Any]:
    """Cases that are recovered in one of the modes."""
    for name, tried in RECOVERIES.items():
        for mode in (m for m in tried if m in modes):
            feature = {**FEATURES, **SPREAD}[name]
            yield pytest.param(name, mode, marks=pytest.mark.proves(feature, "recovery"), id=f"{name}-{mode}")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """What each rank noted of a case. Many cases run in one launch, because Megatron-Core takes seconds to import."""
    done: dict[str, list[Notes]] = {}
    begun: set[str] = set()

    def notes_of(case: str) -> list[Notes]:
        together = FEATURES if case in FEATURES else SPREAD
        if case not in done:
            assert case not in begun, "the launch of this case failed"
            begun.update(together)
            folder = tmp_path_factory.mktemp("models")
            found = _launch(folder, list(together))
            done.update({name: [[n for n in rank if n["name"] == name] for rank in found] for name in together})
        return done[case]

    return notes_of


def _launch(folder: Path, cases: list[str]) -> list[Notes]:
    with Nursery("models") as nursery:
        return nursery.notes(400, folder, store=str(folder / "store"), cases=cases)


def _of(launch: Launch, case: str, event: str, mode: str | None = None) -> list[Mapping[str, Any]]:
    """All ranks' notes of one event; skips what this version of Megatron-Core lacks."""
    ranks = launch(case)
    for note in ranks[0]:
        if note["event"] == "lacks":
            pytest.skip(note["why"])
    return [next(n for n in rank if n["event"] == event and n.get("mode") == mode) for rank in ranks]


@pytest.mark.parametrize("case", list(rows("inventory")))
def test_every_byte_of_state_is_captured_exactly_once(launch: Launch, case: str) -> None:
    ranks = _of(launch, case, "case")
    for found in ranks:
        assert found["owned"] > 30_000
        assert (found["missed"], found["twice"], found["of_others"]) == (0, 0, 0)
        assert found["moved"] is None
        assert "exp_avg" in (found["moved_later"] or "") or not found["spans"], "a rank without trained parameters"
    names = {name for found in ranks for of_kind in found["tensors"].values() for name in of_kind}
    assert [part for part in NAMES.get(case, ()) if not any(part in name for name in names)] == []


@pytest.mark.parametrize("case", list(rows("inventory")))
def test_all_ranks_together_hold_every_element_of_every_parameter(launch: Launch, case: str) -> None:
    """Shards of the distributed optimizer tile what one rank of the tensor parallel group has of a parameter."""
    ranks = _of(launch, case, "case")

    def holder(rank: int, found: Mapping[str, Any], tensor: str) -> tuple[int, ...]:
        of_place = found["place"]
        return (of_place["etp" if ".experts." in tensor else "tp"], of_place["pp"]) if found["sharded"] else (rank,)

    total = tiled(
        ((tensor, role, *holder(rank, found, tensor)), start, end)
        for rank, found in enumerate(ranks)
        for tensor, role, start, end in found["spans"]
    )
    assert total == 3 * owned_elements(ranks) > 0, "main values and two moments"


@pytest.mark.parametrize("case", list(rows("recovery")))
def test_scrambled_state_is_restored_bitwise_and_so_is_the_next_step(launch: Launch, case: str) -> None:
    for found in _of(launch, case, "case"):
        assert found["scrambled"] == [], "nothing of the state may be left as it was"
        assert found["not_restored"] == []
        assert found["step_again"] == found["step"]
        assert not found["step"]["skipped"]
        assert found["differs_after_step"] == []


@pytest.mark.parametrize(("case", "mode"), list(runs("full", "exact")))
def test_every_bit_is_what_it_would_have_been(launch: Launch, case: str, mode: str) -> None:
    """All processes are lost twice, the second time with a node's memory."""
    ranks = _of(launch, case, "recovery", mode)
    for found in ranks:
        assert found["wrong"] == []
        assert [r["lost"] for r in found["recovered"]] == [0, 0]
        assert all(set(r["units"].values()) == {r["iteration"]} for r in found["recovered"])
    # A rank whose parameters are all frozen has nothing to replay.
    assert any(r["replayed"] for found in ranks for r in found["recovered"]) == (mode == "exact")


@pytest.mark.parametrize(("case", "mode"), list(runs("popularity")))
def test_an_expert_is_of_one_iteration_on_all_ranks_that_have_parts_of_it(launch: Launch, case: str, mode: str) -> None:
    """Also where these are tensor parallel shards; and its tokens are lost once, however many ranks counted them."""
    ranks = _of(launch, case, "recovery", mode)
    ages = []
    before = 0
    for fault in range(2):
        at = [found["recovered"][fault] for found in ranks]
        (iteration,) = {r["iteration"] for r in at}
        taken: dict[str, int] = {}
        for name, when in ((n, w) for r in at for n, w in r["units"].items()):
            if ".experts." not in name and not name.endswith(".frozen"):
                assert when == iteration, name
            elif ".experts." in name:
                assert taken.setdefault(name, when) == when >= 0, f"{name}: parts of different iterations"
        ages += [iteration - when for when in taken.values()]
        lost = 0
        for found, r in zip(ranks, at, strict=True):
            now = r["counts"][str(iteration)] if found["place"]["etp"] == 0 else {}
            # What an earlier recovery lost is not lost again.
            lost += sum(n - r["counts"][str(max(before, taken[e]))][e] for e, n in now.items() if e in taken)
        assert {r["lost_tokens"] for r in at} == {lost}
        before = iteration
    assert any(ages) == bool(ages), "with few experts a snapshot some are older"


@pytest.mark.proves("Another order of the kinds of parallelism after a restart", "refused")
def test_another_ranks_shard_is_not_taken_for_ours(
    launch: Launch, record_property: Callable[[str, object], None]
) -> None:
    """Its names and sizes are the same: only the place in the groups tells."""
    for found in _of(launch, "tp2 etp2, whole optimizers", "another order"):
        record_property("message", found["message"])
        assert "how it is spread over ranks" in found["message"]
