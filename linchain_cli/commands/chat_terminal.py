"""`linchain chat` at the keyboard, and with questions that come line by line from a file or a program."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from linchain_cli import console
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from linchain_cli.commands.cast import Cast
    from linchain_cli.evaluation.dialogue import Dialogue
    from linchain_cli.evaluation.speaking import Sampling

QUOTES = '"""'
HELP = {
    "/reset": "forget what was said",
    "/system TEXT": "begin anew with this system prompt; without TEXT, show it",
    "/use NAME": "ask another run, or base for the base without any; without NAME, list them",
    "/temperature NUMBER": "draw answers, the more freely the higher; 0: the likeliest",
    "/help": "show this",
    "/exit": "end (also Ctrl-D)",
}
FURTHER = (
    'Ctrl-C stops an answer. Several lines stand between """ and """. A line that begins with // is sent with'
    " one / less."
)


def converse(cast: Cast, dialogue: Dialogue, sampling: Sampling, source: TextIO) -> None:
    """Answers line by line until the input ends. At a terminal what cannot be done is told and the next line
    awaited; elsewhere it ends the command.

    Raises:
        InputError: a line cannot be understood or answered, and `source` is no terminal.
    """
    terminal = _Terminal(cast, dialogue, sampling, source)
    terminal.say_how()
    while True:
        try:
            terminal.turn()
        except EOFError:
            if source.isatty():
                print(file=sys.stderr)
            return


class _Terminal:
    def __init__(self, cast: Cast, dialogue: Dialogue, sampling: Sampling, source: TextIO):
        self._cast, self._dialogue, self._sampling = cast, dialogue, sampling
        self._source, self._interactive = source, source.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401, gives input() a history and its keys

    def say_how(self) -> None:
        if not self._dialogue.remembers:
            console.note("Each question is asked by itself: this template has no place for earlier ones.")
        if self._dialogue.system is not None and not self._dialogue.remembers:
            console.warn("the system prompt has no place in this template and is left out")
        if self._interactive and not self._dialogue.messages:
            console.note("/help shows what can be typed; Ctrl-D ends.")

    def turn(self) -> None:
        """One line, or one message of several."""
        try:
            text = self._next_text()
            if text.startswith("//"):
                self._ask(text[1:])
            elif text.startswith("/"):
                self._obey(*_split(text))
            elif text.strip():
                self._ask(text)
        except InputError as error:
            if not self._interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # of a line that was being typed
            if not self._interactive:
                raise
            print("\n(Ctrl-D or /exit ends)", file=sys.stderr)

    def _line(self) -> str:
        if not self._interactive:
            return _read_line(self._source)
        several = len(self._cast.names) > 1
        return _typed_line(f"{self._cast.current.rpartition('/')[2]}> " if several else "> ")

    def _next_text(self) -> str:
        text = self._line()
        if not text.lstrip().startswith(QUOTES):
            return text
        text = text.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            try:
                text += f"\n{self._line()}"
            except EOFError:
                raise InputError(f"the input ends within {QUOTES}") from None
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def _ask(self, text: str) -> None:
        try:
            with _interrupted_between_pieces() as show:
                said = self._dialogue.ask(text, self._sampling, show)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(flush=True)
            console.note("(stopped)")
            return
        print(flush=True)
        if said.stop_reason == "length":
            console.note(f"(cut off after {said.tokens:,} tokens; --max-new-tokens allows more)")

    def _obey(self, command: str, rest: str) -> None:
        if command == "/exit":
            raise EOFError
        if command == "/help":
            width = max(map(len, HELP))
            for name, what in HELP.items():
                print(f"{name:<{width}}  {what}", file=sys.stderr)
            print(FURTHER, file=sys.stderr)
        elif command == "/reset":
            self._dialogue.begin()
            console.note("What was said is forgotten.")
        elif command == "/system":
            self._system(rest)
        elif command == "/use":
            self._use(rest)
        elif command == "/temperature":
            self._temperature(rest)
        else:
            known = [name.split()[0] for name in HELP]
            raise InputError(
                f"there is no command {command}.{did_you_mean(command, known)} /help lists them; a question"
                f" that begins with / is sent as /{command}"
            )

    def _system(self, text: str) -> None:
        if text:
            self._dialogue.begin(text)
            console.note("A new conversation begins, with this system prompt.")
        else:
            shown = self._dialogue.system or self._cast.asked.system
            print(shown or "none but what the template writes itself", file=sys.stderr)

    def _use(self, name: str) -> None:
        if not name:
            for each in self._cast.names:
                print(f"{'*' if each == self._cast.current else ' '} {each}", file=sys.stderr)
            return
        remembered = self._dialogue.remembers
        self._dialogue.speaker = self._cast.use(self._cast.find(name))
        if self._dialogue.remembers != remembered:
            self.say_how()

    def _temperature(self, text: str) -> None:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise InputError(f"/temperature {text}: expected a number such as 0.7, or 0")
        top_p = self._sampling.top_p if number else 1.0
        self._sampling = replace(self._sampling, temperature=number, top_p=top_p)


@contextlib.contextmanager
def _interrupted_between_pieces() -> Iterator[Callable[[str], None]]:
    """Gives what prints a piece of an answer, and raises KeyboardInterrupt there after Ctrl-C, which may come
    while a library calls back, where Python cannot raise it and drops it. A second one is raised at once."""
    asked = False

    def remember(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def show(piece: str) -> None:
        print(piece, end="", flush=True)
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield show
        if asked:  # behind the last piece
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _split(text: str) -> tuple[str, str]:
    command, _, rest = text.strip().partition(" ")
    return command, rest.strip()


def _typed_line(prompt: str) -> str:
    """A line from the keyboard; EOFError at its end."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # the answers go elsewhere
    return input()


def _read_line(source: TextIO) -> str:
    """A line of a file or of another program; EOFError at its end."""
    try:
        line = source.readline()
    except UnicodeDecodeError as error:
        raise InputError(f"the standard input is not UTF-8: {error}") from None
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
