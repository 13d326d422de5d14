"""The config of a run that trains an arbitrary style transfer network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import Config, at_least
from tasks.style_transfer.vgg import VGGConfig


@dataclass
class ModelConfig:
    """The network. The defaults are SCIN; other values give its ablations and AdaIN's network."""

    vgg: VGGConfig = field(default_factory=VGGConfig)
    transfer: Literal["attention", "adain"] = "attention"
    """How content features and style features are combined: by cross-attention, or by AdaIN."""
    normalisation: Literal["scin", "adain", "none"] = "scin"
    """Normalisation in the decoder's four stages: SCIN, AdaIN with VGG's statistics of the painting, or none."""
    style_encoder: Literal["pe", "vgg"] = "pe"
    """What computes the style features: `pe`, the Perception Encoder, which learns, or `vgg`, the frozen VGG."""
    scin_width: int = 128
    """Width of SCIN's transformers."""
    scin_depth: int = 2
    """Number of layers in each of SCIN's transformers."""

    @property
    def reads_style_features(self) -> bool:
        """Whether anything reads the output of the style encoder; attention and SCIN do."""
        return self.transfer == "attention" or self.normalisation == "scin"


@dataclass
class LossConfig:
    """Weights of the losses (0 switches a loss off) and what they look at."""

    style: float = 1.0
    """VGG's features should have the mean and deviation that they have for the painting."""
    content: float = 1.0
    """VGG's features, each channel normalised, should be those of the content."""
    identity: float = 50.0
    """A picture repainted in its own style should stay itself, compared by pixels."""
    identity_features: float = 1.0
    """The same, compared by VGG's features."""
    adversarial: float = 5.0
    """Discriminators at several scales tell pictures from paintings (LSGAN); they are trained with the network."""
    contrastive: float = 0.3
    """ICL: pictures that share their content or their painting should lie closer together than others."""
    temperature: float = 0.2
    """Temperature of the contrastive loss."""
    identity_pairs: int = 0
    """How many pairs of a micro-batch (of each replica's part) the identity losses use; each adds two pictures; 0 uses
    all."""
    style_layers: list[str] = field(default_factory=lambda: ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"])
    """Layers of VGG whose statistics stand for style."""
    content_layers: list[str] = field(default_factory=lambda: ["relu4_1", "relu5_1"])
    """Layers of VGG whose features stand for content."""
    parts: int = 1
    """VGG processes the pictures in this many parts, one after another, and recomputes each in backward. More parts
    take less memory; any number above 1 costs one more forward pass of VGG. `local.recompute` makes it at least 4."""
    clip: str = ""
    """Folder or hub name of a CLIP model in transformers' layout, for ICL; empty uses the frozen VGG's features."""


@dataclass
class DataConfig:
    """Photographs and paintings, from any folders of images and all their subfolders.

    MS-COCO's train2017 is such a folder, and so is WikiArt with its one folder per style.
    """

    name: Literal["photographs", "folders"] = "photographs"
    """`photographs`: scikit-image's photographs as contents and its textures as styles; `folders`: the folders
    below."""
    contents: list[str] = field(default_factory=list)
    """Folders of photographs."""
    styles: list[str] = field(default_factory=list)
    """Folders of paintings."""
    test_contents: list[str] = field(default_factory=list)
    """Folders of test photographs; empty holds out every `hold_out`-th photograph of `contents` for testing."""
    test_styles: list[str] = field(default_factory=list)
    """Folders of test paintings; empty holds out every `hold_out`-th painting of `styles` for testing."""
    hold_out: int = 10
    """One image in this many is held out for testing where no test folders are given."""
    resize: int = 512
    """The shorter side of every image is scaled to this many pixels before a square is cropped."""
    crop: int = 256
    """Side in pixels of the squares, which are cropped at random for training and from the middle for testing."""
    batch: int = 6
    """Pairs of a photograph and a painting per optimizer step. Every painting is used for two photographs, that of its
    own pair and that of the next, which makes twice as many pictures."""
    repeat: int = 1
    """How often an epoch uses every photograph."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    tests: int = 8
    """At most this many photographs and this many paintings are tested, each photograph with each painting."""
    sheet: int = 5
    """An evaluation's contact sheet shows at most this many photographs and this many paintings."""
    lpips: Literal["", "alex", "vgg"] = ""
    """Network for LPIPS, `alex` or `vgg`, whose weights torchvision downloads; empty leaves LPIPS out."""
    fid_weights: str = ""
    """File of torch-fidelity's Inception weights, for FID and for ArtFID, which needs `lpips` too; empty leaves them
    out."""


@dataclass
class SCINConfig(Config):
    """Train a network that repaints any photograph in the style of any painting, by blocks or end to end."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        super().check()
        data, loss, model = self.data, self.loss, self.model
        at_least(
            ("model.scin_width", model.scin_width, 8),
            ("model.scin_depth", model.scin_depth, 1),
            ("loss.identity_pairs", loss.identity_pairs, 0),
            ("loss.parts", loss.parts, 1),
            ("data.hold_out", data.hold_out, 2),
            ("data.crop", data.crop, 64),
            ("data.resize", data.resize, data.crop),
            ("data.batch", data.batch, 1),
            ("data.repeat", data.repeat, 1),
            ("data.workers", data.workers, 0),
            ("data.tests", data.tests, 1),
            ("data.sheet", data.sheet, 0),
        )
        for key in ("style", "content", "identity", "identity_features", "adversarial", "contrastive"):
            at_least((f"loss.{key}", getattr(loss, key), 0))
        if loss.temperature <= 0:
            raise ValueError(f"loss.temperature: {loss.temperature} must be above 0")
        if not loss.style_layers or not loss.content_layers:
            raise ValueError("loss.style_layers, loss.content_layers: name at least one layer each, such as relu4_1")
        if model.style_encoder == "pe" and not model.reads_style_features:
            raise ValueError("model.style_encoder: without attention and SCIN nothing reads pe; set it to vgg")
        micro_batch = data.batch // self.train.accumulate
        if micro_batch % self.placement.replicas:
            raise ValueError(
                f"placement.replicas: {self.placement.replicas} do not divide the {micro_batch} pairs of a "
                "micro-batch; choose another data.batch"
            )
        if model.scin_width % 4:
            raise ValueError(f"model.scin_width: {model.scin_width} is not a multiple of 4, its number of heads")
        if data.crop % 16:
            raise ValueError(f"data.crop: {data.crop}; the network needs a multiple of 16")
        if data.batch % self.train.accumulate:
            raise ValueError(f"train.accumulate: {self.train.accumulate} does not divide data.batch, {data.batch}")
        pairs = data.batch // self.train.accumulate // self.placement.replicas
        if loss.contrastive and pairs < 2:
            raise ValueError(
                f"data.batch: {pairs} pair(s) in a replica's micro-batch have no negatives for the contrastive loss; "
                "the least is 2, or set loss.contrastive 0"
            )
        if data.name == "photographs" and (data.contents or data.styles or data.test_contents or data.test_styles):
            raise ValueError("data.name: photographs reads no folders; set data.name folders")
        if data.name == "folders" and not (data.contents and data.styles):
            raise ValueError("data.contents, data.styles: data.name folders needs at least one folder each")
        if data.fid_weights and not data.lpips:
            raise ValueError("data.fid_weights: ArtFID needs LPIPS too; set data.lpips alex")
