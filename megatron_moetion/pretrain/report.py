# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: Megatron's log lines and TensorBoard scalars, and one JSON line an iteration.

A file that cannot be written is a user's mistake where a job begins; later what it would hold is lost, and training
goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import distributed as dist

from megatron_moetion.errors import ConfigError
from megatron_moetion.output import Output
from megatron_moetion.pretrain.progress import Progress


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one training step reports; ``losses`` are averages over the global batch, empty where unknown."""

    losses: dict[str, float]
    grad_norm: float | None
    learning_rate: float
    loss_scale: float
    skipped: bool
    seconds: float

    @property
    def is_nan(self) -> bool:
        """Whether any loss is not a finite number."""
        return not all(math.isfinite(loss) for loss in self.losses.values())

    @property
    def is_healthy(self) -> bool:
        """Whether losses and gradients are finite. Where a loss scaler skipped the step, the state is as before it."""
        return not self.is_nan and (self.skipped or self.grad_norm is None or math.isfinite(self.grad_norm))


class Scalars:
    """A ``SummaryWriter`` whose failures, which it raises at whatever call comes next, stop no step."""

    def __init__(self, writer: Any, output: Output) -> None:
        self._writer = writer
        self._output = output

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        """As of a ``SummaryWriter``; called by Megatron too."""
        if not self._output.lost:
            with self._output.writing():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits and end the file."""
        with self._output.writing():
            self._writer.close()


class Reporter:
    """Writes on the one rank that has the loss (``active``); on all others it does nothing."""

    def __init__(self, args: argparse.Namespace, *, active: bool, attempt: int) -> None:
        self._args = args
        self._active = active
        self._attempt = attempt
        self._metrics: IO[str] | None = None
        self.writer: Scalars | None = None
        """TensorBoard's writer, or None."""
        self._pending: list[StepResult] = []
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._metrics_output = Output("--metrics-path", args.metrics_path, rank=rank, attempt=attempt)
        if not active:
            return
        if args.metrics_path is not None:
            path = Path(args.metrics_path)
            with self._metrics_output.opening():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._metrics = path.open("a", encoding="utf-8")
        if args.tensorboard_dir is not None:
            output = Output("--tensorboard-dir", args.tensorboard_dir, rank=rank, attempt=attempt)
            with output.opening():
                self.writer = Scalars(_summary_writer(args.tensorboard_dir), output)

    def step(self, progress: Progress, result: StepResult) -> None:
        """Report one finished training step."""
        if not self._active:
            return
        loss = result.losses["lm loss"]
        self._write_metrics(
            iteration=progress.iteration,
            loss=loss,
            loss_hex=loss.hex(),
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            seconds=result.seconds,
        )
        if self.writer is not None:
            self._write_scalars(self.writer, progress, result)
        self._pending.append(result)
        if progress.iteration % self._args.log_interval == 0:
            _print(format_line(self._args, progress, self._pending))
            self._pending = []

    def scalars(self, progress: Progress, read: Callable[[], Mapping[str, float]]) -> None:
        """More TensorBoard scalars of this iteration, read only if they are written."""
        if self.writer is not None:
            for name, value in read().items():
                self.writer.add_scalar(name, value, progress.iteration)

    def validation(self, progress: Progress, loss: float) -> None:
        """Report one evaluation."""
        if not self._active:
            return
        self._write_metrics(iteration=progress.iteration, validation_loss=loss, validation_loss_hex=loss.hex())
        perplexity = math.exp(min(20.0, loss))
        line = (
            f" validation loss at iteration {progress.iteration} on validation set | "
            f"lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} | "
        )
        rule = "-" * (len(line) + 1)
        _print(f"{rule}\n{line}\n{rule}")
        if self.writer is not None:
            self.writer.add_scalar("lm loss validation", loss, progress.iteration)
            self.writer.add_scalar("lm loss validation ppl", perplexity, progress.iteration)

    def close(self) -> None:
        """Flush and close the files."""
        if self._metrics is not None:
            with self._metrics_output.writing():
                self._metrics.close()
        if self.writer is not None:
            self.writer.close()

    def _write_metrics(self, **values: Any) -> None:
        if self._metrics is None or self._metrics_output.lost:
            return
        line = json.dumps(values | {"time": time.time(), "attempt": self._attempt})
        with self._metrics_output.writing():
            self._metrics.write(line + "\n")
            self._metrics.flush()

    def _write_scalars(self, writer: Scalars, progress: Progress, result: StepResult) -> None:
        scalars: dict[str, float] = {
            "learning-rate": result.learning_rate,
            "batch-size": self._args.global_batch_size,
            "lm loss": result.losses["lm loss"],
            "loss-scale": result.loss_scale,
            "iteration-time": result.seconds,
        }
        if result.grad_norm is not None:
            scalars["grad-norm"] = result.grad_norm
        for name, value in scalars.items():
            writer.add_scalar(name, value, progress.iteration)
        writer.add_scalar("lm loss vs samples", result.losses["lm loss"], progress.consumed_train_samples)


def format_line(args: argparse.Namespace, progress: Progress, results: list[StepResult]) -> str:
    """Megatron's log line over the steps since the last one. Losses are averages over steps that were not skipped."""
    applied = [r for r in results if not r.skipped] or results[-1:]
    last = results[-1]
    milliseconds = 1000 * sum(r.seconds for r in results) / len(results)
    fields = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {progress.iteration:8d}/{args.train_iters:8d}",
        f"consumed samples: {progress.consumed_train_samples:12d}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        f"learning rate: {last.learning_rate:.6E}",
        f"global batch size: {args.global_batch_size:5d}",
    ]
    for name in last.losses:
        fields.append(f"{name}: {sum(r.losses[name] for r in applied) / len(applied):.6E}")
    fields.append(f"loss scale: {last.loss_scale:.1f}")
    if last.grad_norm is not None:
        fields.append(f"grad norm: {last.grad_norm:.3f}")
    fields.append(f"number of skipped iterations: {sum(r.skipped for r in results):3d}")
    fields.append(f"number of nan iterations: {sum(r.is_nan for r in results):3d}")
    return " | ".join(fields) + " |"


def say(text: str) -> None:
    """Print a log line once, from rank 0."""
    say_as(dist.get_rank(), text)


def say_as(rank: int, text: str) -> None:
    """As ``say``, also where ranks are not connected."""
    if rank == 0:
        _print(text)


def _print(text: str) -> None:
    """A log line. Where standard output is a file on a full disk, lines are missing and training goes on."""
    with suppress(OSError):
        print(text, flush=True)


def _summary_writer(folder: str) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(f"--tensorboard-dir {folder} needs the package tensorboard; install it, or drop the flag")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=folder)
