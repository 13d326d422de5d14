"""The lock that a killed build of DeepSpeed's extension leaves: every later run with ZeRO waited for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.distributed.replication.extension import PATIENCE, cache, in_use, prepare_extension

# As torch makes it (torch.utils.file_baton).
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('made', flush=True); time.sleep(100)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "deepspeed_shm_comm").mkdir()
    assert cache() == tmp_path
    return tmp_path / "deepspeed_shm_comm"


def holder(lock: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    return process


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())  # lines are as wide as the terminal


def test_a_lock_is_removed_when_its_process_is_gone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = folder / "lock"
    process = holder(lock)
    try:
        prepare_extension()
        assert lock.exists()
        assert "another process that is building DeepSpeed's extension" in said(capsys)
    finally:
        process.kill()
        process.wait()
    prepare_extension()
    assert not lock.exists()
    text = said(capsys)
    assert "left by a killed build of DeepSpeed's extension" in text
    assert "once, about two minutes" in text
    (folder / "deepspeed_shm_comm.so").write_text("")
    prepare_extension()
    assert said(capsys) == ""


def test_only_the_first_rank_of_a_host_removes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lock").write_text("")
    monkeypatch.setenv("LOCAL_RANK", "1")
    prepare_extension()
    assert (folder / "lock").exists()


def test_what_another_host_may_hold_stays_for_a_while(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = folder / "lock"
    lock.write_text("")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert in_use(lock)
    os.utime(lock, (0, time.time() - PATIENCE - 1))
    assert not in_use(lock)
