"""float32 products on a CPU by the faster of the two libraries that torch brings.

torch multiplies float32 matrices with MKL and bfloat16 with oneDNN. On an AMD processor (Zen 4, two cores)
oneDNN was faster with float32, too: 1.1 to 1.4 times in layers of SmolLM2-135M. The
operator that is called here is the one that torch.compile calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linchain_cli.machine import cpu_info
from linchain_cli.model.fast import is_replaced, replace_forward

# oneDNN takes 1 to 2 ms to write a program for each new number of rows. With few rows it is faster, too (1.1
# to 1.4 times from 16 on), but that is microseconds.
MIN_ROWS = 64


def onednn_is_faster() -> bool:
    """Whether this machine's float32 products are better left to oneDNN. By its maker and not by a trial: all
    processes of an evaluation must compute alike."""
    return (
        cpu_info("vendor_id") == "AuthenticAMD"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextlib.contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, the model's float32 linear layers on a CPU run by oneDNN, where that is faster. For passes
    without gradients; one with gradients runs as always."""
    with contextlib.ExitStack() as undo:
        for module in model.modules() if onednn_is_faster() else ():
            # A module whose forward is somebody else's already is theirs. A chain layer leaves its base to
            # itself then, and adds its own term.
            if type(module) is nn.Linear and not is_replaced(module) and _suits(module.weight):
                undo.callback(replace_forward(module, _forward))
        yield


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """(..., d_in) → (..., d_out)."""
    if torch.is_grad_enabled() or not _suits(x) or x.numel() < MIN_ROWS * x.shape[-1]:
        return F.linear(x, self.weight, self.bias)
    return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _suits(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
