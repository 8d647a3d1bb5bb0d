# SPDX-License-Identifier: Apache-2.0
"""Real Megatron-Core on four ranks with the precision-aware optimizer: its raw state is captured, and comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery, logs, notes_in

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

CASES = {
    "fp32 moments": ("fp32 moments", {"MASTER": "float32", "EXP_AVG": "float32", "EXP_AVG_SQ": "float32"}, 12),
    "bf16 moments": ("bf16 moments", {"MASTER": "float32", "EXP_AVG": "bfloat16", "EXP_AVG_SQ": "bfloat16"}, 8),
    "fp16 moments": (
        "fp16 moments",
        {"MASTER": "float32", "EXP_AVG": "float16", "EXP_AVG_SQ": "float16", "SCALE": "float32"},
        8,
    ),
    "FP8 moments": (
        "FP8 moments",
        {"MASTER": "float32", "EXP_AVG": "uint8", "EXP_AVG_SQ": "uint8", "SCALE": "float32"},
        6,
    ),
    "FP8 and fp16 moments, overlapped": (
        "FP8 and fp16 moments",
        {"MASTER": "float32", "EXP_AVG": "uint8", "EXP_AVG_SQ": "float16", "SCALE": "float32"},
        7,
    ),
    "remainders": (
        "int16 remainders",
        {"MODEL": "bfloat16", "REMAINDER": "int16", "EXP_AVG": "float32", "EXP_AVG_SQ": "float32"},
        12,
    ),
    "remainders, bf16 moments, overlapped": (
        "int16 remainders and bf16 moments",
        {"MODEL": "bfloat16", "REMAINDER": "int16", "EXP_AVG": "bfloat16", "EXP_AVG_SQ": "bfloat16"},
        8,
    ),
    "fp16 mains": (
        "fp16 main parameters",
        {
            "MODEL": "bfloat16",
            "MASTER": "float16",
            "EXP_AVG": "bfloat16",
            "EXP_AVG_SQ": "bfloat16",
            "SCALE": "float32",
        },
        8,
    ),
    "fp16 parameters, skipped steps": (
        "fp16 parameters and a loss scale",
        {"MASTER": "float32", "EXP_AVG": "bfloat16", "EXP_AVG_SQ": "bfloat16"},
        8,
    ),
    "mains of Megatron": (
        "bf16 moments beside fp32 main parameters of Megatron's (MXFP8 recipe)",
        {"MASTER": "float32", "EXP_AVG": "bfloat16", "EXP_AVG_SQ": "bfloat16"},
        8,
    ),
}
"""Of each case what a person calls it, the types of its state by role, and the bytes of a parameter."""


REPLAYED = (
    "bf16 moments",
    "FP8 and fp16 moments, overlapped",
    "remainders, bf16 moments, overlapped",
    "fp16 mains",
    "fp16 parameters, skipped steps",
    "mains of Megatron",
)
"""In mode ``exact``: each way in which gradients, scales and model parameters may matter, once."""


def proving(level: str, cases: Iterable[str] = CASES) -> list[Any]:
    """Cases, each as a row of the compatibility table."""
    return [
        pytest.param(case, marks=pytest.mark.proves(f"Precision-aware optimizer, {CASES[case][0]}", level))
        for case in cases
    ]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    found = Nursery("precision")
    yield found
    found.close()


@pytest.fixture(scope="module")
def examined(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank found in each case; all of them in one launch."""
    folder: Path = tmp_path_factory.mktemp("precision")
    return nursery.notes(200, folder, store="", case=None)


@pytest.fixture
def ranks(examined: list[list[dict[str, Any]]], case: str) -> list[dict[str, Any]]:
    return [next(n for n in of_rank if n["name"] == case) for of_rank in examined]


@pytest.mark.parametrize("case", proving("inventory"))
def test_every_byte_of_raw_state_is_captured_exactly_once(ranks: list[dict[str, Any]], case: str) -> None:
    _, types, bytes_a_parameter = CASES[case]
    for found in ranks:
        assert (found["missed"], found["twice"], found["of_others"]) == (0, 0, 0)
        assert found["owned"] > 20_000
        assert found["moved"] is None
        assert found["roles"] == sorted(f"{role} {dtype}" for role, dtype in types.items())
        assert found["bytes"] == bytes_a_parameter * found["elements"] > 0
        assert found["optimizers"] == 2, "dense and expert"


@pytest.mark.parametrize("case", proving("recovery"))
def test_scrambled_state_is_restored_bitwise_and_so_is_the_next_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["is_finite"]
        assert len(found["changed"]) > 20, "the step changes state"
        assert found["scrambled"] == [], "nothing of the state may be left as it was"
        assert found["not_restored"] == []
        assert found["step_again"] == found["step"]
        assert found["differs_after_step"] == []


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_what_megatron_saves(ranks: list[dict[str, Any]]) -> None:
    """State in less than fp32 is on disk as what it stands for; each rank has written its part."""
    assert [found["on_disk"] for found in ranks] == [[]] * 4


@pytest.mark.parametrize("case", proving("recovery", REPLAYED))
def test_replayed_steps_lead_to_the_same_bits(nursery: Nursery, store: Path, tmp_path: Path, case: str) -> None:
    """Mode ``exact``: at every recovery, before every fault and at the end, as without faults."""
    environments = [{"RANK": str(rank)} for rank in range(4)]
    codes = nursery.launch(200, folder=str(tmp_path), store=str(store), case=case, ranks=environments)
    assert codes == [0] * 4, logs(tmp_path)
    for found in (notes_in(tmp_path / f"rank{rank:05d}.0.jsonl")[0] for rank in range(4)):
        assert found["wrong"] == [], (found["wrong"], found["lost"])
        assert max(found["lost"]) <= 2, "one, and the iteration of two steps"
        assert max(found["replayed"]) >= 2
        assert (found["skipped"] > 0) == ("skipped" in case)
        assert found["hashes"] == 1
