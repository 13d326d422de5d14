"""timm models as chains: the same function, the same names, every family by the one adapter."""

import pytest
import torch
from torch import nn

from engine.learning.schedules import Sequential
from engine.network.layout import as_map
from engine.network.message import Message
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification
from tasks.classification.timm_chain import timm_chain
from tests.toy import blocks_of

MODELS = [
    ("resnet18", 64),
    ("resnet50", 64),
    ("resnext50_32x4d", 64),
    ("vit_tiny_patch16_224", 32),
    ("deit_tiny_distilled_patch16_224", 32),
    ("swin_tiny_patch4_window7_224", 56),
    ("convnext_atto", 64),
    ("efficientnet_b0", 64),
    ("mobilenetv3_small_050", 64),
    ("regnetx_002", 64),
    ("vgg11_bn", 64),
    ("densenet121", 64),
    ("mixer_s32_224", 224),
    ("seresnet50", 64),
    ("poolformer_s12", 64),
    ("efficientformer_l1", 224),  # keeps a cache of what it computes in evaluation
    ("ese_vovnet19b_slim", 64),  # gives modules a list of tensors beside one
    ("test_vit", 64),  # reads the grid of its patch embedding where it adds positions
]
NAMED = [("resnet101", 64), ("resnet152", 64), ("resnext101_32x8d", 64)]


@pytest.mark.parametrize(
    ("name", "size"), [*MODELS, *(pytest.param(*named, marks=pytest.mark.slow) for named in NAMED)]
)
def test_the_chain_computes_what_the_model_computes(name: str, size: int) -> None:
    chain = timm_chain(name, 7, size, pretrained=False)
    x = torch.randn(2, 3, size, size)
    chain.model.eval()
    with torch.no_grad():
        assert torch.equal(chain(Message({"x": x})), chain.model(x))
    assert len(chain) >= 7


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_gradients_are_the_models_own(name: str) -> None:
    size = {"resnet18": 32, "vit_tiny_patch16_224": 32, "swin_tiny_patch4_window7_224": 56}[name]
    chain = timm_chain(name, 3, size, pretrained=False)
    x = torch.randn(2, 3, size, size)
    gradients = []
    for forward in (lambda: chain(Message({"x": x})), lambda: chain.model(x)):
        chain.model.zero_grad()
        torch.manual_seed(0)
        forward().square().sum().backward()
        gradients.append({n: p.grad for n, p in chain.model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter]), parameter


def test_units_are_residual_blocks_and_stages_are_shapes() -> None:
    chain = timm_chain("resnet18", 10, 64, pretrained=False)
    assert [unit.name for unit in chain.units] == [
        "conv1", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)),
    ]  # fmt: skip
    assert len({unit.stage for unit in chain.units}) == 4, "the stem has layer1's shape"
    vit = timm_chain("vit_tiny_patch16_224", 10, 32, pretrained=False)
    assert [unit.name for unit in vit.units[:3]] == ["patch_embed", "pos_embed", "blocks.0"]
    assert as_map(vit.shapes()[2].x, vit.layout).shape == (2, 192, 1, 5)
    assert timm_chain("swin_tiny_patch4_window7_224", 10, 56, pretrained=False).layout == "NHWC"


def test_watching_changes_no_statistic_and_leaves_no_hook() -> None:
    chain = timm_chain("resnet18", 10, 64, pretrained=False)
    for name, tensor in chain.model.state_dict().items():
        if name.endswith("running_mean"):
            assert not tensor.any(), name
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chain.model.modules())
    vit = timm_chain("vit_tiny_patch16_224", 10, 32, pretrained=False)
    assert "_pos_embed" not in vars(vit.model)


@pytest.mark.parametrize(
    ("name", "size", "auxiliary"),
    [
        pytest.param("timm:resnet50", 64, "glcan", marks=pytest.mark.slow),
        ("timm:vit_tiny_patch16_224", 32, "glcan"),
        ("timm:swin_tiny_patch4_window7_224", 56, "glcan"),
        ("timm:vit_tiny_patch16_224", 32, "dgl"),
        pytest.param("timm:resnext50_32x4d", 64, "{type: glcan, width: 0.5}", marks=pytest.mark.slow),
        ("timm:convnext_atto", 64, "greedy"),
        ("timm:efficientformer_l1", 224, "{type: glcan, reduce: 1}"),  # maps, then tokens
        pytest.param("timm:efficientformer_l1", 224, "dgl", marks=pytest.mark.slow),
    ],
)
def test_they_train_in_blocks(name: str, size: int, auxiliary: str) -> None:
    import yaml

    config = ClassificationConfig(task="classification")
    config.model.name, config.data.size, config.data.batch = name, size, 4
    config.data.subset, config.local.auxiliary = 8, yaml.safe_load(auxiliary)
    task = Classification(config)
    chain, blocks, schedule = blocks_of(task, config)
    assert isinstance(schedule, Sequential)
    assert len(blocks) == 4
    before = {n: p.detach().clone() for n, p in chain.model.named_parameters()}
    _, reports = schedule.step(next(task.batches(0, 0))[0])
    assert all(torch.isfinite(report.loss) for report in reports)
    still = [n for n, p in chain.model.named_parameters() if torch.equal(p, before[n])]
    # A layer scale's or a norm's bias may round to no change; weights do not.
    assert not [n for n in still if before[n].dim() > 1]


def test_a_copied_position_embedding_has_tensors_of_its_own_and_no_blocks() -> None:
    """The wrapper carried the whole model along, and its copies worked on the model's parameters."""
    chain = timm_chain("vit_tiny_patch16_224", 10, 32, pretrained=False)
    unit = chain.units[1]
    copy = unit.copy()
    embedding, original = copy.module[0], unit.module[0]
    (stand_in,) = embedding._stand_in
    assert stand_in._parameters is embedding._parameters
    assert not [parameter for child in stand_in.children() for parameter in child.parameters()]
    with torch.no_grad():
        embedding.pos_embed.zero_()
    x = chain.units[0](Message({"x": torch.randn(2, 3, 32, 32)}))
    assert not torch.equal(copy(x).x, unit(x).x)
    copy(x).x.sum().backward()
    assert embedding.cls_token.grad is not None
    assert original.cls_token.grad is None


def test_a_position_embedding_that_runs_other_modules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood in for an nn.Sequential did nothing, so that the chain was another network than the model."""
    from timm.models.vision_transformer import VisionTransformer

    init, embed = VisionTransformer.__init__, VisionTransformer._pos_embed

    def wider(self, *arguments, **options) -> None:
        init(self, *arguments, **options)
        self.mixing = nn.Sequential(nn.Linear(self.embed_dim, self.embed_dim))

    monkeypatch.setattr(VisionTransformer, "__init__", wider)
    monkeypatch.setattr(VisionTransformer, "_pos_embed", lambda self, x: self.mixing(embed(self, x)))
    said = r"^model.name: test_vit is not a chain of modules: it runs 'mixing' where it adds positions; write your own"
    with pytest.raises(ValueError, match=said):
        timm_chain("test_vit", 10, 64, pretrained=False)


def test_models_that_are_no_chain_say_where_and_why() -> None:
    ended = r"hrnet_w18_small is not a chain of modules: (no )?module .*'[\w.]+'.*; write your own chain"
    with pytest.raises(ValueError, match=ended):
        timm_chain("hrnet_w18_small", 10, 64, pretrained=False)
    with pytest.raises(ValueError, match="timm cannot build 'resnet5000'"):
        timm_chain("resnet5000", 10, 64, pretrained=False)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("coat_tiny", 64, "the features of coat_tiny are a list, not one tensor; write your own chain"),
        ("maxvit_rmlp_pico_rw_256", 100, "maxvit_rmlp_pico_rw_256.* 100 px"),
        ("efficientformer_l1", 64, "efficientformer_l1 cannot take images of 64 px"),
    ],
)
def test_what_is_no_chain_or_does_not_fit_is_named(name: str, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"^model.name: .*{words}") as refused:
        timm_chain(name, 3, size, pretrained=False)
    assert "\n" not in str(refused.value)


def test_local_units_that_do_not_fit_are_named_with_the_remedy() -> None:
    """MaxViT's windows do not divide the map at half the resolution; torch asserts that, and does not raise."""
    config = ClassificationConfig(task="classification")
    config.model.name, config.data.size = "timm:maxvit_rmlp_pico_rw_256", 256
    words = r"units stages.*do not fit on block 0's output of shape \(2, .*; try reduce=1, .*\(AssertionError"
    with pytest.raises(ValueError, match=words):
        blocks_of(Classification(config), config)
