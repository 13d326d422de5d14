"""Sizes that were published, and both networks train locally."""

import pytest
import torch

from benchmarks.networks import vgg16, wrn28_10
from engine.network.chain import Chain
from tasks import load
from tests.toy import blocks_of


def size(chain: Chain) -> int:
    return sum(parameter.numel() for parameter in chain.model.parameters())


def test_parameters_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        assert size(wrn28_10(10, 32)) == 36_479_194
        assert size(vgg16(1000, 224)) == 138_365_992  # torchvision's vgg16_bn
    with pytest.raises(ValueError, match="data.size: 40 px"):
        vgg16(10, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "wrn28_10"])
def test_they_train_in_blocks(name: str) -> None:
    words = ["--config", "tasks/classification/configs/smoke.yaml", "--data.size", "32", "--data.batch", "2"]
    words += ["--model.name", f"benchmarks.networks:{name}", "--local.blocks", "3"]
    config, task = load(words)
    _, _, schedule = blocks_of(task, config)
    _, reports = schedule.step(task.example())
    assert len(reports) == 3
    assert all(torch.isfinite(report.loss) for report in reports)
