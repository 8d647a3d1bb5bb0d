# SPDX-License-Identifier: Apache-2.0
"""What a rank number means depends on the sizes of all kinds of parallelism."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state
from torch import distributed as dist

from megatron_moetion.mcore.topology import is_same, parallel_sizes, topology

KINDS = ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model", "expert_tensor", "data")


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    for kind, size in zip(KINDS, (2, 4, None, 1, 2, 1, 2), strict=True):
        monkeypatch.setattr(parallel_state, f"get_{kind}_parallel_world_size", lambda size=size: size)


def test_an_arena_names_all_sizes_in_the_order_that_older_ones_have() -> None:
    assert topology() == "tp2 pp4 vpp1 cp1 ep2 dp2"


def test_sizes_that_an_older_checkpoint_did_not_save_are_not_compared() -> None:
    now = parallel_sizes()
    older = {k: now[k] for k in ("world", "tensor", "pipeline", "virtual_pipeline", "expert")}
    assert is_same(now, now)
    assert is_same(older, now)
    for name in older:
        assert not is_same({**older, name: 8}, now)
