# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own on Megatron-Core, with MoEtion: a small GPT with experts, in plain lines.

On GPUs, one for each process, or, on a machine without any, on the CPU. Two nodes, emulated on one machine:

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 examples/own_loop.py --ranks-per-node 2 --run-id demo

Kill some of its processes, and delete the folder of node 1 below --store: it goes on. ``docs/own_loop.md`` explains it.
"""

import argparse
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the question alone makes no CUDA context then
ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # before anything of Megatron is imported
    from megatron_moetion.mcore import cpu_device

    cpu_device.install()

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

import megatron_moetion
from megatron_moetion import MoetionConfig

SEQUENCE, VOCABULARY, EXPERTS, MICRO_BATCH, MICRO_BATCHES = 32, 64, 8, 2, 2


class Sequences(torch.utils.data.Dataset[torch.Tensor]):
    """Token ids that count on by a step of their own. A real data set is indexed the same way."""

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(number)
        first, step = torch.randint(VOCABULARY, (2,), generator=draw).tolist()
        return (first + step * torch.arange(SEQUENCE + 1)) % VOCABULARY


def samples_from(consumed: int) -> Iterator[int]:
    """The numbers of this rank's samples, from a position in the data on."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    while True:
        yield from range(consumed + rank * MICRO_BATCH, consumed + (rank + 1) * MICRO_BATCH)
        consumed += size * MICRO_BATCH


def build_model() -> DistributedDataParallel:
    """This rank's stage of the model."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        moe_aux_loss_coeff=1e-2,
        moe_token_dispatcher_type="alltoall",
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=not ON_GPU,
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
    return DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)


def forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro batch, as Megatron's schedule calls it."""
    tokens = next(batches).cuda()
    positions = torch.arange(SEQUENCE, device=tokens.device).expand(MICRO_BATCH, -1)
    hidden = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=tokens.device).triu(1)
    output = model(tokens[:, :-1].contiguous(), positions, hidden, labels=tokens[:, 1:].contiguous())

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.float().mean(), {"loss": losses.detach().float().mean()}

    return output, mean


def batches_from(done: int) -> Iterator[torch.Tensor]:
    """Micro batches of this rank, after so many iterations."""
    consumed = done * MICRO_BATCHES * MICRO_BATCH * parallel_state.get_data_parallel_world_size()
    return iter(torch.utils.data.DataLoader(Sequences(), batch_size=MICRO_BATCH, sampler=samples_from(consumed)))


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Iterator[torch.Tensor],
    **pipeline_arguments: Any,
) -> float | None:
    """One iteration. The loss is known on the last pipeline stage."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
        **pipeline_arguments,
    )
    optimizer.step()
    scheduler.step(increment=1)
    return torch.stack([each["loss"] for each in losses]).mean().item() if losses else None


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="A training loop of one's own on Megatron-Core, with MoEtion.")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline parallel size")
    parser.add_argument("--experts", type=int, default=2, help="expert parallel size")
    parser.add_argument("--mode", default="auto", choices=("auto", "full", "popularity", "exact"))
    parser.add_argument("--run-id", default="", help="start again under the same one to go on")
    parser.add_argument("--store", default="", help="folder for the arenas; default: below /dev/shm")
    parser.add_argument("--ranks-per-node", type=int, default=0, help="emulate nodes of so many ranks")
    parser.add_argument("--warm-restarts", type=int, default=0, help="restarts that fork the ranks again, at once")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Train, from wherever this run stands."""
    if ON_GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Takes the arguments of torch's own. Its group comes up again when torchrun restarts the processes.
    megatron_moetion.init_process_group("nccl" if ON_GPU else "gloo", timeout=timedelta(minutes=5))
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=args.pipeline, expert_model_parallel_size=args.experts
    )
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    model_parallel_cuda_manual_seed(1)

    model = build_model()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, min_lr=3e-4, use_distributed_optimizer=True), [model])
    schedule = {"lr_warmup_steps": 5, "lr_decay_steps": 100, "lr_decay_style": "cosine"}
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 100, "wd_incr_style": "constant"}
    scheduler = OptimizerParamScheduler(optimizer, init_lr=0.0, max_lr=3e-3, min_lr=3e-4, **schedule, **decay)

    # docs/own_loop.md has these lines:
    # after init_process_group, initialize_model_parallel and the random seeds; before the first step
    session = megatron_moetion.attach(
        model=model,
        optimizer=optimizer,  # from get_megatron_optimizer
        opt_param_scheduler=scheduler,  # Megatron's, or one of your own
        config=MoetionConfig(mode=args.mode, run_id=args.run_id, store=args.store, ranks_per_node=args.ranks_per_node),
    )
    with session:  # closes it at the end, also after an exception
        resumed = session.start()  # recovers; or takes the first snapshot and returns None
        done = resumed.iteration if resumed else 0
        batches = batches_from(done)
        session.restore_rng()  # where something has drawn random numbers since start(), as data loaders do
        for iteration in range(done + 1, args.iterations + 1):
            loss = train_step(model, optimizer, scheduler, batches, **session.pipeline_arguments)
            session.on_step_end(iteration)  # after each iteration
            if loss is not None and parallel_state.get_data_parallel_rank() == 0:
                print(f"iteration {iteration}: loss {loss}", flush=True)
    # Here these lines end.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    flags = arguments()
    megatron_moetion.run_warm(lambda: main(flags), restarts=flags.warm_restarts)
