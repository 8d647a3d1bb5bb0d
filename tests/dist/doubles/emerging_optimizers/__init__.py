# SPDX-License-Identifier: Apache-2.0
"""Stands in for NVIDIA's package ``emerging_optimizers``, which no index has: what Megatron-Core imports of it.

Interfaces and kinds of state are the package's, arithmetic is plain torch. Both spellings of arguments are taken: that
of the releases which megatron-core 0.16 was written for, and that of 0.19's.
"""
