"""What the pages tell their readers to do, done: snippets run, commands parse, links and figures' commits exist."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from engine.config import Config, config_file, parse, task_name
from engine.utilities.command import ToolParser
from engine.utilities.options import hints
from tasks import find_task

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "tasks/**/README.md", "benchmarks/results/README.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SAVED_AS = re.compile(r"# ([\w./]+\.(?:py|yaml))\n")
DEFAULT = "tasks/classification/configs/digits_resnet32_k16_glcan.yaml"
NEW_TASK = "tasks/regression/"
"""The task of docs/extend.md, which is not part of the repository."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text(page)) if language in languages]


def saved(page: str) -> dict[str, str]:
    """The files that a page asks its reader to save, by their paths."""
    found = ((SAVED_AS.match(code), code) for code in blocks(page, "python", "yaml"))
    return {match[1]: code for match, code in found if match}


def command_lines(page: str) -> list[str]:
    """Every command of the page's sh blocks, without comments and alternatives in brackets."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    without = (re.sub(r"(^| )#.*|\[--.*\]", "", line).strip() for line in lines)
    return [line for line in without if line]


def run(argv: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# Links, anchors, files, commits.


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text(page)), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", text(page))):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(os.path.relpath(target.resolve(), ROOT)), link


@pytest.mark.parametrize("page", PAGES)
def test_configs_it_names_exist(page: str) -> None:
    for path in re.findall(r"\btasks/[\w/]+\.(?:yaml|yml|py)\b", text(page)):
        assert (ROOT / path).is_file() or path in saved("docs/extend.md"), path


@pytest.mark.parametrize("page", PAGES)
def test_modules_it_names_exist(page: str) -> None:
    for name in re.findall(r"`engine\.([\w.]+)", text(page)) if page != "CHANGELOG.md" else ():
        parts = name.rstrip(".").split(".")
        path = ROOT / "engine" / "/".join(parts[:2])  # what follows is in the module
        assert any(p.exists() for p in (path, path.with_suffix(".py"), path.parent.with_suffix(".py"))), name


@pytest.mark.parametrize("page", PAGES)
def test_commits_it_names_exist(page: str) -> None:
    named = re.findall(r"\b(?=\w*[a-f])(?=\w*\d)[0-9a-f]{7}\b", text(page))
    if not named:
        return
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no history to look commits up in")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("the history is not all here")
    known = run(["git", "log", "--format=%h", "--abbrev=7"], ROOT).split()
    assert not set(named) - set(known)


def test_the_front_page_is_a_page() -> None:
    assert len(text("README.md").splitlines()) <= 150


# Commands: each is parsed by the tool it calls, which then stops.


class Parsed(Exception):
    """What a tool makes of its words, instead of working."""

    def __init__(self, rest: list[str]) -> None:
        super().__init__(rest)
        self.rest = rest


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ToolParser.parse_known_args

    def stop(self: ToolParser, args: Any = None, namespace: Any = None) -> NoReturn:
        raise Parsed(plain(self, args, namespace)[1])

    monkeypatch.setattr(ToolParser, "parse_known_args", stop)


def overrides(main: Callable[[list[str]], Any], argv: list[str]) -> list[str]:
    """What a tool leaves to the config."""
    with pytest.raises(Parsed) as stopped:
        main(argv)
    return stopped.value.rest  # type: ignore[no-any-return]


def check_config(argv: list[str]) -> None:
    """Load the config with its overrides, as the tool would; of a task that is only on a page, look at the keys."""
    file = config_file(argv)
    assert file is not None, argv
    if str(file) in saved("docs/extend.md"):
        return
    if "--help" in argv:
        argv = [word for word in argv if word != "--help"]
    parse(find_task(task_name(argv)).config, argv)


def check_overrides_of_run(name: str, argv: list[str]) -> None:
    """Of a run that exists only on the page, the config is the one of its name."""
    configs = [*ROOT.glob(f"tasks/*/configs/{name}.yaml"), *ROOT.glob(f"tasks/*/*/configs/{name}.yaml")]
    if not configs:
        assert name in ("NAME", "OTHER", "last", "tiny", "lora") or any(
            name in path for path in saved("docs/extend.md")
        ), name
        return
    known = hints(find_task(task_name(["--config", str(configs[0])])).config)
    for word in argv:
        assert not word.startswith("--") or word[2:] in known, word


def check_command(line: str) -> None:
    words = [DEFAULT if word == "FILE" else word for word in shlex.split(line)]
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "torchrun":
        words = ["python", *words[next(n for n, word in enumerate(words) if word.startswith("tools/")) :]]
    if words[0] == "make":
        made = re.findall(r"^([\w-]+):", text("Makefile"), re.M)
        assert words[1] in made, f"make {words[1]}"
    elif words[0] == "." or words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:])
    elif words[:3] == ["python", "-m", "basicsr.train"]:
        assert words[3] == "-opt"
    elif words[:2] == ["python", "-m"]:
        rest = overrides(importlib.import_module(words[2]).main, words[3:])
        if rest:
            check_config(rest)
    elif words[:2] == ["python", "tools/train.py"]:
        check_config([word for word in words[2:] if word != "OVERRIDES"])
    else:
        assert words[0] == "python", line
        assert (ROOT / words[1]).is_file(), line
        argv = words[2:]
        rest = overrides(importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main, argv)
        if "--run" in argv:
            check_overrides_of_run(Path(argv[argv.index("--run") + 1]).name, rest)
        else:
            check_config(rest)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, parsing_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    filled = {"CUT": "[stage3]", "PARTS": "4"}
    for line in command_lines(page):
        try:
            check_command(re.sub(r"\b(CUT|PARTS)\b", lambda match: filled[match[1]], line))
        except Exception as error:
            raise AssertionError(f"{page}: {line}: {error}") from error


@pytest.mark.parametrize("page", PAGES)
def test_keys_it_names_exist(page: str) -> None:
    """`--section.key` and `section.key` in running text are keys of a config."""
    known = hints(Config)
    named = re.findall(r"`(?:--)?((?:local|optimizer|train|placement|output)\.[a-z_.]+)", FENCE.sub("", text(page)))
    for key in named:
        old = key == "local.checkpoint"  # is understood, and pages say so
        assert key.rstrip(".") in known or key.startswith("local.auxiliary.") or old or key.endswith("."), key


# Snippets.


def prepare_train(folder: Path) -> None:
    from safetensors.torch import save_file

    from tasks.classification.resnet import ResNet

    (folder / "runs").mkdir()
    save_file(ResNet(32, classes=10).state_dict(), folder / "runs/resnet32.safetensors")


def prepare_super_resolution(folder: Path) -> None:
    import torch
    from basicsr.archs.edsr_arch import EDSR

    import tasks.super_resolution  # noqa: F401  mends `import basicsr`

    network = EDSR(3, 3, num_feat=32, num_block=16, upscale=2)
    (folder / "runs").mkdir()
    torch.save({"params": network.state_dict()}, folder / "runs/edsr.pth")


def prepare_diffusion(folder: Path) -> None:
    """A tiny, untrained Stable Diffusion with an untrained prompt, and a photograph."""
    from PIL import Image

    from tasks.style_transfer.diffusion.base import Base, quiet
    from tests.tasks.style_transfer.pipelines import pipeline

    base = Base("tiny")
    with quiet():
        base.save(folder / "checkpoint", base.unet(), base.vae())
    pipeline("artbank", folder / "checkpoint", "vangogh").bank.save(folder / "bank.safetensors")
    Image.new("RGB", (64, 48), "blue").save(folder / "photograph.jpg")


PREPARED: dict[str, Callable[[Path], None]] = {
    "docs/train.md": prepare_train,
    "tasks/super_resolution/README.md": prepare_super_resolution,
    "tasks/style_transfer/diffusion/README.md": prepare_diffusion,
}
SMALLER = {
    # In place of what has to be downloaded, or needs a GPU, or takes long.
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "checkpoint",
    "pipeline.enable_model_cpu_offload()": "pipeline.to('cpu')",
    ".resize((768, 512))": ".resize((64, 64))",
    "strength=0.7)": "strength=0.7, num_inference_steps=2)",
}


def snippets() -> Iterator[Any]:
    for page in PAGES:
        for number, code in enumerate(blocks(page, "python")):
            if not SAVED_AS.match(code) and page != "docs/extend.md":
                yield pytest.param(page, code, id=f"{page}-{number}")


@pytest.mark.parametrize(("page", "code"), [*snippets()])
def test_snippets_run(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page in PREPARED:
        PREPARED[page](tmp_path)
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    before = os.environ.copy()
    try:
        exec(compile(code, page, "exec"), {"__name__": "snippet"})
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("page", ["tasks/detection/README.md", "tasks/super_resolution/README.md"])
def test_local_in_another_frameworks_config(page: str) -> None:
    from tasks.local_settings import local_settings

    if page == "tasks/detection/README.md":
        given: dict[str, Any] = {}
        exec(next(code for code in blocks(page, "python") if "LocalRunner" in code), given)
        local = given["local"]
    else:
        local = yaml.safe_load(next(code for code in blocks(page, "yaml") if "LocalSRModel" in code))["local"]
    assert local_settings(local, {}, 0, ("tail_parts",)).local.blocks == 4


# Files that the README and docs/extend.md have their readers save, in a copy of the repository.

SMALL = "--model.name resnet8 --local.blocks 3 --data.batch 32 --data.size 16 --data.subset 200 --train.steps 3"
NEW_CONFIG = f"{NEW_TASK}configs/diabetes_mlp_k2_glcan.yaml"
ONE_PROCESS = """
import json, runpy, sys
for argv in json.loads(sys.argv[1]):
    print("==", *argv, flush=True)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
"""


def commands_of_extend() -> tuple[list[str], list[str]]:
    """Those for the new task, and the one for the new auxiliary network."""
    lines = [line for line in command_lines("docs/extend.md") if line.startswith("python ")]
    new = [line for line in lines if "diabetes" in line]
    return new, [line for line in lines if line not in new]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with everything that its readers are told to add to it."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("engine", "tasks", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.jpg"))
    for path, code in {**saved("README.md"), **saved("docs/extend.md")}.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text(code)
    own = saved("docs/extend.md")["engine/learning/auxiliary/bottleneck.py"].replace('@register("bottleneck")\n', "")
    (copy / "my_auxiliary.py").write_text(own)
    registry = copy / "engine/learning/schedules/__init__.py"
    (the_import,) = (code for code in blocks("docs/extend.md", "python") if code.count("\n") == 1)
    (the_line,) = (code for code in blocks("docs/extend.md", "") if "Timed" in code)
    head, tail = registry.read_text().split("SCHEDULES: dict[str, type[Schedule]] = {\n")
    registry.write_text(f"{head}{the_import}\nSCHEDULES: dict[str, type[Schedule]] = {{\n{the_line}{tail}")
    return copy


@pytest.fixture(scope="module")
def shown(extended: Path) -> dict[str, str]:
    """What each of these commands prints, run one after another in one process, which imports everything once."""
    network = next(line for line in command_lines("README.md") if "--model.name my_network:chain" in line)
    new, (auxiliary,) = commands_of_extend()
    wanted = {
        "network": f"{network} --train.steps 3 --output.name network",
        **{f"new {number}": line for number, line in enumerate(new)},
        "old timed": f"{auxiliary} {SMALL} --local.schedule timed --output.name old",
        "new timed": f"tools/train.py --config {NEW_CONFIG} --train.epochs 1 --local.schedule timed --local.auxiliary "
        "bottleneck --output.name new",
        "own": f"tools/train.py --config {NEW_CONFIG} --train.epochs 1 --local.auxiliary my_auxiliary:Bottleneck "
        "--output.name own",
    }
    argv = [shlex.split(line.removeprefix("python ")) for line in wanted.values()]
    printed = run([sys.executable, "-c", ONE_PROCESS, json.dumps(argv)], extended, PYTHONPATH=str(extended))
    return dict(zip(wanted, re.split(r"^== .*\n", printed, flags=re.M)[1:], strict=True))


def test_your_own_network_in_twenty_lines(shown: dict[str, str]) -> None:
    code = saved("README.md")["my_network.py"]
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 20
    assert "layer2" in shown["network"]


def test_a_new_task_works_with_every_tool(shown: dict[str, str], extended: Path) -> None:
    assert len([key for key in shown if key.startswith("new ")]) >= 4
    assert float(re.findall(r"rmse ([\d.]+) after", shown["new 0"])[0]) < 70, "predicting the mean errs by about 77"
    assert (extended / "diabetes.safetensors").is_file()


def test_a_new_auxiliary_network_and_schedule_work_with_old_and_new_tasks(shown: dict[str, str]) -> None:
    assert re.search(r"ms of each block: [\d.]+, [\d.]+, [\d.]+", shown["old timed"])
    assert re.search(r"ms of each block: [\d.]+, [\d.]+", shown["new timed"])
    registered, named = (re.findall(r"rmse [\d.]+ after", shown[key]) for key in ("new timed", "own"))
    assert registered == named != []


def test_the_other_snippets_of_extend_run() -> None:
    for code in blocks("docs/extend.md", "python"):
        if not SAVED_AS.match(code) and code.count("\n") > 1:
            exec(compile(code, "docs/extend.md", "exec"), {"__name__": "snippet"})


def test_every_hook_of_a_task_is_on_the_page() -> None:
    from engine.task import Task

    page = text("docs/extend.md")
    hooks = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    for hook in hooks - {"batching"}:
        assert re.search(rf"`{hook}\b", page), f"docs/extend.md does not name the hook {hook!r}"
