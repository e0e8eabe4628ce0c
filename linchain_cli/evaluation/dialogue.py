"""A conversation: what was said goes into the next question, where the template has a place for it."""

from __future__ import annotations

from linchain_cli.data.asking import question
from linchain_cli.data.conversation import Message
from linchain_cli.data.rows import Row
from linchain_cli.errors import InputError
from linchain_cli.evaluation.speaking import Said, Sampling, Show, Speaker


class Dialogue:
    """Questions and answers, in turn.

    Only chat templates have places for a system prompt and for what was said before. Any other one was
    trained on single questions, so each is asked by itself.

    Raises:
        InputError: `system` is given and the template has no place for it.
    """

    def __init__(self, speaker: Speaker, system: str | None = None):
        self.messages: list[Message] = []
        self.system: str | None = None
        self.speaker = speaker
        if system is not None:
            self.begin(system)

    @property
    def remembers(self) -> bool:
        """Whether the model is given what was said before."""
        return self.speaker.template.name == "chat"

    def begin(self, system: str | None = None) -> None:
        """Forgets what was said; `system` None keeps the system prompt.

        Raises:
            InputError: the template has no place for a system prompt.
        """
        if system is not None:
            if not self.remembers:
                raise InputError(
                    f"the template {self.speaker.template.name} has no place for a system prompt; of the"
                    " templates only chat has (--template chat)"
                )
            self.system = system
        self.messages = []

    def ask(self, text: str, sampling: Sampling, show: Show = lambda piece: None) -> Said:
        """The answer. One that is cut off by an exception counts as far as it was shown.

        Raises:
            InputError: as for `Speaker.say`; what was asked is forgotten then.
        """
        pieces: list[str] = []

        def note(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        row = self._row(text)
        try:
            said = self.speaker.say(row, sampling, note)
        except KeyboardInterrupt:
            if pieces:
                self._remember(text, "".join(pieces))
            raise
        self._remember(text, said.text, said.parts)
        return said

    def _row(self, text: str) -> Row:
        if not self.remembers:
            return question(self.speaker.template, text)
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, *self.messages, {"role": "user", "content": text}]}

    def _remember(self, text: str, written: str, parts: tuple[str, str | None] | None = None) -> None:
        """What the template knows as reasoning and answer is handed to it as such the next time."""
        thought, answer = parts or ("", None)
        said: Message = {"role": "assistant", "content": written if answer is None else answer}
        if thought and answer is not None:
            said["reasoning_content"] = thought
        self.messages += [{"role": "user", "content": text}, said]
