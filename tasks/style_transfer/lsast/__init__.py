"""LSAST: prompts by stage and layer of a frozen denoiser, with a ControlNet (arXiv 2404.11474)."""

from tasks import TaskEntry
from tasks.style_transfer.lsast.config import LSASTConfig

TASK = TaskEntry(LSASTConfig, "tasks.style_transfer.lsast.task:LSASTTask")
