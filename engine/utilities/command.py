"""Command-line tools whose errors are one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class ToolParser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, so that ``run_tool`` reports it in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists what there is")


def run_tool(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command-line tool. A ValueError, which is a user's error, becomes one line on stderr and exit code 2.

    So does Ctrl-C where nothing else handles it, with the exit code 130, by which shells know an interrupted command.
    Under torchrun, only the first rank of each host prints.
    """
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
