"""What each part of a fast training step is worth: one process, each step run with the part and without it.

    python -m scripts.bench parts --model DIR --data rows.json [rows2.json ...] [--parts ...]

Rows, settings and the step are those of train.py's arm at depth 3. In every round each part takes its turn,
and each of the steps runs once with everything and once without the part, whichever first by turns. Two
figures: the time without it divided by the time with it, for each step's fastest round (which leaves out
what else the machine was doing) and as the median over all pairs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from linchain_cli.chain import chain_layers, find_siblings
from linchain_cli.chain.fused import Group
from linchain_cli.model.attention import GROUPED
from linchain_cli.model.flat_rows import allow_flat_rows, forbid_flat_rows, share_beginnings
from linchain_cli.model.head import hidden_states
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import optimizer_step
from scripts.bench import options
from scripts.bench.job import RATE, BenchRows, make_job, restore_norms


def parts(model: torch.nn.Module) -> dict[str, tuple[Callable, Callable]]:
    """How each part is taken out and put back."""

    def lone() -> None:
        for layer in chain_layers(model).values():
            layer.group = Group([layer])

    def attention(implementation: str) -> None:
        model.set_attn_implementation(implementation)
        allow_flat_rows(model)

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    found = {
        "lean norms": (lambda: restore_norms(model), lambda: make_norms_lean(model)),
        "q, k and v in one node": (lone, lambda: find_siblings(model, lambda: hidden_states(model, ids))),
        "rows without padding": (lambda: forbid_flat_rows(model), lambda: allow_flat_rows(model)),
        "common beginnings once": (
            lambda: share_beginnings(model, False),
            lambda: share_beginnings(model, True),
        ),
    }
    if model.config._attn_implementation == GROUPED:
        # Without it rows are padded, too.
        found["grouped attention"] = (lambda: attention("eager"), lambda: attention(GROUPED))
    return found


def main() -> None:
    made = options.parser(__doc__, rounds=6)
    made.add_argument("--parts", nargs="+", help="only these")
    options.add_training(made, steps=3)
    arguments = made.parse_args()
    settings = options.training_settings(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        settings["scratch"] = scratch
        job = make_job(settings, depth=3)
        rows, stop = BenchRows(job), StopRequest()
        available = parts(job.model)
        if unknown := set(arguments.parts or ()) - set(available):
            made.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(available)}")
        chosen = arguments.parts or list(available)

        def seconds(index: int) -> float:
            began = time.perf_counter()
            optimizer_step(job, rows.by_step(index), RATE, stop).result()
            return time.perf_counter() - began

        times = {name: {True: defaultdict(list), False: defaultdict(list)} for name in chosen}
        for number in range(arguments.rounds + 1):
            for name in chosen:
                take_out, put_back = available[name]
                for index in range(arguments.steps):
                    for without in (False, True) if (number + index) % 2 else (True, False):
                        if without:
                            take_out()
                        taken = seconds(index)
                        if without:
                            put_back()
                        if number:  # the first round warms up
                            times[name][without][index].append(taken)
            print(f"round {number} of {arguments.rounds} done", file=sys.stderr)

    results = {}
    for name, taken in times.items():
        fastest = {without: sum(min(values) for values in taken[without].values()) for without in taken}
        pairs = [
            slow / fast
            for index in range(arguments.steps)
            for slow, fast in zip(taken[True][index], taken[False][index], strict=True)
        ]
        results[name] = {"fastest": fastest[True] / fastest[False], "median": statistics.median(pairs)}
    print(f"{'times slower without':26} {'fastest':>8} {'median':>8}")
    for name, entry in results.items():
        print(f"{name:26} {entry['fastest']:8.3f} {entry['median']:8.3f}")
    document = {"settings": {k: v for k, v in settings.items() if k != "scratch"}, "parts": results}
    options.finish(document, arguments.out)
