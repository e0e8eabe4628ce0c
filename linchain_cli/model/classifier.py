"""Sequence classifiers: a base, encoder or decoder, with a head that gives a score per class or one number.

transformers' own classes compute them. What their heads are, and how rows are padded so that they find a
row's end, is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from linchain_cli.errors import InputError
from linchain_cli.model.fast import (
    REFUSALS,
    changing_nothing,
    embeddings_apart,
    gradient_of,
    probe_ids,
    record,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SUFFIX = "ForSequenceClassification"
# What tells segments apart in its attention, and has no table of them that its configuration could name.
_SEGMENTS_WITHOUT_TABLE = ("xlnet", "funnel")


class ModelInputs(Protocol):
    """What a model reads of a right-padded batch, see data/labelled_batches.py."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    is_padded: bool


# Whether the rows that are being read have padding. Their mask says so, too, but a GPU would have to be
# waited for.
PADDED: ContextVar[bool] = ContextVar("padded", default=True)


@dataclass(frozen=True)
class Outputs:
    """What a classifier tells: the names of its classes, in order; none for a regression's one number."""

    classes: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """How many values the head gives."""
        return len(self.classes) or 1

    @property
    def task(self) -> str:
        return "classification" if self.classes else "regression"

    def configure(self, config: PretrainedConfig) -> None:
        """Writes it into a configuration, as transformers names it."""
        for name, value in self.as_config().items():
            setattr(config, name, value)

    def as_config(self) -> dict[str, object]:
        """The keys of config.json that say it."""
        names = self.classes or ("LABEL_0",)
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification" if self.classes else "regression",
        }

    @classmethod
    def unknown(cls, task: str) -> Outputs | None:
        """Those of a recipe's task whose classes do not matter, as to the shapes of the base; None of a
        language model."""
        return {"causal": None, "classification": cls(("0", "1")), "regression": cls()}[task]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Outputs:
        """What the configuration of a classifier says."""
        if config.num_labels == 1:
            return cls()
        return cls(tuple(config.id2label[number] for number in range(config.num_labels)))


def names_classifier(architectures: Sequence[str] | None) -> bool:
    """Whether a config.json's `architectures` name a sequence classifier."""
    return any(name.endswith(_SUFFIX) for name in architectures or ())


def is_classifier(model: nn.Module) -> bool:
    """Whether a model was built as a sequence classifier."""
    return type(model).__name__.endswith(_SUFFIX)


def refuse_unless_classifier(config: PretrainedConfig, directory: object) -> None:
    """Raises InputError unless transformers has a sequence classifier of this architecture, which can be
    told what of a row is padding."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    kind = config.model_type
    wanted = (
        "task: classification and regression take encoders (BERT, RoBERTa, DeBERTa, ModernBERT) and decoders"
    )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{directory}: '{kind}' is an encoder-decoder model; {wanted}.")
    if kind not in CLASSIFIERS:
        raise InputError(f"{directory}: transformers has no sequence classifier of '{kind}'; {wanted}.")
    built = CLASSES.get(type(config), None)
    if built is not None and "attention_mask" not in signature(built.forward).parameters:
        raise InputError(
            f"{directory}: '{kind}' takes no attention mask, so padding would change a row's label; {wanted}."
        )


def check_missing(model: PreTrainedModel, missing: Sequence[str], mismatched: Sequence[str]) -> list[str]:
    """Of the weights that a checkpoint lacks, or holds for other classes, those that are not the head's:
    without them it is incomplete. The head's are remembered with the model: their values begin at random."""
    lacking = set(missing) | set(mismatched)
    head = {name for name in lacking if _behind(model, name)}
    record(model)["drawn"] = tuple(name for name, _ in model.named_parameters() if name in head)
    return sorted(lacking - head)


@torch.no_grad()
def clear_drawn(model: nn.Module) -> None:
    """Zeros in place of the random numbers that transformers has filled a head with."""
    for name in drawn_names(model):
        model.get_parameter(name).zero_()


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters of a loaded classifier's head: what lies behind its blocks."""
    return tuple(name for name, _ in model.named_parameters() if _behind(model, name))


def drawn_names(model: nn.Module) -> tuple[str, ...]:
    """Those of the head's parameters that the checkpoint has no values for."""
    return record(model).get("drawn", ())


def _behind(model: nn.Module, name: str) -> bool:
    """Whether a parameter lies behind the base's blocks. transformers counts BERT's pooler to the base."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def initial_deviation(model: nn.Module) -> float:
    """The standard deviation that the architecture draws its weights with."""
    return float(getattr(model.config.get_text_config(), "initializer_range", 0.02))


def padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills short rows. A decoder's head reads the last token that is not this one, so its
    configuration has to name it, and gets it from the tokenizer where it names none."""
    config = model.config.get_text_config()
    size = model.get_input_embeddings().weight.shape[0]
    known = (named_padding(model), tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    token = next(token for token in known if isinstance(token, int) and 0 <= token < size)
    config.pad_token_id = model.config.pad_token_id = token
    return token


def named_padding(model: nn.Module) -> int | None:
    """The padding token that a model's configuration names."""
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def tells_segments(config: PretrainedConfig) -> bool:
    """Whether a model can be told which of two texts a token is of. RoBERTa's table of them has one row, and
    GPT-2 would take their numbers for words."""
    if config.model_type in _SEGMENTS_WITHOUT_TABLE:
        return True
    kinds = getattr(config, "type_vocab_size", None)
    return isinstance(kinds, int) and kinds > 1


def padding_side(model: nn.Module) -> Literal["left", "right"]:
    """Where short rows have to be filled: before them, where the head reads the last place whatever is there
    (XLNet's)."""
    summary = getattr(model, "sequence_summary", None)
    return "left" if getattr(summary, "summary_type", None) == "last" else "right"


def row_logits(model: nn.Module, batch: ModelInputs) -> Tensor:
    """What the head gives for each row of a padded batch: (batch, classes or 1), in float32 at least."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None and tells_segments(model.config):
        inputs["token_type_ids"] = batch.token_type_ids
    if batch.is_padded and padding_side(model) == "left":
        inputs = _moved_right(inputs, batch.attention_mask)
    # With a cache, a decoder's block that is computed again would attend to its own keys as well.
    cache = {"use_cache": False} if "use_cache" in signature(type(model).forward).parameters else {}
    told = PADDED.set(batch.is_padded)
    try:
        logits = model(**inputs, **cache).logits
    finally:
        PADDED.reset(told)
    return logits if logits.dtype == torch.float64 else logits.float()


def _moved_right(inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Right-padded rows, each (batch, length), with their padding before them."""
    length = mask.shape[1]
    missing = length - mask.sum(1, keepdim=True)
    places = (torch.arange(length, device=mask.device) - missing) % length
    return {name: tensor.gather(1, places) for name, tensor in inputs.items()}


def reads_padding(model: nn.Module, pad_token_id: int) -> bool:
    """Whether what the base tells the head of a row depends on the row's padding: that state has a gradient
    for the padding's embeddings, which is exactly zero where a mask hides them.

    ConvBERT's convolutions and Nyströmformer's landmarks take padding for text, in transformers as well.
    """
    ids = probe_ids(model, 2, 16).clone()
    mask = torch.ones_like(ids)
    left = padding_side(model) == "left"
    hidden = slice(None, -4) if left else slice(4, None)
    ids[1, hidden], mask[1, hidden] = pad_token_id, 0
    try:
        with torch.enable_grad(), changing_nothing(model), embeddings_apart(model) as embedded:
            states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            gradient = gradient_of(states[1, -1 if left else 0], embedded[-1])
    except REFUSALS:  # which training will tell of
        return False
    if len(gradient) != len(ids):  # XLNet puts rows behind positions
        gradient = gradient.transpose(0, 1)
    return bool(gradient[1, hidden].nan_to_num(0.0, 0.0, 0.0).any())


def predictions(logits: Tensor) -> Tensor:
    """What a head's outputs (batch, classes or 1) tell: the number of the likeliest class, or the number."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
