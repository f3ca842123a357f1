"""The one exception that means "your input is wrong", and how a command begins and ends."""

import argparse
import sys
import traceback
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input: the message is one line with the offending value and what would be right."""


class Diverged(RuntimeError):
    """Training that can't go on: updates that are not finite, one after another."""


def command_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """For `python -m module`; `text`, its docstring with an example, is shown by --help."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; an `InputError` becomes one line on stderr and exit code 2, a
    `Diverged` exit code 3, Ctrl-C one line and exit code 130. With --debug the traceback is
    shown as well.
    """
    try:
        main()
    except (InputError, Diverged) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 3) from None
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print("interrupted; the same command goes on from what was saved", file=sys.stderr)
        raise SystemExit(130) from None
