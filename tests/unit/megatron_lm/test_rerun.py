# SPDX-License-Identifier: Apache-2.0
"""From which checkpoint the rerun state machine is told of a step, real files of Megatron-Core aside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing, rerun_state_machine

from megatron_moetion.mcore.tracker import checkpoint_folder, write_tracker
from megatron_moetion.megatron_lm.rerun import take_over

SIZES = {
    "world_size": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "data_parallel_size": 2
}  # fmt: skip


class Machine:
    """Megatron's, as far as it is asked."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def validate_state_dict(self, state: Any) -> bool:
        return bool(state) and state["state"] != "not running"

    def state_dict(self, data_iterator: Any, ckpt_format: str, force: bool) -> Any:
        return "template"

    def load_state_dict(self, state: Any) -> None:
        self.loaded = state


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """``tmp_path`` holds the checkpoint of iteration 4, with a step to be run again."""
    found = Machine()
    common = {"args": argparse.Namespace(**SIZES), "rerun_state_machine": {"state": "to be run again"}}

    def load_common(folder: str) -> Any:
        if not Path(folder).is_dir():
            raise OSError(f"no {folder}")
        return common

    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", lambda: found)
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", load_common)
    monkeypatch.setattr(dist_checkpointing, "load", lambda wanted, folder: {**common, **dict.fromkeys(wanted, folder)})
    checkpoint_folder(str(tmp_path), 4).mkdir()
    write_tracker(tmp_path, 4)
    return found


def flags(folder: Path | None, **changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"load": folder and str(folder), "finetune": False, **SIZES, **changed})


def test_a_step_is_taken_over_from_the_checkpoint_of_the_recovered_iteration(machine: Machine, tmp_path: Path) -> None:
    assert take_over(flags(tmp_path), 4, lambda here: here)
    assert machine.loaded == str(checkpoint_folder(str(tmp_path), 4))


@pytest.mark.parametrize(
    ("changed", "iteration"),
    [({}, 5), ({"finetune": True}, 4), ({"load": None}, 4), ({"world_size": 8}, 4), ({"data_parallel_size": 1}, 4)],
)
def test_nothing_is_taken_over_from_another_one(
    machine: Machine, tmp_path: Path, changed: dict[str, Any], iteration: int
) -> None:
    assert not take_over(flags(tmp_path, **changed), iteration, lambda here: here)
    assert machine.loaded is None


def test_a_checkpoint_that_cannot_be_read_stops_no_recovery(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_folder(str(tmp_path), 4).rmdir()
    assert not take_over(flags(tmp_path), 4, lambda here: here)
    assert "is no help: no " in caplog.text
    assert machine.loaded is None


def test_ranks_agree_before_any_of_them_loads(machine: Machine, tmp_path: Path) -> None:
    """Where one does not see the checkpoint, to load it would leave the others waiting."""
    asked = []
    assert not take_over(flags(tmp_path), 4, lambda here: bool(asked.append(here)))
    assert not take_over(flags(tmp_path), 5, lambda here: bool(asked.append(here)))
    assert asked == [True, False], "all are asked, whatever this rank has found"
    assert machine.loaded is None
