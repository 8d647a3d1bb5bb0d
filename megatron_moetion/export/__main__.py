# SPDX-License-Identifier: Apache-2.0
"""The writer of one rank, as a program: ``python -m megatron_moetion.export``. Only a rank starts it."""

from __future__ import annotations

import os

from megatron_moetion.mcore import cpu_device


def main() -> None:
    """Serve the rank behind standard input and output."""
    outward = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for people
    cpu_device.install()
    from megatron_moetion.export.writer import serve

    serve(0, outward)


main()
