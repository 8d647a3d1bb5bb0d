# SPDX-License-Identifier: Apache-2.0
"""Real Megatron-Core on four ranks in mode ``exact``: after every fault, every bit is what it would have been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Nursery, logs, notes_in

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

PERIOD = 3
FAULTS = 9
CASES = (
    "pp2 ep2, bf16, distributed",
    "ep2 dp2, bf16, distributed, overlapped",
    "ep2 dp2, fp32, distributed, overlapped",
    "pp2 ep2, fp32",
    "ep2 dp2, bf16",
    "ep2 dp2, bf16 gradients, distributed",
    "pp2 ep2, bf16 gradients",
    "pp2 ep2, fp16, skipped steps",
    "ep2 dp2, fp16 gradients, skipped steps",
    "ep4, bf16, expert bias, experts without tokens",
    "pp2 ep2 in four stages, bf16, distributed",
    "torch AdamW, foreach",
    "torch AdamW, fused",
    "torch Adam, fused",
    "sgd with momentum",
)


@pytest.fixture(scope="module")
def exact_nursery() -> Iterator[Nursery]:
    found = Nursery("exact")
    yield found
    found.close()


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_what_it_would_have_been(exact_nursery: Nursery, store: Path, tmp_path: Path, case: str) -> None:
    """Tensors, random states, data position and losses, at every recovery and before every fault, and at the end."""
    environments = [{"RANK": str(rank)} for rank in range(4)]
    codes = exact_nursery.launch(100, folder=str(tmp_path), store=str(store), case=case, ranks=environments)
    assert codes == [0] * 4, logs(tmp_path)
    ranks = [notes_in(tmp_path / f"rank{rank:05d}.0.jsonl")[0] for rank in range(4)]
    for found in ranks:
        assert found["wrong"] == [], (found["wrong"], found["lost"])
        assert len(found["lost"]) == FAULTS
        assert max(found["lost"]) <= 2, "one, and the iteration of two steps"
        assert max(found["replayed"]) >= PERIOD - 1
        assert (found["skipped"] > 0) == ("skipped" in case)
        zeroed, twice, good = found["careless"]
        if "skipped" not in case:
            assert "changed before on_step_end" in zeroed
            assert twice.startswith("2")
        assert good is None
        assert found["hashes"] == 1, "a state's hash is the same with and without faults"
    assert all(found["zeros"] > 0 for found in ranks), "of the iteration without a step"
