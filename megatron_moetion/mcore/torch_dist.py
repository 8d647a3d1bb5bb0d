# SPDX-License-Identifier: Apache-2.0
"""Writes a ``torch_dist`` checkpoint from stretches of tensors and guides to them, without model, GPU or process group.

Format ``fully_reshardable``: each parameter and each of its optimizer tensors is one global tensor, which any other
layout can load. Several processes may write one checkpoint. Each has a ``PartWriter`` with a file of its own, and what
``close`` returns goes to one process, which calls ``finish``. Until then a folder has tensors and no names for them.

The files are those of ``torch.distributed.checkpoint``, whose classes are stored: one file a part with a saved tensor
behind the other, and ``.metadata``. ``common.pt`` and ``metadata.json`` are written by Megatron-Core.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moetion.errors import CorruptArena
from megatron_moetion.mcore.boxes import Box, View, missing
from megatron_moetion.mcore.disk_common import common_part, common_state, random_states, telling
from megatron_moetion.mcore.optimizer_state import unscaled
from megatron_moetion.persist.tracker import make_durable
from megatron_moetion.units import Role

CHUNK_BYTES = 64 << 20
"""A piece of a tensor that is saved by itself has as many at most, and is in memory twice more while it is written."""
_METADATA = ".metadata"
_OF_MODEL = (Role.MODEL, Role.WEIGHT, Role.BUFFER, Role.MASTER)
"""What the model's own tensor is written from: the first of these that there is."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One tensor of the checkpoint, as far as a view of one parameter reaches."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def part_name(index: int) -> str:
    """The file that has the tensors of a part."""
    return f"__{index}_0.distcp"


class PartWriter:
    """One process's part of a checkpoint: stretches of tensors, in any order, each written as it is added.

    ``folder`` is there; ``index`` is no other part's. What was added once is not written again: ranks may hold copies
    of the same. Nothing of what is added is kept. Leaving it as a context closes the file, complete or not. ``OSError``
    where it cannot be written.
    """

    def __init__(self, folder: Path, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._name = part_name(index)
        self._file = (folder / self._name).open("wb", buffering=0)
        self._chunk_bytes = chunk_bytes
        self._position = 0
        self._tensors: dict[str, dict[str, Any]] = {}
        self._pieces: dict[_Target, list[list[Any]]] = defaultdict(list)
        self._covered: dict[_Target, list[tuple[int, int]]] = defaultdict(list)
        self._objects: dict[str, list[int]] = {}
        self._ranks: list[dict[str, Any]] = []
        self.nbytes = 0
        """Of tensors, so far."""

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(
        self,
        entry: Mapping[str, Any],
        start: int,
        tensors: Mapping[Role, torch.Tensor],
        scales: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Elements from ``start`` on of one parameter or buffer: a flat and contiguous tensor for each role.

        ``entry``: that of the guide. ``scales``: by name, fp32 of one element, of tensors that are stored with one; a
        checkpoint has what they stand for, in fp32. Gradients are passed over.
        """
        of_model = next(role for role in _OF_MODEL if role in tensors)
        for fields in entry["views"]:
            view = View(fields["shape"], fields["strides"], fields["first"])
            self._put(fields, view, fields["key"], start, tensors[of_model], getattr(torch, entry["dtype"]))
            for role, values in tensors.items():
                if name := entry["keys"].get(role.name):
                    plain = unscaled(role, name, values, scales or {})
                    self._put(fields, view, f"optimizer.state.{name}.{fields['key']}", start, plain, torch.float32)

    def add_rank(self, rank: int, guide: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """What a rank has beside tensors: its random states, small objects of its modules, and what is common to all.

        ``state``: the adapter's host state.
        """
        for states in random_states(rank, guide, state):
            self._put_object(states)
        for entry in guide["objects"]:
            data = _object(entry["kind"], base64.b64decode(entry["content"]))
            place = tuple(entry["global_shape"]), tuple(entry["global_offset"])
            self._put_object(ShardedObject(entry["key"], data, *place))
        self._ranks.append(common_part(rank, guide, state))

    def close(self) -> dict[str, Any]:
        """Make the part durable. Returns what ``finish`` needs of it: numbers, text, lists and tables by text, and in
        ``ranks`` tuples and bytes too (``snapshot/host_state.py`` encodes all of these)."""
        os.fsync(self._file.fileno())
        self._file.close()
        targets = [
            {"key": t.key, "offset": list(t.offset), "shape": list(t.shape), "pieces": pieces}
            for t, pieces in self._pieces.items()
        ]
        return {
            "file": self._name,
            "nbytes": self.nbytes,
            "tensors": self._tensors,
            "targets": targets,
            "objects": self._objects,
            "ranks": telling(self._ranks),
        }

    def _put(
        self,
        fields: Mapping[str, Any],
        view: View,
        key: str,
        start: int,
        values: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        target = _Target(key=key, offset=tuple(fields["global_offset"]), shape=view.shape)
        covered = self._covered[target]
        places = view.before(start), view.before(start + values.numel())
        for first, last in list(missing(covered, *places)):
            for box in view.boxes(first, last, max(1, self._chunk_bytes // dtype.itemsize)):
                at = view.first - start + sum(o * s for o, s in zip(box.offset, view.strides, strict=True))
                found = torch.as_strided(values, box.shape, view.strides, values.storage_offset() + at)
                self._put_box(target, fields, box, found, dtype)
            covered.append((first, last))
        covered.sort()

    def _put_box(
        self, target: _Target, fields: Mapping[str, Any], box: Box, found: torch.Tensor, dtype: torch.dtype
    ) -> None:
        extra = fields["prepended"]
        offset = [o + b for o, b in zip(target.offset, (*[0] * extra, *box.offset), strict=True)]
        shape = [*[1] * extra, *box.shape]
        kind = {"dtype": str(dtype).removeprefix("torch."), "shape": list(fields["global_shape"])}
        if self._tensors.setdefault(target.key, kind) != kind:
            raise CorruptArena(f"{target.key} is {kind} on one rank and {self._tensors[target.key]} on another")
        position, length = self._save(found.to(dtype, copy=True, memory_format=torch.contiguous_format).view(shape))
        self._pieces[target].append([box.start, box.end, offset, shape, position, length])
        self.nbytes += found.numel() * dtype.itemsize

    def _put_object(self, sharded: ShardedObject) -> None:
        if sharded.unique_key not in self._objects:
            self._objects[sharded.unique_key] = [*self._save([sharded.data])]

    def _save(self, value: Any) -> tuple[int, int]:
        """Where it lies in the file, and its bytes there."""
        saved = io.BytesIO()
        torch.save(value, saved)
        position, length = self._position, saved.tell()
        rest = saved.getbuffer()
        while rest.nbytes:
            rest = rest[self._file.write(rest) :]
        self._position += length
        return position, length


def finish(
    folder: Path, parts: Sequence[Mapping[str, Any]], iteration: int, expert_parallel_size: int | None = None
) -> None:
    """Give the tensors of all parts their names: after this the folder is a checkpoint.

    ``parts``: what each ``PartWriter.close`` has returned. ``expert_parallel_size``: of who will load it; None: one
    that, like the run's own, is 1, or is not. ``CorruptArena`` where some elements of a tensor are in no part, or a
    part is not in the folder.
    """
    for part in parts:
        if not (folder / part["file"]).is_file():
            raise CorruptArena(f"{part['file']} is not in {folder} any more")
    metadata = _metadata(parts)
    common = common_state([rank for part in parts for rank in part["ranks"]], iteration, expert_parallel_size)
    torch.save(common, folder / COMMON_STATE_FNAME)
    make_durable(folder / COMMON_STATE_FNAME)
    with (folder / _METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    make_durable(folder / _METADATA)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    make_durable(folder / "metadata.json")
    make_durable(folder)


def _metadata(parts: Sequence[Mapping[str, Any]]) -> Metadata:
    tensors: dict[str, dict[str, Any]] = {}
    pieces: dict[_Target, list[tuple[list[Any], str]]] = defaultdict(list)
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        for key, kind in part["tensors"].items():
            if tensors.setdefault(key, kind) != kind:
                raise CorruptArena(f"{key} is {kind} in one part and {tensors[key]} in another")
        for found in part["targets"]:
            target = _Target(key=found["key"], offset=tuple(found["offset"]), shape=tuple(found["shape"]))
            pieces[target].extend((piece, part["file"]) for piece in found["pieces"])
        for key, (position, length) in part["objects"].items():
            stored[key] = BytesStorageMetadata()
            places.setdefault(MetadataIndex(key), _StorageInfo(part["file"], position, length))
    numel: dict[str, int] = defaultdict(int)
    for target, of_target in sorted(pieces.items(), key=lambda item: (item[0].key, item[0].offset)):
        kind = tensors[target.key]
        tensor = stored.setdefault(target.key, _tensor(kind))
        assert isinstance(tensor, TensorStorageMetadata), f"{target.key} is a tensor and an object"
        for piece, file in _needed(target, of_target):
            _, _, offset, shape, position, length = piece
            index = MetadataIndex(target.key, offset, len(tensor.chunks))
            places[index] = _StorageInfo(file, position, length)
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
        numel[target.key] += prod(target.shape)
    for key, count in numel.items():
        if count != prod(tensors[key]["shape"]):
            raise CorruptArena(f"no rank has all of {key}: {count} of {prod(tensors[key]['shape'])} elements are there")
    return Metadata(state_dict_metadata=stored, storage_data=places)


def _needed(target: _Target, pieces: Iterable[tuple[list[Any], str]]) -> Iterable[tuple[list[Any], str]]:
    """Those that together are the target; copies of what others have already are left out."""
    end = 0
    for piece, file in sorted(pieces, key=lambda found: (found[0][0], -found[0][1])):
        start, last = piece[:2]
        if start > end:
            break
        if last > end:
            yield piece, file
            end = last
    if end != prod(target.shape):
        raise CorruptArena(f"no rank has all of {target.key}: of the part at {target.offset} it ends at element {end}")


def _tensor(kind: Mapping[str, Any]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, kind["dtype"])), torch.Size(kind["shape"]), [])


def _object(kind: str, content: bytes) -> Any:
    match kind:
        case "stream":
            return io.BytesIO(content)
        case "bytes":
            return torch.tensor(list(content), dtype=torch.uint8)
        case _:
            return None
