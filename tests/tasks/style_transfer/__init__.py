"""Diffusers imports torchvision, which on torch's CPU build wants the operators that the package brings."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests ask no hub

import tasks  # noqa: F401
