"""The command line: which command exists, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from linchain_cli import __version__
from linchain_cli.commands import (
    check,
    compare,
    eval,
    export,
    generate,
    import_,
    inspect,
    merge,
    recipes,
    report,
    train,
)
from linchain_cli.errors import LinchainError
from linchain_cli.machine import ensure_home

INTERRUPTED = 128 + signal.SIGINT
# What the system says of a place that the user should name otherwise; a full or broken disk is none.
WRONG_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV),
)

app = typer.Typer(
    name="linchain",
    help="Fine-tune language models with chain adapters, evaluate them, export checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train", no_args_is_help=True)(train.run)
app.command("eval")(eval.run)
app.command("merge")(merge.run)
app.command("export")(export.run)
app.command("import", no_args_is_help=True)(import_.run)
app.command("generate", no_args_is_help=True)(generate.run)
app.command("compare", no_args_is_help=True)(compare.run)
app.command("check", no_args_is_help=True)(check.run)
app.command("inspect")(inspect.run)
app.command("report")(report.run)

recipes_app = typer.Typer(
    help="List, copy and describe recipes.", no_args_is_help=True, rich_markup_mode=None
)
recipes_app.command("list")(recipes.list_recipes)
recipes_app.command("copy", no_args_is_help=True)(recipes.copy)
recipes_app.command("schema")(recipes.schema)
app.add_typer(recipes_app, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"linchain {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command. `--debug` is taken out by `main`, wherever it stands."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong input, 130 or 143 stopped by a signal."""
    _show_notes()
    if remark := ensure_home():
        logging.getLogger("linchain_cli").info(remark)
    arguments, debug = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    sys.exit(_run(arguments, debug))


def _show_notes() -> None:
    """Lets what the package logs (a conversion that takes a while, a hub that cannot be reached) reach
    stderr."""
    logger = logging.getLogger("linchain_cli")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler()]


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out of the words before a `--`, so that it may stand before or behind the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [word for word in arguments[:end] if word != "--debug"]
    return options + arguments[end:], len(options) != end


def _run(arguments: list[str], debug: bool) -> int:
    try:
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said there, not even when Python flushes at
        # its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except LinchainError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if debug:
            traceback.print_exc()
        if error.filename is None:
            return _unexpected(error)
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2 if error.errno in WRONG_PLACE else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    reason = " ".join(str(error).split())
    print(f"error: unexpected {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
    return 1


def _call(arguments: list[str]) -> int:
    """The exit code that Typer ends with: 2 for wrong options, with its own message, and 0 when the command
    is done."""
    try:
        app(args=arguments, prog_name="linchain")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


if __name__ == "__main__":
    main()
