"""The adapter's two files: chain.safetensors (values, float32) and chain.json (what they are).

Tensors are named by module path: `<path>.A` (r, d_in), `<path>.links` (n, r, r), `<path>.B` (d_out, r). Of
routed experts the path is the parameter's (`….experts.down_proj`), and each tensor has a first dimension that
counts them. A classifier's head lies beside them, `<path>.weight` and `<path>.bias`, and chain.json names its
tensors and classes. The bytes depend on values and configuration alone, so equal adapters are equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linchain_cli import storage
from linchain_cli.chain.head import Head, load_head
from linchain_cli.chain.inject import ChainConfig, chain_layers, inject_at, refuse_second_adapter
from linchain_cli.chain.layer import Chain, collapse
from linchain_cli.chain.shapes import carriers, misfit
from linchain_cli.errors import InputError

FORMAT_VERSION = 1
WITH_HEAD = 2  # the version of adapters with a head, which earlier versions cannot read
TENSORS_FILE = "chain.safetensors"
CONFIG_FILE = "chain.json"


class ChainTensors(NamedTuple):
    """The values of one adapted module: A (r, d_in), links (n, r, r), B (d_out, r), all float32; of routed
    experts with a leading dimension that counts them."""

    A: Tensor
    links: Tensor
    B: Tensor


@dataclass(frozen=True)
class Adapter:
    """A chain adapter apart from any model: its configuration, its values by module path, the base it is for,
    and the head of a classifier that was trained with it.

    `base` holds at least "path" and "hash" (of the base's weights) when it was written by a run.
    """

    config: ChainConfig
    tensors: dict[str, ChainTensors]
    base: dict[str, Any]
    head: Head | None = None


def adapter_of(
    model: nn.Module, config: ChainConfig, base: Mapping[str, Any] | None = None, head: Head | None = None
) -> Adapter:
    """The adapter that `model` carries, as copies of its values on the CPU, and the `head` beside it."""
    tensors = {
        path: ChainTensors(
            *(tensor.detach().to("cpu", copy=True) for tensor in (layer.A, layer.links, layer.B))
        )
        for path, layer in chain_layers(model).items()
    }
    return Adapter(config, tensors, dict(base or {}), head)


def named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as the file names them."""
    chains = {
        f"{path}.{name}": getattr(chain, name)
        for path, chain in adapter.tensors.items()
        for name in chain._fields
    }
    return chains | (adapter.head.tensors if adapter.head else {})


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The adapter's files by name, as bytes that depend on the adapter alone."""
    config = adapter.config
    targets = config.target_modules
    description = {
        "format": "linchain",
        "format_version": WITH_HEAD if adapter.head else FORMAT_VERSION,
        "rank": config.rank,
        "depth": config.depth,
        "alpha": config.alpha,
        "init": config.init,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "base": adapter.base,
    }
    if adapter.head:
        description["head"] = {
            "classes": list(adapter.head.classes),
            "tensors": list(adapter.head.tensors),
        }
    return {
        TENSORS_FILE: storage.tensor_bytes(named_tensors(adapter)),
        CONFIG_FILE: storage.json_bytes(description),
    }


def save_adapter(adapter: Adapter, directory: Path) -> None:
    """Writes the adapter's two files into `directory`, which is created; each replaces its older self as one
    step."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(adapter).items():
        storage.write_atomic(directory / name, data)


def adapter_hash(directory: Path) -> str | None:
    """SHA-256 of the adapter's values, whatever chain.json says of them; None without any."""
    path = Path(directory) / TENSORS_FILE
    return storage.sha256_file(path) if path.is_file() else None


def load_adapter(directory: Path) -> Adapter:
    """Reads what `save_adapter` wrote.

    Raises:
        InputError: a file is missing, damaged, of a later format, or its tensors contradict chain.json.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (directory / name).is_file():
            raise InputError(f"{directory} holds no chain adapter: {name} is missing")
    description = _read_description(directory / CONFIG_FILE)
    config = ChainConfig(
        rank=description["rank"],
        depth=description["depth"],
        alpha=description["alpha"],
        init=description["init"],
        target_modules=description["target_modules"],
    )
    path = directory / TENSORS_FILE
    loaded = _load_file(path)
    head = _read_head(loaded, description["head"], path) if "head" in description else None
    return Adapter(config, _read_tensors(loaded, config, path), description["base"], head)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != "linchain":
        raise InputError(f"{path} does not describe a chain adapter")
    if description.get("format_version") not in (FORMAT_VERSION, WITH_HEAD):
        raise InputError(
            f"{path} has format version {description.get('format_version')}, this linchain reads versions"
            f" up to {WITH_HEAD}: install the version that wrote it, or a later one"
        )
    wanted = {
        "rank": int,
        "depth": int,
        "alpha": (int, float),
        "init": str,
        "target_modules": (str, list),
        "base": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(description.get(key), kind):
            raise InputError(f"{path}: '{key}' is missing or of the wrong type")
    return description


def _load_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _read_head(loaded: dict[str, Tensor], about: Any, path: Path) -> Head:
    """Takes the head's tensors out of `loaded`."""
    try:
        names, classes = list(map(str, about["tensors"])), tuple(map(str, about["classes"]))
        return Head({name: loaded.pop(name) for name in names}, classes)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: the head that {CONFIG_FILE} describes is not there ({error})") from None


def _read_tensors(loaded: Mapping[str, Tensor], config: ChainConfig, path: Path) -> dict[str, ChainTensors]:
    by_path: dict[str, dict[str, Tensor]] = {}
    for key, tensor in loaded.items():
        module, _, name = key.rpartition(".")
        by_path.setdefault(module, {})[name] = tensor
    rank, depth = config.rank, config.depth
    result = {}
    for module, tensors in by_path.items():
        if set(tensors) != set(ChainTensors._fields):
            raise InputError(f"{path}: module '{module}' holds {sorted(tensors)}, expected A, B and links")
        chain = ChainTensors(**tensors)
        experts = chain.A.shape[:-2]
        fits = (
            chain.A.dim() in (2, 3)
            and chain.A.shape[-2] == rank
            and chain.B.shape[:-2] == experts
            and chain.B.dim() == chain.A.dim()
            and chain.B.shape[-1] == rank
            and chain.links.shape == (*experts, depth, rank, rank)
        )
        if not fits or any(tensor.dtype != torch.float32 for tensor in chain):
            raise InputError(
                f"{path}: module '{module}' does not fit rank {rank} and depth {depth} in float32: "
                + ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())
            )
        result[module] = chain
    if not result:
        raise InputError(f"{path} holds no tensors")
    return result


@torch.no_grad()
def attach(model: nn.Module, adapter: Adapter, dropout: float = 0.0) -> dict[str, Chain]:
    """Puts an adapter's chains into a model, at exactly the modules it was trained on.

    To change to another adapter on the same base, `detach(model)` and attach the other one.

    Raises:
        InputError: the model lacks one of the modules, or has it in another shape. Nothing is changed then.
    """
    refuse_second_adapter(model)
    modules = dict(model.named_modules())
    for path, chain in adapter.tensors.items():
        if why := misfit(modules, path, chain.A, chain.B):
            raise InputError(f"the adapter does not fit this model: {why}")
    config = replace(adapter.config, dropout=dropout)
    order = [path for path in carriers(modules) if path in adapter.tensors]
    if adapter.head:
        load_head(model, adapter.head)
    layers = inject_at(model, order, config, seed=0)
    for path, layer in layers.items():
        load_tensors(layer, adapter.tensors[path])
    return layers


@torch.no_grad()
def load_tensors(layer: Chain, chain: ChainTensors) -> None:
    """Copies A, links and B of equal shapes into a layer."""
    for name, tensor in chain._asdict().items():
        getattr(layer, name).copy_(tensor)


def with_depth(adapter: Adapter, depth: int) -> Adapter:
    """The same function as a chain of another depth: longer by identity links, shorter by collapsing.

    Depth 0 folds the whole product into A; a depth of at least 1 multiplies the surplus first links into one.
    ΔW stays the same up to float32 rounding (bit for bit when the chain only grows).
    """
    if depth < 0:
        raise InputError(f"a chain's depth is at least 0, not {depth}")

    def reshape(chain: ChainTensors) -> ChainTensors:
        *experts, have, rank, _ = chain.links.shape
        if depth >= have:
            extra = torch.eye(rank).expand(*experts, depth - have, rank, rank)
            return chain._replace(links=torch.cat([chain.links, extra], dim=-3))
        links = chain.links.double()
        if depth == 0:
            folded = (collapse(links) @ chain.A.double()).float()
            return ChainTensors(folded, chain.links[..., :0, :, :], chain.B)
        first = collapse(links[..., : have - depth + 1, :, :]).float().unsqueeze(-3)
        return chain._replace(links=torch.cat([first, chain.links[..., have - depth + 1 :, :, :]], dim=-3))

    tensors = {path: reshape(chain) for path, chain in adapter.tensors.items()}
    return replace(adapter, config=replace(adapter.config, depth=depth), tensors=tensors)
