# SPDX-License-Identifier: Apache-2.0
"""One of four ranks whose parameters are Transformer Engine's quantised tensors, and what a recovery makes of them.

Real modules, DDP and distributed optimizers; the kernels that quantise are ``fp8_twins``. There is no forward pass:
gradients are made up, scales of delayed scaling move by Transformer Engine's own rule, and gathers come where
Megatron's training loop has them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine

engine.pretend()

# isort: split
import fp8_twins
import torch
import transformer_engine.pytorch as te
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron_trainer import WORLD_SIZE, join
from torch import distributed as dist
from toy_trainer import Notes
from transformer_engine.pytorch.quantization import _amax_and_scale_update, get_fp8_max

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.attach import NoState
from megatron_moetion.mcore.quantised import payload, quantised_class, scaling_tensors
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.units import Region, Role


class _Done:
    """A collective that has happened."""

    def wait(self) -> None: ...


@contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[_Done]:
    """In place of coalesced collectives: gloo mixes up the bytes of tensors of different types, NCCL does not."""
    yield _Done()


def _gather(output: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool) -> None:
    dist.all_gather_into_tensor(output, part, group=group)


fp8_twins.install()
param_and_grad_buffer._coalescing_manager = _one_by_one
param_and_grad_buffer.dist_all_gather_func = _gather


@dataclass(frozen=True, kw_only=True)
class Case:
    """``gathers``: whether parameters are kept quantised; ``overlapped``: whether gathers wait for the next forward."""

    recipe: str
    gathers: bool = True
    overlapped: bool = False


CASES = {
    "mxfp8": Case(recipe="mxfp8"),
    "mxfp8, overlapped": Case(recipe="mxfp8", overlapped=True),
    "mxfp8, bf16 parameters": Case(recipe="mxfp8", gathers=False),
    "tensorwise": Case(recipe="tensorwise"),
    "tensorwise, overlapped": Case(recipe="tensorwise", overlapped=True),
    "blockwise": Case(recipe="blockwise"),
    "blockwise, overlapped": Case(recipe="blockwise", overlapped=True),
    "delayed": Case(recipe="delayed"),
    "delayed, overlapped": Case(recipe="delayed", overlapped=True),
    "delayed, bf16 parameters": Case(recipe="delayed", gathers=False),
}
REPLAYED = ("mxfp8, overlapped", "tensorwise", "blockwise, overlapped", "delayed")
"""Cases that are recovered by replaying steps, too."""
_CAPTURED, _LAST = 2, 4
"""The iteration that is captured, and the one that is compared after it."""


class Tiny(torch.nn.Module):
    """Dense and expert weights that are quantised, beside parameters that are not: norm, biases, an fp32 router."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.router = torch.nn.Parameter(torch.randn(4, 128))
        with get_fp8_context(config, is_init=True):
            self.dense = te.LayerNormLinear(128, 384, params_dtype=torch.bfloat16, device="cuda")
            self.out = te.Linear(256, 128, params_dtype=torch.bfloat16, device="cuda")
            self.experts = te.GroupedLinear(2, 128, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
        for parameter in self.experts.parameters():
            parameter.allreduce = False


class Run:
    """A model with its optimizer, as a process has them that has just started."""

    def __init__(self, case: Case, rank: int, seed: int, clip_grad: float = 1.0) -> None:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        torch.manual_seed(seed + parallel_state.get_expert_model_parallel_rank())
        self.case, self.rank, self.is_first = case, rank, True
        shares = case.gathers and case.recipe == "mxfp8"
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=128,
            num_attention_heads=1,
            num_moe_experts=4,
            expert_model_parallel_size=2,
            bf16=True,
            params_dtype=torch.bfloat16,
            fp8="hybrid",
            fp8_recipe=case.recipe,
            fp8_param=case.gathers,
            fp8_amax_history_len=3,
            fp8_amax_compute_algo="max",
        )
        module = Tiny(self.config)
        for parameter in (p for n, p in module.named_parameters() if "experts" not in n):
            same = payload(parameter) if quantised_class(parameter) else {"": parameter.data}
            for tensor in same.values():
                dist.broadcast(tensor.contiguous(), 0)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_param_gather=case.overlapped,
            fp8_param_gather=case.gathers,
            reuse_grad_buf_for_mxfp8_param_ag=shares,
            bucket_size=60_000,
        )
        self.model = [DistributedDataParallel(self.config, ddp, module)]
        how = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=clip_grad,
            fp8_recipe=case.recipe,
            overlap_param_gather=case.overlapped,
            reuse_grad_buf_for_mxfp8_param_ag=shares,
        )
        self.optimizer = get_megatron_optimizer(how, self.model)
        self.links = list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))
        self.shares = shares

    def state(self, log_steps: bool = False) -> MegatronState:
        return MegatronState(
            model=self.model, optimizer=self.optimizer, scheduler=None, user_state=NoState(), log_steps=log_steps
        )

    def iterate(self, iteration: int, before_step: Callable[[], None] = lambda: None) -> None:
        """What Megatron's loop does in one iteration; ``before_step`` is called once gradients are reduced."""
        (chunk,) = self.model
        chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.case.overlapped and not self.is_first:
            if self.shares:
                for link in self.links:
                    link._copy_main_params_to_param_buffer()
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.finish_param_sync()
        self.is_first = False
        self._move_scales(iteration)
        for number, parameter in enumerate(chunk.parameters()):
            draw = torch.Generator().manual_seed(1000 * iteration + 10 * number + self.rank)
            parameter.main_grad.copy_(torch.randn(parameter.main_grad.shape, generator=draw))
        chunk.finish_grad_sync()
        before_step()
        succeeded, _, _ = self.optimizer.step()
        assert succeeded

    def _move_scales(self, iteration: int) -> None:
        """A forward and a backward pass have seen other values, and the scales follow."""
        for number, module in enumerate(m for m in self.model[0].modules() if list(scaling_tensors(m))):
            recipe = module.fp8_meta["recipe"]
            for key, is_forward in (("scaling_fwd", True), ("scaling_bwd", False)):
                meta = module.fp8_meta[key]
                draw = torch.Generator().manual_seed(1000 * iteration + 10 * number + is_forward)
                seen = torch.rand(meta.amax_history.shape[1], generator=draw) * 4
                meta.amax_history[0].copy_(torch.maximum(meta.amax_history[0], seen))
                _amax_and_scale_update(meta.amax_history, meta.scale, get_fp8_max(recipe, is_forward), recipe)

    def gather(self) -> None:
        """Megatron's own way to bring all parameters to all ranks; gradients in shared memory are gone after it."""
        with torch.no_grad():
            self.optimizer.prepare_model_params_for_param_sync()
            if self.case.overlapped:
                for chunk in self.model:
                    chunk.start_param_sync(force_sync=True)

    def image(self) -> dict[str, str]:
        """A digest of every parameter's bytes and scales as they are on this rank."""
        found = {}
        for name, parameter in self.model[0].named_parameters():
            parts = payload(parameter) if quantised_class(parameter) else {"": parameter.detach()}
            found |= {f"{name} {part}": digest(tensor) for part, tensor in parts.items()}
        return found

    def spoil(self, state: MegatronState) -> None:
        """Noise into every tensor of the state, all parameters, and the buffers of gradients and gathers."""
        torch.manual_seed(99 + self.rank)
        for view in state._tensors.views:
            view.copy_(torch.randn(view.shape))
        for parameter in self.model[0].parameters():
            for tensor in payload(parameter).values() if quantised_class(parameter) else [parameter.data]:
                noise(tensor)
        for buffer in (*self.model[0].buffers, *self.model[0].expert_parallel_buffers):
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def noise(tensor: torch.Tensor) -> None:
    if tensor.dtype is torch.uint8:
        tensor.copy_(torch.randint(0, 255, tensor.shape, dtype=torch.uint8))
    else:
        tensor.copy_(torch.randn(tensor.shape))


def main(folder: Path, environment: Mapping[str, str]) -> int:
    """All cases; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)  # once: groups of gloo have threads
    for name, case in CASES.items():
        notes.write("case", name=name, **_recovered(case, rank))
        notes.write("gradients", name=name, **_gradients(case, rank))
        if name in REPLAYED:
            notes.write("replayed", name=name, **_replayed(case, rank))
    notes.write("refused", **_refused(rank))
    dist.barrier()
    return 0


# -- regions ------------------------------------------------------------------------------------------------------


def _regions(state: MegatronState, *roles: Role) -> Iterator[Region]:
    for unit in state.inventory().units:
        yield from (r for r in unit.regions if not roles or r.role in roles)


def _read(state: MegatronState, *roles: Role) -> dict[tuple[Any, ...], bytes]:
    return {(r.tensor, r.role, r.start): ctypes.string_at(r.address, r.nbytes) for r in _regions(state, *roles)}


def _write(state: MegatronState, kept: Mapping[tuple[Any, ...], bytes], *roles: Role) -> None:
    for r in _regions(state, *roles):
        ctypes.memmove(r.address, kept[(r.tensor, r.role, r.start)], r.nbytes)


# -- cases --------------------------------------------------------------------------------------------------------


def _recovered(case: Case, rank: int) -> dict[str, Any]:
    """A run; and one that begins with other values and noise, and is given what the first had captured."""
    run = Run(case, rank, seed=1)
    state = run.state()
    for iteration in range(1, _CAPTURED + 1):
        run.iterate(iteration)
    kept, host = _read(state), encode(state.host_state())
    hashes = [state.state_hash()]
    run.gather()
    images = [run.image()]
    for iteration in range(_CAPTURED + 1, _LAST + 1):
        run.iterate(iteration)
    hashes.append(state.state_hash())
    run.gather()
    images.append(run.image())
    roles = sorted({r.role.name for r in _regions(state)})
    tensors = sorted({r.tensor for r in _regions(state)})
    quantised = sorted({found for p in run.model[0].parameters() if (found := quantised_class(p))})
    state_bytes = sum(r.nbytes for r in _regions(state))
    state.close()

    run = Run(case, rank, seed=2)
    state = run.state()
    run.spoil(state)
    spoilt = run.image()
    _write(state, kept)
    unstaged = _unstaged(run) if run.shares else {}
    state.load_host_state(decode(host))  # noise is random
    state.copy_to_model()
    state.resync()
    gradients = max(float(p.main_grad.abs().max()) for p in run.model[0].parameters()) if run.shares else 0.0
    again, hashes_again = [run.image()], [state.state_hash()]
    for iteration in range(_CAPTURED + 1, _LAST + 1):
        run.iterate(iteration)
    hashes_again.append(state.state_hash())
    run.gather()
    again.append(run.image())
    moved = state.moved()
    state.close()
    return {
        "quantised": quantised, "roles": roles, "tensors": tensors, "images": images, "again": again, "moved": moved,
        "hashes": hashes, "hashes_again": hashes_again, "spoilt": spoilt, "unstaged": unstaged,
        "state_bytes": state_bytes,
        "gradients": gradients,
    }  # fmt: skip


def _unstaged(run: Run) -> dict[str, str]:
    """What a gather makes of memory that nobody has filled with parameters; then all is noise again."""
    with torch.no_grad():
        run.model[0].start_param_sync(force_sync=True)
        found = run.image()
        for parameter in run.model[0].parameters():
            for tensor in payload(parameter).values() if quantised_class(parameter) else []:
                noise(tensor)
        for buffer in (*run.model[0].buffers, *run.model[0].expert_parallel_buffers):
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape))
        for group in (*run.model[0].bucket_groups, *run.model[0].expert_parallel_bucket_groups):
            group.param_gather_dispatched = False
    return found


def _gradients(case: Case, rank: int) -> dict[str, Any]:
    """Whether gradients are there after a step as they were before it, and what mode ``exact`` says."""
    run = Run(case, rank, seed=1, clip_grad=0.0)  # which would scale them in place
    try:
        state = run.state(log_steps=True)
    except UnsupportedState as error:
        message, state = str(error), run.state()
    else:
        message = ""
    seen: dict[str, str] = {}

    def look() -> dict[str, str]:
        return {name: digest(p.main_grad) for name, p in run.model[0].named_parameters()}

    for iteration in (1, 2):
        run.iterate(iteration, before_step=lambda: seen.update(look()))
    kept = look()
    remarks = []
    if state.step_log is not None:
        run.iterate(3)
        state.step_log.note_step(2)  # of two steps: nobody has noted the others
        run.iterate(4)
        remarks.append(state.step_log.note_step(4).check())
        run.iterate(5)
        run.gather()
        remarks.append(state.step_log.note_step(5).check())
    state.close()
    return {"overwritten": sorted(n for n in seen if seen[n] != kept[n]), "message": message, "remarks": remarks}


def _replayed(case: Case, rank: int) -> dict[str, Any]:
    """State of one iteration, brought to a later one by the logged gradients."""
    moments = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)
    run = Run(case, rank, seed=1)
    state = run.state(log_steps=True)
    assert state.step_log is not None
    state.step_log.remember(_LAST)
    logs = {}
    old: dict[tuple[Any, ...], bytes] = {}
    for iteration in range(1, _LAST + 1):
        run.iterate(iteration)
        note = state.step_log.note_step(iteration)
        assert note.problem is None
        assert note.check() is None
        logs[iteration] = _read(state, Role.GRAD)
        if iteration == _CAPTURED:
            old = _read(state, *moments)
    host, buffers = encode(state.host_state()), _read(state, Role.BUFFER)
    state_hash = state.state_hash()
    run.gather()
    image = run.image()
    state.close()

    run = Run(case, rank, seed=2)
    state = run.state(log_steps=True)
    assert state.step_log is not None
    state.step_log.remember(_LAST)
    run.spoil(state)
    _write(state, old, *moments)
    state.step_log.begin_replay(decode(host))
    for iteration in range(_CAPTURED + 1, _LAST + 1):
        _write(state, logs[iteration], Role.GRAD)
        assert state.step_log.replay(iteration)
    _write(state, buffers, Role.BUFFER)
    state.load_host_state(decode(host))
    state.copy_to_model()
    state.resync()
    again = run.image()
    hash_again = state.state_hash()
    state.close()
    return {"image": image, "again": again, "hash": state_hash, "hash_again": hash_again}


def _refused(rank: int) -> dict[str, str]:
    """What is said of quantised parameters that could not be made again."""
    found = {}

    def refuse(name: str, case: Case, spoil: Callable[[Run], Any]) -> None:
        run = Run(case, rank, seed=1)
        spoil(run)
        try:
            run.state().close()
            found[name] = ""
        except UnsupportedState as error:
            found[name] = str(error)

    mxfp8, tensorwise = Case(recipe="mxfp8"), Case(recipe="tensorwise")
    refuse("nothing", mxfp8, lambda run: None)
    refuse("frozen", mxfp8, lambda run: run.model[0].module.out.weight.requires_grad_(False))
    refuse("not gathered", tensorwise, lambda run: setattr(run.model[0].ddp_config, "fp8_param_gather", False))
    refuse("overlap differs", mxfp8, lambda run: setattr(run.links[0].config, "overlap_param_gather", True))
    refuse("unknown module", Case(recipe="delayed"), lambda run: setattr(run.model[0].module, "odd", Odd()))
    return found


class Odd(torch.nn.Module):
    """A module with scales that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
