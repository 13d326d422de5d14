import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from engine.learning.auxiliary import build_auxiliary
from engine.network.bank import FeatureBank
from engine.network.cut import Span
from tasks.detection.chain import detector_chain, recomputed
from tasks.detection.heads import pyramid_head
from tasks.detection.targets import samples_of, targets_of
from tests.tasks.detection.detectors import (
    CONFIGS,
    build_detector,
    images,
    message,
    samples,
    small_task,
)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


one_stage_and_slowly_two = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "faster_rcnn" else []) for name in CONFIGS]
)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_chain_trains_as_mmdetection_does_to_the_bit(name: str) -> None:
    detector, _ = build_detector(name)
    torch.manual_seed(1)
    theirs = detector.loss(images(), samples())
    detector.parse_losses(theirs)[0].backward()
    wanted = gradients(detector)

    torch.manual_seed(1)
    ours = detector_chain(detector)(message()).losses(samples())
    detector.parse_losses(ours)[0].backward()
    found = gradients(detector)

    assert list(ours) == list(theirs)
    assert detector.parse_losses(ours)[0].equal(detector.parse_losses(theirs)[0])
    assert found.keys() == wanted.keys()
    assert wanted, "something trains"
    assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_chain_predicts_as_mmdetection_does(name: str) -> None:
    detector, _ = build_detector(name)
    detector.eval()
    with torch.no_grad():
        theirs = detector.predict(images(), samples())
        ours = detector_chain(detector)(message()).predict(samples())
    for one, other in zip(ours, theirs, strict=True):
        assert one.pred_instances.bboxes.equal(other.pred_instances.bboxes)
        assert one.pred_instances.scores.equal(other.pred_instances.scores)
        assert one.pred_instances.labels.equal(other.pred_instances.labels)


def test_units_are_stem_residual_blocks_neck_and_head() -> None:
    detector, _ = build_detector("retinanet")
    chain = detector_chain(detector)
    layers = [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]
    assert [unit.name for unit in chain.units] == ["stem", *layers, "neck", "head"]
    shapes = chain.shapes()
    assert set(shapes[2].features) == {"x"}, "RetinaNet's neck does not read the first stage's map"
    assert set(shapes[3].features) == {"x", "layer2"}
    assert set(shapes[8].features) == {"x", "layer2", "layer3", "layer4"}
    assert set(shapes[9].features) == {"x", "levels"}, "maps end at the neck"


def test_what_is_no_such_chain_is_refused_by_module_and_cause() -> None:
    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=f"^model.config: {said}") as caught:
            detector_chain(detector)
        assert "\n" not in str(caught.value)

    detector, _ = build_detector("retinanet")
    detector.bbox_head.prior_generator = None
    refused(
        "model.bbox_head of RetinaNet is RetinaHead, which has no prior_generator with a stride for each level; supp"
    )
    detector.neck = nn.Sequential(detector.neck, nn.Identity())
    refused(r"model.neck of RetinaNet is a list \(FPN, Identity\); give one module, such as FPN")
    del detector.neck
    refused("RetinaNet has no model.neck, which makes the levels for its head; supported are RetinaNet, ")
    detector.backbone = MODELS.build({"type": "mmdet.MobileNetV2"})
    refused("model.backbone of RetinaNet is MobileNetV2, which does not compute as MMDetection's ResNet does; set ")


@pytest.mark.parametrize("boxes", [(0, 1), (0, 0)])
@one_stage_and_slowly_two
def test_images_without_ground_truth_train(name: str, boxes: tuple[int, ...]) -> None:
    detector, _ = build_detector(name)
    chain = detector_chain(detector)
    loss = detector.parse_losses(chain(message(boxes)).losses(samples(boxes)))[0]
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())


@one_stage_and_slowly_two
def test_a_light_head_learns_from_any_unit_s_output(name: str) -> None:
    detector, model = build_detector(name)
    chain = detector_chain(detector)
    outputs, passing = {}, message()
    with torch.no_grad():
        for unit in chain.units:
            passing = unit(passing)
            outputs[unit.name] = passing
    for at in ("stem", "layer1.1", "layer2.1", "layer4.1", "neck"):
        for only_seen in (False, True):
            head = pyramid_head(detector, model, chain.shapes()[chain.index(at)], only_seen=only_seen)
            prediction = head(outputs[at], FeatureBank())
            loss = prediction.detector.parse_losses(prediction.losses(samples()))[0]
            loss.backward()
            unused = [key for key, p in head.named_parameters() if p.grad is None]
            assert loss.isfinite()
            assert not unused, f"{at}: {unused}"
    whole = sum(p.numel() for p in detector.bbox_head.parameters()) if hasattr(detector, "bbox_head") else float("inf")
    assert sum(p.numel() for p in head.detector.parameters()) < whole / 2


def test_levels_are_those_a_block_can_see() -> None:
    detector, model = build_detector("retinanet")
    chain = detector_chain(detector)
    shapes = chain.shapes()

    def sides(at: str, only_seen: bool) -> list[int]:
        output = shapes[chain.index(at)]
        head = pyramid_head(detector, model, output, only_seen=only_seen)
        made = output.map(lambda t: torch.zeros(t.shape))
        return [level.shape[-1] for level in head(made, FeatureBank()).levels]

    assert sides("layer1.1", True) == [32], "stride 4 is too fine: pooled to the head's finest, 8"
    assert sides("layer2.0", True) == [32]
    assert sides("layer3.1", True) == [32, 16]
    assert sides("layer3.1", False) == [32, 16, 8, 4, 2]
    assert sides("neck", True) == sides("neck", False) == [32, 16, 8, 4, 2]


def test_anchors_of_a_level_do_not_depend_on_which_levels_there_are() -> None:
    detector, model = build_detector("retinanet")
    own = detector.bbox_head.prior_generator
    chain = detector_chain(detector)
    head = pyramid_head(detector, model, chain.shapes()[chain.index("layer3.1")], only_seen=True)
    light = head.detector.bbox_head.prior_generator
    assert light.strides == own.strides[:2]
    middle = [anchors[1::3] for anchors in own.base_anchors[:2]]  # of three scales an octave the second
    for few, many in zip(light.base_anchors, middle, strict=True):
        assert torch.allclose(few, many, atol=1e-4)


def test_glcan_s_local_part_gives_the_maps_that_the_block_has_not() -> None:
    _, task = small_task()
    chain = task.build_chain()
    span = Span(0, 4, 0, chain.index("layer2.0"))
    network = build_auxiliary("glcan", chain, span, FeatureBank(), task, 0)
    assert [unit.name for unit in network.local_units] == ["layer2.0", "layer3.0", "layer4.0"], "one a stage, no neck"
    assert network.head.names == ["layer2", "layer3", "layer4"]
    assert network.head.fpn.in_channels == [16, 32, 64], "half as wide"
    assert network.reduce == 1
    after_neck = build_auxiliary("glcan", chain, Span(0, 2, 0, chain.index("head")), FeatureBank(), task, 0)
    assert after_neck.local_units == []
    with pytest.raises(ValueError, match="'dgl' is not for detection; known: glcan, greedy, levels"):
        build_auxiliary("dgl", chain, span, FeatureBank(), task, 0)


def test_greedy_sees_nothing_but_the_block_s_own_output() -> None:
    _, task = small_task()
    chain = task.build_chain()
    network = build_auxiliary("greedy", chain, Span(0, 2, 0, chain.index("layer4.0")), FeatureBank(), task, 0)
    assert network.head.names == ["x"]
    whole = chain.shapes()[chain.index("layer3.1")].map(lambda t: torch.zeros(t.shape))
    prediction = network(whole, FeatureBank())
    assert [level.shape[-1] for level in prediction.levels] == [16, 8, 4, 2], "no finer than its own map"


@one_stage_and_slowly_two
def test_a_recomputed_head_gives_the_same_gradients(name: str) -> None:
    detector, _ = build_detector(name)
    chain = detector_chain(detector)
    head = detector.bbox_head if hasattr(detector, "bbox_head") else detector.rpn_head
    plain = list(vars(head))
    torch.manual_seed(1)
    detector.parse_losses(chain(message()).losses(samples()))[0].backward()
    wanted = gradients(detector)
    torch.manual_seed(1)
    with recomputed(detector):
        loss = detector.parse_losses(chain(message()).losses(samples()))[0]
    loss.backward()
    found = gradients(detector)
    assert all(found[key].equal(wanted[key]) for key in wanted)
    assert list(vars(head)) == plain, "and is as before"


def test_targets_are_plain_and_come_back_whole() -> None:
    made = samples((2, 0))
    targets = targets_of(made)
    for one, other in zip(samples_of(targets), made, strict=True):
        assert one.metainfo == other.metainfo
        assert one.gt_instances.bboxes.equal(other.gt_instances.bboxes)
        assert one.gt_instances.labels.equal(other.gt_instances.labels)
    assert all(type(value) in (int, float, str, tuple) for meta in targets["meta"] for value in meta.values())
