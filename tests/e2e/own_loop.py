# SPDX-License-Identifier: Apache-2.0
"""A training loop of somebody's own on two ranks, which ends as the first argument says."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.mcore import cpu_device
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.pretrain.process import Process

FLAGS = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --num-experts 2 --moe-ffn-hidden-size 16 "
    "--expert-model-parallel-size 2 --micro-batch-size 1 --train-iters 50 --lr 1e-3 --mock-data --eval-iters 0 "
    "--use-distributed-optimizer --log-interval 1"
)
STEPS = 4


class NoSummary:
    """What has nothing to say at the end."""

    def at_end(self, *_: Any) -> NoReturn:
        raise ValueError("no summary")


def main(ending: str, store: str, timeout_s: int) -> None:
    cpu_device.install()
    place = Process.from_environment(os.environ)
    args = parse_arguments(FLAGS.split(), Machine.here(place.world_size, has_gpu=False))

    from torch import distributed as dist

    import megatron_moetion
    from megatron_moetion.pretrain.loop import Trainer
    from megatron_moetion.pretrain.report import Reporter
    from megatron_moetion.pretrain.startup import build_source, form_groups

    dist.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    form_groups(args, place)
    trainer = Trainer(args, build_source(args), Reporter(args, active=False, attempt=0))
    if ending == "refused":
        leave_nothing_behind(trainer, store)
    config = MoetionConfig(
        mode="full", run_id="own", store=store, ranks_per_node=1, timeout_s=timeout_s, schedule="eager"
    )
    session = megatron_moetion.attach(
        model=trainer.model, optimizer=trainer.optimizer, opt_param_scheduler=trainer.scheduler, config=config
    )
    resumed = session.start()
    print("resumed", resumed and resumed.iteration, flush=True)
    if ending == "raises":
        fail_beside_a_peer_that_never_comes(trainer, session, place.rank)
    for iteration in range(1, STEPS + 1):
        trainer.train_step()
        session.on_step_end(iteration)
    if ending == "closes":
        session.close()
    if ending in ("closes", "destroys"):
        dist.destroy_process_group()
    print("left", time.time(), flush=True)


def hooks(trainer: Any) -> list[tuple[int, ...]]:
    """What hangs on the model and the optimizers."""
    modules = [m for chunk in trainer.model for m in chunk.modules()]
    dispatchers = [m.token_dispatcher for m in modules if hasattr(m, "token_dispatcher")]
    inner = [link.optimizer for link in trainer.optimizer.chained_optimizers]
    return [
        tuple(len(m._forward_pre_hooks) for m in modules),
        tuple(len(vars(d)) for d in dispatchers),
        tuple(len(o._optimizer_step_pre_hooks) for o in inner),
    ]


def leave_nothing_behind(trainer: Any, store: str) -> None:
    """Fail in ``attach``, in ``start`` and in ``close``: nothing may stay hooked."""
    import megatron_moetion

    before = hooks(trainer)
    loop = {"model": trainer.model, "optimizer": trainer.optimizer, "opt_param_scheduler": trainer.scheduler}
    for mode in ("full", "popularity", "exact"):
        settings = {"mode": mode, "store": store, "ranks_per_node": 1, "timeout_s": 20}
        try:
            megatron_moetion.attach(**loop, config=MoetionConfig(**settings, run_id="no/name"))
        except ConfigError:
            assert hooks(trainer) == before, mode
        session = megatron_moetion.attach(**loop, config=MoetionConfig(**settings, run_id=mode))
        try:
            session.start(load_persistent=lambda: int("no number"))
        except (ValueError, MoetionError):
            session.close()
        assert hooks(trainer) == before, mode
        session = megatron_moetion.attach(**loop, config=MoetionConfig(**settings, run_id=mode))
        session.start()
        assert hooks(trainer) != before
        session.session.running = replace(session.session.running, summary=NoSummary())
        try:
            session.close()
        except ValueError:
            print("close raised", mode, flush=True)
        assert hooks(trainer) == before, mode


def fail_beside_a_peer_that_never_comes(trainer: Any, session: Any, rank: int) -> NoReturn:
    trainer.train_step()
    if rank:
        time.sleep(600)
    session.on_step_end(1)
    time.sleep(0.5)  # by now replication waits for the peer
    print("left", time.time(), flush=True)
    raise RuntimeError("CUDA out of memory, say")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
