"""torchrun with several ranks: as a user starts them, on one host and on two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tools.commands import ALONE, ROOT, SMOKE, call, typed
from tests.toy import assert_equal

CONFIG = [*SMOKE, "--local.blocks", "4"]
LONG = [*CONFIG, "--train.epochs", "8", "--train.steps", "0", "--placement.stages", "[0,0,1,1]"]


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words]


def start(job: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        job, cwd=folder, env={**ALONE, **environment}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


@contextmanager
def running(job: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that does not outlive the test."""
    process = start(job, folder)
    try:
        yield process
    finally:
        process.kill()


def workers(mark: str) -> dict[str, int]:
    """Processes of a job by rank; ``mark`` is the folder it writes to."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            environment = dict(
                pair.split("=", 1) for pair in (entry / "environ").read_bytes().decode().split("\0") if "=" in pair
            )
        except OSError:
            continue
        if mark in words and "RANK" in environment:  # the oldest: a loader's workers look like their rank
            found[environment["RANK"]] = min(int(entry.name), found.get(environment["RANK"], sys.maxsize))
    return found


def weights(run: Path) -> dict[str, object]:
    step = json.loads((run / "summary.json").read_text())["steps"]
    files = sorted((run / "checkpoints" / f"step_{step}").glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def causes(said: str) -> int:
    """How many ranks have said why they ended; torchrun's report repeats it, indented."""
    return sum(line.startswith("error: ") for line in said.splitlines())


def wait_for(run: Path, step: int) -> None:
    """Until a checkpoint of that step or a later one is there."""
    end = time.monotonic() + 240
    while not any(int(path.name.split("_")[1]) >= step for path in (run / "checkpoints").glob("step_*")):
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_starts_again_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """A rank killed once, in a job that may restart: the same weights as the job that was left in peace."""
    runs = tmp_path / "runs"
    words = [*LONG, "--train.save_every", "3", "--output.root", str(runs)]
    job = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "tools/train.py"), *words)
    with running(job, tmp_path) as process:
        wait_for(runs / "smoke", 9)
        os.kill(workers(str(runs))["1"], signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert causes(said) == 1, said
    assert "error: rank 0: the link to rank 1 broke" in said
    assert "resumed" in said
    assert [path.name for path in runs.iterdir()] == ["smoke"], "the same run, not a second one"
    assert workers(str(runs)) == {}
    single = [*CONFIG, "--train.epochs", "8", "--train.steps", "0", "--output.root", str(tmp_path / "alone")]
    assert call(*single, cwd=tmp_path).returncode == 0
    assert_equal(weights(runs / "smoke"), weights(tmp_path / "alone/smoke"))


@pytest.mark.slow
def test_a_second_failure_is_said_as_the_first_was(tmp_path: Path) -> None:
    """torchrun's store keeps what was said before a restart, and no rank said anything any more."""
    runs = tmp_path / "runs"
    words = [*LONG, "--train.epochs", "60", "--train.save_every", "3", "--output.root", str(runs)]
    job = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "tools/train.py"), *words)
    with running(job, tmp_path) as process:
        wait_for(runs / "smoke", 3)
        os.kill(workers(str(runs))["1"], signal.SIGKILL)
        wait_for(runs / "smoke", 40)
        os.kill(workers(str(runs))["0"], signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert causes(said) == 2, said
    assert "error: rank 0: the link to rank 1 broke" in said
    assert "error: rank 1: the link from rank 0 broke" in said


@pytest.mark.slow
def test_sigterm_saves_though_loaders_have_workers(tmp_path: Path) -> None:
    """torchrun passes a signal on to the rank's whole session, its loader's workers included."""
    runs = tmp_path / "runs"
    words = [*LONG, "--train.epochs", "60", "--data.workers", "1", "--output.root", str(runs)]
    job = torchrun("--standalone", "--nproc-per-node", "2", str(ROOT / "tools/train.py"), *words)
    with running(job, tmp_path) as process:
        wait_for(runs / "smoke", 7)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=240)
    assert "error: " not in said, said
    assert "stopped and saved at step" in said
    assert json.loads((runs / "smoke/summary.json").read_text())["interrupted"]


@pytest.mark.slow
def test_a_job_without_restarts_ends_with_one_cause_and_no_orphan(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [*LONG, "--output.root", str(runs), "--train.save_every", "3", "--data.workers", "1"]
    job = torchrun("--standalone", "--nproc-per-node", "2", str(ROOT / "tools/train.py"), *words)
    with running(job, tmp_path) as process:
        wait_for(runs / "smoke", 3)
        os.kill(workers(str(runs))["0"], signal.SIGKILL)
        began = time.monotonic()
        said, _ = process.communicate(timeout=240)
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    assert causes(said) == 1, said
    assert "error: rank 1: the link from rank 0 broke" in said
    end = time.monotonic() + 10
    while workers(str(runs)) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers(str(runs)) == {}


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_with_the_job(tmp_path: Path) -> None:
    """Stopped for good: its neighbour says after `placement.timeout` whom it waited for and at which step."""
    runs = tmp_path / "runs"
    words = [*LONG, "--output.root", str(runs), "--train.save_every", "3", "--placement.timeout", "3"]
    job = torchrun("--standalone", "--nproc-per-node", "2", str(ROOT / "tools/train.py"), *words)
    with running(job, tmp_path) as process:
        wait_for(runs / "smoke", 3)
        os.kill(workers(str(runs))["0"], signal.SIGSTOP)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "error: rank 1 waited 3 s for order" in said
    assert "this rank is at step" in said
    assert workers(str(runs)) == {}


WRONG = [
    (
        ["--placement.stages", "[0,0,2,1]"],
        "error: placement.stages: block 2 is on stage 2, there are stages 0 to 1",
    ),
    (["--local.blokcs", "3"], "error: unknown key 'local.blokcs', did you mean 'local.blocks'?"),
    (["--placement.replicas", "3"], "error: placement.replicas: 3 does not divide the 2 ranks torchrun started"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "wrong"), [("1", WRONG[1]), ("2", WRONG[0]), ("2", WRONG[1])])
def test_a_wrong_key_is_the_last_that_torchrun_says(tmp_path: Path, ranks: str, wrong: tuple[list[str], str]) -> None:
    """The same line as at first: torchrun's own report of the failed ranks comes between."""
    words, cause = wrong
    job = torchrun("--standalone", "--nproc-per-node", ranks, str(ROOT / "tools/train.py"), *CONFIG, *words)
    ended = subprocess.run(job, cwd=tmp_path, env=ALONE, timeout=240, capture_output=True, text=True)
    assert ended.returncode == 1
    assert causes(ended.stderr) == 1, ended.stderr
    last = ended.stderr.rstrip("=\n ").splitlines()[-1]
    assert cause.removeprefix("error: ") in last, ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "cause"), WRONG)
def test_a_wrong_key_is_said_by_one_rank(tmp_path: Path, words: list[str], cause: str) -> None:
    ended = run_ranks(2, typed, [*CONFIG, *words, "--output.root", str(tmp_path / "runs")])
    assert [each.code for each in ended] == [2, 2]
    said = "".join(each.said for each in ended)
    assert said.count("error: ") == 1, said
    assert cause in said
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two hosts joined by a cable: network namespaces."""
    names = [f"host{os.getpid()}{side}" for side in "ab"]
    cables = [f"v{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and the rights to make them")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")
        yield [f"{name}:{cable}" for name, cable in zip(names, cables, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts(hosts: list[str], tmp_path: Path) -> None:
    """The standard rendezvous options; the folder of runs is shared, as it must be."""
    processes = []
    for number, host in enumerate(hosts):
        name, cable = host.split(":")
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        meet += ["--master-addr", "10.99.0.1", "--master-port", "29400"]
        job = torchrun(*meet, str(ROOT / "tools/train.py"), *CONFIG, "--output.root", str(tmp_path / "runs"))
        processes.append(start(["ip", "netns", "exec", name, *job], tmp_path, GLOO_SOCKET_IFNAME=cable))
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    summary = json.loads((tmp_path / "runs/smoke/summary.json").read_text())
    assert (summary["world_size"], summary["schedule"]) == (2, "pipeline")
    assert call(*CONFIG, "--output.root", str(tmp_path / "alone"), cwd=tmp_path).returncode == 0
    assert_equal(weights(tmp_path / "runs/smoke"), weights(tmp_path / "alone/smoke"))
