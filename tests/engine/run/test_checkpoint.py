"""Saving, resuming and exporting: no bit lost, no checkpoint half written, nothing of another model loaded."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from engine.config import Config
from engine.learning.optimizer import state_by_name
from engine.run.checkpoint import Incomplete, Position, check_names, find_checkpoint, read_state
from engine.run.export import export_model
from engine.run.resume import load_model
from engine.run.save import save_checkpoint
from engine.run.trainer import Trainer
from tests.toy import Toy, assert_equal, blocks_of, config, load_checkpoint, state


def trainer(room: Path, **changes: object) -> Trainer:
    settings = config(train__epochs=3, train__save_every=1, train__log_every=1, local__blocks=2, **changes)
    settings.output.root, settings.output.name = str(room), "run"
    return Trainer(settings, Toy(dropout=0.2, norm=True))


def everything(made: Trainer) -> dict[str, torch.Tensor]:
    found = state(made.blocks)
    for block in made.blocks:
        found |= state_by_name(block.optimizer, list(block.named_state().items()))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 11])
def test_killed_and_resumed_gives_the_bits_of_the_uninterrupted_run(tmp_path: Path, stop: int, optimizer: str) -> None:
    """4 steps an epoch: 1, 3 and 6 stop within one, 4 at its end, 11 just before the run's."""
    changes = {"optimizer__name": optimizer, "optimizer__warmup_epochs": 1.0}
    whole = trainer(tmp_path / "whole", **changes)
    whole.fit()
    part = trainer(tmp_path / "part", **changes, train__steps=stop)
    part.fit()
    rest = trainer(tmp_path / "part", **changes, train__resume="auto")
    assert rest.position.step == stop
    rest.fit()
    assert_equal(everything(rest), everything(whole))
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("whole", "part")]
    losses = [[json.loads(line)["train_loss"] for line in text if "train_loss" in line] for text in lines]
    assert losses[0] == losses[1]


def test_scaler_and_skipped_updates_come_back(tmp_path: Path) -> None:
    first = trainer(tmp_path, local__precision="fp16", train__steps=3)
    first.fit()
    second = trainer(tmp_path, local__precision="fp16", train__resume="auto")
    assert [b.scaler.get_scale() for b in second.blocks] == [b.scaler.get_scale() for b in first.blocks]
    assert [b.skipped for b in second.blocks] == [b.skipped for b in first.blocks] != [0, 0]


def test_other_blocks_keep_the_model_and_start_auxiliary_networks_afresh(tmp_path: Path) -> None:
    first = trainer(tmp_path, train__steps=3)
    first.fit()
    said: list[str] = []
    settings = config(local__blocks=4)
    chain, blocks, _ = blocks_of(Toy(dropout=0.2, norm=True), settings)
    fresh = state(blocks)
    position = load_checkpoint(tmp_path / "run/checkpoints/step_3", blocks, "greedy", said.append)
    assert position == first.position
    assert_equal(dict(chain.model.state_dict()), dict(first.chain.model.state_dict()))
    for name, tensor in state(blocks).items():
        if name.startswith("auxiliary."):
            assert torch.equal(tensor, fresh[name])
    assert len(said) == 1
    assert "auxiliary networks start fresh" in said[0]
    momentum = first.blocks[0].optimizer.state[first.chain.model.layers[0].linear.weight]["momentum_buffer"]
    ours = blocks[0].optimizer.state[chain.model.layers[0].linear.weight]["momentum_buffer"]
    assert torch.equal(momentum, ours), "the model's optimizer state goes on by name"
    assert not any(p in blocks[0].optimizer.state for p in blocks[0].auxiliary.parameters())


def saved(tmp_path: Path) -> Path:
    made = trainer(tmp_path, train__steps=2)
    made.fit()
    return tmp_path / "run/checkpoints"


def test_a_file_cut_short_at_any_place_falls_back_to_the_one_before(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    names = [path.name for path in (folder / "step_2").iterdir()]
    assert {"state.json", "model.0.safetensors", "optimizer.1.safetensors", "auxiliary.0.safetensors"} <= set(names)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        path = folder / "step_2" / name
        whole = path.read_bytes()
        for length in {0, len(whole) - 1, int(torch.randint(len(whole), (), generator=generator))}:
            path.write_bytes(whole[:length])
            said: list[str] = []
            assert find_checkpoint(folder, said.append) == folder / "step_1"
            assert "checkpoint is damaged" in said[0]
            assert "step_2" in said[0]
        path.write_bytes(whole)
    assert find_checkpoint(folder, print) == folder / "step_2"


def test_an_altered_byte_or_a_missing_file_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "step_2" / "model.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Incomplete, match=r"model.1.safetensors is missing, short or altered"):
        read_state(folder / "step_2")
    path.unlink()
    with pytest.raises(Incomplete, match=r"model.1.safetensors"):
        read_state(folder / "step_2")


def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file the kill comes after, the newest complete checkpoint is the old one, and saving works again."""
    import engine.run.save as module

    folder = saved(tmp_path)
    made = trainer(tmp_path, train__resume="auto")
    real = module.save_file

    class Killed(BaseException):
        pass

    for fatal in range(6):
        count = 0

        def save_file(tensors: object, path: Path, fatal: int = fatal) -> None:
            nonlocal count
            if count == fatal:
                path.write_bytes(b"half")
                raise Killed
            count += 1
            real(tensors, path)

        monkeypatch.setattr(module, "save_file", save_file)
        with pytest.raises(Killed):
            save_checkpoint(folder, made.blocks, Position(step=3), "greedy", 2)
        assert find_checkpoint(folder, print) == folder / "step_2"
    monkeypatch.setattr(module, "save_file", real)
    assert save_checkpoint(folder, made.blocks, Position(step=3), "greedy", 2) == folder / "step_3"
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_3"]


def test_resume_after_damage_says_so_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path)
    (folder / "step_2" / "state.json").write_text("{")
    made = trainer(tmp_path, train__resume="auto")
    assert made.position.step == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint is damaged" in said
    assert "step_2" in said
    assert "resumed" in said


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    _, blocks, _ = blocks_of(Toy(depth=3, norm=True), config(local__blocks=2))
    before = state(blocks)
    with pytest.raises(ValueError, match=r"step_2 belongs to another model: 'layers.3[.\w]+' is \(.*\) in it, nothing"):
        load_checkpoint(folder / "step_2", blocks, "greedy", print)
    assert_equal(state(blocks), before)
    with pytest.raises(ValueError, match=r"'layers.0.norm.weight' is \(6,\) in it, \(5,\) in this network"):
        load_model(folder / "step_2", Toy(width=5, norm=True).build_chain().model)


def test_export_is_the_plain_network(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = trainer(tmp_path, train__steps=3)
    made.fit()
    made.chain.model.eval()
    for name, load in (("m.safetensors", load_file), ("m.pth", lambda path: torch.load(path, weights_only=True))):
        export_model(made.chain.model, tmp_path / "out" / name)
        content = load(tmp_path / "out" / name)
        assert not [key for key in content if "auxiliary" in key]
        plain = Toy(norm=True).build_chain().model
        plain.load_state_dict(content, strict=True)
        x = torch.randn(5, 6)
        assert torch.equal(plain.eval()(x), made.chain.model(x))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m.pth", "m.safetensors"]


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert {path.suffix for path in (folder / "step_2").iterdir()} == {".json", ".safetensors"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    made = trainer(tmp_path, train__keep=3)
    made.fit()
    steps = sorted(int(path.name.split("_")[1]) for path in (tmp_path / "run/checkpoints").iterdir())
    assert steps == [10, 11, 12]
    assert Config().train.keep == 2


def test_names_are_compared_before_loading() -> None:
    model = Toy(depth=1).build_chain().model
    good = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(model, good, "here")
    with pytest.raises(ValueError, match="here belongs to another model: 'extra' is"):
        check_names(model, {**good, "extra": (1,)}, "here")


def test_resume_with_other_steps_an_epoch_is_refused(tmp_path: Path) -> None:
    """The position in the epoch would mean another batch, or none: the loop never ended."""
    saved(tmp_path)
    task = Toy(dropout=0.2, norm=True)
    task.batch = 16
    settings = config(local__blocks=2, train__resume="auto")
    settings.output.root, settings.output.name = str(tmp_path), "run"
    with pytest.raises(ValueError, match=r"step_2 has 4 steps an epoch, this config 2; keep data.batch"):
        Trainer(settings, task)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"optimizer.name: .*step_2 was trained with SGD, the config says AdamW"):
        trainer(tmp_path, train__resume="auto", optimizer__name="adamw")


def test_resume_from_an_earlier_checkpoint_sets_later_ones_aside(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    made = trainer(tmp_path, train__resume=str(folder / "step_1"), train__steps=2)
    assert made.folder == tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "superseded_step_2"]
    made.fit()
    assert find_checkpoint(folder, print) == folder / "step_2"


def test_resume_from_another_runs_checkpoint_is_a_new_run(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    shutil.copytree(folder / "step_2", tmp_path / "elsewhere/step_2")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    made = trainer(tmp_path, train__resume=str(tmp_path / "elsewhere/step_2"), train__steps=3)
    assert made.folder == tmp_path / "run-2"
    made.fit()
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert [path.name for path in (made.folder / "checkpoints").iterdir()] == ["step_3"]


def test_auxiliary_networks_of_another_shape_start_afresh(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state_file = folder / "step_2" / "state.json"
    said: list[str] = []
    _, blocks, _ = blocks_of(Toy(norm=True), config(local__blocks=2, local__auxiliary={"type": "glcan", "reduce": 1}))
    content = json.loads(state_file.read_text())
    content["auxiliary"] = "glcan"  # a default changed since: the same name, another network
    del content["seal"]
    state_file.write_text(json.dumps(content))
    load_checkpoint(folder / "step_2", blocks, "glcan", said.append)
    assert "auxiliary networks start fresh" in said[0]


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state_file = folder / "step_2" / "state.json"
    content = json.loads(state_file.read_text())
    state_file.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="step_2 has format 2; this version of the engine reads format 1"):
        read_state(folder / "step_2")
    state_file.write_text("[]")
    with pytest.raises(Incomplete, match="step_2: state.json"):
        read_state(folder / "step_2")


def test_seconds_add_up_over_a_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, train__steps=2)
    first.position.seconds = 100.0
    first.fit()
    assert trainer(tmp_path, train__resume="auto").fit()["seconds"] > 100


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere", print) is None
    shutil.rmtree(tmp_path)
    assert find_checkpoint(tmp_path, print) is None


def test_an_evaluation_that_a_kill_cut_short_is_made_after_resuming(tmp_path: Path) -> None:
    """An epoch is saved before it is evaluated, and the resumed run went on with the next epoch at once."""

    def scored(room: Path) -> list[int]:
        lines = map(json.loads, (room / "run/metrics.jsonl").read_text().splitlines())
        return [line["epoch"] for line in lines if "error" in line]

    killed = trainer(tmp_path)
    killed.course._evaluation = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    killed.writer.wait()
    assert scored(tmp_path) == []
    trainer(tmp_path, train__resume="auto").fit()
    assert scored(tmp_path) == [1, 2, 3]
    trainer(tmp_path / "whole", train__keep=12).fit()
    assert scored(tmp_path / "whole") == [1, 2, 3]
    # From the end of an epoch that was evaluated, nothing is evaluated twice, also into another run's folder.
    step = str(tmp_path / "whole/run/checkpoints/step_8")
    trainer(tmp_path / "whole", train__keep=12, train__resume=step).fit()
    assert scored(tmp_path / "whole") == [1, 2, 3]
    trainer(tmp_path / "other", train__resume=step).fit()
    assert scored(tmp_path / "other") == [3]


EDITS = {
    "a negative step": lambda state: state["position"].update(step=-5),
    "half a step": lambda state: state["position"].update(step=1.5),
    "beyond the epoch": lambda state: state["position"].update(step_in_epoch=99),
    "an unknown key": lambda state: state["position"].update(steps=1),
    "no position": lambda state: state.pop("position"),
    "no cut": lambda state: state.pop("cut"),
    "no optimizer": lambda state: state.pop("optimizer"),
    "no counters": lambda state: state["blocks"].pop(),
    "another auxiliary network": lambda state: state.update(auxiliary="dgl"),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_no_checkpoint(edit: str, sealed: bool, tmp_path: Path) -> None:
    """Training went on from step -5. Checkpoints of earlier versions have no checksum, but must make sense."""
    trainer(tmp_path, train__steps=3).fit()
    folder = tmp_path / "run/checkpoints"
    path = folder / "step_3/state.json"
    state = json.loads(path.read_text())
    if not sealed:
        del state["seal"]
    path.write_text(json.dumps(state))
    assert read_state(folder / "step_3") == state
    EDITS[edit](state)
    path.write_text(json.dumps(state))
    if edit == "another auxiliary network" and not sealed:
        assert read_state(folder / "step_3")  # nothing tells
        return
    with pytest.raises(Incomplete, match="step_3: state.json"):
        read_state(folder / "step_3")
    said: list[str] = []
    assert find_checkpoint(folder, said.append) == folder / "step_2"
    assert "trying the one before it" in said[0]
    resumed = trainer(tmp_path, train__resume="auto")
    assert resumed.position.step == 2
