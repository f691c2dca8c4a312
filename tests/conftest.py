"""Test session: one torch thread (tiny models are slower with more), no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch

torch.set_num_threads(1)
