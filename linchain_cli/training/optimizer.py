"""The optimizer over a model's trained tensors, and its state as named tensors, so that checkpoints need no
pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linchain_cli.chain import Chain
from linchain_cli.errors import InputError
from linchain_cli.stopping import SIGNALS

BETAS = (0.9, 0.999)
EPSILON = 1e-8
KINDS = ("A", "links", "B", "head")  # head: whatever is trained beside the chains
EXTRAS = 2 + len(SIGNALS)  # summed over processes with the gradients: loss, tokens, a flag for each signal
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ROW = 1024  # of so many gradients the squares are summed first, as float32 sums of more lose digits


def trained_parameters(layers: Mapping[str, Chain]) -> dict[str, nn.Parameter]:
    """A, links and B of every layer by the adapter file's names; empty links (depth 0) are left out."""
    of_chains = KINDS[:-1]
    named = {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in of_chains}
    return {name: parameter for name, parameter in named.items() if parameter.numel()}


def kind_of(name: str) -> str:
    """What a trained tensor is, by its name in the adapter's file."""
    last = name.rpartition(".")[2]
    return last if last in KINDS else "head"


class FlatAdamW(torch.optim.AdamW):
    """AdamW over tensors that lie behind one another: a step takes as many operations as there are kinds.

    The parameters it is made from become views of one buffer, ordered by kind, and their gradients views of
    another. Gradients are zero and never None, so that they can be summed over processes, cut down and set to
    zero as one tensor. Each parameter group holds one parameter, all tensors of a kind; its `rate_scale` is
    the kind's factor on the learning rate. Biases and gains of norms (one dimension) are a group of their
    own, without weight decay, as transformers' Trainer has it.

    Attributes:
        sums: float32, the gradients and behind them `extras`: what processes sum.
        extras: (EXTRAS,), room for a few numbers that travel with the gradients.
        found_inf: a scalar, 1 from a step on whose gradients were not finite: torch's kernel leaves such
            steps out.

    Args:
        parameters: by the adapter file's names, of which `kind_of` tells the kind.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        weight_decay: float = 0.0,
        multipliers: Mapping[str, float] | None = None,
    ):
        alike: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
        for name in sorted(parameters, key=lambda name: KINDS.index(kind_of(name))):
            alike.setdefault((kind_of(name), parameters[name].dim() > 1), {})[name] = parameters[name]
        ordered = [parameter for members in alike.values() for parameter in members.values()]
        values = torch.cat([parameter.detach().flatten() for parameter in ordered])
        rows = math.ceil(len(values) / _ROW)
        self.sums = values.new_zeros(rows * _ROW + EXTRAS)
        self.extras = self.sums[-EXTRAS:]
        self._rows = self.sums[:-EXTRAS].view(rows, _ROW)
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._places: dict[str, tuple[nn.Parameter, slice]] = {}
        groups, start = [], 0
        for (kind, decays), members in alike.items():
            size = sum(parameter.numel() for parameter in members.values())
            whole = nn.Parameter(values[start : start + size])
            whole.grad = self.sums[start : start + size]
            scale, decay = (multipliers or {}).get(kind, 1.0), weight_decay if decays else 0.0
            groups.append({"params": [whole], "rate_scale": scale, "weight_decay": decay})
            self._lay_out(members, whole)
            start += size
        self.found_inf = values.new_zeros(())
        super().__init__(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)

    def _lay_out(self, members: Mapping[str, nn.Parameter], whole: nn.Parameter) -> None:
        start = 0
        for name, parameter in members.items():
            place = slice(start, start := start + parameter.numel())
            parameter.data = whole.detach()[place].view_as(parameter)
            parameter.grad = whole.grad[place].view_as(parameter)
            self._places[name] = whole, place

    def set_learning_rate(self, rate: float) -> None:
        """Sets every group's rate to `rate` times its kind's factor."""
        for group in self.param_groups:
            group["lr"] = rate * group["rate_scale"]

    def step_if(self, finite: Tensor) -> None:
        """A step, left out by the device if `finite`, a scalar, is false, with all that follow until `go_on`:
        the host need not know."""
        self.found_inf = torch.maximum(self.found_inf, finite.logical_not().to(self.found_inf))
        self.step()

    def go_on(self) -> None:
        """Has steps taken again after one that was left out."""
        self.found_inf = torch.zeros_like(self.found_inf)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Sets all gradients to zero in place, whatever `set_to_none` says."""
        self.sums.zero_()

    @torch.no_grad()
    def clip_gradients(self, most: float | None, scale: float = 1.0) -> Tensor:
        """Divides all gradients by `scale`, and cuts them together down to a norm of `most`; returns the norm
        they had before that, a scalar."""
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(self._rows, dim=1)) / scale
        if most is not None:
            self._rows.mul_((most / (norm + 1e-6)).clamp(max=1.0) / scale)
        elif scale != 1.0:
            self._rows.div_(scale)
        return norm

    def moments(self, name: str) -> dict[str, Tensor]:
        """The state of one of the parameters, as views in its shape; empty before the first step."""
        whole, place = self._places[name]
        shape = self._shapes[name]
        return {key: self.state[whole][key][place].view(shape) for key in _MOMENTS if self.state[whole]}

    def named_state(self) -> dict[str, Tensor]:
        """Copies of the state of all parameters as `<name>/<exp_avg, exp_avg_sq or step>`, on the CPU."""
        found = {}
        for name, (whole, place) in self._places.items():
            for key, value in self.state[whole].items():
                part = value[place].view(self._shapes[name]) if value.dim() else value
                found[f"{name}/{key}"] = part.detach().to("cpu", copy=True)
        return found

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `named_state` gave.

        Raises:
            InputError: the state belongs to other parameters, or to another optimizer.
        """
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self._places}
        for key, tensor in state.items():
            name, _, entry = key.rpartition("/")
            if name not in by_name:
                raise InputError(
                    f"the checkpoint's optimizer state names '{name}', which this run does not train"
                )
            by_name[name][entry] = tensor
        for name, (whole, place) in self._places.items():
            saved = by_name[name]
            if not saved:
                raise InputError(f"the checkpoint holds no optimizer state for '{name}'")
            if set(saved) != {"step", *_MOMENTS}:
                raise InputError(f"the checkpoint's optimizer state for '{name}' is another optimizer's")
            if not self.state[whole]:
                self.state[whole] = {key: torch.zeros_like(whole) for key in _MOMENTS}
            self.state[whole]["step"] = saved["step"].to(whole.device, torch.float32, copy=True)
            for key in _MOMENTS:
                self.state[whole][key][place].copy_(saved[key].flatten())
