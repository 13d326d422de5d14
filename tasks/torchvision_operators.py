"""Let torchvision be imported where its compiled operators cannot load (a CUDA build on CPU-only torch)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

_library: torch.library.Library | None = None


def define_operators() -> bool:
    """Define ``torchvision::nms`` and ``qnms`` on the CPU, unless torchvision's own operators load.

    Call this before torchvision is imported; without these operators the import fails with "operator torchvision::nms
    does not exist". ``tasks.torchvision_hook`` calls it.

    Returns:
        whether it defined them.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or _own_operators_load(Path(str(spec.origin)).parent):
        return _library is not None
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.impl(name, nms, "CPU")
    return True


def _own_operators_load(package: Path) -> bool:
    for library in package.glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box that overlaps a better one by more than this is dropped.

    Returns:
        Indices of the boxes kept, best first, int64.
    """
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        order = order[overlap / (areas[best] + areas[order] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else order.new_empty(0)
