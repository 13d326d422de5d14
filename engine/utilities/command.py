"""Command-line tools whose errors are one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from engine.utilities.console import first_of_host
from engine.utilities.kinds import refusal
from engine.utilities.text import nearest, none_of, one_line


class ToolParser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, so that ``run_tool`` reports it in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as ``argparse`` does, but take ``--memory -5GiB`` for a value, and suggest the nearest option."""
        given = list(sys.argv[1:] if args is None else args)
        for at, word in enumerate(given):
            option, own = word.split("=")[0], self._option_string_actions
            # Options of the config have dots, apart from --config and --task, which are not that close to any.
            unknown = option.startswith("--") and option not in own and "." not in option
            if unknown and (close := nearest(option, own, cutoff=0.85)):
                self.error(f"unknown option {option}, did you mean {close}?")
            takes_one = isinstance(own.get(word), argparse._StoreAction) and own[word].nargs is None
            if takes_one and re.match(r"-[^-]", "".join(given[at + 1 : at + 2])):
                given[at : at + 2] = [f"{word}={given[at + 1]}"]
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        about, _, trouble = message.removeprefix("argument ").partition(": ")
        if match := re.match(r"invalid (int|float) value: '(.*)'", trouble):
            message = refusal(about, {"int": int, "float": float}[match[1]], match[2])
        elif match := re.match(r"invalid choice: '(.*)' \(choose from (.*)\)", trouble):
            message = f"{about}: {none_of(match[1], [word.strip(chr(39)) for word in match[2].split(', ')])}"
        elif re.match(r"expected (one|at least one) argument", trouble):
            message = f"{about}: no value given"
        raise ValueError(f"{message}; --help lists what there is")


def run_tool(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command-line tool. A ValueError, which is a user's error, becomes one line on stderr and exit code 2.

    Ctrl-C, where nothing else handles it, becomes one line as well, and exit code 130.
    Under torchrun, only the first rank of each host prints.
    """
    try:
        main(sys.argv[1:])
    except ValueError as error:
        end_with(f"error: {error}")
    except KeyboardInterrupt:
        _say("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        report_failure(f"error: {type(error).__name__}: {one_line(error)}")
        raise


def end_with(line: str) -> NoReturn:
    """Print a user's mistake, leave it to torchrun as well, and end the process with exit code 2."""
    _say(line)
    report_failure(line)
    raise SystemExit(2) from None


def _say(line: str) -> None:
    if first_of_host():
        print(line, file=sys.stderr)


def report_failure(line: str) -> None:
    """Leave ``line`` to torchrun, whose report of the failure ends with it; without torchrun, do nothing.

    The format is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``, which would write a
    traceback, and which takes seconds to import.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # on a full disk torchrun tells less
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
