"""Command-line tools whose errors are one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class ToolParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all other errors of tools."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists what there is")


def run_tool(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command-line tool: user errors become one line on stderr (of one rank a host) and exit code 2."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
