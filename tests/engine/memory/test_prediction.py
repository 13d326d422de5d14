"""What is predicted is what is measured."""

import os
import random

import pytest

from engine.memory.measure import Stepper
from engine.memory.variant import Variant, estimate_variant
from engine.network.message import Message
from tasks import load
from tests.toy import Toy, config

SMOKE = ["--config", "tasks/classification/configs/smoke.yaml"]

SMALL = [("resnet8", 4), ("resnet14", 7)]
LARGER = [("timm:resnet18", 9), ("timm:vit_tiny_patch16_224", 14)]


def draw(chance: random.Random, networks: list[tuple[str, int]]) -> list[str]:
    """Any configuration that the engine knows, small enough for a test."""
    model, most = chance.choice(networks)
    words = ["--model.name", model, "--data.size", "32", "--data.batch", str(chance.choice([4, 12, 16, 30]))]
    words += ["--local.schedule", chance.choice(["sequential", "sequential", "sequential", "end_to_end"])]
    words += ["--local.blocks", str(chance.randint(2, most))]
    words += ["--local.auxiliary", chance.choice(["glcan", "glcan", "dgl", "greedy"])]
    # On a CPU fp16 is so slow that only the smallest network is drawn with it.
    words += ["--local.precision", chance.choice(["fp32", "bf16"] + ["fp16"] * (model == "resnet8"))]
    words += chance.choice([[], [], ["--local.recompute", "units"], ["--local.offload", "true"]])
    optimizer = chance.choice(["sgd", "plain", "adamw"])
    plain = ["--optimizer.name", "sgd", "--optimizer.momentum", "0", "--optimizer.nesterov", "false"]
    words += plain if optimizer == "plain" else ["--optimizer.name", optimizer]
    words += ["--train.accumulate", str(chance.choice([1, 1, 2]))]
    return [*words, "--optimizer.clip_norm", str(chance.choice([0, 1]))]


@pytest.mark.parametrize(
    ("networks", "count"), [(SMALL, 2), pytest.param(SMALL + LARGER, 10, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_configurations_drawn_at_random(networks: list[tuple[str, int]], count: int) -> None:
    """Within 1 %; SEED draws the same ones again."""
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    chance = random.Random(seed)
    for _ in range(count):
        words = draw(chance, networks)
        predicted = estimate_variant(Variant("", ()), [*SMOKE, *words], load).footprint
        measured = Stepper(*load([*SMOKE, *words, "--train.device", "cpu"])).memory().footprint
        about = f"SEED={seed}, {' '.join(words)}: {predicted.peak} predicted, {measured.peak} measured"
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01), about
        assert predicted.by_block_bytes == pytest.approx(measured.by_block_bytes, rel=0.01), about
        for name, size in measured.peak.items():
            assert abs(predicted.peak[name] - size) <= 0.02 * measured.peak_bytes, f"{name}, {about}"


def test_a_wrong_example_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    class Wrong(Toy):
        def example(self) -> Message:
            return Message({"x": self.x[:8]}, self.y[:7])

    said = r"^on the message of example\(\): block 0 failed at micro-batch 0: .*\[7, 1\]"
    with pytest.raises(ValueError, match=said) as raised:
        estimate_variant(Variant("", ()), [], lambda argv: (config(local__blocks=2), Wrong()))
    assert "\n" not in str(raised.value)
    assert not any(capfd.readouterr())
