"""A frozen base spread over processes (FSDP2), loaded block by block.

No process ever holds more than its share, the block it reads, and what stays whole everywhere: embeddings,
final norm and head, since how often the head runs differs between processes. The processes of a group take
turns at the blocks: each reads (and rounds to 4 bit, if asked) every n-th one as transformers would, and
deals out its rows. So every weight is read and rounded once per group, and is bit for bit what a whole base
has.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from linchain_cli.errors import InputError
from linchain_cli.machine import return_large_memory
from linchain_cli.model.checkpoint import StoredTensor
from linchain_cli.model.head import backbone, decoder_blocks
from linchain_cli.model.loading import (
    choose_attention,
    loading_problems,
    read_into,
    read_model,
    refuse_incomplete,
)
from linchain_cli.model.names import map_names
from linchain_cli.model.packed import open_weights
from linchain_cli.training.processes import together

SHARD, REPLICATE = "shard", "replicate"


def load_sharded(
    directory: Path,
    accelerator: Accelerator,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    attention: str = "auto",
    per_machine: bool = False,
    offload: bool = False,
) -> nn.Module:
    """The model of a checkpoint directory, in eval mode, all frozen, its blocks spread over the processes.

    A block is whole on the device for as long as it computes. Chains that are put in later are not part of
    it. All processes call it together; what fails on one of them ends it on all.

    Args:
        dtype, quantization, attention: as for `load_model`; int8 cannot be spread.
        per_machine: spread it over the processes of each machine, so that every machine holds all of it.
        offload: keep the shards in main memory, from where a block is copied to the GPU when it computes.

    Raises:
        InputError: as `load_model` does; the model shares weights between its blocks; or `per_machine`, and
        the machines run different numbers of processes.
    """
    device, mesh = accelerator.device, _mesh(accelerator, per_machine)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    group = mesh.get_group(SHARD)
    return_large_memory()

    def fill(model: nn.Module, settings: Any) -> Any:
        parts = _parts(model, directory)

        def read(tensors: dict[str, StoredTensor]) -> Any:
            with loading_problems(directory, attention):
                return read_into(model, tensors, settings)

        found = together(accelerator, lambda: read(parts.rest))
        for first in range(0, len(parts.blocks), group.size()):
            blocks = parts.blocks[first : first + group.size()]
            mine = blocks[group.rank()][1] if group.rank() < len(blocks) else {}
            together(accelerator, lambda mine=mine: read(mine))
            for owner, (block, _) in enumerate(blocks):
                _deal_out(block, owner, mesh, policy, device)
        found.missing_keys -= parts.names
        return found

    model = read_model(
        directory,
        dtype=dtype,
        device=device,
        quantization=quantization,
        attention=attention,
        fill=fill,
        spread=True,
    )
    # The backbone owns no shard itself; as the common root of the blocks it lets them be fetched ahead.
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(backbone(model), mesh=mesh, ignored_params=whole)
    together(accelerator, lambda: choose_attention(model, attention))
    return model


def _mesh(accelerator: Accelerator, per_machine: bool) -> DeviceMesh:
    """The processes as a line along which blocks are spread; or, per machine, as one such line for each."""
    world, kind = accelerator.num_processes, accelerator.device.type
    if not per_machine:
        return init_device_mesh(kind, (world,), mesh_dim_names=(SHARD,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    found = sorted(set(gather_object([local])))
    if len(found) > 1 or world % local:
        raise InputError(
            "training.parallel: hybrid needs as many processes on every machine; there are"
            f" {' and '.join(map(str, found))} on one, {world} in all. Start as many on each, or set it to"
            " shard"
        )
    return init_device_mesh(kind, (world // local, local), mesh_dim_names=(REPLICATE, SHARD))


@dataclass(frozen=True)
class _Parts:
    """A checkpoint's tensors by key, those of each block and the others, and the names of what lies in
    blocks."""

    blocks: list[tuple[nn.Module, dict[str, StoredTensor]]]
    rest: dict[str, StoredTensor]
    names: set[str]


def _parts(model: nn.Module, directory: Path) -> _Parts:
    checkpoint = open_weights(directory)
    names, blocks = map_names(model, checkpoint.shapes), decoder_blocks(model)
    paths = {id(module): path for path, module in model.named_modules()}
    place = {
        f"{paths[id(block)]}.{name}": number
        for number, block in enumerate(blocks)
        for name in block.state_dict()
    }
    if shared := sorted(place.keys() & names.tied.keys()):
        raise InputError(
            f"training.parallel: {type(model).__name__} shares weights between its blocks (first"
            f" '{shared[0]}'), which therefore cannot be spread over processes; set it to replicate"
        )
    refuse_incomplete(directory, [name for name in names.missing if name in place])
    homes = {key: {place.get(name)} for name, key in names.renamed.items()}
    for group in names.converted.values():
        homes.update(dict.fromkeys(group.keys, {place.get(name) for name in group.parameters}))
    parts = _Parts([(block, {}) for block in blocks], {}, set(place))
    for key, stored in checkpoint.tensors.items():
        home = homes.get(key, {None})
        # What one conversion makes for several places is made everywhere, before the blocks.
        number = next(iter(home)) if len(home) == 1 else None
        (parts.rest if number is None else parts.blocks[number][1])[key] = stored
    return parts


@dataclass(frozen=True)
class _Form:
    """All of a block but the values that are spread: what the other processes have to know of it."""

    parameters: dict[str, tuple[torch.Size, torch.dtype]]
    scalars: dict[str, Tensor]
    buffers: dict[str, Tensor]
    scales: dict[str, dict[str, Any]]  # of 4-bit weights, by module

    @classmethod
    def of(cls, block: nn.Module) -> _Form:
        scales = {
            path: {
                key: value.cpu() if isinstance(value, Tensor) else value
                for key, value in module.quant_state.as_dict(packed=True).items()
            }
            for path, module in block.named_modules()
            if getattr(module, "quant_state", None) is not None
        }
        # Buffers that no checkpoint holds are still empty.
        return cls(
            {name: (value.shape, value.dtype) for name, value in block.named_parameters()},
            {name: value.data.cpu() for name, value in block.named_parameters() if not value.dim()},
            {name: value.cpu() for name, value in block.named_buffers() if not value.is_meta},
            scales,
        )

    def give(self, block: nn.Module, device: torch.device) -> None:
        """Gives a block this form; the values to come are empty."""
        for name, (shape, dtype) in self.parameters.items():
            value = self.scalars.get(name)
            value = torch.empty(shape, dtype=dtype, device="meta") if value is None else value.to(device)
            _set_parameter(block, name, value)
        for name, value in self.buffers.items():
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            module._buffers[leaf] = value.to(device)
            module._buffers[leaf]._is_hf_initialized = True
        for path, state in self.scales.items():
            from bitsandbytes.functional import QuantState

            block.get_submodule(path).quant_state = QuantState.from_dict(dict(state), device)


def _deal_out(
    block: nn.Module, owner: int, mesh: DeviceMesh, policy: OffloadPolicy, device: torch.device
) -> None:
    """Spreads a block that process `owner` of each group has read."""
    group = mesh.get_group(SHARD)
    whole = dict(block.named_parameters()) if group.rank() == owner else {}
    form = [_Form.of(block) if group.rank() == owner else None]
    distributed.broadcast_object_list(form, group=group, group_src=owner)
    form[0].give(block, device)
    scalars = {parameter for parameter in block.parameters() if not parameter.dim()}
    fully_shard(block, mesh=mesh, offload_policy=policy, ignored_params=scalars)
    for module in block.modules():
        # Its weights are there. Buffers that no checkpoint holds are transformers' to compute.
        module._is_hf_initialized = not module._non_persistent_buffers_set
    for name, empty in list(block.named_parameters()):
        if not isinstance(empty, DTensor):
            continue
        share = _share(empty, whole.pop(name, None), owner, group, device)
        if isinstance(policy, CPUOffloadPolicy):
            share = share.cpu()
        spread = DTensor.from_local(
            share,
            empty.device_mesh,
            empty.placements,
            run_check=False,
            shape=empty.shape,
            stride=empty.stride(),
        )
        _set_parameter(block, name, spread)


def _share(empty: DTensor, whole: Tensor | None, owner: int, group: Any, device: torch.device) -> Tensor:
    """This process's rows of a parameter of which only `owner` has the values, as FSDP2 cuts it."""
    rows = math.ceil(empty.shape[0] / group.size())
    share = torch.empty((rows, *empty.shape[1:]), dtype=empty.dtype, device=device)
    pieces = None
    if whole is not None:
        pieces = [_rows(whole.data, rank * rows, rows) for rank in range(group.size())]
    distributed.scatter(share.view(-1).view(torch.uint8), pieces, group=group, group_src=owner)
    return share[: empty.to_local().shape[0]]


def _rows(values: Tensor, first: int, count: int) -> Tensor:
    """The bytes of `count` rows; what lies beyond the last row is zero."""
    rows = values[first : first + count]
    if len(rows) < count:
        rows = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
    return rows.contiguous().view(-1).view(torch.uint8)


def _set_parameter(block: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # or transformers would fill it with random numbers
    block.get_submodule(path)._parameters[leaf] = parameter
