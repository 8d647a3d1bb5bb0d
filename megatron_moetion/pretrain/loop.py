# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, step, evaluate, save."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, track_moe_metrics
from torch import distributed as dist

from megatron_moetion.errors import ProtectionLost
from megatron_moetion.mcore.arguments import moetion_config
from megatron_moetion.mcore.rng import load_rng_states, rng_states
from megatron_moetion.persist.tracker import latest_iteration
from megatron_moetion.pretrain import checkpoint, flags
from megatron_moetion.pretrain.corpus import SampleSource, Split, batches, sample_numbers
from megatron_moetion.pretrain.model import build_model, build_optimizer
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.progress import Progress, RunState
from megatron_moetion.pretrain.report import Reporter, StepResult, say, say_as
from megatron_moetion.pretrain.startup import build_source, initialize

UNHEALTHY_MAX = 4
"""Iterations in a row without a finite loss: enough for all ranks to have given up the first ones as a way back."""
AUX_LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def pretrain(args: argparse.Namespace, process: Process, source: SampleSource | None = None) -> None:
    """Train to ``--train-iters`` on this rank, from wherever the run stands. ``source``: where it is there already."""
    say_as(process.rank, f"> connecting {process.world_size} rank(s)")
    attempt = initialize(args, process)
    say(f"> {process.world_size} rank(s) are connected")
    source = build_source(args) if source is None else source
    say(f"> data: {source.description}")
    # The last rank is on the last pipeline stage, which has the loss.
    reporter = Reporter(args, active=process.rank == process.world_size - 1, attempt=attempt)
    with closing(reporter):
        trainer = Trainer(args, source, reporter)
        say(f"> {trainer.num_parameters:,} parameters on rank 0, {args.num_microbatches} micro batches a step")
        trainer.train()
    dist.destroy_process_group()


class Trainer:
    """One rank's part of a run."""

    def __init__(self, args: argparse.Namespace, source: SampleSource, reporter: Reporter) -> None:
        self.args = args
        self.source = source
        self.reporter = reporter
        self.progress = Progress()
        self.state = RunState(self.progress, flags.record(args))
        self._saved = -1
        self._unhealthy = 0
        """Iterations in a row whose loss or gradients were no numbers."""
        self.model = build_model(args, source.vocab_size)
        self.optimizer, self.scheduler = build_optimizer(args, self.model)
        if args.save is not None or args.load is not None:
            checkpoint.check_supported(self.optimizer)
        self._forward_backward = get_forward_backward_func()
        self.pipeline_arguments: dict[str, Any] = {}
        """What Megatron's schedule is given beside the step: see ``Attached``."""
        device = torch.cuda.current_device()
        self._positions = torch.arange(args.seq_length, device=device).expand(args.micro_batch_size, -1)
        self._mask: torch.Tensor | None = None
        if args.transformer_impl == "local":
            # True is hidden. Transformer Engine makes its own causal mask.
            square = torch.ones(1, 1, args.seq_length, args.seq_length, dtype=torch.bool, device=device)
            self._mask = square.triu(1)

    @property
    def num_parameters(self) -> int:
        """Model parameters on this rank."""
        return sum(p.numel() for chunk in self.model for p in chunk.parameters())

    def train(self) -> None:
        """Resume, then step to the end."""
        with ExitStack() as stack:
            session = self._attach()
            if session is None:
                self.load()
            else:
                stack.enter_context(session)
                resumed = session.start(load_persistent=self.load, newest_persistent=self._newest_on_disk)
                self.pipeline_arguments = session.pipeline_arguments
                if resumed is not None:
                    self._go_on()
                    # A snapshot is older than the checkpoint of its iteration, which may be missing or cut short.
                    self._save_if_due(session)
            self._train(session)
        if self.args.eval_iters and self.progress.evaluated != self.progress.iteration:
            self.evaluate()
        if self.args.save is not None and self._saved != self.progress.iteration:
            self.save()

    def _train(self, session: Any) -> None:
        """All steps that are left."""
        args, progress = self.args, self.progress
        say(f"> training from iteration {progress.iteration} to {args.train_iters}")
        for chunk in self.model:
            chunk.train()
        while progress.iteration < args.train_iters:
            if progress.iteration + 1 in args.iterations_to_skip:
                self._skip_iteration(session)
                continue
            result = self.train_step()
            self.reporter.step(progress, result)
            if args.eval_iters and progress.iteration % args.eval_interval == 0:
                self.evaluate()
            if session is not None:
                session.on_step_end(progress.iteration, healthy=result.is_healthy)
                self.pipeline_arguments = session.pipeline_arguments  # may change as mode auto chooses
                self.reporter.scalars(progress, session.scalars)
                self._leave_if_lost(result, session)
            self._save_if_due(session)
            if args.exit_interval is not None and progress.iteration % args.exit_interval == 0:
                say(f"> leaving at iteration {progress.iteration}, a multiple of --exit-interval")
                break

    def _skip_iteration(self, session: Any) -> None:
        """An iteration of ``--iterations-to-skip``, as of Megatron-LM: its samples are consumed, and that is all."""
        self.progress.iteration += 1
        self.progress.skipped_iterations += 1
        self.progress.consumed_train_samples += self.args.global_batch_size
        say(f"> iteration {self.progress.iteration} is skipped, as --iterations-to-skip has it")
        if session is not None:
            session.on_step_end(self.progress.iteration, stepped=False)

    def _leave_if_lost(self, result: StepResult, session: Any) -> None:
        """Raise ``ProtectionLost`` where the state is no number any more: a restart goes back to before that."""
        self._unhealthy = 0 if result.is_healthy else self._unhealthy + 1
        if self._unhealthy == UNHEALTHY_MAX:
            since = self.progress.iteration - UNHEALTHY_MAX + 1
            raise ProtectionLost(
                f"the loss or the norm of the gradients is no finite number since iteration {since}: this process ends "
                f"so that its supervisor restarts the job from iteration {session.stable_iteration}"
            )

    def _attach(self) -> Any:
        """The checkpointing session, not started; None without ``--moetion``."""
        if not self.args.moetion:
            return None
        # Imported here only: a run without --moetion loads nothing of the checkpointing runtime.
        from megatron_moetion.mcore.attach import attach

        return attach(
            model=self.model,
            optimizer=self.optimizer,
            opt_param_scheduler=self.scheduler,
            config=moetion_config(self.args),
            user_state=self.state,
        )

    def _newest_on_disk(self) -> int | None:
        """The iteration of the newest checkpoint below ``--load``, or None if there is none."""
        return None if self.args.load is None else latest_iteration(self.args.load)

    def _go_on(self) -> None:
        """State of an earlier start is in place: flags that are not as they were then act from here on."""
        if self.state.flags_changed:
            say(f"> {self.state.flags_changed}")
        # The schedule counts samples of this batch size, whatever the batch size was before.
        steps = (self.progress.iteration - self.progress.skipped_iterations) * self.args.global_batch_size
        if self.scheduler.num_steps != steps:
            self.scheduler.num_steps = steps
            self.scheduler.step(increment=0)
        if self.args.save is not None:
            self._saved = checkpoint.last_saved(self.args.save)

    def _save_if_due(self, session: Any) -> None:
        """Save at multiples of ``--save-interval``, once each, unless that is done beside training."""
        if session is not None and session.writes_checkpoints:
            return
        iteration, interval = self.progress.iteration, self.args.save_interval
        if interval is not None and iteration and iteration % interval == 0 and self._saved != iteration:
            self.save()

    def load(self) -> int | None:
        """Load the newest checkpoint below ``--load``. Returns its iteration, or None if there is none."""
        if self.args.load is None:
            return None
        iteration = checkpoint.load_checkpoint(
            self.args.load, self.model, self.optimizer, self.scheduler, self.state.load_checkpoint, self.args.seed
        )
        if iteration is None:
            say(f"> no checkpoint in {self.args.load}: starting from random weights")
        else:
            say(f"> loaded the checkpoint of iteration {iteration} from {self.args.load}")
            self._go_on()
        return iteration

    def save(self) -> None:
        """Write a torch_dist checkpoint below ``--save``."""
        started = time.perf_counter()
        with self.params_gathered():
            checkpoint.save_checkpoint(self.args.save, self.model, self.optimizer, self.scheduler, self.state)
        self._saved = self.progress.iteration
        seconds = time.perf_counter() - started
        say(f"> saved the checkpoint of iteration {self.progress.iteration} to {self.args.save} in {seconds:.1f} s")

    def train_step(self) -> StepResult:
        """One step on one global batch; ``progress`` moves with it."""
        started = time.perf_counter()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run_schedule(Split.TRAIN, self.progress.consumed_train_samples, forward_only=False)
        applied, grad_norm, _ = self.optimizer.step()
        if self.args.fp16:
            applied = all_ranks_agree(applied)
        if applied:
            self.scheduler.step(increment=self.args.global_batch_size)
        else:
            self.progress.skipped_iterations += 1
        self.progress.iteration += 1
        self.progress.consumed_train_samples += self.args.global_batch_size
        averages = self._average(losses) | self._auxiliary_losses()
        return StepResult(
            losses=averages,
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=canonical_learning_rate(self.optimizer.param_groups),
            loss_scale=float(self.optimizer.get_loss_scale()),
            skipped=not applied,
            seconds=time.perf_counter() - started,
        )

    def evaluate(self) -> None:
        """Average loss over ``--eval-iters`` global batches of the validation split.

        Training is not disturbed: RNG states are put back, and validation has a data cursor of its own.
        """
        states = rng_states()
        total = 0.0
        for chunk in self.model:
            chunk.eval()
        with self.params_gathered(), torch.no_grad():
            for _ in range(self.args.eval_iters):
                consumed = self.progress.consumed_valid_samples
                losses = self._run_schedule(Split.VALIDATION, consumed, forward_only=True)
                total += self._average(losses).get("lm loss", 0.0)
                self.progress.consumed_valid_samples += self.args.global_batch_size
        for chunk in self.model:
            chunk.train()
        load_rng_states(states)
        self.progress.evaluated = self.progress.iteration
        self.reporter.validation(self.progress, total / self.args.eval_iters)

    def params_gathered(self) -> ParamsGathered:
        return ParamsGathered(self.model, needed=self.model[0].ddp_config.overlap_param_gather)

    def _run_schedule(self, split: Split, consumed: int, *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
        """Run the pipeline schedule over one global batch. Returns the losses of each micro batch (last stage only)."""
        losses: list[dict[str, torch.Tensor]] = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=[self._batches(split, consumed) for _ in self.model],
            model=self.model,
            num_microbatches=self.args.num_microbatches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=forward_only,
            **self.pipeline_arguments,
        )
        return losses

    def _batches(self, split: Split, consumed: int) -> Iterator[torch.Tensor]:
        numbers = sample_numbers(
            consumed=consumed,
            num_microbatches=self.args.num_microbatches,
            micro_batch_size=self.args.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=self.args.data_parallel_size,
        )
        return batches(self.source, split, numbers)

    def _forward_step(
        self, iterator: Iterator[torch.Tensor], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
        tokens = next(iterator).to(self._positions.device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return model(inputs, self._positions, self._mask, labels=labels), mean_loss

    def _average(self, losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Mean over micro batches and data parallel ranks; nothing except on the last pipeline stage."""
        if not losses:
            return {}
        mean = torch.stack([loss["lm loss"] for loss in losses]).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        return {"lm loss": mean.item() / self.args.data_parallel_size}

    def _auxiliary_losses(self) -> dict[str, float]:
        """Mean router losses over layers and micro batches. All ranks call it: layers live on all stages."""
        if self.args.num_experts is None:
            return {}
        names = [AUX_LOSS_NAMES[k] for k in self.args.moe_router_load_balancing_type if k in AUX_LOSS_NAMES]
        if self.args.moe_z_loss_coeff is not None:
            names.append("z_loss")
        if not names:
            clear_aux_losses_tracker()
            return {}
        totals: dict[str, torch.Tensor] = {}
        track_moe_metrics(
            loss_scale=1 / self.args.num_microbatches,
            iteration=self.progress.iteration,
            writer=self.reporter.writer,
            total_loss_dict=totals,
            force_initialize=True,
            track_names=names,
            num_layers=self.args.num_layers,
            moe_layer_freq=self.args.moe_layer_freq,
        )
        return {name: float(totals[name]) for name in names}


class ParamsGathered:
    """While it is entered, every rank holds all parameters, also with ``--overlap-param-gather``."""

    def __init__(self, model: list[Any], *, needed: bool) -> None:
        self._model = model if needed else []

    def __enter__(self) -> None:
        for chunk in self._model:
            chunk.disable_forward_pre_hook(param_sync=True)

    def __exit__(self, *exc: object) -> None:
        for chunk in self._model:
            chunk.enable_forward_pre_hook()


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one micro batch from the losses of its tokens, ``[micro_batch_size, seq_length]``."""
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


def all_ranks_agree(applied: bool) -> bool:
    """Whether every rank applied the step: a loss that overflows on one rank is skipped on all."""
    flag = torch.tensor([int(applied)], device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def canonical_learning_rate(groups: list[dict[str, Any]]) -> float:
    """The rate of the groups that follow the schedule without a multiplier of their own."""
    return next((float(group["lr"]) for group in groups if group["default_config"]), math.nan)
