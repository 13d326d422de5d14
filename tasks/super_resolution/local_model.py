"""``model_type: LocalSRModel`` in BasicSR's options: BasicSR's own training, by local learning."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from engine.learning.build import build_blocks, remarks
from engine.network.message import Message
from engine.run.checkpoint import Division
from engine.utilities.files import replaced
from tasks.local_settings import local_settings
from tasks.super_resolution.chain import enlargement, network_chain
from tasks.super_resolution.network import check_scale, side_multiple
from tasks.super_resolution.task import Upscaling
from tasks.tiles import enlarge

OWN = {"tail_parts": 1, "auxiliary_tail": "direct"}
"""Keys of ``local`` besides the engine's, and their defaults; ``ModelConfig`` describes them."""

_TOOL = "use this project's tools/train.py"
ELSEWHERE = {
    "schedule": f"blocks run one after another here; for streams, pipelines and end_to_end {_TOOL}, or SRModel",
    "precision": f"BasicSR trains in fp32; {_TOOL} with local.precision",
    "compile": f"{_TOOL} with local.compile",
}


TRAIN = {"ema_decay", "optim_g", "scheduler", "total_iter", "warmup_iter", "pixel_opt", "perceptual_opt"}
"""The keys of ``train`` that SRModel and ``basicsr.train`` read."""


class GivenNetwork(Upscaling):
    """The task of a network that BasicSR builds, feeds and evaluates; only loss and auxiliary heads are used."""

    def __init__(self, scale: int, auxiliary_tail: str, pixel_loss: nn.Module) -> None:
        super().__init__(scale, auxiliary_tail)
        self.pixel_loss = pixel_loss

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.pixel_loss(prediction, targets)
        return loss


@MODEL_REGISTRY.register()
class LocalSRModel(SRModel):
    """BasicSR's SRModel with a ``local`` section in its options; networks, data, schedules and metrics stay BasicSR's.

    Every block has its own optimizer and its own learning-rate scheduler, built in BasicSR's way. A saved network is
    the plain network. The state of the blocks is in the training state, from which training resumes with the same
    blocks or with others. With other blocks, or after SRModel, auxiliary networks start fresh. With the same blocks,
    weights, optimizers and random state are bit-identical; only the order of the data starts again, as always in
    BasicSR. ``val: tile`` and ``val: tile_overlap`` are for large test images, as ``DataConfig`` describes.

    Raises:
        ValueError: local learning cannot train with these options: there is no ``local`` section or it has an unknown
            key, there are several ranks or a loss besides ``pixel_opt``, or network and scale make no chain.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self._check(opt)
        super().__init__(opt)

    def _check(self, opt: Mapping[str, Any]) -> None:
        val = opt.get("val") or {}
        self.tile, self.tile_overlap = val.get("tile", 0), val.get("tile_overlap", 16)
        for key, value, least in (("tile", self.tile, 16), ("tile_overlap", self.tile_overlap, 0)):
            if not isinstance(value, int) or (value < least and value != 0):
                raise ValueError(f"val.{key}: {value!r}; give 0, or a whole number of pixels from {least} on")
        if not opt["is_train"]:
            return
        local, train = opt.get("local"), opt["train"]
        if not isinstance(local, Mapping):
            raise ValueError(f"local: {local!r}; give a section with blocks: 4 and auxiliary: glcan, say")
        own = {key: local.get(key, value) for key, value in OWN.items()}
        self.tail_parts, self.auxiliary_tail = own["tail_parts"], own["auxiliary_tail"]
        if not isinstance(self.tail_parts, int) or self.tail_parts < 1:
            raise ValueError(f"local.tail_parts: {self.tail_parts!r}; give a number of 1 or more")
        if self.auxiliary_tail not in ("direct", "own"):
            raise ValueError(f"local.auxiliary_tail: {self.auxiliary_tail!r}; give direct or own")
        self.settings = local_settings(_plain(local), ELSEWHERE, int(opt["manual_seed"]), OWN)
        if opt["dist"] or opt["num_gpu"] > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"num_gpu: LocalSRModel trains on one device; on several {_TOOL}")
        for key in [*(f"train.{key}" for key in train if key not in TRAIN), *({"network_d"} & set(opt))]:
            raise ValueError(f"{key}: LocalSRModel does not read it; leave it out, or take another model")
        if train.get("perceptual_opt"):
            raise ValueError("train.perceptual_opt: blocks learn from pixel_opt alone; leave it out, or take SRModel")
        if not train.get("pixel_opt"):
            raise ValueError("train.pixel_opt: missing; blocks learn from it")
        network = opt["network_g"]
        check_scale(network["type"], opt["scale"], network.get("upsampler", ""))

    def setup_optimizers(self) -> None:
        """Cut the network into blocks and build an optimizer for each.

        Raises:
            ValueError: the network enlarges by another factor than ``scale``, or cannot be cut as ``local`` says.
        """
        # Shapes are inferred and weights drawn on the CPU, so that they do not depend on the device.
        chain = network_chain(self.net_g.cpu(), self.tail_parts)
        if (found := enlargement(chain)) != self.opt["scale"]:
            raise ValueError(f"network_g: it enlarges {found} times, and scale is {self.opt['scale']}; make them equal")
        self._check_patch()
        task = GivenNetwork(self.opt["scale"], self.auxiliary_tail, self.cri_pix)
        self.blocks = build_blocks(chain, self.settings, task)
        self.net_g.to(self.device)
        options = dict(self.opt["train"]["optim_g"])
        kind = options.pop("type")

        def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            learning = [parameter for _, parameter in named if parameter.requires_grad]
            made: torch.optim.Optimizer = self.get_optimizer(kind, learning, **options)
            return made

        logger = get_root_logger()
        for block in self.blocks:
            block.to(self.device)
            block.attach(make)
            self.optimizers.append(block.optimizer)
            added = sum(parameter.numel() for parameter in block.auxiliary.parameters()) if block.auxiliary else 0
            logger.info(f"Block {block.index}: {block.title}; {added:,d} parameters in its auxiliary network.")
        for line in remarks(self.blocks):
            logger.info(line)
        chain.check()

    def _check_patch(self) -> None:
        """Check that the network can take patches of this size; BasicSR itself would fail in the first step."""
        size = ((self.opt.get("datasets") or {}).get("train") or {}).get("gt_size")
        unit = self.opt["scale"] * side_multiple(self.net_g)
        if size is not None and size % unit:
            raise ValueError(f"datasets.train.gt_size: {size}; this network and scale need a multiple of {unit}")

    def optimize_parameters(self, current_iter: int) -> None:
        """Run a local step of every block; ``l_pix`` is the network's own loss, ``l_K`` the loss of block K."""
        message = Message({"x": self.lq}, self.gt, sequence=self.blocks[0].next_sequence)
        losses: OrderedDict[str, Tensor] = OrderedDict()
        for block in self.blocks:
            message, report = block.local_step(message)
            losses["l_pix" if block.span.last else f"l_{block.index}"] = report.loss
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self) -> None:
        network: Any = getattr(self, "net_g_ema", self.net_g)
        network.eval()
        multiple = side_multiple(network)
        self.output = enlarge(network, self.lq, self.opt["scale"], multiple, self.tile, self.tile_overlap)
        self.net_g.train(self.is_train)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Save as BasicSR does, but to a file that is complete or absent, with optimizer state by parameter name."""
        if current_iter == -1 or self.opt["rank"] != 0:
            return
        parts = [block.state() for block in self.blocks]
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [{"state": {}, "param_groups": o.state_dict()["param_groups"]} for o in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "local": {
                "cut": [block.unit_names for block in self.blocks],
                "auxiliary": _plain(self.settings.local.auxiliary),
                "tensors": {name: tensor.cpu() for part in parts for name, tensor in part["auxiliary"].items()},
                "optimizer": {name: tensor.cpu() for part in parts for name, tensor in part["optimizer"].items()},
            },
        }
        target = Path(self.opt["path"]["training_states"]) / f"{current_iter}.state"
        with replaced(target) as partial, partial.open("wb") as file:
            torch.save(state, file)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Resume from a training state of the same blocks, of others, or of SRModel; weights are already loaded."""
        logger, saved = get_root_logger(), resume_state.get("local")
        optimizer = self._optimizer_after_srmodel(resume_state) if saved is None else saved["optimizer"]
        auxiliary = {} if saved is None else saved["tensors"]
        shapes = {name: tuple(tensor.shape) for name, tensor in auxiliary.items()}
        before = None if saved is None else Division(saved["cut"], saved["auxiliary"], shapes)
        if before != Division.of(self.blocks, self.settings.local.auxiliary):
            what = "SRModel: auxiliary networks" if saved is None else "other blocks or auxiliary networks: these"
            logger.warning(f"The training state is of {what} start fresh.")
            auxiliary, optimizer = {}, {k: v for k, v in optimizer.items() if not k.startswith("auxiliary.")}
        saved_group = resume_state["optimizers"][0]["param_groups"][0]
        for block, stepper in zip(self.blocks, self.optimizers, strict=True):
            block.load({}, auxiliary, optimizer)
            block.next_sequence = resume_state["iter"]
            for group in stepper.param_groups:
                group.update({key: value for key, value in saved_group.items() if key != "params"})
        for scheduler in self.schedulers:  # all blocks have the same schedule
            scheduler.load_state_dict(resume_state["schedulers"][0])

    def _optimizer_after_srmodel(self, resume_state: Mapping[str, Any]) -> dict[str, Tensor]:
        """State, as ``parameter name:key`` -> tensor, of SRModel's single optimizer, which numbers the parameters."""
        names = [name for name, parameter in self.net_g.named_parameters() if parameter.requires_grad]
        (saved,) = resume_state["optimizers"]
        return {
            f"{names[number]}:{key}": torch.as_tensor(value)
            for number, entries in saved["state"].items()
            for key, value in entries.items()
        }


def _plain(value: Any) -> Any:
    """``value`` with plain dicts instead of the ordered ones in BasicSR's options."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


_init = BaseModel.__init__


def _init_without_local(self: BaseModel, opt: dict[str, Any]) -> None:
    """Refuse ``local`` for BasicSR's other models, which would ignore it and silently train without blocks."""
    if opt.get("is_train") and opt.get("local") is not None and not isinstance(self, LocalSRModel):
        raise ValueError(
            f"local: model_type {opt.get('model_type')} has no blocks; set model_type: LocalSRModel, or remove local"
        )
    _init(self, opt)


BaseModel.__init__ = _init_without_local


_resume = BaseModel.resume_training


def _resume_without_blocks(self: BaseModel, resume_state: dict[str, Any]) -> None:
    """BasicSR's other models have one optimizer, and say only that the numbers differ."""
    if "local" in resume_state:
        raise ValueError(
            "path.resume_state: LocalSRModel wrote it, with an optimizer for each block; go on with model_type: "
            f"LocalSRModel and a section local, or start {self.opt.get('model_type')} from the saved network: "
            "path.pretrain_network_g, without resume_state and --auto_resume"
        )
    _resume(self, resume_state)


BaseModel.resume_training = _resume_without_blocks
