"""Defects found once; each test failed before its repair."""

import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import Config
from engine.memory.measure import measure
from engine.memory.variant import Variant
from engine.network.chain import Unit
from engine.network.message import Message, TensorSpec
from engine.task import Task, evaluate
from tasks.classification.config import ClassificationConfig
from tasks.classification.task import Classification
from tasks.classification.timm_chain import timm_chain
from tests.toy import Toy, blocks_of, config, state, train


def small(batch: int, accumulate: int) -> ClassificationConfig:
    """Digits of 8 pixels."""
    config = ClassificationConfig(task="classification")
    config.data.size, config.data.batch, config.data.augment = 8, batch, "none"
    config.train.accumulate = accumulate
    return config


def refuse(argv: Sequence[str]) -> tuple[Config, Task]:
    """A loader that fails in the worker."""
    raise ValueError("data.root: gone meanwhile")


def test_units_can_be_copied_under_fake_tensors() -> None:
    """copy.deepcopy of a fake parameter fails on its storage."""
    with FakeTensorMode():
        copy = Unit("u", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).copy()
        assert copy.module[0].weight.shape == (4, 3)


def test_a_sum_in_place_is_no_link_of_a_chain() -> None:
    """`x += shortcut` keeps the tensor's identity, so a residual block looked like a chain of its convolutions."""
    chain = timm_chain("resnet18", 10, 32, pretrained=False)
    assert not [unit.name for unit in chain.units if "layer" in unit.name and "conv" in unit.name]


def test_watching_a_model_does_not_count_a_batch() -> None:
    """Under fake tensors, BatchNorm's counter went up all the same."""
    chain = timm_chain("resnet18", 10, 32, pretrained=False)
    assert all(t == 0 for n, t in chain.model.state_dict().items() if n.endswith("num_batches_tracked"))


def test_recomputed_batchnorm_saves_the_same_tensors() -> None:
    """Turning tracking off while recomputing saved fewer tensors, which checkpointing refuses."""
    task = Toy(norm=True)
    _, blocks, schedule = blocks_of(task, config(local__schedule="end_to_end", local__recompute="units"))
    train(schedule, [batch[0] for batch in task.batches(0, 0)][:1])
    assert all(t == 1 for n, t in state(blocks).items() if n.endswith("num_batches_tracked"))


def test_two_runs_may_unpack_one_archive_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one failed on the folder the faster one had just made."""
    from tasks.classification.data import _unpacked

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    with tarfile.open("set.tar", "w") as tar:
        for number in range(300):
            tar.add("a.png", f"set/train/a/{number}.png")
    errors: list[BaseException] = []
    together = threading.Barrier(4)

    def unpack() -> None:
        together.wait()
        try:
            _unpacked(Path("set.tar"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=unpack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    (folder,) = Path("data").iterdir()
    assert len(list((folder / "train/a").iterdir())) == 300


def test_archives_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was named by the archive's name alone, so the second one's images were never seen."""
    from tasks.classification.data import _unpacked

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    for folder, count in (("one", 1), ("two", 2)):
        Path(folder).mkdir()
        with tarfile.open(f"{folder}/set.tar", "w") as tar:
            for number in range(count):
                tar.add("a.png", f"set/{number}.png")
        assert len(list(_unpacked(Path(folder) / "set.tar").iterdir())) == count


def test_later_blocks_of_many_do_not_diverge() -> None:
    """Unnormalised pooled features grow with the residual sums; joined in one linear layer, losses reached 70."""
    settings = ClassificationConfig(task="classification")
    settings.model.name, settings.data.size, settings.data.batch, settings.data.augment = "resnet32", 8, 64, "none"
    settings.local.blocks = 16
    task = Classification(settings)
    _, _, schedule = blocks_of(task, settings)
    losses = torch.stack([torch.stack(step) for step in train(schedule, [b[0] for b in task.batches(0, 0)])])
    assert losses[-5:].mean(0).max() < 5, "0.7 now, 24 then"


def test_evaluation_takes_no_more_images_at_a_time_than_training() -> None:
    """It took whole batches of at least 100, so a run whose micro-batches just fitted died after its first epoch."""
    task = Classification(small(batch=60, accumulate=4))
    sizes = set()

    def predict(message: Message) -> torch.Tensor:
        sizes.add(message.batch)
        return torch.zeros(message.batch, 10)

    evaluate(task, predict)
    assert max(sizes) == 15


def test_a_short_last_batch_is_not_cut_smaller_than_need_be() -> None:
    """29 images in 16 micro-batches came to some of 1, which BatchNorm refuses; 4 of 8 or fewer are as small as any."""
    config = small(batch=128, accumulate=16)
    config.data.subset = 128 + 29
    assert Classification(config).smallest_batch() == 7


def test_a_worker_that_could_not_start_is_heard() -> None:
    """It had ended before it was asked anything, and that was reported as a lack of memory."""
    with pytest.raises(ValueError, match=r"x: data.root: gone meanwhile"):
        measure([Variant("x", ())], [], refuse, steps=1)


def test_a_single_element_of_any_stride_becomes_bytes() -> None:
    """The label of an image's only box came expanded out of a data set, and no rank could send it."""
    label = torch.tensor(7).expand(1)
    assert label.stride() == (0,)
    spec = TensorSpec.of(label)
    assert spec.from_bytes(spec.to_bytes(label)).equal(label)
