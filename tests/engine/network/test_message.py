import pytest
import torch

from engine.network.bank import FeatureBank
from engine.network.message import Message, TensorSpec, flatten, unflatten


def message() -> Message:
    features = {
        "x": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "skips": [torch.randn(2, 1, dtype=torch.bfloat16), torch.empty(0, 5)],
        "time": {"embedding": torch.arange(4)},
    }
    return Message(features, targets=(torch.tensor([1, 0]), "cat"), bank=FeatureBank({0: torch.ones(2, 3)}), sequence=5)


def test_flatten_and_back_keeps_every_leaf() -> None:
    sent = message()
    tensors, structure = flatten(sent.parts())
    arrived = Message.of(unflatten(tensors, structure), 5)
    assert arrived.targets[1] == "cat"
    assert arrived.sequence == 5
    assert list(arrived.bank) == [0]
    again, same = flatten(arrived.parts())
    assert same == structure
    assert all(a is b for a, b in zip(tensors, again, strict=True))


def test_structure_tells_shapes_and_dtypes_apart() -> None:
    first = flatten(message().parts())[1]
    assert flatten(message().parts())[1] == first
    for other in (torch.randn(1, 3, 4, 4), torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 4, 4)):
        assert flatten(message().with_x(other).parts())[1] != first


def test_arrival_of_other_tensors_is_refused() -> None:
    tensors, structure = flatten(message().parts())
    with pytest.raises(ValueError, match="tensor 0 is"):
        unflatten([tensors[0][:1], *tensors[1:]], structure)
    with pytest.raises(ValueError, match="1 tensors arrived, 6 expected"):
        unflatten(tensors[:1], structure)


def test_a_tensor_comes_back_from_its_bytes_with_its_strides() -> None:
    image = torch.randn(2, 3, 4, 5)
    tensors = [image, image.to(memory_format=torch.channels_last), image.transpose(0, 3), torch.tensor(3.5)]
    tensors += [image.bfloat16(), torch.tensor([True, False]), torch.arange(5), torch.randn(3, dtype=torch.complex64)]
    for tensor in tensors:
        spec = TensorSpec.of(tensor)
        raw = spec.to_bytes(tensor)
        assert raw.numel() == spec.nbytes
        back = spec.from_bytes(raw.clone())
        assert torch.equal(back, tensor)
        assert (back.dtype, back.stride()) == (tensor.dtype, tensor.stride())


def test_detach_cuts_everything_and_keeps_strides() -> None:
    sent = message().map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    detached = sent.detach()
    assert not any(tensor.requires_grad for tensor in detached.tensors())
    assert detached.x.stride() == sent.x.stride()
    assert detached.x.is_contiguous(memory_format=torch.channels_last)
    assert detached.x.data_ptr() == sent.x.data_ptr(), "detaching copies nothing"


def test_bank_is_added_to_without_changing_the_old_one() -> None:
    old = FeatureBank()
    new = old.add(0, 1)
    assert len(old) == 0
    assert dict(new) == {0: 1}
    with pytest.raises(AssertionError):
        new.add(0, 2)
