"""A loaded model as lm-evaluation-harness asks it; importing this module imports the harness."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.rows import RowError
from linchain_cli.errors import InputError
from linchain_cli.evaluation.reasoning import Reasoning

BATCH_SIZE = {"cpu": 8, "cuda": 32}


class SharedModel(HFLM):
    """The harness's own class for models of transformers, which it asks in one process alone if the model is
    loaded already. Here `world` processes that hold the same model each get the rows of their `rank`, and the
    first of them all results.

    Conversations are written by `chat`: the template that the model was trained through, with its variables
    and date, which need not be the tokenizer's. What it knows as reasoning is no part of an answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, rank: int = 0, world: int = 1, chat: ChatTemplate | None = None
    ):
        by_device = BATCH_SIZE.get(model.get_input_embeddings().weight.device.type, BATCH_SIZE["cuda"])
        # It gives the tokenizer a padding token, by which it would be another one to everybody else.
        tokenizer, self._chat = copy.deepcopy(tokenizer), chat
        if chat is not None:
            tokenizer.chat_template = chat.source
        thinks = chat is not None and chat.thinking is not None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=by_device,
            add_bos_token=None if chat is None else chat.adds_bos,
            think_end_token=Reasoning(tokenizer, chat).end if thinks else None,
        )
        self._rank, self._world_size = rank, world

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text that asks for an answer, or without `add_generation_prompt` for the rest of the last turn.
        Of what the template refuses the system prompt is left out, as the harness itself does."""
        without = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            return self._written(chat_history, add_generation_prompt)
        except RowError as error:
            if len(without) == len(chat_history):
                raise InputError(str(error)) from None
        return self.apply_chat_template(without, add_generation_prompt)

    def _written(self, turns: list[dict[str, Any]], ask: bool) -> str:
        if ask:
            return self._chat.prompt({"messages": turns})
        return self._chat.complete({"messages": turns[:-1]}, turns[-1]["content"]).text

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A number of each process, (world,)."""
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, tensor.item())
        return torch.tensor(found)

    def barrier(self) -> None:
        """Waits for all processes, for which the harness's own needs an Accelerator."""
        self.all_gather(torch.zeros(()))


@contextlib.contextmanager
def without_git() -> Iterator[None]:
    """Keeps the harness from asking git for the commit of the current directory, whatever that is of: git
    complains on stderr where there is none."""
    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked
