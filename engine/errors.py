"""Errors that are the user's to fix, and the exit codes of the command line.

A ``UserError`` is one sentence: key or file, what was expected, what came, what to do. The command line prints it on
one line of standard error and exits with 2; a traceback therefore always means a defect of the project.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_SIGINT, EXIT_SIGTERM = 130, 143  # 128 + signal number, as shells report it


class UserError(Exception):
    """Bad input; ``str(error)`` is the whole message."""


def expected(key: str, want: object, got: object, remedy: str) -> UserError:
    """The error sentence used throughout; the caller raises it."""
    return UserError(f"{key}: expected {want}, got {got}; {remedy}")


def first_line(error: BaseException) -> str:
    """A foreign error on one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def run_command(command: Callable[[], int]) -> int:
    """Run ``command`` and turn errors that are not ours into an exit code and one line."""
    try:
        return command()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; what was written before is complete", file=sys.stderr)
        return EXIT_SIGINT
