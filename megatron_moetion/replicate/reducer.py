# SPDX-License-Identifier: Apache-2.0
"""``Reducer`` over a tree of the control plane."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

from megatron_moetion.errors import ChannelError, understood
from megatron_moetion.replicate.channel import Combine, Note, Reduced
from megatron_moetion.replicate.control import Control, Tree

TEXT_MAX = 400
"""Characters of a note."""
_KINDS_MAX = 32
"""Kinds of notes in one round; more are left out."""


class TreeReducer:
    """See ``Reducer``. A round that a member had to give up has no result anywhere: the numbers of results jump."""

    def __init__(self, control: Control, name: str, members: Sequence[int], combine: Combine) -> None:
        def merge(number: int, payloads: Sequence[bytes]) -> bytes:
            words, notes = unpack(payloads[0])
            for payload in payloads[1:]:
                more_words, more_notes = unpack(payload)
                if len(more_words) != len(words):
                    raise ChannelError(f"ranks give {len(words)} and {len(more_words)} words to one round of {name!r}")
                words, notes = tuple(combine(words, more_words)), merge_notes(notes, more_notes)
            return pack(words, notes)

        self._name = name
        self._tree: Tree = control.join(f"reducer/{name}", members, merge)
        self._number, self._num_words = -1, 0

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        """See ``Reducer``."""
        self._number, self._num_words = number, len(words)
        self._tree.contribute(number, pack(words, notes or {}))

    def results(self) -> list[Reduced]:
        """See ``Reducer``."""
        found = []
        for number, payload in self._tree.results():
            words, notes = unpack(payload)
            if number > self._number or len(words) != self._num_words:
                raise ChannelError(
                    f"{self._name!r}: a result of {len(words)} words for round {number}, where this rank has given "
                    f"{self._num_words} words and is in round {self._number}"
                )
            found.append(Reduced(number=number, words=words, notes=notes))
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        """See ``Reducer``; also true where a later round has its result."""
        return self._tree.wait(number, timeout_s)


def merge_notes(mine: Mapping[str, Note], theirs: Mapping[str, Note]) -> dict[str, Note]:
    """Of two sets of ranks: how many ranks have something to say, and what the lowest of them says."""
    found = dict(mine)
    for kind, note in theirs.items():
        if kind not in found:
            if len(found) < _KINDS_MAX:
                found[kind] = note
            continue
        lower = min(found[kind], note, key=lambda n: n.rank)
        ranks = found[kind].ranks + note.ranks
        found[kind] = Note(ranks=ranks, rank=lower.rank, iteration=lower.iteration, text=lower.text)
    return found


def pack(words: Sequence[int], notes: Mapping[str, Note]) -> bytes:
    """uint32 number of words, the words as int64, then the notes as JSON, if there are any."""
    body = struct.pack(f"<I{len(words)}q", len(words), *words)
    if notes:
        said = {k: [n.ranks, n.rank, n.iteration, n.text[:TEXT_MAX]] for k, n in notes.items()}
        body += json.dumps(said).encode()
    return body


def unpack(payload: bytes) -> tuple[tuple[int, ...], dict[str, Note]]:
    """See ``pack``. ``ChannelError`` for bytes that it cannot have made."""
    with understood("words and notes of a round"):
        (num,) = struct.unpack_from("<I", payload)
        words = struct.unpack_from(f"<{num}q", payload, 4)
        text = payload[4 + 8 * num :]
        notes = {
            kind: Note(ranks=int(ranks), rank=int(rank), iteration=int(iteration), text=str(said)[:TEXT_MAX])
            for kind, (ranks, rank, iteration, said) in (json.loads(text) if text else {}).items()
        }
        return words, notes
