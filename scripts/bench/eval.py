"""Rows per second of evaluating the same rows in six ways, in interleaved rounds.

    likelihood    linchain's scoring, tokenising included
    lm-eval       lm-evaluation-harness through a local task file; only its model calls are timed
    lm-eval-8     the same with batches of 8 (--batch-size) instead of its default of 1
    per-option    each option's text read alone, all logits: what the fast way is held to
    generate      linchain's 4-beam generation of 32 tokens
    transformers  the same by transformers' `generate`, left-padded batches of like length

    python -m scripts.bench eval --model DIR --data-dir DIR [--tasks boolq,openbookqa] [--rows 32]

Needs `lm-eval` (the `bench` extra). Everything runs in float32; with `--bfloat16` predictions are also made
in bfloat16, and the share that flips with the batches is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM

from linchain_cli.data.encoding import encode_prompt, encode_responses
from linchain_cli.data.templates import get_template
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.generation import stop_tokens
from linchain_cli.evaluation.results import NEAR_TIE
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.evaluation.tasks import load_tasks
from linchain_cli.model.files import locate
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer
from scripts.bench import options

Key = tuple[str, int]
Predictions = dict[Key, str | None]
BEAMS, NEW_TOKENS = 4, 32
ARMS = ("lm-eval", "lm-eval-8", "per-option", "generate", "transformers")


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    directory = locate(arguments.model)
    bench = Bench(directory, load_tasks([arguments.tasks], arguments.data_dir, arguments.rows), arguments)
    arms: dict[str, Callable[[], tuple[float, Predictions]]] = {
        "likelihood": bench.likelihood,
        "lm-eval": lambda: bench.lm_eval(1),
        "lm-eval-8": lambda: bench.lm_eval(arguments.batch_size),
        "per-option": bench.per_option,
        "generate": bench.generate,
        "transformers": bench.transformers,
    }
    arms = {name: arm for name, arm in arms.items() if name == "likelihood" or name in arguments.arms}
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, Predictions] = {}
    for number in range(1, arguments.rounds + 1):
        for name, arm in arms.items():
            seconds, found[name] = arm()
            speeds[name].append(len(found[name]) / seconds)
            print(f"round {number}: {name} {speeds[name][-1]:.2f} rows/s", flush=True)
    report = summary(arguments, bench.tasks, speeds, found)
    if arguments.bfloat16:
        report["bfloat16"] = flips(directory, bench.tasks, found["likelihood"])
    print_table(report)
    options.finish(report, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, rounds=3, data=False)
    parser.add_argument("--data-dir", default=os.environ.get("LINCHAIN_DATA_DIR"))
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what to measure beside likelihood"
    )
    parser.add_argument("--tasks", default="boolq,openbookqa")
    parser.add_argument("--rows", type=int, default=32, help="rows of each task")
    parser.add_argument(
        "--generated-rows", type=int, default=8, help="rows of each task for the generating arms"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows of a batch for lm-eval and transformers"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bfloat16", action="store_true", help="also count flips in bfloat16")
    return parser.parse_args()


class Bench:
    """One model, the same rows, one method per arm. Each returns the seconds it took and its predictions."""

    def __init__(self, directory: Path, tasks: Sequence[Task], arguments: argparse.Namespace):
        self.tasks, self.batch_size = tasks, arguments.batch_size
        self.few = [Task(**{**vars(task), "rows": task.rows[: arguments.generated_rows]}) for task in tasks]
        self.model = load_model(directory, dtype="float32")
        # With transformers' own attention, as those who use it or lm-evaluation-harness load it.
        self.theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(
            self.model.device
        )
        self.tokenizer = load_tokenizer(directory)
        self.template = get_template("alpaca", self.tokenizer)

    def likelihood(self) -> tuple[float, Predictions]:
        return self._linchain(self.tasks, "likelihood")

    def generate(self) -> tuple[float, Predictions]:
        return self._linchain(self.few, "generate")

    def _linchain(self, tasks: Sequence[Task], protocol: Any) -> tuple[float, Predictions]:
        start = time.perf_counter()
        results = evaluate(
            self.model, self.tokenizer, self.template, tasks, name="bench", protocol=protocol, beams=BEAMS
        )
        return time.perf_counter() - start, {
            (row["task"], row["index"]): row["prediction"] for row in results.predictions
        }

    @torch.inference_mode()
    def per_option(self) -> tuple[float, Predictions]:
        start, found = time.perf_counter(), {}
        for task in self.tasks:
            for row in task.rows:
                responses = [task.prefix + option for option in row.options]
                prompt, answers = encode_responses(self.tokenizer, self.template, row.fields, responses)
                scores = [self._score(prompt, answer) for answer in answers]
                found[task.name, row.index] = row.options[scores.index(max(scores))]
        return time.perf_counter() - start, found

    def _score(self, prompt: list[int], answer: list[int]) -> float:
        tokens = torch.tensor([prompt + answer], device=self.model.device)
        log_probs = self.model(input_ids=tokens).logits[0].float().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return sum(log_probs[place, token].item() for place, token in zip(places, answer, strict=True))

    @torch.inference_mode()
    def transformers(self) -> tuple[float, Predictions]:
        from transformers import GenerationConfig

        start, found = time.perf_counter(), {}
        ends = stop_tokens(self.model, self.tokenizer, self.template)
        config = GenerationConfig(
            num_beams=BEAMS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        rows = [
            (task, row, encode_prompt(self.tokenizer, self.template, row.fields))
            for task in self.few
            for row in task.rows
        ]
        rows.sort(key=lambda item: len(item[2]))
        for at in range(0, len(rows), self.batch_size):
            batch = rows[at : at + self.batch_size]
            longest = max(len(prompt) for _, _, prompt in batch)
            ids = torch.tensor([[ends[0]] * (longest - len(prompt)) + prompt for _, _, prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, _, prompt in batch])
            device = self.theirs.device
            written = self.theirs.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for (task, row, _), tokens in zip(batch, written[:, longest:], strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                readings = task.rule.readings(text, row.options, row.answer)
                found[task.name, row.index] = next(iter(readings.values())).prediction
        return time.perf_counter() - start, found

    def lm_eval(self, batch_size: int) -> tuple[float, Predictions]:
        import logging

        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model = HFLM(pretrained=self.theirs, tokenizer=self.tokenizer, batch_size=batch_size, max_length=2048)
        seconds = [0.0]
        inner = model.loglikelihood

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            seconds[0] += time.perf_counter() - start
            return result

        model.loglikelihood = timed
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = folder
            names = {self._write_task(task, Path(folder)): task for task in self.tasks}
            manager = TaskManager(include_path=folder, include_defaults=False)
            output = simple_evaluate(
                model, tasks=list(names), task_manager=manager, bootstrap_iters=0, verbosity=None
            )
        found = {}
        for name, task in names.items():
            for sample in output["samples"][name]:
                row = task.rows[sample["doc_id"]]
                scores = [float(response[0][0]) for response in sample["resps"]]
                found[task.name, row.index] = row.options[scores.index(max(scores))]
        return seconds[0], found

    def _write_task(self, task: Task, folder: Path) -> str:
        """A task file of lm-eval beside its rows; the prompts are ours to the character."""
        name = f"bench_{task.name}"
        rows = [self._lm_eval_row(task, row) for row in task.rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f'dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / name))[:-1]}.jsonl"}}}}\n'
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\n"
            "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
        )
        return name

    def _lm_eval_row(self, task: Task, row: TaskRow) -> dict[str, Any]:
        context = self.template.prompt(row.fields) + task.prefix
        blank = context[len(context.rstrip()) :]
        choices = [blank + option for option in row.options]
        return {"context": context.rstrip(), "choices": choices, "gold": row.options.index(row.answer)}


def summary(
    arguments: argparse.Namespace,
    tasks: Sequence[Task],
    speeds: dict[str, list[float]],
    found: dict[str, Predictions],
) -> dict[str, Any]:
    ours = speeds["likelihood"]
    ratios = {
        name: statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        for name, theirs in speeds.items()
        if name != "likelihood"
    }
    return {
        "model": arguments.model,
        "rows": {name: len(predictions) for name, predictions in found.items()},
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "rows_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "spread": {name: [min(values), max(values)] for name, values in speeds.items()},
        "likelihood_is_faster_by": ratios,
        "same_predictions": {
            name: same(found["likelihood"], found[name])
            for name in ("per-option", "lm-eval", "lm-eval-8")
            if name in found
        },
        "accuracy": {name: accuracies(tasks, predictions) for name, predictions in found.items()},
        "same_generated": same(found.get("generate", {}), found.get("transformers", {})),
    }


def accuracies(tasks: Sequence[Task], predictions: Predictions) -> dict[str, float]:
    """The share of right predictions of each task, of the rows that there are predictions of."""
    shares = {}
    for task in tasks:
        rows = [row for row in task.rows if (task.name, row.index) in predictions]
        if rows:
            right = sum(predictions[task.name, row.index] == row.answer for row in rows)
            shares[task.name] = right / len(rows)
    return shares


def same(one: Predictions, other: Predictions) -> str:
    """How many of the common rows have the same prediction: `64/64`."""
    common = one.keys() & other.keys()
    return f"{sum(one[key] == other[key] for key in common)}/{len(common)}"


def flips(directory: Path, tasks: Sequence[Task], reference: Predictions) -> dict[str, Any]:
    """Predictions in bfloat16: how many change with the batches, and how many differ from float32's."""
    model, tokenizer = load_model(directory, dtype="bfloat16"), load_tokenizer(directory)
    template = get_template("alpaca", tokenizer)
    runs, ties = [], 0
    for batch_tokens in (1, 300, 2048):
        results = evaluate(model, tokenizer, template, tasks, name="bench", batch_tokens=batch_tokens)
        runs.append({(row["task"], row["index"]): row["prediction"] for row in results.predictions})
        ties = sum(score.near_ties for score in results.summary.tasks.values())
    changed = sum(len({run[key] for run in runs}) > 1 for key in reference)
    return {
        "rows": len(reference),
        "change_with_batches": changed / len(reference),
        "differ_from_float32": sum(runs[-1][key] != value for key, value in reference.items())
        / len(reference),
        f"within_{NEAR_TIE:g}": ties,
    }


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{'way':14}{'rows':>6}{'rows/s':>9}{'from':>8}{'to':>8}{'likelihood is faster by':>26}")
    for name, speed in sorted(report["rows_per_second"].items(), key=lambda item: -item[1]):
        low, high = report["spread"][name]
        ratio = report["likelihood_is_faster_by"].get(name)
        shown = f"{ratio:25.1f}x" if ratio else ""
        print(f"{name:14}{report['rows'][name]:6}{speed:9.2f}{low:8.2f}{high:8.2f}{shown}")
    print(
        f"accuracy: {report['accuracy']}\n"
        f"predictions as likelihood: {report['same_predictions']};"
        f" generated as transformers: {report['same_generated']}"
    )
