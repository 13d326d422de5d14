"""Image classification: CIFAR ResNets, any timm model, or a chain of your own."""

from tasks import TaskEntry
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification

TASK = TaskEntry(ClassificationConfig, Classification)
