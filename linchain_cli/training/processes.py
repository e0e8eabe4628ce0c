"""What several processes need of each other: errors that reach all of them, and one sum per optimizer step.

Every process holds the adapters whole and steps its own optimizer on the same summed gradient, so they stay equal
without being sent around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from linchain_cli.errors import LinchainError

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Runs `work` on the main process while the others wait; its result there, None elsewhere.

    When it raises a LinchainError, every process raises the same one, so that none is left waiting.
    """
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except LinchainError as raised:
            error = raised
    if accelerator.num_processes > 1:
        error = broadcast_object_list([error])[0]
    if error is not None:
        raise error
    return result


def sum_over_processes(accelerator: Accelerator, parameters: Iterable[nn.Parameter], extras: Tensor) -> Tensor:
    """Sums gradients, and a few numbers that travel with them, over all processes in one all-reduce.

    Args:
        parameters: in the same order on every process. A parameter without a gradient counts as zero.
        extras: (k,) float32, this process's numbers.

    Returns:
        (k,) the summed numbers. The gradients are replaced in place.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return extras
    flat = torch.cat([extras, *(parameter.grad.flatten() for parameter in parameters)])
    flat = accelerator.reduce(flat, reduction="sum")
    sizes = [extras.numel(), *(parameter.numel() for parameter in parameters)]
    summed, *gradients = flat.split(sizes)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad.copy_(gradient.view_as(parameter))
    return summed
