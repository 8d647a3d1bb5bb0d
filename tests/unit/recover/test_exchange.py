# SPDX-License-Identifier: Apache-2.0
"""Documents and words between a few ranks, over real sockets."""

from __future__ import annotations

import numpy as np
import pytest
from fabrics import Faults, loopback_fabrics
from support import together

from megatron_moetion.errors import ChannelError
from megatron_moetion.recover.exchange import Meeting, add, sealed, swap
from megatron_moetion.replicate.channel import Message


def test_documents_of_any_size_reach_those_that_they_are_for() -> None:
    """Rank 0 to 1 and 2, 1 to 2, 2 to 0; nobody to 3."""
    sizes = {(0, 1): 0, (0, 2): 1, (1, 2): 300_000, (2, 0): 48}
    document = {pair: bytes(size % 251 for _ in range(size)) for pair, size in sizes.items()}
    with loopback_fabrics(4) as fabrics:
        for _ in range(2):
            found = together(
                *(
                    lambda r=r: swap(  # type: ignore[misc]
                        fabrics[r].channel,
                        {b: document[a, b] for a, b in document if a == r},
                        {a for a, b in document if b == r},
                    )
                    for r in range(4)
                )
            )
            assert found == [{a: document[a, b] for a, b in document if b == r} for r in range(4)]


def test_a_document_that_arrives_damaged_is_refused() -> None:
    faults = Faults()
    with loopback_fabrics(2, cuts=faults) as fabrics:
        together(*(lambda r=r: swap(fabrics[r].channel, {1 - r: b"first"}, [1 - r]) for r in range(2)))  # type: ignore[misc]

        def send() -> None:
            damaged = bytearray(sealed(b"second"))
            damaged[2] ^= 1
            for part in (len(damaged).to_bytes(8, "little"), bytes(damaged)):
                fabrics[0].channel.exchange([Message(peer=1, data=np.frombuffer(part, dtype=np.uint8))], [])

        def receive() -> None:
            with pytest.raises(ChannelError, match="a document of rank 0 arrived damaged"):
                swap(fabrics[1].channel, {}, [0])

        together(send, receive)


@pytest.mark.parametrize("size", [-1, 15, 1 << 40])
def test_a_size_that_cannot_be_is_refused_before_memory_is_taken(size: int) -> None:
    with loopback_fabrics(2) as fabrics:

        def send() -> None:
            data = np.array([size], dtype=np.int64).view(np.uint8)
            fabrics[0].channel.exchange([Message(peer=1, data=data)], [])

        def receive() -> None:
            with pytest.raises(ChannelError, match=f"rank 0 announces a document of {size} bytes"):
                swap(fabrics[1].channel, {}, [0])

        together(send, receive)


def test_each_meeting_combines_the_words_of_its_members() -> None:
    with loopback_fabrics(5) as fabrics:
        groups = {0: [0, 3], 1: [1, 2, 4], 2: [1, 2, 4], 3: [0, 3], 4: [1, 2, 4]}

        def meet(rank: int) -> list[list[int]]:
            meeting = Meeting(fabrics[rank], "a meeting", groups[rank], add, 10.0)
            return [list(meeting.combine([rank, 1])), list(meeting.combine([10 * rank, 1]))]

        found = together(*(lambda r=r: meet(r) for r in range(5)))  # type: ignore[misc]
        expected = {0: [[3, 2], [30, 2]], 1: [[7, 3], [70, 3]]}
        assert found == [expected[0 if rank in (0, 3) else 1] for rank in range(5)]


def test_a_meeting_of_one_needs_nobody_and_one_without_an_answer_ends() -> None:
    with loopback_fabrics(2) as fabrics:
        assert Meeting(fabrics[0], "alone", [0], add, 0.1).combine([7]) == [7]
        with pytest.raises(ChannelError, match="together: not all of the 2 ranks from rank 0 on answered"):
            Meeting(fabrics[0], "together", [0, 1], add, 0.1).combine([7])
