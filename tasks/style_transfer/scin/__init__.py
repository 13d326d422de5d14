"""Arbitrary style transfer with SCIN, ICL and the Perception Encoder (arXiv 2404.13584), trained by local learning."""

from tasks import TaskEntry
from tasks.style_transfer.scin.config import SCINConfig

TASK = TaskEntry(SCINConfig, "tasks.style_transfer.scin.task:SCINTransfer")
