"""``model_type: LocalSRModel`` in BasicSR's options: its own training, by local learning."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from engine.learning.build import build_blocks
from engine.network.message import Message
from engine.run.checkpoint import Division
from tasks.local_settings import local_settings
from tasks.super_resolution.chain import enlargement, network_chain
from tasks.super_resolution.network import check_scale, side_multiple
from tasks.super_resolution.task import Upscaling
from tasks.tiles import enlarge

OWN = {"tail_parts": 1, "auxiliary_tail": "direct"}
"""Keys of ``local`` beside the engine's, and their defaults; ``ModelConfig`` says what they do."""

_TOOL = "use this project's tools/train.py"
ELSEWHERE = {
    "schedule": f"blocks run one after another here; for streams, pipelines and end_to_end {_TOOL}, or SRModel",
    "precision": f"BasicSR trains in fp32; {_TOOL} with local.precision",
    "compile": f"{_TOOL} with local.compile",
}


class GivenNetwork(Upscaling):
    """The task of a network that BasicSR builds, feeds and evaluates: loss and auxiliary heads are left."""

    def __init__(self, scale: int, auxiliary_tail: str, pixel_loss: nn.Module) -> None:
        super().__init__(None, scale, auxiliary_tail)
        self.pixel_loss = pixel_loss

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.pixel_loss(prediction, targets)
        return loss


@MODEL_REGISTRY.register()
class LocalSRModel(SRModel):
    """BasicSR's SRModel with a ``local`` section in its options; its networks, data, losses, schedules and metrics.

    Every block has an optimizer and a learning-rate scheduler of its own, built as BasicSR builds its one. Saved
    networks are the plain network; what belongs to blocks is in the training state, from which training goes on with
    the same blocks, or with others (or after SRModel), whose auxiliary networks then start fresh. With the same ones
    weights, optimizers and random state are to the bit; the order of the data starts anew, as ever in BasicSR.
    Large test images: ``val: tile`` and ``val: tile_overlap``, as ``DataConfig`` says.

    Raises:
        ValueError: the options cannot be trained so: no ``local`` section or an unknown key, several ranks, a loss
            beside ``pixel_opt``, a network or scale that is no chain.
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
        if opt["dist"] or opt["num_gpu"] > 1:
            raise ValueError(f"num_gpu: LocalSRModel trains on one device; on several {_TOOL}")
        if train.get("perceptual_opt"):
            raise ValueError("train.perceptual_opt: blocks learn from pixel_opt alone; leave it out, or take SRModel")
        if not train.get("pixel_opt"):
            raise ValueError("train.pixel_opt: missing; blocks learn from it")
        network = opt["network_g"]
        check_scale(network["type"], opt["scale"], network.get("upsampler", ""))

    def setup_optimizers(self) -> None:
        """Cut the network into blocks, and give each its optimizer."""
        # Shapes are inferred, and weights drawn, on the CPU whatever the device.
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
        chain.check()

    def _check_patch(self) -> None:
        """See that the training patches' size suits the network: BasicSR itself finds out in the first step."""
        size = ((self.opt.get("datasets") or {}).get("train") or {}).get("gt_size")
        unit = self.opt["scale"] * side_multiple(self.net_g)
        if size is not None and size % unit:
            raise ValueError(f"datasets.train.gt_size: {size}; this network and scale need a multiple of {unit}")

    def optimize_parameters(self, current_iter: int) -> None:
        """A local step of every block; ``l_pix`` is the network's own loss, ``l_K`` that of block K."""
        message = Message({"x": self.lq}, self.gt, sequence=self.blocks[0].next_sequence)
        losses: OrderedDict[str, Tensor] = OrderedDict()
        for block in self.blocks:
            message, report = block.local_step(message)
            losses["l_pix" if block.span.last else f"l_{block.index}"] = report.loss
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self) -> None:
        network = getattr(self, "net_g_ema", self.net_g)
        network.eval()
        multiple = side_multiple(network)
        self.output = enlarge(network, self.lq, self.opt["scale"], multiple, self.tile, self.tile_overlap)
        self.net_g.train(self.is_train)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """As BasicSR's, but whole or not there; states of optimizers are by parameter name."""
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
        room = target.with_name(f".{target.name}.writing")
        torch.save(state, room)
        os.replace(room, target)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on from a training state, of these blocks, of others, or of SRModel; the weights are loaded already."""
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
        for scheduler in self.schedulers:  # blocks' schedulers are all alike
            scheduler.load_state_dict(resume_state["schedulers"][0])

    def _optimizer_after_srmodel(self, resume_state: Mapping[str, Any]) -> dict[str, Tensor]:
        """State by ``parameter name:key`` of SRModel's one optimizer, which counts the network's parameters."""
        names = [name for name, parameter in self.net_g.named_parameters() if parameter.requires_grad]
        (saved,) = resume_state["optimizers"]
        return {
            f"{names[number]}:{key}": torch.as_tensor(value)
            for number, entries in saved["state"].items()
            for key, value in entries.items()
        }


def _plain(value: Any) -> Any:
    """``value`` with dicts in place of the ordered ones that BasicSR's options are made of."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
