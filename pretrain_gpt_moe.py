# SPDX-License-Identifier: Apache-2.0
"""Train a GPT with Mixture-of-Experts layers on Megatron-Core: ``torchrun ... pretrain_gpt_moe.py --help``."""

import sys

from megatron_moetion.pretrain.launch import leave, run

if __name__ == "__main__":
    leave(run(sys.argv[1:]))
