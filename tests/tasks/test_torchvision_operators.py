import subprocess
import sys

import torch

from tasks.torchvision_operators import nms


def test_torchvision_imports_and_suppresses() -> None:
    import torchvision

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.4])
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert torchvision.ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_our_suppression_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) * 10], 1)
    scores = torch.rand(60, generator=generator)
    from torchvision.ops import box_iou

    overlap, kept = box_iou(boxes, boxes), []
    for index in scores.argsort(descending=True).tolist():
        if all(overlap[index, other] <= 0.4 for other in kept):
            kept.append(index)
    assert nms(boxes, scores, 0.4).tolist() == kept


def test_torchvision_is_importable_after_somebody_has_only_looked_for_it() -> None:
    """transformers asks importlib whether torchvision is there, and imports it much later."""
    code = """
import importlib.util, sys
import tasks
assert importlib.util.find_spec("torchvision") is not None
assert "torchvision" not in sys.modules
import torchvision, torch
import importlib.resources
assert (importlib.resources.files("torchvision") / "version.py").is_file(), "its loader is its own again"
print(torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[0]\n", done.stderr[-2000:]
