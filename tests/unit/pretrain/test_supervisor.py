# SPDX-License-Identifier: Apache-2.0
"""Settings of torchrun with which a lost node cannot be replaced are said; all others are not."""

from __future__ import annotations

import pytest

from megatron_moetion.pretrain.supervisor import SHARE_SWITCH, replacement_warning

TWO_NODES = {
    "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "job", "RANK": "0", "WORLD_SIZE": "4",
}  # fmt: skip


@pytest.mark.parametrize(("setting", "said"), [({}, "is not set"), ({SHARE_SWITCH: "0"}, "is 0")])
def test_the_remedy_is_named_in_one_line(setting: dict[str, str], said: str) -> None:
    line = replacement_warning(TWO_NODES | setting)
    assert line is not None
    assert said in line
    assert line.startswith("with --rdzv-backend=c10d")
    assert line.endswith(f"{SHARE_SWITCH}=1 on every node")
    assert "\n" not in line


@pytest.mark.parametrize(
    "environ",
    [
        TWO_NODES | {SHARE_SWITCH: "1", "TORCHELASTIC_USE_AGENT_STORE": "False"},
        TWO_NODES | {"GROUP_WORLD_SIZE": "1"},
        TWO_NODES | {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"RANK": "0", "WORLD_SIZE": "16"},
        {},
    ],
    ids=["set", "one node", "no restarts", "not torchrun", "alone"],
)
def test_nothing_is_said_otherwise(environ: dict[str, str]) -> None:
    assert replacement_warning(environ) is None
