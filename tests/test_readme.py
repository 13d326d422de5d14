"""What the README tells its readers to do, done."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_your_own_network_in_twenty_lines(tmp_path: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my_network.py" in block)
    command = next(line for line in README.splitlines() if "--model.name my_network:chain" in line)
    statements = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(statements) <= 20
    (tmp_path / "my_network.py").write_text(code)
    words = command.replace("python tools", f"{sys.executable} {ROOT}/tools").replace("--config ", f"--config {ROOT}/")
    done = subprocess.run(
        [*words.split(), "--train.steps", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layer2" in done.stdout


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_config_it_names_exists() -> None:
    for path in re.findall(r"[\w/]+\.yaml", README):
        if path.startswith("tasks/"):
            assert (ROOT / path).is_file(), path
