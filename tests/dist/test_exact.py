# SPDX-License-Identifier: Apache-2.0
"""Real Megatron-Core on four ranks in mode ``exact``: after every fault, every bit is what it would have been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Nursery

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

PERIOD = 3
FAULTS = 9
_OVERLAP = "--overlap-grad-reduce, --overlap-param-gather"
_SKIPPED = "Steps that a loss scaler skips"
CASES = {
    "pp2 ep2, bf16, distributed": (
        "DistributedOptimizer, bf16",
        "Pipeline parallelism",
        "Adam that counts steps in the group (Apex, Transformer Engine)",
        "Iterations with several optimizer steps",
    ),
    "ep2 dp2, bf16, distributed, overlapped": (_OVERLAP, "Expert parallelism"),
    "ep2 dp2, fp32, distributed, overlapped": ("DistributedOptimizer, fp32", _OVERLAP),
    "pp2 ep2, fp32": ("FP32Optimizer",),
    "ep2 dp2, bf16": ("Float16OptimizerWithFloat16Params, bf16",),
    "ep2 dp2, bf16 gradients, distributed": ("Gradients reduced in bf16",),
    "pp2 ep2, bf16 gradients": ("Gradients reduced in bf16",),
    "pp2 ep2, fp16, skipped steps": ("DistributedOptimizer, fp16", _SKIPPED),
    "ep2 dp2, fp16 gradients, skipped steps": ("Gradients reduced in fp16", _SKIPPED),
    "ep4, bf16, expert bias, experts without tokens": ("Router with expert bias", "Experts without tokens"),
    "pp2 ep2 in four stages, bf16, distributed": ("Virtual pipeline stages",),
    "torch AdamW, foreach": ("torch.optim.AdamW",),
    "torch AdamW, fused": ("torch.optim.AdamW",),
    "torch Adam, fused": ("torch.optim.Adam",),
    "sgd with momentum": ("SGD with momentum",),
}
"""By what they prove: rows of docs/compatibility.md."""


@pytest.fixture(scope="module")
def exact_nursery() -> Iterator[Nursery]:
    found = Nursery("exact")
    yield found
    found.close()


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.proves(f, "recovery") for f in fs]) for c, fs in CASES.items()]
)
def test_every_bit_is_what_it_would_have_been(exact_nursery: Nursery, store: Path, tmp_path: Path, case: str) -> None:
    """Tensors, random states, data position and losses, at every recovery and before every fault, and at the end."""
    ranks = [of_rank[0] for of_rank in exact_nursery.notes(100, tmp_path, store=str(store), case=case)]
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
