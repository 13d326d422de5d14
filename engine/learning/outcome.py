"""What a local step did, or why it failed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class BlockError(RuntimeError):
    """A block failed; names the block, the micro-batch and the cause. The job ends with it."""

    def __init__(self, block: int, sequence: int, cause: BaseException) -> None:
        super().__init__(f"block {block} failed at micro-batch {sequence}: {type(cause).__name__}: {cause}")
        self.block, self.sequence, self.cause = block, sequence, cause


@dataclass(frozen=True)
class Report:
    """What a local step did. Tensors stay on the device: reporting makes nobody wait (an fp16 scaler does).

    ``gradient_norm`` is the block's own norm before clipping (nan without clipping or update);
    ``skipped`` counts the updates that this block's loss scaler has left out so far.
    """

    block: int
    loss: Tensor
    gradient_norm: Tensor
    skipped: int
