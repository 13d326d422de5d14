"""Repaint: python tools/stylize.py --content FILE|FOLDER --style FILE|FOLDER|ARTIST --run runs/NAME --out OUT [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.utilities.command import ToolParser, run_tool
from tasks.style_transfer.repaint import TILE, Options, repaint

ABOUT = """
Paint every photograph in the style of every painting, with the newest complete checkpoint of a run. If the run has
learnt the styles of artists, --style takes their names instead of paintings.

Writes OUT/CONTENT_STYLE.png for every pair; OUT/sheet.png, which shows the first of them; and OUT/report.json, which
lists them all.
"""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("--content", required=True, type=Path, help="photograph, or folder of photographs")
    parser.add_argument("--style", required=True, help="painting, or folder of paintings; or artists: monet,cezanne")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures; made if it does not exist")
    parser.add_argument(
        "--alpha",
        "--strength",
        type=float,
        help="strength of the style, from 0 to 1; default 1, for artists the run's own strength",
    )
    parser.add_argument("--seed", type=int, help="seed of the noise that artists' pictures start from; default 0")
    parser.add_argument("--keep-colour", action="store_true", help="keep the photographs' colours")
    parser.add_argument(
        "--tile",
        type=int,
        help=f"side in pixels of the tiles in which larger photographs are painted; default {TILE}; not for artists, "
        "whose pictures are painted whole",
    )
    parser.add_argument(
        "--style-size", type=int, help="pixels of the paintings' shorter side; default what the network wants"
    )
    parser.add_argument("--content-size", type=int, help="pixels of the photographs' shorter side; default unchanged")
    given = parser.parse_args(list(argv))
    pictures = repaint(Options(**vars(given)))
    seconds = sum(picture["seconds"] for picture in pictures) / len(pictures)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} in {given.out}, {seconds:.2f} s each")


if __name__ == "__main__":
    run_tool(main)
