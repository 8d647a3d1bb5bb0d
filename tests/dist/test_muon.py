# SPDX-License-Identifier: Apache-2.0
"""Muon on real Megatron-Core, four ranks: whole parameters on one rank each are captured, restored and replayed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery, logs, notes_in

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

CASES = (
    "pp2 ep2",
    "ep2 dp2",
    "ep2 dp2, untied, bf16 gradients",
    "ep2 dp2, overlapped",
    "pp2 ep2, buckets",
    "ep2 dp2, buckets",
    "ep2 dp2, buckets, overlapped",
    "ep2 dp2, adaptive",
    "ep2 dp2, buckets, lion for the rest",
    "ep2 dp2, lion",
)
FEATURE = {
    "ep2 dp2, adaptive": "Adaptive Muon (second moment of the parameter's shape)",
    "ep2 dp2, buckets, lion for the rest": "Lion",
    "ep2 dp2, lion": "Lion",
}


REFUSED = {
    "tensor parallel": "muon_tp_mode='duplicated' is not supported in mode 'exact': its step talks to other ranks",
    "l2": "with weight_decay_method='l2' is not supported in mode 'exact'",
}


def feature(case: str) -> str:
    return FEATURE.get(case, "Muon (LayerWiseDistributedOptimizer)" + (", overlapped" if "overlapped" in case else ""))


def proving(level: str, mode: str, *cases: str) -> list[Any]:
    return [pytest.param(c, marks=pytest.mark.proves(f"{feature(c)}{mode}", level)) for c in cases or CASES]


@pytest.fixture(scope="module")
def muon() -> Iterator[Nursery]:
    found = Nursery("muon")
    yield found
    found.close()


Ranks = list[dict[str, Any]]
Work = Callable[..., Ranks]


def launch(muon: Nursery, folder: Path, store: Path, *work: str) -> list[Ranks]:
    """Work on four ranks; what each rank noted, by case."""
    environments = [{"RANK": str(rank)} for rank in range(4)]
    codes = muon.launch(200, folder=str(folder), store=str(store), work=list(work), ranks=environments)
    assert codes == [0] * 4, logs(folder)
    return [
        list(of_case) for of_case in zip(*(notes_in(folder / f"rank{r:05d}.0.jsonl") for r in range(4)), strict=True)
    ]


def there(found: Ranks) -> Ranks:
    """Skips the test where this megatron-core has nothing of the kind."""
    if "absent" in found[0]:
        pytest.skip(found[0]["absent"])
    return found


@pytest.fixture
def ranks(muon: Nursery, store: Path, tmp_path: Path) -> Work:
    """Does some work with one case."""
    return lambda kind, case: there(*launch(muon, tmp_path, store, kind, case))


@pytest.fixture(scope="module")
def inventories(muon: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """Of all cases, by one launch."""
    folder = tmp_path_factory.mktemp("muon")
    return {found[0]["name"]: found for found in launch(muon, folder, folder, "inventory")}


@pytest.mark.parametrize("case", proving("inventory", ""))
def test_each_parameter_is_whole_on_one_rank_and_what_was_captured_can_be_put_back(
    inventories: dict[str, Ranks], case: str
) -> None:
    found = there(inventories[case])
    spans: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for of_rank in found:
        assert (of_rank["missed"], of_rank["twice"], of_rank["of_others"]) == (0, 0, 0)
        assert of_rank["scrambled"] == []
        assert of_rank["not_restored"] == []
        assert of_rank["step_again"] == of_rank["step"]
        assert of_rank["differs_after_step"] == []
        assert of_rank["moved"] is None
        assert "was replaced" in of_rank["moved_later"]
        assert "LayerWiseDistributedOptimizer, which gives each rank whole" in of_rank["not_exported"]
        for kind, part in (REFUSED if "lion" not in case or "rest" in case else {}).items():
            assert part in of_rank["refused"][kind]
        for tensor, role, start, end in of_rank["spans"]:
            spans[tensor, role].append((start, end))
    for key, parts in spans.items():
        cursor = 0
        for start, end in sorted(parts):
            assert start == cursor, f"{key}: {sorted(parts)}"
            cursor = end
    held = Counter(
        {role: sum(e - s for (_, r), parts in spans.items() if r == role for s, e in parts) for _, role in spans}
    )
    elements = [r["elements"] for r in found]
    assert held["MASTER"] == held["EXP_AVG"] == sum(d / n + e / m for d, n, e, m in elements)
    second = {name for name, role in spans if role == "EXP_AVG_SQ"}
    if "lion" not in case:
        assert any("embedding" in name for name in second), "Adam has the embedding"
    of_matrices = [name for name in second if ".experts." in name and name.endswith("weight")]
    assert bool(of_matrices) == ("adaptive" in case), "Muon has one moment, and Adam the biases"
    if "dp2" in case and "lion" not in case and "adaptive" not in case:
        whole = [
            parts for (name, role), parts in spans.items() if role == "MASTER" and "linear" in name and "weight" in name
        ]
        assert all(len(parts) == 1 for parts in whole), "a matrix is on one rank"
    if case == "ep2 dp2, buckets":
        assert all(r["counted_elsewhere"] > 0 for r in found), "counts tokens of experts whose state is elsewhere"
    assert all(r["counts"] > 0 for r in found)
    by_peers = {tuple(r["peers"]): r["experts"] for r in found}
    assert all(r["experts"] == by_peers[tuple(r["peers"])] for r in found), "counters are in one order on all peers"


@pytest.mark.proves("In-place expert re-layout, which has no setting: snapshots are dropped from then on", "note")
@pytest.mark.parametrize("case", CASES)
def test_experts_that_move_between_ranks_are_noticed(
    inventories: dict[str, Ranks], case: str, record_property: Callable[[str, Any], None]
) -> None:
    for of_rank in there(inventories[case]):
        record_property("message", of_rank["experts_moved"])
        assert "experts that move between ranks are not supported" in of_rank["experts_moved"]


@pytest.mark.parametrize("case", proving("recovery", ", mode exact"))
def test_in_mode_exact_every_bit_is_what_it_would_have_been(ranks: Work, case: str) -> None:
    for found in ranks("exact", case):
        assert found["wrong"] == [], (found["wrong"], found["lost"])
        assert max(found["lost"]) <= 2
        assert max(found["replayed"]) >= 2
        assert "changed before on_step_end" in found["careless"][0]
        assert found["careless"][2] is None
        assert found["hashes"] == 1


@pytest.mark.parametrize(
    "case", proving("recovery", ", mode popularity", "ep2 dp2", "ep2 dp2, buckets", "ep2 dp2, buckets, overlapped")
)
def test_in_mode_popularity_all_parts_of_an_expert_are_of_one_iteration(ranks: Work, case: str) -> None:
    """Parts of one expert may lie on several ranks, and a rank may have none: each is captured with the others."""
    found = ranks("popularity", case)
    ages: dict[str, list[set[int]]] = defaultdict(list)
    (iteration,) = {r["iteration"] for r in found}
    for of_rank in found:
        assert of_rank["counts"]
        assert of_rank["model"] == []
        for unit, its in of_rank["ages"].items():
            ages[unit].append(set(its))
            assert ".experts." in unit or iteration in its, f"{unit} is of {its}, not of {iteration}"
    together = {unit: set.intersection(*its) for unit, its in ages.items() if ".experts." in unit}
    assert len(together) == 8
    assert all(together.values()), ages
    assert len({max(its) for its in together.values()}) > 1, "experts are of several iterations"
