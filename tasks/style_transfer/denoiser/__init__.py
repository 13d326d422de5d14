"""The denoiser itself: a Stable Diffusion UNet trained whole or by LoRA."""

from tasks import TaskEntry
from tasks.style_transfer.denoiser.config import DenoiserConfig
from tasks.style_transfer.denoiser.task import DenoiserTask

TASK = TaskEntry(DenoiserConfig, DenoiserTask)
