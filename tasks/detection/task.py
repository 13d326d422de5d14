"""Detection as the engine sees it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import dist_utils, register_all_modules
from mmengine.config import Config as PlainConfig
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.runner.checkpoint import get_torch_safe_globals
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed import ProcessGroup

from engine.learning.recompute import recomputes
from engine.memory.estimate import make_fake
from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.message import Message
from engine.task import Task
from engine.utilities.batches import WHOLE, Part, micro_batches
from engine.utilities.seed import seeded
from engine.utilities.text import described, one_line
from tasks.detection.auxiliary import Levels
from tasks.detection.chain import SUPPORTED, Prediction, dense_head, detector_chain, recomputed
from tasks.detection.config import DetectionConfig
from tasks.detection.data import Samples, data_preprocess, load_samples
from tasks.detection.evaluate import DetectionMetrics
from tasks.detection.export import write_config
from tasks.detection.fake import keeping_values, made_up_boxes
from tasks.detection.heads import PyramidHead, pyramid_head
from tasks.detection.plain_config import class_count, plain_config, set_classes, without_downloads
from tasks.detection.targets import Targets, samples_of
from tasks.detection.trial import TRIAL_SIDE, failure_of
from tasks.weights import load_weights

EXAMPLE_BOXES = 8
"""Number of objects in each image of a made-up micro-batch."""
BOXES = (EXAMPLE_BOXES, 1)
"""Number of objects in each image of a trial."""


class Detection(Task):
    """Find boxes and classes in images, with MMDetection's own detectors, losses, data sets and metrics."""

    name = "detection"
    metric = "mAP"
    # A detector's head needs maps at their own resolution, and DGL ends in a flat vector. With half the channels and
    # one unit per stage, the local part stays smaller than the rest of the backbone, which it stands in for.
    auxiliary_options = {
        "glcan": {"depth": 1, "width": 0.5, "reduce": 1},
        "dgl": None,
    }
    own_auxiliaries = {"levels": Levels}
    single_sample = True
    smoke = {
        "levels": ("--local.auxiliary", "levels"),
        # Compiling takes minutes for every new size of images.
        "glcan, compiled": ("--local.compile", "true", "--data.sizes", "[[128, 128]]", "--local.cut", "[neck]"),
    }
    config: DetectionConfig
    named: Mapping[str, Tensor] = {}

    def __init__(self, config: DetectionConfig) -> None:
        register_all_modules(init_default_scope=True)
        MMLogger.get_instance("mmengine").setLevel("WARNING")  # it logs for every tensor how it was initialised
        super().__init__(config)
        self._samples: tuple[Samples, Samples] | None = None
        self._fits = False
        """Whether a chain was made of the detector."""
        self._failures: dict[Any, str] = {}

    @cached_property
    def plain(self) -> PlainConfig:
        """The MMDetection config, with heads for the number of classes in the data."""
        plain = plain_config(self.config.model)
        if self.config.data.name != "config":
            set_classes(plain.model, len(self.classes))
        for augment in (plain.model.get("data_preprocessor") or {}).get("batch_augments") or []:
            if augment.type == "BatchSyncRandomResize":
                raise ValueError(
                    "model.config: BatchSyncRandomResize makes ranks wait for each other; remove it by model.options: "
                    "{model.data_preprocessor.batch_augments: null}, and give several data.sizes"
                )
        return plain

    @property
    def samples(self) -> tuple[Samples, Samples]:
        """Training and test data, opened when they are first needed."""
        if self._samples is None:
            data = self.config.data
            if not self._fits:  # whoever has a large data set should not wait for it to learn that the detector is none
                model = plain_config(self.config.model).model
                without_downloads(model)
                detector_chain(_detector(model, initialise=False))
            # Not self.plain: its heads depend on the number of classes, which the data determines.
            plain = plain_config(self.config.model) if data.name == "config" else None
            train, test = load_samples(data, plain, self.config.train.seed)
            if data.subset:
                train.subset(data.subset)
            self._samples = train, test
        return self._samples

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, read from the annotations only if nothing else tells them."""
        data = self.config.data
        if data.classes:
            return data.classes
        return [str(digit) for digit in range(10)] if data.name == "digits" else self.samples[0].classes

    @cached_property
    def preprocessor(self) -> nn.Module:
        """The detector's own data preprocessor, which normalises and pads a batch."""
        built: nn.Module = MODELS.build(self.plain.model.data_preprocessor)
        return built

    @property
    def micro_batch(self) -> int:
        """Images per micro-batch, except in the last batches of an epoch."""
        return self.config.data.batch // self.config.train.accumulate

    def build_chain(self, initial: bool = True) -> Chain:
        model, config = copy.deepcopy(self.plain.model), self.config.model
        if not (initial and config.pretrained):
            without_downloads(model)
        with seeded(self.config.train.seed, "model"):
            chain = detector_chain(_detector(model, initialise=True))
        if initial and not config.pretrained and not config.weights:
            _check_learns(model.backbone)
        if initial:  # training follows
            self._try_heads(chain.model)
        if initial and config.weights:
            load_weights(chain.model, Path(config.weights), [*get_torch_safe_globals(), bytes])
        self._fits = True
        return chain

    def _try_heads(self, detector: BaseDetector) -> None:
        """Compute losses and predictions on made-up images, as small as those of the data if these are not large.

        Raises:
            ValueError: something fails. The message says whether it is the images' size or that some have no boxes.
        """
        width, height = (min(TRIAL_SIDE, *sides) for sides in zip(*self._sizes(), strict=True))
        empty = self.config.data.name != "config" and self.config.data.keep_empty
        channels = dense_head(detector).in_channels

        def failure(boxes: Sequence[int], width: int = width, height: int = height) -> str:
            with _among(None):  # other ranks need not be here yet
                return failure_of(detector, channels, self._made_up_samples(boxes, width, height))

        said = failure((*BOXES, 0) if empty else BOXES)
        if not said:
            return
        if empty and not failure(BOXES):
            train, _ = self.samples
            if all(train.info(index)["instances"] for index in range(len(train))):
                return
            raise ValueError(f"data.keep_empty: on images without boxes {said}; set it to false")
        if not failure(BOXES, TRIAL_SIDE, TRIAL_SIDE):
            key = "model.config: its pipeline" if self.config.data.name == "config" else "data.sizes"
            raise ValueError(
                f"{key}: on images of {width} x {height} pixels {said}; on {TRIAL_SIDE} x {TRIAL_SIDE} it does not, so "
                "give larger sizes"
            )
        raise ValueError(
            f"model.config: on made-up images with {' and '.join(map(str, BOXES))} boxes {said}; change the heads by "
            f"model.options, or choose another detector; {SUPPORTED}"
        )

    def loss(self, prediction: Prediction, targets: Targets) -> Tensor:
        if not isinstance(prediction.levels[0], FakeTensor):
            return self._loss(prediction, targets)
        with keeping_values(type(prediction.detector).__name__, fused=self.config.train.device != "cpu"):
            return self._loss(prediction, _made_up(targets))

    def _loss(self, prediction: Prediction, targets: Targets) -> Tensor:
        """The sum of MMDetection's losses, as it computes it; ``named`` keeps each loss by its name."""
        loss: Tensor
        # As MMEngine's loop does for its hooks: TOOD's assigner changes after some epochs.
        for epoch in {meta["epoch"] for meta in targets["meta"] if "epoch" in meta}:
            MessageHub.get_current_instance().update_info("epoch", epoch)
        with recomputed(prediction.detector) if recomputes() else nullcontext(), _among(self.group):
            loss, named = prediction.detector.parse_losses(prediction.losses(samples_of(targets)))
        self.named = {name: value.detach() for name, value in named.items()}
        return loss

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> nn.Module:
        return self._head(chain, message, only_seen=False)

    def level_head(self, chain: Chain, message: Message) -> nn.Module:
        """A head on only the levels that ``message`` has maps for."""
        return self._head(chain, message, only_seen=True)

    def _head(self, chain: Chain, message: Message, *, only_seen: bool) -> PyramidHead:
        # Anchors are constants whose values matter even where everything else is fake.
        with unset_fake_temporarily() as mode:
            try:
                head = pyramid_head(chain.model, self.plain.model, message, only_seen=only_seen)
                failure = self._failure(head, message)
            except Exception as error:  # the heads' own code may raise anything
                failure = f"it cannot be built: {described(error)}"
            if failure:
                raise ValueError(
                    f"local.auxiliary: a light copy of the heads of {type(chain.model).__name__} does not work: "
                    f"{failure}; train it with local.schedule end_to_end, or choose another detector; {SUPPORTED}"
                )
        if mode is not None:
            make_fake([head])
        return head

    def _failure(self, head: PyramidHead, message: Message) -> str:
        """What fails in a trial of light heads, which is the same for all on the same levels."""
        channels: Any = head.fpn.out_channels if head.fpn else message.features["levels"][0].shape[1]
        strides = tuple(dense_head(head.detector).prior_generator.strides)
        if (channels, strides) not in self._failures:
            samples = self._made_up_samples(BOXES, TRIAL_SIDE, TRIAL_SIDE)
            with _among(None):
                self._failures[channels, strides] = failure_of(head.detector, channels, samples)
        return self._failures[channels, strides]

    def example(self) -> Message:
        # Landscape images stand for both orientations.
        width, height = max(max(size) for size in self._sizes()), max(min(size) for size in self._sizes())
        # The preprocessor computes sizes with tensors, and may draw them.
        with unset_fake_temporarily(), seeded(self.config.train.seed, "example"):
            (sample,) = self._made_up_samples([EXAMPLE_BOXES], width, height)
            image = torch.zeros(3, height, width, dtype=torch.uint8)
            one = data_preprocess(self.preprocessor, [{"inputs": image, "data_samples": sample}], True)
        with seeded(self.config.train.seed, "example"):
            images = torch.randn(self.micro_batch, *one.x.shape[1:])
        return Message({"x": images}, {key: values * self.micro_batch for key, values in one.targets.items()})

    def _made_up_samples(self, boxes: Sequence[int], width: int, height: int) -> list[DetDataSample]:
        """An image of this size for each number of boxes."""
        side = (height, width)
        meta = {"img_id": 0, "img_path": "", "epoch": 0, "scale_factor": (1.0, 1.0)}
        meta |= dict.fromkeys(("ori_shape", "img_shape", "pad_shape", "batch_input_shape"), side)
        classes = class_count(self.plain.model) or 1
        return samples_of(
            {
                "boxes": [made_up_boxes(count, height, width) for count in boxes],
                "labels": [torch.arange(count) % classes for count in boxes],
                "ignored": [torch.zeros(0, 4) for _ in boxes],
                "meta": [meta for _ in boxes],
            }
        )

    def _sizes(self) -> list[tuple[int, int]]:
        """Widths and heights that images are scaled to fit into."""
        if self.config.data.name == "config":
            return _resized_to(self.plain.train_dataloader.dataset)
        return [(width, height) for width, height in self.config.data.sizes]

    def steps_per_epoch(self) -> int:
        return len(self._batch_sizes())

    def smallest_batch(self) -> int:
        sizes = self._batch_sizes() or [self.config.data.batch]
        return min(min(micro_batches(size, self.micro_batch)) for size in sizes)

    def _batch_sizes(self) -> list[int]:
        return self.samples[0].batch_sizes(self.config.data.batch, True, self.config.data.drop_last)

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        data = self.config.data
        for items in self.samples[0].batches(epoch, start, data.batch, data.workers, True, data.drop_last):
            messages, at = [], 0
            for size in micro_batches(len(items), self.micro_batch):
                # The whole micro-batch is padded before a part is taken, so that the padding does not depend on the
                # part.
                whole = data_preprocess(self.preprocessor, items[at : at + size], True)
                for meta in whole.targets["meta"]:
                    meta["epoch"] = epoch
                messages.append(_part(whole, part.of(size)))
                at += size
            yield messages

    def test_batches(self) -> Iterator[Message]:
        # At most as many images at a time as in training, so that evaluation needs no more memory.
        for items in self.samples[1].batches(0, 0, self.micro_batch, self.config.data.workers, False, False):
            yield data_preprocess(self.preprocessor, items, False)

    def metrics(self) -> DetectionMetrics:
        return DetectionMetrics(self.config.data, self.samples[1], self.plain)

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """What MMDetection's ``init_detector`` loads; writes the plain config beside it, with the suffix .py."""
        write_config(self.plain, self.config.data, self.classes, target)
        return {"state_dict": dict(state), "meta": {"dataset_meta": {"classes": tuple(self.classes)}}}


def _detector(model: ConfigDict, *, initialise: bool) -> BaseDetector:
    """The detector that MMDetection builds from a ``model`` config, in training mode.

    Args:
        initialise: whether to initialise the weights as MMDetection does, which its shapes need not wait for.

    Raises:
        ValueError: the detector cannot be built.
    """
    try:
        detector = MODELS.build(model)
        if initialise:
            detector.init_weights()
    except Exception as error:
        raise ValueError(f"model.config: {model.get('type')}: {one_line(error, 300)}") from error
    # The engine synchronises BatchNorm between replicas; SyncBatchNorm itself would wait for every rank.
    detector = revert_sync_batchnorm(detector)
    detector.train()  # those with a teacher return nothing
    return detector


def _check_learns(backbone: Mapping[str, Any]) -> None:
    frozen, normalised = backbone.get("frozen_stages", -1), backbone.get("norm_eval", True)
    if frozen >= 0 or normalised:
        raise ValueError(
            f"model.options: the backbone starts at random, and frozen_stages {frozen} and norm_eval {normalised} keep "
            "parts of it so; set model.backbone.frozen_stages -1 and model.backbone.norm_eval false, or give "
            "model.pretrained or model.weights"
        )


def _part(message: Message, own: slice) -> Message:
    targets = {key: values[own] for key, values in message.targets.items()}
    return Message({"x": message.x[own]}, targets, message.bank, message.sequence)


def _made_up(targets: Targets) -> Targets:
    """``targets`` with made-up boxes and labels in place of fake ones, which have no values."""
    metas, boxes = targets["meta"], targets["boxes"]
    counts = [len(own) for own in boxes]
    return {
        "boxes": [made_up_boxes(n, *meta["img_shape"]) for n, meta in zip(counts, metas, strict=True)],
        "labels": [torch.zeros(n, dtype=torch.long) for n in counts],
        "ignored": [torch.zeros(0, 4) for _ in counts],
        "meta": metas,
    }


def _resized_to(dataset: Any) -> list[tuple[int, int]]:
    """Every scale that the pipeline in a data set's config may resize to; COCO's usual scale if it names none."""
    found: list[tuple[int, int]] = []
    steps = list(dataset.get("pipeline") or [])
    while steps:
        step = steps.pop(0)
        if isinstance(step, list | tuple):
            steps += step
            continue
        steps += step.get("transforms") or []
        scales = step.get("scales") or step.get("scale") or ()
        scales = scales if scales and isinstance(scales[0], list | tuple) else [scales]
        ratio = max(step.get("ratio_range") or (1,))
        found += [
            (math.ceil(scale[0] * ratio), math.ceil(scale[1] * ratio))
            for scale in scales
            if len(scale) == 2 and isinstance(scale[0], int)
        ]
    if not found and isinstance(dataset.get("dataset"), dict):
        return _resized_to(dataset.dataset)  # RepeatDataset and its like
    return found or [(1333, 800)]


class _Replicas:
    """Replaces ``torch.distributed`` for MMDetection's losses: only the replicas of this block take part.

    The losses average normalisers over all ranks. But the ranks of a pipeline compute different losses at different
    times, and would wait for each other forever.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def is_initialized(self) -> bool:
        return self.group is not None

    def get_world_size(self) -> int:
        return torch.distributed.get_world_size(self.group)

    def all_reduce(self, tensor: Tensor, op: Any) -> None:
        torch.distributed.all_reduce(tensor, op, self.group)


@contextmanager
def _among(group: ProcessGroup | None) -> Iterator[None]:
    plain = dist_utils.dist
    dist_utils.dist = _Replicas(group)
    try:
        yield
    finally:
        dist_utils.dist = plain
