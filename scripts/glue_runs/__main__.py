"""See the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from linchain_cli.errors import LinchainError
from linchain_cli.locks import locked

from . import __doc__ as description
from .plan import ARMS, BATCH, FEW, TASKS, Plan
from .pool import Results, work, work_in_processes
from .tables import tables

ROOT = Path(__file__).resolve().parents[2]


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts.glue_runs",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint directory, of an encoder or a decoder")
    parser.add_argument(
        "--targets", default="query,key,value,intermediate.dense", help="modules with a chain (those of BERT)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", help="of a frozen base; full fine-tuning is in float32")
    parser.add_argument("--studies", default="all,few", help="in this order")
    parser.add_argument("--tasks", default="rte,cola")
    parser.add_argument("--arms", default="", help="names separated by semicolons; all, if left out")
    parser.add_argument("--few-rows", default="16,64,256,1024")
    parser.add_argument("--seeds", type=int, default=3, help="reported runs of an arm on all rows")
    parser.add_argument("--few-seeds", type=int, default=10, help="on few rows")
    parser.add_argument("--choosing", type=int, default=1, help="runs that a rate is judged by on all rows")
    parser.add_argument("--few-choosing", type=int, default=2, help="on few rows")
    parser.add_argument("--rate", type=float, help="every arm's learning rate; none is chosen then")
    parser.add_argument("--length", type=float, default=1.0, help="factor on all numbers of steps")
    parser.add_argument("--batch", type=int, default=BATCH, help="the most rows of a step")
    parser.add_argument("--micro-batch", type=int, help="the most rows of a micro-batch (8 on a CPU)")
    parser.add_argument("--held-out", type=int, help="the most rows that a rate is judged on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="no run starts later than this")
    parser.add_argument("--plan", action="store_true", help="only count runs and steps")
    parser.add_argument("--table", action="store_true", help="only show what is done")
    parser.add_argument("--worker-until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name, known in (("studies", ARMS), ("tasks", TASKS), ("few_rows", FEW)):
        values = [int(word) if name == "few_rows" else word for word in getattr(arguments, name).split(",")]
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{name.replace('_', '-')}: {unknown[0]} is none of {', '.join(map(str, known))}")
        setattr(arguments, name, values)
    arguments.arms = [name.strip() for name in arguments.arms.split(";") if name.strip()]
    known = {name for study in arguments.studies for name in ARMS[study]}
    if unknown := set(arguments.arms) - known:
        parser.error(f"--arms: '{min(unknown)}' is none of {'; '.join(sorted(known))}")
    return arguments


def plan_of(arguments: argparse.Namespace) -> Plan:
    return Plan(
        arguments.studies,
        arguments.tasks,
        arguments.few_rows,
        {"all": arguments.seeds, "few": arguments.few_seeds},
        {"all": arguments.choosing, "few": arguments.few_choosing},
        arguments.arms,
        arguments.length,
        arguments.batch,
        arguments.held_out,
        arguments.rate,
    )


def train_some(arguments: argparse.Namespace, plan: Plan, results: Results, until: float | None) -> None:
    """One process's share of the runs."""
    from linchain_cli.machine import limit_threads

    from .learn import Learner

    limit_threads()
    targets = arguments.targets.split(",")
    learner = Learner(arguments.model, targets, arguments.dtype, arguments.out, plan, arguments.micro_batch)
    work(results, plan.possible, learner.do, until)


def main(argv: list[str]) -> int:
    arguments = arguments_of(argv)
    plan = plan_of(arguments)
    if arguments.plan:
        print("\n".join(plan.describe()))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out)
    if arguments.worker_until is not None:
        train_some(arguments, plan, results, arguments.worker_until)
        return 0
    told: list[str] = []
    if not arguments.table:
        until = time.time() + (arguments.seconds if arguments.seconds is not None else float("inf"))
        with locked(results.path):
            results.forget_claims()
            if arguments.processes > 1:
                path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
                os.environ["PYTHONPATH"] = path
                command = [sys.executable, "-m", "scripts.glue_runs", *argv, "--worker-until", str(until)]
                told = work_in_processes(command, arguments.out, results, arguments.processes, until)
            else:
                train_some(arguments, plan, results, until)
    results.refresh()
    print("\n".join(tables(plan, results.done)))
    failed = [f"{name}: {row['failed']}" for name, row in results.done.items() if "failed" in row]
    left = len(plan.possible(results.done))
    if left:
        told.append(f"{left} runs (and those that they would make possible) are open; call it again to go on")
    print("\n".join(["", *failed, *told]), file=sys.stderr)
    return 1 if left and not arguments.table else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LinchainError as error:
        sys.exit(f"error: {error}")
