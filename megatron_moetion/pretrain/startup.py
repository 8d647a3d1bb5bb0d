# SPDX-License-Identifier: Apache-2.0
"""What happens once before training: the ranks connect, form Megatron's groups, seed, and open the data."""

from __future__ import annotations

import argparse
import logging
import random
import socket
import sys
from datetime import timedelta

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

from megatron_moetion.pretrain.corpus import MockCorpus, SampleSource, StdlibCorpus
from megatron_moetion.pretrain.indexed import IndexedCorpus
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.rendezvous import Device, connect


def initialize(args: argparse.Namespace, process: Process) -> int:
    """Connect the ranks, form Megatron's groups, seed. Returns the attempt number."""
    device = _device(process)
    if device.index is not None:
        torch.cuda.set_device(device.index)
    attempt = connect(process, timedelta(minutes=args.distributed_timeout_minutes), device)
    # Announces itself as a warning although it is off.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    _show_runtime_log()
    form_groups(args, process)
    return attempt


def _device(process: Process) -> Device:
    """The GPU of this rank's number, or the only one that it sees; without any the CPU."""
    host = socket.gethostname()
    if not torch.cuda.is_available():
        return Device(host=host, index=None)
    index = 0 if torch.cuda.device_count() == 1 else process.local_rank
    return Device(host=host, index=index, gpu=str(torch.cuda.get_device_properties(index).uuid))


def _show_runtime_log() -> None:
    """The checkpointing runtime only logs; this program is what shows it, on standard output."""
    logger = logging.getLogger("megatron_moetion")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]


def form_groups(args: argparse.Namespace, process: Process) -> None:
    """Megatron's process groups and random seeds for one set of flags, over ranks that are connected."""
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    init_num_microbatches_calculator(
        process.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    # As Megatron-LM: pipeline stages differ, data parallel replicas agree; the tracker adds the expert ranks.
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_source(args: argparse.Namespace) -> SampleSource:
    """The data that the flags ask for. All ranks call it together."""
    if args.mock_data:
        return MockCorpus(seq_length=args.seq_length, seed=args.seed)
    if args.data_path is None:
        return StdlibCorpus(seq_length=args.seq_length, seed=args.seed)
    evaluations = args.train_iters // args.eval_interval + 1
    return IndexedCorpus(
        paths=args.data_path,
        split=args.split,
        seq_length=args.seq_length,
        seed=args.seed,
        num_train=max(args.train_iters, 1) * args.global_batch_size,
        num_validation=max(evaluations * args.eval_iters, 1) * args.global_batch_size,
        num_ids=args.vocab_size,
        cache=args.data_cache_path,
    )
