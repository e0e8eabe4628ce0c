"""Module names against checkpoint names: where each parameter of a model lies in its checkpoint's files.

For about a third of the architectures the two differ. Most differences are renames (a base checkpoint without
the `transformer.` prefix, Gemma 3's `language_model.`); some are conversions, in which one converter of
transformers turns a group of file tensors into a group of parameters (per-expert matrices into one 3-D
parameter, a fused qkv matrix into three). `map_names` replays the renaming of
`transformers.core_model_loading` key by key, in the order in which `from_pretrained` does it, so that a file
can be patched without loading the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from linchain_cli.errors import LinchainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming


class ConversionError(LinchainError):
    """A converter does more than move elements, so a sum in the model has no exact counterpart in the
    file."""


@dataclass(frozen=True)
class Conversion:
    """Checkpoint tensors that one of transformers' weight converters turns into parameters of the model.

    `sources` are the checkpoint keys with the converter's pattern that each matched, in the order the
    converter collects them; `parameters` are the names it produces.
    """

    sources: tuple[tuple[str, str], ...]
    parameters: tuple[str, ...]
    _first_target: str = field(repr=False)
    _converter: Any = field(repr=False)
    _model: Any = field(repr=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """The checkpoint keys of the group."""
        return tuple(key for key, _ in self.sources)

    def to_model(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the converter: checkpoint tensors by key -> parameters by name."""
        converter = deepcopy(self._converter)
        for key, pattern in self.sources:
            converter.add_tensor(self._first_target, key, pattern, tensors[key])
        converted = converter.convert(self._first_target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def only(self, keys: Collection[str]) -> Conversion:
        """The same conversion of some of its checkpoint keys."""
        return replace(self, sources=tuple(source for source in self.sources if source[0] in keys))

    def pieces(self, shapes: Mapping[str, torch.Size]) -> dict[str, Piece] | None:
        """Where each file tensor lies, if all of them are whole rows of single experts' matrices; else None.

        Found by following numbered tensors of a few rows and columns: what stacks matrices, and puts them one
        below the other, does so at any size. Only running the converter on the real ones proves it.
        """
        if any(len(shapes[key]) != 2 for key in self.keys):
            return None
        sizes = sorted({size for key in self.keys for size in shapes[key]})
        reduced = {key: torch.Size(2 + sizes.index(size) for size in shapes[key]) for key in self.keys}
        try:
            places = self.element_sources(reduced)
        except ConversionError:
            return None
        numbered, state = self._numbered(reduced), self._model.state_dict()
        found: dict[str, Piece] = {}
        for name, place in places.items():
            for expert, matrix in enumerate(place if place.dim() == 3 else ()):
                first = 0
                for key, transposed in _laid_out(matrix, numbered):
                    rows, columns = shapes[key][::-1] if transposed else shapes[key]
                    found[key] = Piece(name, expert, first, rows, transposed)
                    first += rows
                    if columns != state[name].shape[-1]:
                        return None
                if first != state[name].shape[-2]:
                    return None
        return found if found.keys() == set(self.keys) else None

    def _numbered(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The group's tensors with the numbers of their elements, when they lie end to end."""
        numbered, total = {}, 0
        for key in self.keys:
            count = shapes[key].numel()
            numbered[key] = torch.arange(total, total + count).reshape(shapes[key])
            total += count
        return numbered

    def element_sources(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """For each parameter, the place of each of its elements in the group's file tensors laid end to end.

        The converter is run on tensors that hold their own element numbers; int64, each in the parameter's
        shape. A converter that does anything but move elements is a ConversionError.
        """
        numbered = self._numbered(shapes)
        total = sum(tensor.numel() for tensor in numbered.values())
        what = f"the conversion of {', '.join(self.keys[:3])}{' ...' if len(self.keys) > 3 else ''}"
        try:
            places = self.to_model(numbered)
        except Exception as error:  # whatever a converter of transformers raises for integers
            raise ConversionError(f"{what} cannot be followed element by element ({error})") from error
        seen = torch.zeros(total, dtype=torch.bool)
        for name, place in places.items():
            flat = place.reshape(-1)
            if flat.dtype != torch.int64 or (
                flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < total
            ):
                raise ConversionError(f"{what} computes the values of {name} instead of moving them")
            if bool(seen[flat].any()) or torch.unique(flat).numel() != flat.numel():
                raise ConversionError(f"{what} uses an element of the file twice in {name}")
            seen[flat] = True
        return places


def _laid_out(matrix: torch.Tensor, numbered: Mapping[str, torch.Tensor]) -> list[tuple[str, bool]]:
    """The numbered tensors, by their keys, that lie one below the other in a matrix, and whether each is
    transposed; as far as there are any."""
    starts = {int(tensor[0, 0]): key for key, tensor in numbered.items()}
    found, row = [], 0
    while row < len(matrix) and (key := starts.get(int(matrix[row, 0]))):
        block = numbered[key]
        transposed = not torch.equal(matrix[row : row + len(block)], block)
        block = block.T if transposed else block
        if not torch.equal(matrix[row : row + len(block)], block):
            break
        found.append((key, transposed))
        row += len(block)
    return found


@dataclass(frozen=True)
class Piece:
    """A file tensor that is `count` rows, from `first` on, of one expert's matrix in a 3-D parameter, or the
    transpose of these rows."""

    parameter: str
    expert: int
    first: int
    count: int
    transposed: bool


@dataclass(frozen=True)
class NameMap:
    """Where the parameters (and buffers) of one model lie in one checkpoint.

    renamed: parameter name -> checkpoint key, for tensors that the file holds as the model does
    converted: parameter name -> the conversion it comes out of
    unused: checkpoint keys that no parameter takes
    missing: parameters that nothing in the checkpoint gives, those tied to another one left out
    tied: parameter name -> the other names of the same weight
    """

    renamed: dict[str, str]
    converted: dict[str, Conversion]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]


def map_names(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> NameMap:
    """Maps the parameters of `model` (one on the meta device will do) to a checkpoint, given as key ->
    shape."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()

    renamed: dict[str, str] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    unused = []
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = _parameter_name(key, renamings, converters, model.base_model_prefix, state)
        if name not in state or name in renamed:  # of two keys for one parameter, the first is loaded
            unused.append(key)
        elif pattern is None:
            renamed[name] = key
        else:
            groups.setdefault(name, []).append((key, pattern))

    converted: dict[str, Conversion] = {}
    for first, sources in groups.items():
        conversion = _conversion(first, sources, by_pattern[sources[0][1]], model, shapes)
        converted.update(dict.fromkeys(conversion.parameters, conversion))

    tied = tied_names(model)
    present = renamed.keys() | converted.keys()
    missing = [
        name
        for name in state
        if name not in present and not any(other in present for other in tied.get(name, ()))
    ]
    return NameMap(renamed, converted, tuple(unused), tuple(missing), tied)


def _parameter_name(
    key: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    prefix: str,
    state: Mapping[str, Any],
) -> tuple[str, str | None]:
    """The name `key` is loaded under, and the converter pattern it matched, as `from_pretrained` decides
    it."""
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(key, renamings, converters, prefix, state)
    if name not in state and key in state:
        name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
    return name, pattern


def _conversion(
    first: str,
    sources: list[tuple[str, str]],
    converter: WeightConverter,
    model: PreTrainedModel,
    shapes: Mapping[str, Sequence[int]],
) -> Conversion:
    """The group of `sources`; the names it produces are found by running the converter on meta tensors."""
    whole = Conversion(tuple(sources), (first,), first, converter, model)
    empty = {key: torch.empty(shapes[key], device="meta") for key, _ in sources}
    return Conversion(tuple(sources), tuple(whole.to_model(empty)), first, converter, model)


def tied_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Parameter name -> the other names of the same weight, for every weight that has more than one."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    families = [names for names in groups.values() if len(names) > 1]
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        families.append({name, source})
    tied: dict[str, set[str]] = {}
    for names in families:
        for name in names:
            tied.setdefault(name, set()).update(names - {name})
    return {name: tuple(sorted(others)) for name, others in tied.items()}
