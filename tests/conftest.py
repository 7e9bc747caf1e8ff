"""What every test shares: one thread for each worker, and nothing that reaches for the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
