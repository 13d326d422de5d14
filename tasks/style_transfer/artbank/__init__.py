"""ArtBank: an artist's style as a prompt of a frozen denoiser (arXiv 2312.06135)."""

from tasks import TaskEntry
from tasks.style_transfer.artbank.config import ArtBankConfig

TASK = TaskEntry(ArtBankConfig, "tasks.style_transfer.artbank.task:ArtBankTask")
