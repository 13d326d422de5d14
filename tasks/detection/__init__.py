"""Detection: MMDetection's own detectors, trained by local learning."""

from tasks import TaskEntry
from tasks.detection import runner as runner  # has MMEngine's Runner see `local` in a config
from tasks.detection.config import DetectionConfig
from tasks.detection.task import Detection

TASK = TaskEntry(DetectionConfig, Detection)
