"""Export: python tools/export.py --run runs/NAME --out FILE"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.network.state import tensors_of
from engine.run.export import export_model
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import writing
from tasks.run import open_run


def main(argv: Sequence[str]) -> None:
    parser = ToolParser("Write a run's plain network, without auxiliary networks, or what its task writes instead.")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    parser.add_argument(
        "--out", required=True, type=Path, help="FILE.safetensors, or FILE.pth for torch.load; FOLDER for a denoiser"
    )
    arguments = parser.parse_args(list(argv))
    run = open_run(arguments.run)
    with writing(arguments.out):
        folder = arguments.out.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    written = run.task.write_export(arguments.out)
    if written is None:
        export_model(run.chain.model, arguments.out, run.task.export)
        written = f"{len(tensors_of(run.chain.model))} tensors in {arguments.out}"
    print(f"step {run.step}: {written}")


if __name__ == "__main__":
    run_tool(main)
