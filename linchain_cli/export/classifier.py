"""Merging a sequence classifier: the base's tensors under the classifier's names, with the head beside them.

A checkpoint of another model class (a language model's, an encoder's bare) leaves the names that the class
does not share, and what it has no use for: so that any loader finds base and head in one form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.chain.head import Head
from linchain_cli.data.labelled import joins_pairs
from linchain_cli.errors import InputError, some
from linchain_cli.model.checkpoint import Checkpoint
from linchain_cli.model.classifier import (
    Outputs,
    named_padding,
    names_classifier,
    padding,
    padding_side,
    tells_segments,
)
from linchain_cli.model.config import empty_model, stored_outputs
from linchain_cli.model.files import read_config
from linchain_cli.model.names import map_names
from linchain_cli.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loading:
    """What a classifier's base and tokenizer do not say of it themselves.

    arguments: of from_pretrained: how many outputs the head has; the padding that a decoder's head looks for,
        where config.json names none; and that a head of other classes is replaced
    pad_token: what the tokenizer shall fill short rows with, where it has no token for that
    paired: whether the tokenizer joins two texts itself; if not, a line break stands between them
    max_length: the tokens that rows were cut to; None where nobody knows
    settings: keys of tokenizer_config.json with which the tokenizer reads rows as the run did
    told: what that changes, in sentences for people
    """

    arguments: dict[str, int | bool]
    pad_token: str | None = None
    paired: bool = True
    max_length: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()


def loading_of(
    model: PreTrainedModel, head: Head | None, directory: Path, max_length: int | None = None
) -> Loading | None:
    """How others load the classifier on the base in `directory`, which was trained on rows of up to
    `max_length` tokens; None of a language model."""
    if head is None:
        return None
    tokenizer, is_named = load_tokenizer(directory), named_padding(model) is not None
    token = padding(model, tokenizer)
    outputs = outputs_of(head)
    arguments = {"num_labels": outputs.number} | ({} if is_named else {"pad_token_id": token})
    is_classifier = names_classifier(read_config(directory).get("architectures"))
    if is_classifier and stored_outputs(directory).number != outputs.number:
        arguments["ignore_mismatched_sizes"] = True
    pad_token = None if tokenizer.pad_token else tokenizer.convert_ids_to_tokens(token)
    settings = dict(_reading(model, tokenizer, pad_token, max_length))
    changed = {key: value for key, (value, _) in settings.items()}
    told = tuple(sentence for _, sentence in settings.values())
    return Loading(arguments, pad_token, joins_pairs(tokenizer), max_length, changed, told)


def _reading(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pad_token: str | None,
    max_length: int | None,
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Keys of tokenizer_config.json that have to be others for rows to be read as in training, each with its
    value and what that changes."""
    if pad_token is not None:
        yield (
            "pad_token",
            (pad_token, f"the tokenizer, which had no padding, fills short rows with {pad_token}"),
        )
    if max_length not in (None, tokenizer.model_max_length):
        cut = f"the tokenizer's model_max_length is {max_length:,}, to which the run cut its rows"
        yield "model_max_length", (max_length, cut)
    if (side := padding_side(model)) != tokenizer.padding_side:
        yield "padding_side", (side, f"the tokenizer fills short rows on the {side}, as in training")
    names = list(tokenizer.model_input_names)
    has_segments = "token_type_ids" in names
    if has_segments and not tells_segments(model.config):
        names.remove("token_type_ids")
        unread = f"the tokenizer gives no segment ids, which {type(model).__name__} cannot read"
        yield "model_input_names", (names, unread)


def outputs_of(head: Head | None) -> Outputs | None:
    """What the model of an adapter tells, if it is a classifier."""
    return None if head is None else Outputs(head.classes)


def as_classifier(base: Checkpoint, model: PreTrainedModel, head: Head) -> tuple[Checkpoint, list[str]]:
    """The base's tensors that a classifier has, by the classifier's names and without its head, and the keys
    that are left out.

    Args:
        model: the classifier, on the meta device.

    Raises:
        InputError: the checkpoint lacks a weight that the head does not bring, or the head another shape.
    """
    names = map_names(model, base.shapes)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in head.tensors.items():
        if shapes.get(name) != tensor.shape:
            raise InputError(
                f"{base.directory}: the adapter's head does not fit: '{name}' is {tuple(tensor.shape)} and"
                f" {type(model).__name__} has {tuple(shapes.get(name, ())) or 'nothing'} there"
            )
    missing = [name for name in names.missing if name not in head.tensors and name in shapes]
    if missing:
        raise InputError(
            f"{base.directory}: the checkpoint lacks '{missing[0]}', and the head does not bring it"
        )
    new_name = {key: name for name, key in names.renamed.items()}
    unused = set(names.unused)
    tensors = {}
    for key, stored in base.tensors.items():
        name = new_name.get(key, key)
        if key not in unused and name not in head.tensors:
            tensors[name] = replace(stored, key=name)
    return Checkpoint(base.directory, tensors), sorted(unused)


def classifier_config(model: PreTrainedModel, outputs: Outputs, directory: Path) -> dict[str, Any]:
    """What config.json of the merged classifier says otherwise than the base's."""
    told = outputs.as_config()
    told["id2label"] = {str(number): name for number, name in told["id2label"].items()}
    return {
        "architectures": [type(model).__name__],
        **told,
        "pad_token_id": padding(model, load_tokenizer(directory)),
    }


def empty_base(directory: Path, head: Head | None) -> PreTrainedModel:
    """The base's model on the meta device, as a classifier where the adapter has a head."""
    return empty_model(directory, outputs_of(head))


def changes(config: Mapping[str, Any], left_out: list[str], loading: Loading) -> list[str]:
    """What a merge has changed beside the weights, in sentences for people."""
    found = [f"config.json names {config['architectures'][0]} and its labels", *loading.told]
    if left_out:
        found.append(f"tensors of the base that a classifier does not have are left out: {some(left_out)}")
    return found
