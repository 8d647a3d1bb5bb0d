# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` says of arguments that are not what it needs, and what it leaves behind where it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fabrics import loopback_fabrics
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import megatron_moetion
from megatron_moetion.coding import Coding
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore import attach as attach_module
from megatron_moetion.mcore.auto import costs
from megatron_moetion.plan.costs import Copies


@pytest.fixture(autouse=True)
def _connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)


def of(kind: type) -> Any:
    """An object of this class that was never made."""
    return kind.__new__(kind)


class OwnScheduler:
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class OwnKindOfScheduler(OptimizerParamScheduler): ...


GOOD: dict[str, Any] = {
    "model": [of(DistributedDataParallel)],
    "optimizer": of(ChainedOptimizer),
    "opt_param_scheduler": of(OptimizerParamScheduler),
    "config": MoetionConfig(run_id="r"),
    "user_state": OwnScheduler(),
}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": torch.nn.Linear(1, 1)}, "is a Linear; give the model that is wrapped in .*DistributedDataParallel"),
        ({"model": [torch.nn.Linear(1, 1)]}, "holds Linear; every chunk must be wrapped in .*DistributedDataParallel"),
        ({"model": []}, "holds nothing"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "is a Adam; give what .*get_megatron_optimizer"),
        ({"opt_param_scheduler": object()}, "is a object without state_dict and load_state_dict; .* or None"),
        ({"config": "full"}, "config=.* is a str; give a MoetionConfig"),
        ({"p2p_communicator": object()}, "is a object; give the one of .*pipeline_arguments"),
        ({"user_state": object()}, "is a object without state_dict and load_state_dict"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_give_instead(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        megatron_moetion.attach(**{**GOOD, **wrong})


def test_attach_before_the_ranks_are_connected_says_what_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"attach\(\) comes after init_process_group"):
        megatron_moetion.attach(**GOOD)


@pytest.mark.parametrize("missing", [None, OwnScheduler()])
def test_arguments_that_are_right_pass(missing: Any) -> None:
    attach_module.check_attach_arguments(**{**GOOD, "user_state": missing})
    for scheduler in (None, OwnScheduler(), of(OwnKindOfScheduler)):
        attach_module.check_attach_arguments(**{**GOOD, "opt_param_scheduler": scheduler})


def test_a_model_that_is_not_in_a_list_is_a_list_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Checked(Exception):
        pass

    def check(model: Any, *_: Any) -> None:
        raise Checked(len(model))

    monkeypatch.setattr(attach_module, "check_attach_arguments", check)
    with pytest.raises(Checked, match="1"):
        megatron_moetion.attach(**{**GOOD, "model": of(DistributedDataParallel)})


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("megatron_moetion")
    before = logger.level, list(logger.handlers), logger.propagate
    logger.setLevel(logging.NOTSET)
    logger.handlers = []
    yield logger
    logger.setLevel(before[0])
    logger.handlers, logger.propagate = before[1:]


def test_an_own_loop_sees_the_log_until_the_end(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "hasHandlers", lambda: bool(log.handlers))  # pytest's own handlers are on the root
    with ExitStack() as undo:
        attach_module.show_log(undo)
        log.info("[moetion] here")
    log.info("[moetion] and gone")
    assert capsys.readouterr().out == "[moetion] here\n"
    assert log.level == logging.NOTSET


def test_a_program_with_a_log_of_its_own_keeps_it(log: logging.Logger) -> None:
    log.setLevel(logging.ERROR)
    handler = logging.NullHandler()
    log.addHandler(handler)
    with ExitStack() as undo:
        attach_module.show_log(undo)
        assert log.level == logging.ERROR
        assert log.handlers == [handler]


def test_settings_that_checkpointing_depends_on_are_logged_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """One line each, from rank 0 alone; a whole-iteration graph takes the schedule with it."""
    made: list[str] = []

    class Stop(Exception):
        pass

    def scheduler(schedule: str, *_: Any, **__: Any) -> None:
        made.append(schedule)
        raise Stop

    chunk = of(DistributedDataParallel)
    torch.nn.Module.__init__(chunk)
    chunk.weight = torch.nn.Parameter(torch.zeros(1))
    chunk.config = SimpleNamespace(
        cuda_graph_impl="full_iteration",
        cuda_graph_modules=[],
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
        moe_paged_stash=True,
        fp8="hybrid",
    )
    monkeypatch.setattr(attach_module, "Scheduler", scheduler)
    monkeypatch.setattr(attach_module, "_connect", lambda *_: loopback_fabrics(1)[0])
    monkeypatch.setattr(attach_module, "restart_warning", lambda environment: "a restart by torchrun would fail")
    for rank, mode in ((0, "popularity"), (0, "full"), (1, "full")):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        caplog.clear()
        config = MoetionConfig(run_id="r", store=str(tmp_path), mode=mode, schedule="bubble")
        with pytest.raises(Stop), caplog.at_level(logging.WARNING, "megatron_moetion"):
            megatron_moetion.attach(**{**GOOD, "model": [chunk], "config": config})
        counted = ["experts' inputs are padded"] if mode == "popularity" else []
        starts = [
            "a restart by torchrun",
            "CUDA graphs are on (",
            "HybridEP exchanges",
            "moe_paged_stash is on",
            *counted,
        ]
        expected = [] if rank else starts
        said = [record.getMessage() for record in caplog.records]
        assert [text.startswith(f"[moetion] rank 0: {s}") for text, s in zip(said, expected, strict=True)] == [
            True
        ] * len(expected)
    assert made == ["steady"] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("graphs", ["none", "full_iteration"])
def test_mode_auto_does_not_come_to_popularity_once_graphs_are_captured(
    monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    def state(*_: Any) -> None:
        raise UnsupportedState("nothing can be captured here")

    chunk = of(DistributedDataParallel)
    torch.nn.Module.__init__(chunk)
    chunk.config = SimpleNamespace(cuda_graph_impl=graphs, cuda_graph_modules=[])
    monkeypatch.setattr(attach_module.Loop, "state", state)
    loop = attach_module.Loop([chunk], GOOD["optimizer"], None, None, None)
    found = costs(loop, MoetionConfig(run_id="r"), Copies(coding=Coding(holders=1), ranks_per_node=8))
    assert found["full"] == found["exact"] == "nothing can be captured here"
    assert ("CUDA graphs" in str(found["popularity"])) == (graphs != "none")
