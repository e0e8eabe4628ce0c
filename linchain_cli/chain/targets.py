"""Which modules get a chain, and which of a model's weights have none."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from linchain_cli.chain.experts import expert_matrices
from linchain_cli.chain.layer import Chain, linear_shape
from linchain_cli.chain.shapes import carriers, parameter_name
from linchain_cli.errors import InputError, did_you_mean

ALL_LINEAR = "all-linear"
EXPERTS = "3-D expert parameters"


@dataclass(frozen=True)
class Matches:
    """The modules a target specification selects: `paths` in model order, and how many each pattern met. The
    path of experts' matrices is their parameter's."""

    paths: tuple[str, ...]
    per_pattern: dict[str, int]


def match_modules(model: nn.Module, target_modules: str | Sequence[str], prefix: str = "") -> Matches:
    """Finds what `target_modules` names below the dotted `prefix` (the text decoder's): linear modules, and
    the matrices of routed experts.

    Those are met by patterns only that name the module which holds them (`experts.down_proj`): often they
    have the names of linear modules (`down_proj`), but they are most of a model.

    Raises:
        InputError: a pattern meets nothing; the message says what could be matched.
    """
    modules = dict(model.named_modules())
    scope = {path: module for path, module in modules.items() if _below(path, prefix) and not _pools(path)}
    suitable = [path for path in carriers(modules) if _below(path, prefix) and not _pools(path)]
    linear = {path: modules[path] for path in suitable if path in modules}
    patterns = [target_modules] if isinstance(target_modules, str) else target_modules
    tests = {pattern: _test(pattern, target_modules, model, linear) for pattern in patterns}
    met = {
        pattern: [
            path
            for path in suitable
            if (test(path) if path in linear else _selects_experts(pattern, test, path))
        ]
        for pattern, test in tests.items()
    }
    if missing := {pattern: tests[pattern] for pattern, paths in met.items() if not paths}:
        raise InputError(_nothing_matched(missing, met, model, scope, suitable, prefix))
    chosen = {path for paths in met.values() for path in paths}
    return Matches(
        tuple(path for path in suitable if path in chosen),
        {pattern: len(paths) for pattern, paths in met.items()},
    )


def _test(
    pattern: str, target_modules: str | Sequence[str], model: nn.Module, linear: Mapping[str, nn.Module]
) -> Callable[[str], bool]:
    """Whether a pattern selects a path: all-linear, a regular expression, or the end of a dotted path.
    `linear` are the modules that can carry a chain."""
    if pattern == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        owners = owners_of_weight(model)
        return lambda path: (
            path in linear and linear[path] is not head and len(owners[linear[path].weight]) == 1
        )
    if pattern != target_modules:
        return lambda path: path == pattern or path.endswith("." + pattern)
    try:
        expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise InputError(f"adapter.target_modules: '{pattern}' is no regular expression: {error}") from error
    return lambda path: expression.fullmatch(path) is not None


def _selects_experts(pattern: str, test: Callable[[str], bool], path: str) -> bool:
    """Whether a pattern meets experts' matrices, or the module that holds them, and names that module."""
    holder = path.rpartition(".")[0]
    return holder.rpartition(".")[2] in pattern and (test(path) or test(holder))


def _below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _pools(path: str) -> bool:
    """Whether a module is an encoder's pooler, behind its blocks: a part of a classifier's head."""
    return "pooler" in path.split(".")


def _nothing_matched(
    missing: Mapping[str, Callable[[str], bool]],
    met: Mapping[str, Sequence[str]],
    model: nn.Module,
    scope: Mapping[str, nn.Module],
    suitable: Sequence[str],
    prefix: str,
) -> str:
    """What is wrong with the patterns that met nothing, and what the model has."""
    linear = [path for path in suitable if path in scope]
    matrices = [path for path in suitable if path not in scope]
    names = Counter(path.rpartition(".")[2] for path in linear)
    named_experts = Counter(".".join(path.split(".")[-2:]) for path in matrices)
    reasons = []
    for pattern, test in missing.items():
        reason = f"'{pattern}' matches no linear module"
        reason += f" of the text decoder ('{prefix}')." if prefix else "."
        outside = [path for path, m in model.named_modules() if path not in scope and linear_shape(m)]
        outside = [path for path in outside if test(path)]
        if outside:
            reason += f" It does match {len(outside)} outside the text decoder, which get no adapter"
            reason += f" (e.g. {outside[0]})."
        experts = _experts_met(pattern, test, model)
        if able := [path for path in experts if path in matrices]:
            wanted = dict.fromkeys(".".join(path.split(".")[-2:]) for path in able)
            reason += f" It only meets routed experts (e.g. {able[0]}), which are met by patterns that name"
            reason += f" them: {', '.join(wanted)}."
        elif experts:
            reason += f" It only meets {EXPERTS} (e.g. {experts[0]}), which a chain cannot adapt:"
            reason += f" {type(model).__name__} multiplies by them in a way of its own."
        kinds = [type(m).__name__ for path, m in scope.items() if path and path not in linear and test(path)]
        if kinds:
            reason += f" It does name {len(kinds)} modules of type {kinds[0]}, which are not linear layers."
        listed = pattern.replace(" ", "").split(",")
        if len(listed) > 1 and set(listed) <= set(names):
            reason += f" Write a list: [{', '.join(listed)}]."
        reasons.append(reason if outside or experts or kinds else reason + did_you_mean(pattern, names))
    message = "adapter.target_modules: " + " ".join(reasons)
    if found := [pattern for pattern, paths in met.items() if paths]:
        message += f" The others fit: adapter.target_modules=[{','.join(found)}]."
    message += (
        f" This model's linear modules: {_listing(names) or 'none'}; all-linear takes all but the head."
    )
    return message + (f" Its routed experts: {_listing(named_experts)}." if named_experts else "")


def _listing(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _experts_met(pattern: str, test: Callable[[str], bool], model: nn.Module) -> list[str]:
    """Parameters with a matrix per expert that the pattern meets, also as a part (up_proj: gate_up_proj)."""
    parameters = [name for name, parameter in model.named_parameters() if _is_experts(name, parameter)]
    return [
        name
        for name in parameters
        if test(name) or test(name.rpartition(".")[0]) or pattern in name.rpartition(".")[2]
    ]


def _is_experts(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds a matrix per expert; a convolution's weight has three dimensions, too."""
    return parameter.dim() == 3 and not name.endswith("conv1d.weight")


def owners_of_weight(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The modules that each parameter belongs to, by their paths: several where it is shared."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].append(name.rpartition(".")[0])
    return owners


def refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """Raises InputError for a module whose weight another one shares: what its chain learns could never be
    merged, because the sum would change both (an output head tied to the embeddings)."""
    owners, modules = owners_of_weight(model), dict(model.named_modules())
    for path in paths:
        name = parameter_name(modules, path)
        holder = name.rpartition(".")[0]
        weight = getattr(modules[holder], name.rpartition(".")[2])
        others = [other for other in owners[weight] if other != holder]
        if others:
            raise InputError(
                f"adapter.target_modules: '{path}' shares its weight with '{others[0]}': a merged checkpoint"
                " could not hold what its chain learns. Leave it out, or use a base that does not tie them."
            )


@dataclass(frozen=True)
class Coverage:
    """How much of a text decoder a set of chains adapts.

    `weights` counts the entries of its matrices, embeddings and output head apart, and `without_chain` those
    that no chain is added to, by kind: the last parts of the path (`self_attn.o_proj`), largest first.
    `frozen_experts` are the patterns that would adapt the routed experts among these.
    """

    weights: int
    without_chain: dict[str, int]
    frozen_experts: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the weights that has a chain, between 0 and 1."""
        return 1 - sum(self.without_chain.values()) / self.weights if self.weights else 0.0

    def describe(self, most: int = 5) -> str:
        """In words, `most` kinds at most by name."""
        text = f"chains on {self.share:.1%} of the blocks' weights"
        named = [f"{kind} {count / self.weights:.1%}" for kind, count in self.without_chain.items()]
        if named:
            text += f"; without: {', '.join(named[:most])}"
            text += f", and {len(named) - most} other kinds" if len(named) > most else ""
        if self.frozen_experts:
            text += ". Routed experts get chains where adapter.target_modules names them: "
            text += ", ".join(self.frozen_experts)
        return text


def coverage(model: nn.Module, paths: Sequence[str], prefix: str = "") -> Coverage:
    """What chains at `paths` adapt of a model's text decoder (below `prefix`); it may carry them already."""
    adapted, left, weights = set(paths), Counter(), 0
    frozen_experts: dict[str, None] = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    apart = {head, getattr(head, "base", None)}
    for path, module in model.named_modules():
        if (
            not _below(path, prefix)
            or _pools(path)
            or isinstance(module, (nn.Embedding, Chain))
            or module in apart
        ):
            continue
        path = path.removesuffix(".base")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            shape = linear_shape(module) if name == "weight" else None
            size = shape[0] * shape[1] if shape else parameter.numel()  # numbers in 4 bit are packed
            weights += size
            if path not in adapted and f"{path}.{name}" not in adapted:
                left[_kind(path, name, parameter)] += size
                if name in expert_matrices(module):
                    frozen_experts[f"{path.rpartition('.')[2]}.{name}"] = None
    return Coverage(weights, dict(left.most_common()), tuple(frozen_experts))


def _kind(path: str, name: str, parameter: nn.Parameter) -> str:
    parts = [part for part in path.split(".") if not part.isdigit()]
    kind = ".".join(parts[-2:] if name == "weight" else [*parts[-1:], name])
    return f"{kind} ({EXPERTS})" if _is_experts(f"{path}.{name}", parameter) else kind
