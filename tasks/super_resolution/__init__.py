"""Super-resolution: BasicSR's own networks, trained by local learning."""

from tasks import TaskEntry
from tasks.super_resolution.repair import repair_basicsr

repair_basicsr()

from tasks.super_resolution import local_model as local_model  # noqa: E402  the model_type of BasicSR's options
from tasks.super_resolution.config import SuperResolutionConfig  # noqa: E402

TASK = TaskEntry(SuperResolutionConfig, "tasks.super_resolution.task:SuperResolution")
