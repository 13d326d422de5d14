import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import tasks
from engine.config import Config, config_file, parse, save, task_name
from engine.utilities.options import hints
from tasks import find_task
from tasks.classification.config import ClassificationConfig
from tasks.local_settings import local_settings

CONFIGS = sorted(Path("tasks").glob("*/configs/*.yaml"))


def read(tmp_path: Path, text: str, *overrides: str) -> ClassificationConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return parse(ClassificationConfig, ["--config", str(path), *overrides])


def test_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "task: classification\nlocal: {blocks: 3}\n", "--local.blocks", "5", "--train.steps=7")
    assert (config.local.blocks, config.train.steps, config.optimizer.lr) == (5, 7, 0.1)


def test_a_number_of_blocks_has_no_effect_beside_a_cut(tmp_path: Path) -> None:
    """Typed after a config that cuts by names, it was ignored without a word."""
    cut = "local: {cut: [layer2.0]}"
    for words in (["--local.blocks", "8"], ["--local.balance", "parameters"]):
        with pytest.raises(
            ValueError, match=rf"^{words[0][2:]}: has no effect beside local.cut; leave it out, or add "
        ):
            read(tmp_path, cut, *words)
    assert read(tmp_path, cut, "--local.cut", "[]", "--local.blocks", "8").local.blocks == 8
    assert read(tmp_path, cut, "--local.blocks", "2").local.cut == ["layer2.0"]


def test_what_is_saved_reads_back_the_same(tmp_path: Path) -> None:
    text = "local: {auxiliary: {type: glcan, width: 0.5}, balance: [1, 2.5], cut: [a, b]}"
    config = read(tmp_path, text)
    save(config, tmp_path / "saved.yaml")
    assert parse(ClassificationConfig, ["--config", str(tmp_path / "saved.yaml")]) == config
    assert set(hints(ClassificationConfig)) >= set(yaml.safe_load((tmp_path / "saved.yaml").read_text()))


def test_options_of_the_auxiliary_network_from_the_command_line(tmp_path: Path) -> None:
    text = "local: {auxiliary: {type: glcan, depth: 1}}"
    assert read(tmp_path, text, "--local.auxiliary.width", "0.5").local.auxiliary == {
        "type": "glcan",
        "depth": 1,
        "width": 0.5,
    }
    assert read(tmp_path, text, "--local.auxiliary", "dgl").local.auxiliary == "dgl"
    named = read(tmp_path, "local: {auxiliary: glcan}", "--local.auxiliary.depth", "1")
    assert named.local.auxiliary == {"type": "glcan", "depth": 1}
    both = ["--local.auxiliary", "dgl", "--local.auxiliary.width", "2"]
    for content in (text, "local: {auxiliary: glcan}"):
        assert read(tmp_path, content, *both).local.auxiliary == {"type": "dgl", "width": 2}, "never silently glcan's"
    with pytest.raises(ValueError, match="options come after the name"):
        read(tmp_path, text, *both[2:], *both[:2])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("local: {blcks: 3}", [], r"c.yaml: unknown key 'local.blcks', did you mean 'local.blocks'\?$"),
        ("lokal: {blocks: 3}", [], r"unknown key 'lokal', did you mean 'local'"),
        ("{}", ["--local.blcks", "3"], r"^unknown key 'local.blcks', did you mean 'local.blocks'"),
        ("{}", ["--data.bach=3"], r"^unknown key 'data.bach', did you mean 'data.batch'"),
        ("local: {blocks: many}", [], r"local.blocks: 'many' is not a whole number"),
        ("{}", ["--train.epochs", "1.5"], r"train.epochs: '1.5' is not a whole number"),
        ("local: {precision: fp8}", [], r"c.yaml: local.precision: 'fp8' is none of fp32, bf16, fp16"),
        ("{}", ["--optimizer.name", "sdg"], r"^optimizer.name: 'sdg' is none of sgd, adamw; did you mean 'sgd'\?$"),
        (
            "{}",
            ["--local.balance", "unit"],
            r"is not a list of numbers, and none of units, parameters; did you",
        ),
        ("{}", ["--placement.stages", "[a]"], r"^placement.stages: '\[a\]' is not a list of whole numbers$"),
        ("{}", ["--optimizer.lr", "-1e-3"], r"^optimizer.lr: -0.001 must be above 0$"),
        ("{}", ["--train.epochs"], r"^--train.epochs: no value given$"),
        ("{}", ["train.epochs", "3"], r"^'train.epochs' belongs to no key; write --KEY VALUE"),
        ("{}", ["--train", "3"], r"^train: '3' is not a section of keys$"),
        ("{}", ["--local.lr", "1"], r"^unknown key 'local.lr', did you mean 'optimizer.lr'\?$"),
        ("{}", ["--output.xyz", "1"], r"^unknown key 'output.xyz'; known: output.root, output.name$"),
        ("data: {batch: }", [], r"c.yaml: data.batch: no value given"),
        ("local: {blocks:3}", [], r"unknown key 'local.blocks:3': YAML needs a space after the colon: blocks: 3$"),
        ("local:\n  blocks:3", [], r"this is str: YAML needs a space after the colon: blocks: 3$"),
        ("local:\n  blocks:3\n  cut: []", [], r"not YAML: .*: YAML needs a space after the colon: blocks: 3$"),
        ("local: {auxiliary: {type:glcan}}", [], r"local.auxiliary: YAML needs a space after the colon: type: glcan$"),
        ("{}", ["--local.auxiliary", "{type:glcan}"], r"^local.auxiliary: YAML needs a space after the colon: type: g"),
        ("{}", ["--optimizer.lr", "0"], r"optimizer.lr: 0.0 must be above 0"),
        ("{}", ["--train.keep", "1"], r"train.keep: 1 is too small; the least is 2"),
        ("{}", ["--data.batch", "0"], r"data.batch: 0 is too small"),
        ("{}", ["--train.accumulate", "3"], r"train.accumulate: 3 does not divide data.batch, 128"),
        ("{}", ["--optimizer.schedule", "step"], r"optimizer.milestones: empty"),
        ("{}", ["--optimizer.momentum", "0"], r"optimizer.nesterov: needs optimizer.momentum above 0"),
        ("{}", ["--model.classes", "-1"], r"model.classes: -1 is too small"),
        ("local: {compile: true, recompute: units}", [], r"local.compile: cannot be combined with local.recompute"),
        ("- a list", [], r"a config is a mapping of sections"),
        ("a: [", [], r"not YAML"),
        ("local: 3", [], r"c.yaml: local: a section is a mapping of keys, this is int"),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(tmp_path: Path, text: str, overrides: list, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "FILE"], "FILE: train.epochs: 'many' is not a whole number"),
        (["--config", "FILE", "--train.epochs", "2"], "FILE: train.epochs: 'many' is not a whole number"),
        (["--train.epochs=2", "--config=FILE"], "FILE: train.epochs: 'many' is not a whole number"),
        (["--train.epochs", "few", "--train.epochs", "2"], "train.epochs: 'few' is not a whole number"),
    ],
)
def test_the_value_that_is_wrong_is_named_with_its_file(words: list[str], message: str, tmp_path: Path) -> None:
    """The command line's was blamed for the file's."""
    file = tmp_path / "wrong.yaml"
    file.write_text("train: {epochs: many}\n")
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FILE', str(file)))}$"):
        parse(Config, [word.replace("FILE", str(file)) for word in words])


def test_config_may_be_given_with_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("local: {blcks: 3}")
    with pytest.raises(ValueError, match="unknown key 'local.blcks', did you mean 'local.blocks'"):
        parse(ClassificationConfig, [f"--config={tmp_path / 'c.yaml'}"])
    assert config_file([f"--config={tmp_path / 'c.yaml'}"]) == tmp_path / "c.yaml"


def test_missing_file_and_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file: nowhere.yaml"):
        task_name(["--config", "nowhere.yaml"])
    file = tmp_path / "c.yaml"
    for text, message in (
        ("tsk: classification", "unknown key 'tsk', did you mean 'task'?"),
        ("a: 3", "task: no value"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {message}')}"):
            task_name(["--config", str(file)])
    with pytest.raises(ValueError, match="--config: no file given"):
        task_name([])
    with pytest.raises(ValueError, match="'clasification' is none of .*; did you mean 'classification'"):
        find_task("clasification")


def test_a_task_without_configs_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in ("classification/configs", "style/scin/configs", "regression"):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made.removesuffix("/configs") / "__init__.py").touch()
    (tmp_path / "style/__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"^task: tasks/regression has no configs/ folder, by which tasks are found$"):
        find_task("regression")
    for name in ("style", "regresion", ""):
        with pytest.raises(ValueError, match=f"^task: '{name}' is none of classification, style/scin"):
            find_task(name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_that_is_shipped_is_valid(path: Path) -> None:
    argv = ["--config", str(path)]
    parse(find_task(task_name(argv)).config, argv)


def test_every_key_has_a_docstring() -> None:
    """Each field's effect is said below it; --help shows it."""
    import ast
    import inspect

    import engine.config
    import tasks.classification.config

    for module in (engine.config, tasks.classification.config):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "ClassificationConfig":
                body = node.body
                for item, after in pairwise(body):
                    if isinstance(item, ast.AnnAssign) and not ast.unparse(item.annotation).endswith("Config"):
                        assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(item.target)}"


@pytest.mark.parametrize(("old", "new"), [("true", "units"), ("false", "none")])
def test_the_old_key_of_recomputation_is_understood(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.yaml").write_text(
        f"task: classification\nlocal: {{checkpoint: {old}, blocks: 2}}\noutput: {{name: '1e5'}}\n"
    )
    assert parse(Config, ["--config", str(tmp_path / "old.yaml")]).output.name == "1e5", "still text"
    capsys.readouterr()
    for argv in (["--config", str(tmp_path / "old.yaml")], ["--local.checkpoint", old], [f"--local.checkpoint={old}"]):
        config = parse(Config, argv)
        assert config.local.recompute == new
        assert f"local.checkpoint {old} is now local.recompute {new}" in capsys.readouterr().out
    assert parse(Config, ["--config", str(tmp_path / "old.yaml"), "--local.recompute", "none"]).local.blocks == 2
    (tmp_path / "old.yaml").write_text("local: {checkpoint: false, recompute: units}\n")
    with pytest.raises(
        ValueError, match="local.checkpoint: this is the old name of local.recompute, and both are given"
    ):
        parse(Config, ["--config", str(tmp_path / "old.yaml")])
    with pytest.raises(ValueError, match="local.checkpoint: 'some' is neither true nor false; the key is now local.re"):
        parse(Config, ["--local.checkpoint", "some"])


def test_the_old_key_in_another_frameworks_config() -> None:
    """The section ``local`` of MMDetection's and BasicSR's configs; the user's own mapping stays as it is."""
    local = {"blocks": 2, "checkpoint": True}
    assert local_settings(local, {}, seed=0).local.recompute == "units"
    assert local == {"blocks": 2, "checkpoint": True}
    with pytest.raises(
        ValueError, match="local.checkpoint: this is the old name of local.recompute, and both are given"
    ):
        local_settings({**local, "recompute": "none"}, {}, seed=0)
