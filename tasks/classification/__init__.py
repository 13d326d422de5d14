"""Image classification: CIFAR ResNets, any timm model, or a chain of your own."""

from tasks import TaskEntry
from tasks.classification.config import ClassificationConfig

TASK = TaskEntry(ClassificationConfig, "tasks.classification.task:Classification")
