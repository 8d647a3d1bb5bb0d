# SPDX-License-Identifier: Apache-2.0
"""The training that every system is attached to: a small GPT with experts on Megatron-Core, bf16, no GPU.

What a system has to keep is the same for all: ``tensors()``, the fp32 parameters and Adam's moments of this rank (12
bytes a parameter; bf16 parameters follow from them), and ``extra()``, which is small. Data follow from the iteration.
``cpu_device.install()`` comes before the import of this module.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

SEQUENCE, VOCABULARY, EXPERTS, HIDDEN, EXPERT_HIDDEN, LAYERS = 128, 512, 16, 256, 1024, 2
MICRO_BATCH = 2
SEQUENCES = 16
"""An iteration, of all ranks."""
NEEDLE_BYTES = 64
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int


def connect() -> Place:
    """Join the other ranks, with what a launcher has put into the environment."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Place(rank, size, int(os.environ["LOCAL_RANK"]))


class Training:
    """Model, optimizer and scheduler of this rank, at iteration 0."""

    def __init__(self, pipeline: int, experts: int) -> None:
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=pipeline, expert_model_parallel_size=experts
        )
        torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
        model_parallel_cuda_manual_seed(1)
        self.iteration = 0
        self.pipeline_arguments: dict[str, Any] = {}
        self.model = self._build()
        rates = {"lr": 1e-3, "min_lr": 1e-4}
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(**rates, bf16=True, use_distributed_optimizer=True), [self.model]
        )
        schedule = {"lr_warmup_steps": 5, "lr_decay_steps": 500, "lr_decay_style": "cosine"}
        decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 500, "wd_incr_style": "constant"}
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=1e-3, min_lr=1e-4, **schedule, **decay
        )
        for inner in self._inner():  # as its first step would make it
            for parameter in self._parameters(inner):
                inner.state[parameter] = {name: torch.zeros_like(parameter) for name in STATES}
        self._tensors = dict(self._walk())
        largest = max(self._tensors, key=lambda name: (name.endswith(".master"), self._tensors[name].numel()))
        self._marked = self._tensors[largest].view(-1)

    # -- training

    def step(self) -> float | None:
        """One iteration. The loss is known on the last pipeline stage."""
        size = parallel_state.get_data_parallel_world_size()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=self._batches(),
            model=[self.model],
            num_microbatches=SEQUENCES // MICRO_BATCH // size,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
            **self.pipeline_arguments,
        )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        self.iteration += 1
        return torch.stack([each["loss"] for each in losses]).mean().item() if losses else None

    def _batches(self) -> Iterator[torch.Tensor]:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for number in range(SEQUENCES // MICRO_BATCH // size):
            first = (self.iteration * SEQUENCES // MICRO_BATCH + number * size + rank) * MICRO_BATCH
            yield torch.stack([_sequence(first + i) for i in range(MICRO_BATCH)])

    def _build(self) -> DistributedDataParallel:
        config = TransformerConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_moe_experts=EXPERTS,
            moe_router_topk=2,
            moe_ffn_hidden_size=EXPERT_HIDDEN,
            moe_aux_loss_coeff=1e-2,
            moe_token_dispatcher_type="alltoall",
            hidden_dropout=0.1,
            attention_dropout=0.1,
            pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
            expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            use_cpu_initialization=True,
            add_bias_linear=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).cuda()
        config.finalize_model_grads_func = finalize_model_grads
        wrapped = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        return DistributedDataParallel(config, wrapped, Float16Module(config, model))

    # -- state

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live fp32 tensors of this rank, by name; names are the same after a restart."""
        return dict(self._tensors)

    def extra(self) -> dict[str, Any]:
        """Everything else that a bitwise resume needs: numbers, text, and small tensors that are copies."""
        tracker = {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
        return {
            "iteration": self.iteration,
            "scheduler": dict(self.scheduler.state_dict()),
            "rng": torch.get_rng_state(),
            "tracker": tracker,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        """Write both back into what trains. Talks to other ranks: parameters are gathered again."""
        with torch.no_grad():
            for name, live in self._tensors.items():
                live.copy_(tensors[name])
        self.iteration = extra["iteration"]
        for inner in self._inner():
            for group in inner.param_groups:
                group["step"] = self.iteration  # the Adam of machines without a GPU keeps it there, as Apex's does
        self.scheduler.num_steps = 0  # loading adds
        self.scheduler.load_state_dict(dict(extra["scheduler"]))
        with torch.no_grad():
            for link in self._links():
                link._copy_main_params_to_model_params()
            self.model.start_param_sync(force_sync=True)
        get_cuda_rng_tracker().set_states({name: state.clone() for name, state in extra["tracker"].items()})
        torch.set_rng_state(extra["rng"])

    def digest(self) -> str:
        """A hash of all state of this rank, random generators included."""
        found = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            found.update(name.encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        extra = self.extra()
        groups = [{k: v for k, v in g.items() if k != "params"} for o in self._inner() for g in o.param_groups]
        found.update(repr((extra["iteration"], sorted(extra["scheduler"].items()), groups)).encode())
        for state in (extra["rng"], *(state for _, state in sorted(extra["tracker"].items()))):
            found.update(state.numpy())
        for parameter in self.model.parameters():
            found.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def needle(self) -> bytes:
        """Bytes out of the middle of the largest fp32 parameter, by which a copy of this state is found."""
        middle = self._marked.numel() // 2
        part = self._marked[middle : middle + NEEDLE_BYTES // 4].detach().clone()
        return part.view(torch.uint8).numpy().tobytes()

    def _links(self) -> list[Any]:
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def _inner(self) -> list[torch.optim.Optimizer]:
        return [link.optimizer for link in self._links()]

    @staticmethod
    def _parameters(inner: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
        for group in inner.param_groups:
            yield from group["params"]

    def _walk(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, inner in enumerate(self._inner()):
            for index, parameter in enumerate(self._parameters(inner)):
                name = f"optimizer{number}.{index:04d}"
                yield f"{name}.master", parameter.detach()
                for state in STATES:
                    yield f"{name}.{state}", inner.state[parameter][state]


def _sequence(number: int) -> torch.Tensor:
    """Token ids that count on by a step of their own."""
    draw = torch.Generator().manual_seed(number)
    first, step = torch.randint(VOCABULARY, (2,), generator=draw).tolist()
    return (first + step * torch.arange(SEQUENCE + 1)) % VOCABULARY


def _forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    hidden = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    output = model(tokens[:, :-1].contiguous(), positions, hidden, labels=tokens[:, 1:].contiguous())

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.float().mean(), {"loss": losses.detach().float().mean()}

    return output, mean
