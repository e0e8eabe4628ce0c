"""A GPU that computes nothing but shapes, so that what matters on one shows on any machine.

Tensors on the device `meta` stand for a GPU's, those on the CPU stay real. While a `PretendGpu` is entered,
it sees every operation on them: what would be a kernel launch, a copy to the device or a wait of the host for
it, and it refuses operations on tensors of both places, as CUDA does. What is computed on the device has no
values: a read of it gives `scalar`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_optimizers = sys.modules[torch.optim.Optimizer.__module__]  # `torch.optim` hides the module of that name

# Operations that only describe memory anew, or take some: no kernel runs.
_FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "numpy_T", "permute",
    "resize_", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unfold", "unsqueeze", "view",
}  # fmt: skip
# Operations whose result's size or value the host has to know.
_READS = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
_MASKING = {"index", "index_put", "index_put_", "_unsafe_index"}  # they read where an index is boolean


@dataclass(frozen=True)
class Copy:
    """A copy from the host to the device."""

    bytes: int
    asynchronous: bool
    place: str


@dataclass
class PretendGpu(TorchDispatchMode):
    """Records what a GPU would be asked for.

    `launches` counts kernels by their operator, `places` by operator and source line. `reads` names operator
    and source line of each wait of the host for the device, `copies` are those to the device. `behind` is,
    for each event that the host waits for, how many kernels the device then still has to run.
    """

    scalar: float = 1.0
    launches: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, str]] = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> PretendGpu:
        self._sdpa = torch.nn.functional.scaled_dot_product_attention
        self._fused = _optimizers._get_fused_kernels_supported_devices
        torch.nn.functional.scaled_dot_product_attention = self._flash
        self._norm = torch.nn.functional.rms_norm
        torch.nn.functional.rms_norm = self._fused_norm
        # The host would read how many there are; here they all are.
        self._assumed = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)
        self._assumed.__enter__()
        devices = [*self._fused(), DEVICE.type]
        _optimizers._get_fused_kernels_supported_devices = lambda: devices
        self._event = torch.cuda.Event
        torch.cuda.Event = lambda: _Event(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._assumed.__exit__(*error)
        torch.nn.functional.scaled_dot_product_attention = self._sdpa
        torch.nn.functional.rms_norm = self._norm
        _optimizers._get_fused_kernels_supported_devices = self._fused
        torch.cuda.Event = self._event

    def clear(self) -> None:
        """Forgets what was recorded so far."""
        for records in (self.launches, self.places, self.reads, self.copies, self.behind):
            records.clear()

    @property
    def launched(self) -> int:
        """Kernels so far."""
        return self.launches.total()

    def _flash(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        """scaled_dot_product_attention's choice on a GPU: the flash kernel, which takes no mask."""
        if query.device != DEVICE or attn_mask is not None:
            self._check_mask(attn_mask)
            return self._sdpa(query, key, value, attn_mask, dropout_p, is_causal, **options)
        scale = options.get("scale")
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]

    def _check_mask(self, mask: torch.Tensor | None) -> None:
        """The kernel that takes a mask reads its rows in steps of 16 bytes, wherever the first one begins.
        torch copies one of booleans, and one whose rows do not begin at multiples of 8 numbers."""
        if mask is None or mask.device != DEVICE or not mask.is_floating_point():
            return
        if any(each % 8 for each in mask.stride()[:-1]):
            return
        if mask.storage_offset() * mask.element_size() % 16:
            raise RuntimeError(f"CUDA error: misaligned address: a mask at {_place()}")

    def _fused_norm(self, x, normalized_shape, weight=None, eps=None):
        """rms_norm's choice on a GPU: one kernel each way, for a weight of the input's type."""
        if x.device != DEVICE or weight is not None and (weight.requires_grad or weight.dtype != x.dtype):
            return self._norm(x, normalized_shape, weight, eps)
        return _FusedNorm.apply(x, self)

    def _count(self, name: str) -> None:
        self.launches[name] += 1
        self.places[name, _place()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor.device == DEVICE]
        there = [tensor for tensor in tensors if tensor.device != DEVICE]
        if not here and not any(isinstance(leaf, torch.device) and leaf == DEVICE for leaf in leaves):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # operations come before they are taken apart
            parts = self._decomposed(func, args, kwargs)
            if parts is not NotImplemented:
                return parts
        name = func.overloadpacket.__name__
        if there and name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        if any(tensor.dim() for tensor in there):  # a number may come from the host
            raise RuntimeError(f"{name}: tensors on the device and on the host at {_place()}")
        if name == "_to_copy" and kwargs.get("device") not in (None, DEVICE):
            self.reads.append(f"copy to the host at {_place()}")
            return torch.full(here[0].shape, self.scalar, dtype=kwargs.get("dtype") or here[0].dtype)
        if name in _READS or (
            name in _MASKING and any(t.dtype == torch.bool for t in args[1] if t is not None)
        ):
            self.reads.append(f"{name} at {_place()}")
            if name == "_local_scalar_dense":
                return torch.tensor(self.scalar).to(here[0].dtype).item()
            if name in ("equal", "is_nonzero"):
                return True
        if name not in _FREE:
            self._count(name)
        return func(*args, **kwargs)

    def _decomposed(self, func, args: tuple, kwargs: dict) -> Any:
        super().__enter__()
        try:
            return func.decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _copy(self, func, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if name == "copy_" and args[0].device != DEVICE:
            if not asynchronous:
                self.reads.append(f"copy to the host at {_place()}")
            return args[0].fill_(self.scalar)
        source = args[1] if name == "copy_" else args[0]
        self.copies.append(Copy(source.numel() * source.element_size(), bool(asynchronous), _place()))
        if name == "copy_":
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=DEVICE)


@dataclass
class _Event:
    """torch.cuda.Event: a place in the device's queue that the host can wait for."""

    gpu: PretendGpu

    def record(self) -> None:
        self.at = self.gpu.launched

    def synchronize(self) -> None:
        self.gpu.reads.append(f"event at {_place()}")
        self.gpu.behind.append(self.gpu.launched - self.at)


class _FusedNorm(torch.autograd.Function):
    """rms_norm's kernels, which torch takes apart on this device."""

    @staticmethod
    def forward(ctx, x, gpu):
        ctx.gpu = gpu
        gpu._count("_fused_rms_norm")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.gpu._count("_fused_rms_norm_backward")
        return torch.empty_like(grad), None


def _place() -> str:
    """The innermost line outside torch that asked for the operation."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__:
            return f"{path.rpartition('site-packages/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def four_bits_to_device(model: torch.nn.Module) -> torch.nn.Module:
    """What `to` does, which cannot take bitsandbytes' weights to a device without values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            moved = torch.Tensor._make_subclass(type(parameter), parameter.data.to(DEVICE), False)
            moved.__dict__.update(parameter.__dict__)
            if state := getattr(parameter, "quant_state", None):
                state.to(DEVICE)
            module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(DEVICE)
    return model
