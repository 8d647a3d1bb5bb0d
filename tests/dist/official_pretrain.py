# SPDX-License-Identifier: Apache-2.0
"""One of two pipeline stages that train with Megatron's own ``pretrain()``, which is given our communicator.

No function of Megatron's training loop is replaced for it. A recorder watches from the second iteration on.
"""

from __future__ import annotations

import json
import os
import sys
import typing
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from megatron_moetion.mcore import cpu_device

cpu_device.install()
if not hasattr(typing, "override"):  # Megatron's loop asks for Python 3.12
    typing.override = lambda function: function  # type: ignore[attr-defined]

# isort: split
from megatron.core import parallel_state
from megatron.core.datasets import utils as data_utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training import get_args, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from megatron_moetion.clock import SystemClock
from megatron_moetion.mcore.traffic import pipeline_arguments
from megatron_moetion.schedule.recorder import HostStopwatch, Recorder
from megatron_moetion.schedule.timeline import Lane

ITERATIONS = 4
MICRO_BATCHES = 2
SEQUENCE = 16
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall "
    f"--micro-batch-size 1 --global-batch-size {MICRO_BATCHES} --train-iters {ITERATIONS} --lr 1e-3 "
    "--pipeline-model-parallel-size 2 --transformer-impl local --distributed-backend gloo --use-distributed-optimizer "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-rope-fusion --use-cpu-initialization --disable-bias-linear --eval-iters 0 "
    "--eval-interval 100 --log-interval 1 --tokenizer-type NullTokenizer --vocab-size 127 --dataloader-type external "
    "--distributed-timeout-minutes 5"
)


def main(folder: Path, rank: int) -> None:
    """Train without and with checkpoints; prints what was seen."""
    redirect()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    sys.argv = ["pretrain", *FLAGS.split()]
    args = parse_and_validate_args()
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", timedelta(seconds=300), rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(1, 2)
    before = {name: value for name, value in vars(training).items() if callable(value)}
    arguments = pipeline_arguments(core_transformer_config_from_args(args))
    run = Run(arguments["p2p_communicator"])
    training.pretrain(
        pretrain_cfg_container_from_args(args),
        run.datasets,
        ModelType.encoder_or_decoder,
        run.forward_step,
        build_model,
        **arguments,
    )
    timeline = run.recorder.cut(1)
    assert timeline is not None
    sent = [span.sent_bytes for span in timeline.spans if span.lane is Lane.PIPELINE]
    replaced = [name for name, value in vars(training).items() if callable(value) and before.get(name) is not value]
    print(json.dumps({"sent": sent, "losses": run.losses, "replaced": replaced}), flush=True)
    dist.barrier()
    os._exit(0)


class Run:
    """What a user of ``pretrain()`` passes to it."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        clock = SystemClock()
        self.recorder = Recorder(HostStopwatch(clock), clock)
        self.passes = 0
        self.losses: list[str] = []

    def datasets(self, *_: Any) -> tuple[Any, None, None]:
        return self._batches(), None, None

    datasets.is_distributed = True  # type: ignore[attr-defined]

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        source = torch.Generator().manual_seed(1)
        for _ in range(MICRO_BATCHES * (ITERATIONS + 1)):
            yield {"tokens": torch.randint(0, 127, (1, SEQUENCE + 1), generator=source)}

    def forward_step(self, iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
        tokens = next(iterator)["tokens"]
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        self.passes += 1
        if self.passes == MICRO_BATCHES + 1:
            self._communicator.watch(self.recorder, crosses=True)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return model(inputs, torch.arange(SEQUENCE)[None], mask, labels=labels), self._loss

    def _loss(self, output: torch.Tensor) -> Any:
        loss = output.float().mean()
        self.losses.append(float(loss).hex())
        return loss, {"lm loss": loss.detach().clone()}


def build_model(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **more: Any
) -> GPTModel:
    args = get_args()
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=SEQUENCE,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=more.get("pg_collection"),
        vp_stage=vp_stage,
    )


def redirect() -> None:
    """What Megatron's loop asks of CUDA beyond what ``cpu_device`` redirects."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.memory_stats = lambda *_: defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.Tensor.pin_memory = lambda self, *_: self
    data_utils.compile_helpers = lambda: None  # the wheel has them


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
