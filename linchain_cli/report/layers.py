"""What every adapted module learned, in numbers: spectrum, ranks, ‖ΔW‖ and its size beside ‖W0‖."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.chain import Adapter, ChainTensors, MatrixShape, carriers, parameter_name
from linchain_cli.chain.spectrum import condition_numbers, entropy_rank, spectrum, stable_rank, top_energy
from linchain_cli.errors import LinchainError
from linchain_cli.model.checkpoint import FLOAT_TYPES, Checkpoint, StoredTensor
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.config import empty_model
from linchain_cli.model.names import NameMap, map_names
from linchain_cli.model.packed import open_weights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class LayerNumbers:
    """One adapted module, or the matrix of one expert, whose number is `expert` and stands in the path as
    well.

    `singular_values` are those of ΔW, largest first, at most r of them; the others are zero.

    `base_norm` is ‖W0‖_F, None where it was not read. `link_conditions` are σ_max/σ_min of each link.
    """

    path: str
    singular_values: tuple[float, ...]
    entropy_rank: float
    stable_rank: float
    top_energy: float
    link_conditions: tuple[float, ...]
    base_norm: float | None = None
    expert: int | None = None

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return sum(value * value for value in self.singular_values) ** 0.5

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖_F / ‖W0‖_F."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def matrices(self) -> str:
        """The path of the module, or that of all experts' matrices, with a `*` for their number."""
        if self.expert is None:
            return self.path
        holder, _, name = self.path.rpartition(".")
        return f"{holder.rpartition('.')[0]}.*.{name}"

    @property
    def place(self) -> tuple[int | None, str]:
        """(layer number, kind): (12, "self_attn.q_proj") for model.layers.12.self_attn.q_proj.

        The first number in the path is the layer's; further ones (experts) become `*`.
        """
        found = _NUMBER.search(self.path)
        if not found:
            return None, self.path
        return int(found[0]), _NUMBER.sub("*", self.path[found.end() + 1 :])


def layer_numbers(adapter: Adapter, base: Path | None = None) -> list[LayerNumbers]:
    """The numbers of every module of an adapter, in its order, and of every expert.

    Args:
        base: the base model's checkpoint directory, for ‖W0‖; its weights are read one at a time.
    """
    outputs = Outputs(adapter.head.classes) if adapter.head else None
    norms = base_norms(base, adapter.tensors, outputs) if base is not None else {}
    scaling = adapter.config.scaling
    found = []
    for path, expert, chain in _chains(adapter):
        values = spectrum(chain.A, chain.links, chain.B, scaling)
        found.append(
            LayerNumbers(
                path,
                tuple(values.tolist()),
                entropy_rank(values),
                stable_rank(values),
                top_energy(values),
                tuple(condition_numbers(chain.links).tolist()),
                norms.get(path),
                expert,
            )
        )
    return found


def _chains(adapter: Adapter) -> Iterator[tuple[str, int | None, ChainTensors]]:
    """Every chain with its path and its expert; of experts' matrices one for each of them."""
    for path, chain in adapter.tensors.items():
        if chain.A.dim() == 2:
            yield path, None, chain
        else:
            for expert, tensors in enumerate(zip(*chain, strict=True)):
                yield _of_expert(path, expert), expert, ChainTensors(*tensors)


def _of_expert(path: str, expert: int) -> str:
    holder, _, name = path.rpartition(".")
    return f"{holder}.{expert}.{name}"


def base_norms(directory: Path, paths: Iterable[str], outputs: Outputs | None = None) -> dict[str, float]:
    """‖W0‖_F by module path, and by expert, for those whose weights lie in the checkpoint as the model holds
    them, or in pieces of single experts.

    Raises:
        InputError: the directory holds no usable checkpoint.
    """
    checkpoint = open_weights(directory)
    model = empty_model(directory, outputs)
    try:
        names = map_names(model, checkpoint.shapes)
    except LinchainError:
        return {}
    modules = dict(model.named_modules())
    suitable = carriers(modules)
    squares: dict[str, float] = {}
    for path in paths:
        shape, name = suitable.get(path), parameter_name(modules, path)
        if shape is not None:
            for place, stored in _stored(path, name, shape, names, checkpoint):
                squares[place] = squares.get(place, 0.0) + float(stored.tensor().float().norm()) ** 2
    return {path: square**0.5 for path, square in squares.items()}


def _stored(
    path: str, name: str, shape: MatrixShape, names: NameMap, checkpoint: Checkpoint
) -> Iterator[tuple[str, StoredTensor]]:
    """The floating-point tensors of the files that are the parameter `name` or parts of it, each with the
    path of what it belongs to."""
    if name in names.renamed:
        stored = checkpoint.tensors[names.renamed[name]]
        if stored.type not in FLOAT_TYPES:
            return
        if shape.experts is None:
            yield path, stored
        else:
            yield from ((_of_expert(path, expert), stored.matrix(expert)) for expert in range(shape.experts))
    elif name in names.converted and shape.experts is not None:
        pieces = names.converted[name].pieces(checkpoint.shapes) or {}
        for key, piece in pieces.items():
            if piece.parameter == name and checkpoint.tensors[key].type in FLOAT_TYPES:
                yield _of_expert(path, piece.expert), checkpoint.tensors[key]
