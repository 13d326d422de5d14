"""Detection: MMDetection's own detectors, trained by local learning."""

from tasks import TaskEntry
from tasks.detection.quiet import quiet_import

with quiet_import():
    import mmdet.datasets
    import mmdet.evaluation  # noqa: F401

from tasks.detection import runner as runner  # makes MMEngine's Runner see `local` in a config
from tasks.detection.config import DetectionConfig

TASK = TaskEntry(DetectionConfig, "tasks.detection.task:Detection")
