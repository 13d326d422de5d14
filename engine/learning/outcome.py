"""What a local step did, or why it failed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class BlockError(RuntimeError):
    """A block failed. The error names the block, the micro-batch and the cause, and ends the job."""

    def __init__(self, block: int, sequence: int, cause: BaseException) -> None:
        super().__init__(f"block {block} failed at micro-batch {sequence}: {type(cause).__name__}: {cause}")
        self.block, self.sequence, self.cause = block, sequence, cause


class Refusal(ValueError):
    """What a network does in a local step cannot be trained with this config; to be shown in one line.

    Other errors in a local step become a ``BlockError``, which is shown with its traceback.
    """


@dataclass(frozen=True)
class Report:
    """What a local step did. Its tensors are scalars that stay on the device, so that the host need not wait for them.

    ``gradient_norm`` is the norm of this block's gradients before clipping; it is nan without clipping or update.
    ``skipped`` counts the updates that this block's fp16 loss scaler has skipped so far.
    """

    block: int
    loss: Tensor
    gradient_norm: Tensor
    skipped: int
