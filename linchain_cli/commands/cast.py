"""Several runs of one base, loaded once, to be asked by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linchain_cli import console
from linchain_cli.commands.subject import (
    Asked,
    Subject,
    choose_template,
    load_subject,
    locate_subject,
    refuse_classifier,
    subject_tokenizer,
)
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.evaluation.speaking import Speaker

BASE = "base"


class Cast:
    """A base that is loaded once, and the runs on it that can be asked by name.

    `names` are the runs, as they were named, and behind them the base without any; of a checkpoint or hub id
    it is the model alone.

    Raises:
        InputError: the runs are not all of one base.
    """

    def __init__(self, subjects: list[Subject], dtype: str | None, template: str | None):
        from linchain_cli.model.hashing import refuse_other_base

        for subject in subjects:
            refuse_classifier(subject)
        first, directory = subjects[0], locate_subject(subjects[0])
        self._adapters: dict[str, Adapter] = {}
        for subject in subjects:
            if subject.named is None:
                continue
            adapter = self._adapters[subject.name] = subject.named.load_adapter()
            wanted = adapter.base.get("hash")
            refuse_other_base(directory, wanted, subject.name, allow=subject.allow_other_base)
            rounded = [one.recipe.model.quantization for one in (first, subject)]
            if len({*rounded}) > 1:
                raise InputError(
                    f"{first.name} was trained on a base with quantization {rounded[0]}, {subject.name} with"
                    f" {rounded[1]}: ask them in two conversations"
                )
        tokenizer = subject_tokenizer(first)
        self._asked = {subject.name: choose_template(subject, tokenizer, template) for subject in subjects}
        self._loaded = load_subject(first, dtype, tokenizer)
        for subject in subjects[1:]:
            if subject.named is not None:
                subject.named.warn_of_changed_base(directory, tokenizer)
        self.names = list(self._asked) + ([BASE] if self._adapters else [])
        self.current = ""

    @property
    def asked(self) -> Asked:
        """How whoever is asked now is asked: the base alone as the run before it, to be compared with it."""
        return self._asked[self._template_of]

    def find(self, word: str) -> str:
        """The name that a word means: itself, or the end of its path.

        Raises:
            InputError: none is meant, or several are.
        """
        found = [name for name in self.names if name == word] or [
            name for name in self.names if name.endswith(f"/{word}")
        ]
        if len(found) != 1:
            what = "there is no" if not found else "there are several"
            raise InputError(
                f"{what} '{word}' here.{did_you_mean(word, self.names)} Known: {', '.join(self.names)}"
            )
        return found[0]

    def use(self, name: str) -> Speaker:
        """Puts that run's adapter onto the base, or takes the one there off."""
        from linchain_cli.chain import attach, detach
        from linchain_cli.evaluation.speaking import Speaker

        model = self._loaded.model
        detach(model)
        if name in self._adapters:
            attach(model, self._adapters[name])
        if name in self._asked:
            self._template_of = name
        self.current = name
        asked = self.asked
        console.note(f"{name}: template {asked.template.name}, {asked.why}")
        return Speaker(model, self._loaded.tokenizer, asked.template, asked.straddles, warn=console.warn)
