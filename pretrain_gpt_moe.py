# SPDX-License-Identifier: Apache-2.0
"""Train a GPT with Mixture-of-Experts layers on Megatron-Core: ``torchrun ... pretrain_gpt_moe.py --help``."""

import sys

from megatron_moetion.pretrain.launch import main

if __name__ == "__main__":
    main(sys.argv[1:])
