"""MMDetection's own runner, made to train by local learning, for configs with ``local``.

A user keeps an MMDetection config and adds::

    custom_imports = dict(imports=['tasks.detection'])
    local = dict(blocks=4, auxiliary=dict(type='glcan'))
    runner_type = 'LocalRunner'

and trains it with MMDetection's own tools. Importing this module changes three functions of MMEngine, so that a config
with ``local`` never trains end to end just because the last line is missing: ``Runner.from_cfg`` makes a
``LocalRunner`` for it, and ``Runner.train`` and ``FlexibleRunner.train`` refuse it if the runner is another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.optim import OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn

from engine.config import Config
from engine.learning.optimizer import load_state_by_name
from tasks.detection.hook import LocalHook
from tasks.detection.wrapper import LocalModel
from tasks.local_settings import local_settings

ELSEWHERE = {
    "schedule": "blocks run one after another here; for streams, pipelines and end_to_end use this project's "
    "tools/train.py, or leave `local` out to train end to end",
    "precision": "MMDetection's own key is optim_wrapper.type='AmpOptimWrapper', or --amp",
    "compile": "use this project's tools/train.py with local.compile",
}
"""Keys of ``engine.config.LocalConfig`` that ``local`` does not support here, and what to use instead."""

REFUSED = {
    "model_wrapper_cfg": "blocks are wrapped already; leave it out",
    "activation_checkpointing": "it wraps modules that blocks do not call; use local.recompute, or with_cp",
    "efficient_conv_bn_eval": "it replaces modules that blocks share; leave it out",
    "compile": "backward is part of a local step; use this project's tools/train.py with local.compile",
}
"""Keys of a config that cannot be combined with ``local``, and why."""


# A reload of this module may replace its own class, but never a class of the same name from elsewhere.
@RUNNERS.register_module(force="LocalRunner" in globals())
class LocalRunner(Runner):
    """MMEngine's runner for a config with ``local``; loops, hooks, logs, schedules and evaluation remain MMEngine's.

    When training starts, the detector is wrapped in a ``LocalModel``, and every block gets an optimizer wrapper of its
    own, built from ``optim_wrapper``, which clips the block's own gradient norm and has its own loss scaler.
    Validation, testing and checkpoints see the plain detector.

    Raises:
        ValueError: ``local`` is missing, or has a key or value that is not valid. When training starts, also for:

            ======================================= ==================================================
            several ranks                           use this project's tools/train.py
            ``model_wrapper_cfg``, ``compile``,     ``REFUSED`` says what to use instead
            ``activation_checkpointing``,
            ``efficient_conv_bn_eval``
            ``optim_wrapper`` that is built, or     every block's is made from one config
            made of several
            a detector that is no chain             see ``tasks.detection.chain``
            a head for another number of classes    than the training data has
            ======================================= ==================================================
    """

    model: Any
    """The detector; from the start of training on a ``LocalModel`` around it."""

    def __init__(self, *args: Any, cfg: Any = None, **kwargs: Any) -> None:
        self.settings = settings_of(cfg or {})
        self.optimizer_before: dict[str, Tensor] | None = None
        """Optimizer state by parameter name, from a checkpoint with other blocks or of end-to-end training."""
        super().__init__(*args, cfg=cfg, **kwargs)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(LocalHook())

    def train(self) -> Any:
        self._check()
        return super().train()

    def _check(self) -> None:
        if self.world_size > 1:
            raise ValueError(
                "local: this runner trains on one rank; on several use this project's tools/train.py "
                "(torchrun tools/train.py --config ... --placement.replicas N)"
            )
        for key, remedy in REFUSED.items():
            if self.cfg.get(key):
                raise ValueError(f"{key}: cannot be combined with `local`: {remedy}")
        built = isinstance(self.optim_wrapper, OptimWrapperDict) and isinstance(self.model, LocalModel)
        if not built and not (
            isinstance(self.optim_wrapper, Mapping) and isinstance(self.optim_wrapper.get("optimizer"), Mapping)
        ):
            raise ValueError(
                "optim_wrapper: `local` makes one for every block from a config such as "
                "dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))"
            )

    def build_train_loop(self, loop: Any) -> Any:
        built = super().build_train_loop(loop)
        if not isinstance(self.model, LocalModel):
            _check_classes(self.model, built.dataloader.dataset)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Cut the detector into blocks and build a wrapper for each."""
        if isinstance(optim_wrapper, OptimWrapperDict):
            return optim_wrapper
        self.model = LocalModel(self.model, self.cfg.model, self.settings)
        return self.model.build_optim_wrapper(optim_wrapper)

    def _init_model_weights(self) -> None:
        super()._init_model_weights()
        self.model.draw()

    def load_or_resume(self) -> None:
        before = self._has_loaded
        super().load_or_resume()
        if isinstance(self.model, LocalModel) and self._has_loaded and not before and not self._resume:
            self.model.draw()

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume as MMEngine does. From a checkpoint with other blocks or of end-to-end training, the detector's
        weights with their optimizer state and the learning rates are continued."""
        self._resume = True
        super().resume(*args, **kwargs)
        if self.optimizer_before is None or not isinstance(self.model, LocalModel):
            return
        for block in self.model.blocks:
            assert block.optimizer is not None
            load_state_by_name(block.optimizer, block.parameters_by_name(), self.optimizer_before)
        self._advance_schedulers()

    def _advance_schedulers(self) -> None:
        """Advance fresh schedulers to the current iteration, as if they had seen all of training."""
        schedulers = [one for each in (self.param_schedulers or {}).values() for one in each]
        if any(getattr(scheduler, "need_val_args", False) for scheduler in schedulers):
            raise ValueError(
                "param_scheduler: one that goes by metrics cannot go on with other blocks; start from the checkpoint's "
                "weights with load_from instead of --resume"
            )
        length = len(self.train_dataloader)
        for done in range(1, self.iter + 1):
            ended = done % length == 0 and done // length <= self.epoch
            for scheduler in schedulers:
                if ended or not scheduler.by_epoch:
                    scheduler.step()


def _check_classes(detector: nn.Module, dataset: Any) -> None:
    """Check the number of classes: with a wrong number training runs without an error, but its boxes mean nothing."""
    classes = getattr(dataset, "metainfo", {}).get("classes")
    if isinstance(classes, str):
        raise ValueError(f"train_dataloader.dataset.metainfo.classes: {classes!r} is no tuple; write ({classes!r},)")
    for name, module in detector.named_modules():
        count = getattr(module, "num_classes", None)
        # A region proposal network has one class, whatever the data.
        if classes is not None and "bbox_head" in name.split(".") and count not in (None, len(classes)):
            raise ValueError(
                f"model.{name}.num_classes: {count}, but the training data has {len(classes)} classes; set it to "
                f"{len(classes)}"
            )


def settings_of(cfg: Mapping[str, Any]) -> Config:
    """The engine's config that an MMDetection config asks for by ``local`` and ``randomness.seed``.

    Raises:
        ValueError: there is no ``local``, a key is unknown (the message names the nearest known one) or is configured
            elsewhere, or a value is not valid.
    """
    local = cfg.get("local")
    if not isinstance(local, Mapping):
        raise ValueError(f"local: {local!r}; give a mapping such as local = dict(blocks=4, auxiliary='glcan')")
    local = local.to_dict() if hasattr(local, "to_dict") else dict(local)
    return local_settings(local, ELSEWHERE, (cfg.get("randomness") or {}).get("seed") or 0)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """MMEngine's own function, even if this module is loaded again and finds its own replacement."""
    own: Callable[..., Any] = getattr(function, "without_local", function)
    return own


def _dispatching(plain: Callable[..., Any]) -> Any:
    @functools.wraps(plain)
    def from_cfg(cls: type[Runner], cfg: Any) -> Runner:
        return plain(LocalRunner if cls is Runner and cfg.get("local") is not None else cls, cfg)

    from_cfg.without_local = plain  # type: ignore[attr-defined]
    return classmethod(from_cfg)


def _refusing(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def train(self: Any) -> Any:
        if self.cfg.get("local") is not None and not isinstance(self, LocalRunner):
            raise ValueError(
                f"local: {type(self).__name__} would train end to end; set runner_type = 'LocalRunner', or leave "
                "`local` out"
            )
        return plain(self)

    train.without_local = plain  # type: ignore[attr-defined]
    return train


Runner.from_cfg = _dispatching(_plain(Runner.from_cfg.__func__))
Runner.train = _refusing(_plain(Runner.train))
FlexibleRunner.train = _refusing(_plain(FlexibleRunner.train))
