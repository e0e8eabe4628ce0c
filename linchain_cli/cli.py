"""The command line: which command exists, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from linchain_cli import __version__, console, streams
from linchain_cli.commands import (
    chat,
    check,
    compare,
    eval,
    export,
    generate,
    import_,
    inspect,
    merge,
    push,
    recipes,
    report,
    reproduce,
    runs,
    train,
    tune,
)
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.machine import ensure_home, is_out_of_memory, suit_cuda_to_many_lengths
from linchain_cli.storage import NO_ROOM

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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", no_args_is_help=True)(train.run)
app.command("eval")(eval.run)
app.command("merge")(merge.run)
app.command("export")(export.run)
app.command("import", no_args_is_help=True)(import_.run)
app.command("generate", no_args_is_help=True)(generate.run)
app.command("chat")(chat.run)
app.command("compare", no_args_is_help=True)(compare.run)
app.command("tune", no_args_is_help=True)(tune.run)
app.command("check", no_args_is_help=True)(check.run)
app.command("inspect")(inspect.run)
app.command("report")(report.run)
app.command("runs")(runs.run)
app.command("reproduce", no_args_is_help=True)(reproduce.run)
app.command("push", no_args_is_help=True)(push.run)

recipes_app = typer.Typer(
    help="List, copy, convert and describe recipes.", no_args_is_help=True, rich_markup_mode=None
)
recipes_app.command("list")(recipes.list_recipes)
recipes_app.command("copy", no_args_is_help=True)(recipes.copy)
recipes_app.command("convert", no_args_is_help=True)(recipes.convert)
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
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors: no notes, no progress.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command. `main` takes out `--quiet` and `--debug`, wherever they stand."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong input; 130, 143 or 129 stopped by a
    signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, quiet = _take(words, "--quiet", "-q")
    words, debug = _take(words, "--debug")
    streams.make_ready()
    console.set_quiet(quiet)
    _show_log(logging.WARNING if quiet else logging.INFO)
    suit_cuda_to_many_lengths()
    if remark := ensure_home():
        console.note(remark)
    sys.exit(_run(words, debug))


def _take(arguments: list[str], *options: str) -> tuple[list[str], bool]:
    """Takes an option out of the words before a `--`, so that it may stand before or behind the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [word for word in arguments[:end] if word not in options]
    return rest + arguments[end:], len(rest) != end


def _show_log(level: int) -> None:
    """Lets what the package logs (a conversion that takes a while, a hub that cannot be reached) reach
    stderr."""
    logger = logging.getLogger("linchain_cli")
    logger.setLevel(level)
    logger.handlers = [logging.StreamHandler()]
    # Where its cache cannot be written it says so at length, and goes on without.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said there, not even when Python flushes at
        # its end.
        streams.silence(sys.stdout)
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
        if error.filename == "stdout":
            streams.silence(sys.stdout)
        if error.filename is None or error.strerror is None:
            return _unexpected(error)
        remedy = _REMEDIES.get(error.errno, "")
        print(f"error: {_name(error.filename)}: {error.strerror}{remedy}", file=sys.stderr)
        return 2 if error.errno in WRONG_PLACE else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # pathlib's own
            place = _one_line(error).removeprefix("Symlink loop from ")
            print(f"error: {place}: a link that leads back to itself", file=sys.stderr)
            return 2
        if is_out_of_memory(error):
            print(f"error: the memory is not enough ({_one_line(error)})", file=sys.stderr)
            return 1
        return _unexpected(error)


_REMEDIES = {
    errno.EACCES: "; choose a place that you may read and write, or change its permissions",
    errno.EPERM: "; choose a place that you may read and write",
    errno.EROFS: "; choose a place that can be written to",
    errno.EISDIR: "; a file is expected there: name one, or move the directory away",
    **dict.fromkeys(NO_ROOM, "; make room there, or choose another place"),
}


def _name(path: object) -> str:
    """A path as text of one line."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _unexpected(error: Exception) -> int:
    print(
        f"error: unexpected {type(error).__name__}: {_one_line(error)} (--debug shows where)", file=sys.stderr
    )
    return 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:397]}..."


# What other tools take: --training.max_steps=50, --learning_rate 1e-4, --packing. No option of ours has a dot
# or an underscore in it, or one of their names.
_DASHED = re.compile(r"--([A-Za-z][\w.]*)(?:=(.*))?", re.DOTALL)
# Their commands, and ours.
_CALLED_ELSEWHERE = {
    **dict.fromkeys(("sft", "finetune", "fine-tune"), "train"),
    "preprocess": "check",
    **dict.fromkeys(("inference", "infer"), "chat"),
    "merge-lora": "merge",
    "evaluate": "eval",
    "convert": "recipes convert",
}


def _refuse_what_other_tools_take(words: list[str]) -> None:
    """Tells how it is done here to those who write a recipe's value as an option, or call a command by
    another tool's name."""
    if words and words[0] in _CALLED_ELSEWHERE:
        raise InputError(f"{words[0]}: here it is `linchain {_CALLED_ELSEWHERE[words[0]]}`")
    if not words or words[0] not in ("train", "check", "compare", "tune"):
        return
    for word in words[1 : words.index("--") if "--" in words else None]:
        if not (found := _DASHED.fullmatch(word)):
            continue
        name, value = found[1], found[2] or "VALUE"
        if name == "config":
            raise InputError(f"{word}: the recipe is given without it: `linchain {words[0]} RECIPE`")
        from linchain_cli.recipe.other_tools import CALLED_HERE, instead_of

        if name not in CALLED_HERE and (said := instead_of(name)):
            raise InputError(f"{word}: {said}")
        if name in CALLED_HERE or "_" in name or "." in name:
            from linchain_cli.recipe import dotted_key

            raise InputError(
                f"{word}: a recipe's value is given without dashes, as {dotted_key(name)}={value}"
            )


# What one process does; others that a launcher has started have nothing to do there.
_ALONE = ("merge", "export", "import", "push", "inspect", "report", "runs", "recipes")


def _call(arguments: list[str]) -> int:
    """The exit code that Typer ends with: 2 for wrong options, with its own message, and 0 when the command
    is done."""
    if arguments and arguments[0] in _ALONE and not console.is_first_process():
        return 0
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries of torch's end the process for it
        raise InputError("the current directory was removed: change into one that is there") from None
    _refuse_what_other_tools_take(arguments)
    try:
        app(args=arguments, prog_name="linchain")
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise KeyboardInterrupt from None  # which Typer ends without a word
        return end.code if isinstance(end.code, int) else 0
    return 0


if __name__ == "__main__":
    main()
