# SPDX-License-Identifier: Apache-2.0
"""A run's own files: a mistake shows where a job begins, and a full disk stops no step."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest

from megatron_moetion.errors import ConfigError
from megatron_moetion.pretrain.progress import Progress
from megatron_moetion.pretrain.report import Reporter, StepResult


def arguments(**changes: object) -> argparse.Namespace:
    fields = {"metrics_path": None, "tensorboard_dir": None, "log_interval": 1, "train_iters": 9,
              "global_batch_size": 4, **changes}  # fmt: skip
    return argparse.Namespace(**fields)


def report(reporter: Reporter, steps: int) -> None:
    progress = Progress()
    for _ in range(steps):
        progress.iteration += 1
        result = StepResult(
            losses={"lm loss": 1.5}, grad_norm=2.0, learning_rate=1e-3, loss_scale=1.0, skipped=False, seconds=0.1
        )
        reporter.step(progress, result)
        reporter.scalars(progress, lambda: {"moetion/x": 1.0})
        reporter.validation(progress, 1.5)
    reporter.close()


def test_each_step_is_a_line_and_scalars(tmp_path: Path) -> None:
    path, board = tmp_path / "new" / "metrics.jsonl", tmp_path / "board"
    report(Reporter(arguments(metrics_path=str(path), tensorboard_dir=str(board)), active=True, attempt=0), 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["iteration"], "loss" in line) for line in lines] == [(n, x) for n in (1, 2, 3) for x in (True, False)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    assert {"lm loss", "lm loss vs samples", "grad-norm", "moetion/x", "lm loss validation"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("lm loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("losses", "grad_norm", "skipped", "healthy"),
    [
        ({"lm loss": 1.5}, 2.0, False, True),
        ({}, 2.0, False, True),  # not the last stage of a pipeline
        ({"lm loss": 1.5}, None, False, True),
        ({"lm loss": math.nan}, 2.0, False, False),
        ({"lm loss": 1.5, "load_balancing_loss": math.inf}, 2.0, False, False),
        ({}, math.nan, False, False),
        ({"lm loss": 1.5}, math.inf, False, False),
        ({"lm loss": 1.5}, math.inf, True, True),  # gradients that overflow are a loss scaler's business
        ({"lm loss": math.nan}, None, True, False),  # a state that is lost overflows each time
    ],
)
def test_an_iteration_is_healthy_whose_loss_and_gradients_are_numbers(
    losses: dict[str, float], grad_norm: float | None, skipped: bool, healthy: bool
) -> None:
    result = StepResult(
        losses=losses, grad_norm=grad_norm, learning_rate=1e-3, loss_scale=1.0, skipped=skipped, seconds=0.1
    )
    assert result.is_healthy is healthy


def test_a_full_disk_stops_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    reporter = Reporter(arguments(metrics_path=str(full), tensorboard_dir=str(tmp_path)), active=True, attempt=0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert reporter.writer is not None
    monkeypatch.setattr(reporter.writer._writer, "add_scalar", fail)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", fail)
        report(reporter, 3)
    said = [m for m in caplog.messages if "nothing more is written" in m]
    assert [m.split(": ")[1] for m in said] == ["--metrics-path", "--tensorboard-dir"]


@pytest.mark.parametrize(("flag", "name"), [("metrics_path", "--metrics-path"), ("tensorboard_dir", "--tensorboard-")])
def test_a_place_that_cannot_be_written_is_a_mistake_at_the_start_and_no_reason_not_to_restart(
    flag: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    args = arguments(**{flag: str(tmp_path / "file" / "x")})
    with pytest.raises(ConfigError, match=f"{name}.*cannot be written"):
        Reporter(args, active=True, attempt=0)
    report(Reporter(args, active=True, attempt=1), 2)
