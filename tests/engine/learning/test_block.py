from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.learning.outcome import BlockError, Refusal
from engine.network.message import Message
from engine.utilities.seed import derive
from tests.toy import Toy, assert_equal, blocks_of, config, state, train


def messages(task: Toy, count: int) -> list[Message]:
    found: list[Message] = []
    epoch = 0
    while len(found) < count:
        found += [batch[0] for batch in task.batches(epoch, 0)]
        epoch += 1
    return found[:count]


@pytest.mark.parametrize("recompute", ["none", "units"])
def test_one_block_is_plain_pytorch_training_bit_for_bit(recompute: str) -> None:
    task = Toy(norm=True, dropout=0.2)
    settings = config(local__schedule="end_to_end", local__recompute=recompute, optimizer__lr=0.05)
    chain, _, schedule = blocks_of(task, settings)
    plain = task.build_chain().model
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    batches = messages(task, 6)
    losses = train(schedule, batches)
    for number, message in enumerate(batches):
        torch.manual_seed(derive(0, "step", 0, number))
        loss = F.mse_loss(plain(message.x), message.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(losses[number][0], loss.detach())
    assert_equal(dict(chain.model.state_dict()), dict(plain.state_dict()))


def test_gradients_of_two_blocks_by_hand() -> None:
    """h = tanh(w x + b), y = v h + c in each block; loss (y - t)^2; all scalars, gradients on paper."""
    task = Toy(depth=2, width=1, samples=1)
    task.x, task.y = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    settings = config(local__blocks=2, optimizer__lr=1.0, optimizer__momentum=0.0, optimizer__weight_decay=0.0)
    settings.optimizer.nesterov = False
    _, (first, second), schedule = blocks_of(task, settings)
    values = {
        "layers.0.linear.weight": 0.3, "layers.0.linear.bias": 0.1,
        "auxiliary.0.head.linear.weight": 0.7, "auxiliary.0.head.linear.bias": -0.2,
        "layers.1.linear.weight": -0.4, "layers.1.linear.bias": 0.2, "output.weight": 0.9, "output.bias": 0.0,
    }  # fmt: skip
    with torch.no_grad():
        for block in (first, second):
            for name, tensor in block.named_state().items():
                tensor.fill_(values[name])
    schedule.step(Message({"x": task.x}, task.y))

    def by_hand(x: float, w: float, b: float, v: float, c: float) -> tuple[float, list[float]]:
        h = torch.tanh(torch.tensor(w * x + b)).item()
        error = 2 * (v * h + c - 2.0)
        inner = error * v * (1 - h * h)
        return h, [w - inner * x, b - inner, v - error * h, c - error]

    h, expected = by_hand(0.5, 0.3, 0.1, 0.7, -0.2)
    got = [first.named_state()[name].item() for name in list(values)[:4]]
    assert got == pytest.approx(expected, rel=1e-6)
    # The second block sees the first one's output from *before* its update.
    _, expected = by_hand(h, -0.4, 0.2, 0.9, 0.0)
    got = [second.named_state()[name].item() for name in list(values)[4:]]
    assert got == pytest.approx(expected, rel=1e-6)


def test_no_gradient_reaches_an_earlier_block() -> None:
    task = Toy(depth=3)
    _, blocks, _ = blocks_of(task, config(local__blocks=3))
    message, _ = blocks[0].local_step(messages(task, 1)[0])
    assert not message.x.requires_grad
    before = state(blocks[:1])
    seen = []
    for parameter in blocks[0].parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient))
    message, _ = blocks[1].local_step(message)
    blocks[2].local_step(message)
    assert seen == []
    assert_equal(state(blocks[:1]), before)


def test_no_gradient_of_the_input_is_computed() -> None:
    """A block given an input that asks for gradients computes none: the matrix product for it never runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    task = Toy(depth=2)
    _, blocks, _ = blocks_of(task, config(local__blocks=2))
    message = messages(task, 1)[0]
    leaf = message.x.clone().requires_grad_()
    with Count() as count:
        blocks[0].local_step(message.with_x(leaf))
    assert leaf.grad is None
    # Two linear layers: 2 products forward, 2 for weights, 1 for the auxiliary network's input. No sixth.
    assert count.products == 5


def test_a_block_does_not_depend_on_those_after_it() -> None:
    task = Toy(depth=4, dropout=0.3)
    settings = config(local__blocks=4)
    _, whole, schedule = blocks_of(task, settings)
    _, part, _ = blocks_of(task, settings)
    batches = messages(task, 5)
    train(schedule, batches)
    for number, message in enumerate(batches):
        message = replace(message, sequence=number)
        for block in part[:2]:
            message, _ = block.local_step(message)
    assert_equal(state(part[:2]), state(whole[:2]))


def test_parameters_are_the_union_of_units_and_auxiliary_networks() -> None:
    chain, blocks, _ = blocks_of(Toy(depth=3), config(local__blocks=3))
    for block in blocks:
        modules = [unit.module for unit in block.units]
        modules += [block.auxiliary] if block.auxiliary else [chain.head.module]
        wanted = {id(p) for module in modules for p in module.parameters()}
        assert {id(p) for p in block.parameters()} == wanted
        assert {id(p) for group in block.optimizer.param_groups for p in group["params"]} == wanted
    model = {id(p) for p in chain.model.parameters()}
    assert model <= {id(p) for block in blocks for p in block.parameters()}


def test_auxiliary_networks_learn() -> None:
    task = Toy(depth=3)
    _, blocks, schedule = blocks_of(task, config(local__blocks=3))
    before = state(blocks)
    train(schedule, messages(task, 1))
    after = state(blocks)
    assert all(not torch.equal(after[n], before[n]) for n in after), "every parameter has moved"


def test_a_message_out_of_turn_is_refused() -> None:
    task = Toy()
    _, blocks, _ = blocks_of(task, config(local__blocks=2))
    with pytest.raises(BlockError, match="block 0 failed at micro-batch 1: ValueError: message 1 arrived, 0 expected"):
        blocks[0].local_step(replace(messages(task, 1)[0], sequence=1))


def test_a_failure_names_block_step_and_cause() -> None:
    task = Toy(depth=3)
    _, blocks, schedule = blocks_of(task, config(local__blocks=3))
    train(schedule, messages(task, 1))
    blocks[1].units[0].module.linear.weight.data = torch.zeros(6, 5)
    with pytest.raises(BlockError, match="block 1 failed at micro-batch 1: RuntimeError: .*shapes") as caught:
        schedule.step(replace(messages(task, 1)[0], sequence=1))
    assert (caught.value.block, caught.value.sequence) == (1, 1)
    assert caught.value.__cause__ is caught.value.cause


def test_dropout_masks_differ_between_blocks_and_steps() -> None:
    task = Toy(depth=2, dropout=0.5)
    _, blocks, schedule = blocks_of(task, config(local__blocks=2))
    masks = []
    for block in blocks:
        block.units[0].module.dropout.register_forward_hook(lambda module, args, output: masks.append(output == 0))
    train(schedule, [messages(task, 1)[0]] * 2)
    assert not any(torch.equal(a, b) for number, a in enumerate(masks) for b in masks[:number])


def test_random_state_before_a_run_does_not_matter() -> None:
    task = Toy(depth=2, dropout=0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)  # whatever happened before does not matter
        _, blocks, schedule = blocks_of(task, config(local__blocks=2))
        train(schedule, messages(task, 4))
        runs.append(state(blocks))
    assert_equal(runs[0], runs[1])
    assert derive(0, "step", 0, 1) != derive(0, "step", 1, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_bit(precision: str) -> None:
    task = Toy(depth=4, dropout=0.3, norm=True)
    states = []
    for recompute in ("none", "units"):
        settings = config(local__blocks=2, local__recompute=recompute, local__precision=precision)
        _, blocks, schedule = blocks_of(task, settings)
        train(schedule, messages(task, 5))
        states.append(state(blocks))
    assert_equal(*states)
    counters = [tensor for name, tensor in states[1].items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(tensor == 5 for tensor in counters), "each batch counts once, recomputed or not"


def test_clipping_is_per_block() -> None:
    task = Toy(depth=2)
    settings = config(local__blocks=2, optimizer__clip_norm=1e-3, optimizer__weight_decay=0.0, optimizer__lr=1.0)
    settings.optimizer.momentum, settings.optimizer.nesterov = 0.0, False
    _, blocks, schedule = blocks_of(task, settings)
    before = state(blocks)
    _, reports = schedule.step(messages(task, 1)[0])
    for block, report in zip(blocks, reports, strict=True):
        assert report.gradient_norm > 1e-3
        moved = [(tensor - before[name]).flatten() for name, tensor in block.named_state().items()]
        assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    task = Toy(depth=2)
    message = messages(task, 1)[0]
    _, whole, _ = blocks_of(task, config(local__blocks=2))
    _, parts, schedule = blocks_of(task, config(local__blocks=2))
    for block in whole:
        message, _ = block.local_step(message)
    message = messages(task, 1)[0]
    for number, (start, stop) in enumerate([(0, 3), (3, 6), (6, 8)]):
        micro = Message({"x": message.x[start:stop]}, message.targets[start:stop], sequence=number)
        schedule.step(micro, update=stop == 8, weight=(stop - start) / 8)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(tensor, state(parts)[name], rtol=1e-5, atol=1e-6)


def test_fp16_overflow_skips_one_block_only() -> None:
    task = Toy(depth=3)
    _, blocks, schedule = blocks_of(task, config(local__blocks=3, local__precision="fp16"))
    train(schedule, messages(task, 1))
    for block, scale in zip(blocks, (2.0**8, 2.0**60, 2.0**9), strict=True):
        block.scaler.update(new_scale=scale)
        block.skipped = 0
    scales = [block.scaler.get_scale() for block in blocks]
    before = [state([block]) for block in blocks]
    _, reports = schedule.step(replace(messages(task, 2)[1], sequence=1))
    moved = [
        any(not torch.equal(t, old[n]) for n, t in state([b]).items()) for b, old in zip(blocks, before, strict=True)
    ]
    assert moved == [True, False, True]
    assert [report.skipped for report in reports] == [0, 1, 0]
    after = [block.scaler.get_scale() for block in blocks]
    assert after[1] == scales[1] / 2
    assert (after[0], after[2]) == (scales[0], scales[2])


def test_key_features_are_kept_only_when_read() -> None:
    task = Toy(depth=3)
    for auxiliary, kept in (("greedy", 0), ({"type": "glcan", "reduce": 1}, 2)):
        _, blocks, _ = blocks_of(task, config(local__blocks=3, local__auxiliary=auxiliary))
        message = messages(task, 1)[0]
        for block in blocks:
            message, _ = block.local_step(message)
            assert not any(features.requires_grad for features in message.bank.values())
        # The last auxiliary network belongs to block 1, so only block 0's features are ever read.
        assert len(message.bank) == (1 if kept else 0)


def test_any_batch_size_works() -> None:
    task = Toy(depth=2)
    _, _, schedule = blocks_of(task, config(local__blocks=2))
    for number, size in enumerate((8, 1, 3)):
        schedule.step(Message({"x": task.x[:size]}, task.y[:size], sequence=number))


@pytest.mark.slow
def test_compiled_blocks_train_alike_however_many() -> None:
    """With a bank that grows from block to block, each block is a graph of its own: 10 are above dynamo's 8."""
    task = Toy(depth=10)
    losses = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        changes = {"local__blocks": 10, "local__auxiliary": {"type": "glcan", "reduce": 1}}
        _, _, schedule = blocks_of(task, config(local__compile=compiled, **changes))
        losses.append(torch.stack([torch.stack(step) for step in train(schedule, messages(task, 3))]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 10


def test_inplace_units_do_not_disturb_the_block_before() -> None:
    """A unit that changes its input in place works on the message, after the sender's backward is done."""
    task = Toy(depth=2)
    states = []
    for inplace in (False, True):
        _, blocks, schedule = blocks_of(task, config(local__blocks=2))
        blocks[1].units[0].module.norm = nn.ReLU(inplace=inplace)
        train(schedule, messages(task, 4))
        states.append(state(blocks))
    assert_equal(*states)


def test_a_unit_that_changes_its_input_cannot_be_recomputed() -> None:
    task = Toy(depth=3)
    _, blocks, schedule = blocks_of(task, config(local__schedule="end_to_end", local__recompute="units"))
    blocks[0].units[1].module.norm = nn.ReLU(inplace=True)
    with pytest.raises(Refusal, match="^block 0: unit 'layer1' changes its input in place"):
        train(schedule, messages(task, 1))


def test_checkpoint_sees_the_device_whose_random_state_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks for tensors among the arguments only, not inside a message."""
    import torch.utils.checkpoint as module

    seen = []
    real = module.checkpoint

    def spy(function: object, *args: object, **kwargs: object) -> object:
        seen.append(any(isinstance(arg, torch.Tensor) for arg in args))
        return real(function, *args, **kwargs)

    monkeypatch.setattr("engine.learning.recompute.checkpoint", spy)
    task = Toy(depth=3, dropout=0.5)
    _, _, schedule = blocks_of(task, config(local__schedule="end_to_end", local__recompute="units"))
    train(schedule, messages(task, 1))
    assert seen == [True, True], "all units but the last"
