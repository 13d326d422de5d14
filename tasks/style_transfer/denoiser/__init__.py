"""The denoiser itself: a Stable Diffusion UNet, trained in full or by LoRA."""

from tasks import TaskEntry
from tasks.style_transfer.denoiser.config import DenoiserConfig

TASK = TaskEntry(DenoiserConfig, "tasks.style_transfer.denoiser.task:DenoiserTask")
