"""What every adapted module learned, in numbers: spectrum, ranks, ‖ΔW‖ and its size beside ‖W0‖."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.chain import Adapter, linear_shape
from linchain_cli.chain.spectrum import condition_numbers, entropy_rank, spectrum, stable_rank, top_energy
from linchain_cli.errors import LinchainError
from linchain_cli.model.checkpoint import FLOAT_TYPES
from linchain_cli.model.loading import empty_model
from linchain_cli.model.names import map_names
from linchain_cli.model.packed import open_weights

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class LayerNumbers:
    """One adapted module. `singular_values` are those of ΔW, largest first, at most r of them; the others are
    zero.

    `base_norm` is ‖W0‖_F, None where it was not read. `link_conditions` are σ_max/σ_min of each link.
    """

    path: str
    singular_values: tuple[float, ...]
    entropy_rank: float
    stable_rank: float
    top_energy: float
    link_conditions: tuple[float, ...]
    base_norm: float | None = None

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return sum(value * value for value in self.singular_values) ** 0.5

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖_F / ‖W0‖_F."""
        return self.norm / self.base_norm if self.base_norm else None

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
    """The numbers of every module of an adapter, in its order.

    Args:
        base: the base model's checkpoint directory, for ‖W0‖; its weights are read one at a time.
    """
    norms = base_norms(base, adapter.tensors) if base is not None else {}
    scaling = adapter.config.scaling
    found = []
    for path, chain in adapter.tensors.items():
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
            )
        )
    return found


def base_norms(directory: Path, paths: Iterable[str]) -> dict[str, float]:
    """‖W0‖_F by module path, for those modules whose weight lies in the checkpoint as the model holds it.

    Raises:
        InputError: the directory holds no usable checkpoint.
    """
    checkpoint = open_weights(directory)
    model = empty_model(directory)
    try:
        keys = map_names(model, checkpoint.shapes).renamed
    except LinchainError:
        return {}
    modules = dict(model.named_modules())
    wanted = {path: keys.get(f"{path}.weight") for path in paths if linear_shape(modules.get(path))}
    return {
        path: float(checkpoint.tensors[key].tensor().float().norm())
        for path, key in wanted.items()
        if key is not None and checkpoint.tensors[key].type in FLOAT_TYPES
    }
