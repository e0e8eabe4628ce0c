"""Benchmarks of lm-evaluation-harness (`pip install lm-eval`): its tasks, prompts and metrics, our model and
files.

A task is named `lm_eval:NAME`, where NAME is a task, group or tag of the harness or the path of a task's
.yaml file in its format. The loaded model is handed over as it is (adapter folded), through its chat template
where it was trained on one.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.data.fingerprint import tokenizer_sha256
from linchain_cli.data.rows import Template
from linchain_cli.errors import InputError, first_line, nearest
from linchain_cli.evaluation.evaluate import evaluating, setting_of
from linchain_cli.evaluation.generation import stop_tokens
from linchain_cli.evaluation.measuring import Measuring, gather
from linchain_cli.evaluation.results import Prediction, Results, averaged
from linchain_cli.evaluation.statistics import normal_interval
from linchain_cli.recipe.schema import HARNESS_PREFIX
from linchain_cli.result_files import Evaluation, Metric, TaskScore
from linchain_cli.run import now
from linchain_cli.storage import expand, sha256_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOL = "lm_eval"
OWN_PROMPTS = "the harness's own"
# Rises when conversations are written or read otherwise: what was measured before is measured again.
WRITTEN = 3
# How like another a task's name has to be to be suggested: of thousands some are a little like any word.
LIKE_A_TASK = 0.8
# The metric that stands as the accuracy of a task, in this order; the others stand beside it.
ACCURACIES = ("acc", "exact_match", "em", "pass@1", "prompt_level_strict_acc", "acc_norm")
# Metrics that are no share of rows.
_ELSE = ("perplexity", "bits_per_byte", "bleu", "rouge", "ter", "chrf", "brier", "loglikelihood")


def split_names(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own task names, and the harness's without their prefix."""
    names = [name.strip() for listed in tasks for name in listed.split(",") if name.strip()]
    theirs = [name.removeprefix(HARNESS_PREFIX) for name in names if name.startswith(HARNESS_PREFIX)]
    return [name for name in names if not name.startswith(HARNESS_PREFIX)], theirs


def find_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager and the names as it knows them; nothing is loaded yet.

    Raises:
        InputError: the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"{HARNESS_PREFIX}{names[0]} needs lm-evaluation-harness, which cannot be imported ({error}):"
            " pip install lm-eval"
        ) from None
    if not hasattr(TaskManager, "load"):
        raise InputError(f"{HARNESS_PREFIX}{names[0]} needs lm-eval 0.4.12 or later: pip install -U lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [expand(name) for name in names if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no task file {file}")
    manager = TaskManager(
        include_path=[str(folder) for folder in dict.fromkeys(f.parent for f in files)] or None
    )
    known = [_name_in(expand(name)) if name.endswith((".yaml", ".yml")) else name for name in names]
    for name in known:
        if name not in manager.all_tasks:
            found = nearest(name, manager.all_tasks, LIKE_A_TASK)
            guess = f" Did you mean '{HARNESS_PREFIX}{found}'?" if found else ""
            raise InputError(f"{HARNESS_PREFIX}{name}: lm-evaluation-harness knows no such task.{guess}")
    return manager, known


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag that was asked for, loaded: its `tasks` and `groups` by name, and of its file the
    code that lies beside that. `manager` is the harness's, which takes seconds to make."""

    name: str
    manager: Any
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    code: str = ""

    @property
    def items(self) -> list[Any]:
        """What the harness is given: the group, which brings its tasks, or the tasks."""
        return [self.groups[self.name]] if self.name in self.groups else list(self.tasks.values())

    @property
    def source(self) -> str:
        return "lm-evaluation-harness"

    def counts(self, limit: int | None = None) -> list[int]:
        """How many rows each of its tasks asks."""
        return [sum(1 for _ in islice(task.eval_docs, limit)) for task in self.tasks.values()]

    def rows(self, limit: int | None) -> dict[str, str]:
        """SHA-256 of each task and group, over its rows and how they are asked and counted: two results can
        be compared only where it is equal."""
        return self._digests([self.code], limit)

    def fingerprints(self, setting: Evaluation, chat: tuple[int, str | None] | None) -> dict[str, str]:
        """Of each task and group what changes with anything that its numbers depend on: the setting, its
        configuration, the rows that are asked and shown as examples, and of conversations how they are
        written and their system prompt."""
        return self._digests([setting.setting_sha256, chat, self.code], setting.limit)

    def _digests(self, about: Sequence[Any], limit: int | None) -> dict[str, str]:
        found = {name: _digest([*about, *_content(task, limit)]) for name, task in self.tasks.items()}
        of_groups = {
            name: _digest([group.to_dict(), *(found[task.task_name] for task in group.get_all_tasks())])
            for name, group in self.groups.items()
        }
        return found | of_groups


def load_harness(names: Sequence[str]) -> list[HarnessTask]:
    """The tasks of the harness by those names, with their rows.

    Raises:
        InputError: the harness is not installed, knows no such task, or cannot load it; or a task that is not
        about text alone, or runs what a model writes.
    """
    import numpy as np

    manager, known = find_tasks(names)
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    found = []
    for asked, name in dict(zip(names, known, strict=True)).items():
        random.seed(DEFAULT_RANDOM_SEED)  # as its own command: some tasks shuffle while they load
        np.random.seed(DEFAULT_OTHER_SEED)
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task is a program, and its data set may be anywhere
            raise InputError(
                f"{HARNESS_PREFIX}{asked}: {type(error).__name__}: {first_line(error)}"
            ) from error
        code = _code_beside(expand(asked)) if asked != name else ""
        found.append(HarnessTask(name, manager, loaded["tasks"], loaded["groups"], code))
    for name, count in Counter(name for task in found for name in task.tasks).items():
        if count > 1:
            raise InputError(f"{HARNESS_PREFIX}{name} is asked for {count} times: leave out all but one")
    for name, task in ((name, task) for one in found for name, task in one.tasks.items()):
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"{HARNESS_PREFIX}{name} runs code that the model writes, which linchain does not do"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"{HARNESS_PREFIX}{name} asks about more than text, which linchain does not do")
    return found


def _code_beside(file: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(file.parent.glob("*.py")))


def _content(task: Any, limit: int | None) -> Iterator[Any]:
    """What a task asks, and how."""
    config = task.dump_config()
    shots = config.get("num_fewshot") or 0
    # An evaluation adds keys to it, behind the others.
    yield dict(sorted((config | {"num_fewshot": shots}).items()))
    yield from islice(task.eval_docs, limit)
    if shots:
        yield from task.fewshot_docs()


def _digest(parts: Sequence[Any]) -> str:
    return sha256_bytes(json.dumps(parts, default=str).encode())


def _name_in(file: Path) -> str:
    """The task's name in a .yaml file of the harness, whose tags no plain loader knows."""
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("task", "group") and not line[:1].isspace():
            return value.strip().strip("\"'")
    raise InputError(f"{file} is no task of lm-evaluation-harness: it has no line 'task: NAME'")


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tasks: Sequence[HarnessTask],
    *,
    name: str,
    system: str | None = None,
    limit: int | None = None,
    base_sha256: str | None = None,
    quantization: str = "none",
    out: Path | None = None,
    share: bool = True,
) -> Results:
    """Evaluates a loaded model on tasks of the harness.

    Args:
        template: `chat` makes the harness use the model's chat template, with the system prompt `system`;
            with any other the prompts are the harness's own.
        limit: rows of each task at most.
        out: where the result goes; tasks that were measured so before are not measured again.
        share: under torch.distributed the processes share the rows, each returns all results, and the first
            one writes. Otherwise each process asks all rows.

    Raises:
        InputError: nothing can be written at `out`, or the harness cannot evaluate these tasks.
        LinchainError: the processes do not hold the same adapter, rows and settings.
    """
    from importlib.metadata import version

    from lm_eval import simple_evaluate

    from linchain_cli.evaluation.harness_model import SharedModel, without_git

    chat = template.name == "chat"
    of_base = base_sha256, tokenizer_sha256(tokenizer) if tokenizer.is_fast else None, quantization
    setting = setting_of(model, template, name, PROTOCOL, limit, *of_base)
    versions = {**setting.versions, "lm_eval": version("lm_eval")}
    setting = setting.model_copy(
        update={"versions": versions} | ({} if chat else {"template": OWN_PROMPTS, "template_sha256": None})
    )
    own = [task.fingerprints(setting, (WRITTEN, system) if chat else None) for task in tasks]
    fingerprints = {name: value for of_task in own for name, value in of_task.items()}
    measuring = Measuring(setting, fingerprints, out)
    rank, world = measuring.rank, measuring.world
    missing = [task for task, names in zip(tasks, own, strict=True) if not measuring.knows(*names)]
    if not missing:
        return measuring.results()
    # The harness has no row for a process that gets none.
    shared = share and all(count >= world for task in missing for count in task.counts(limit))
    place = (rank, world) if shared else (0, 1)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer, template)
    try:
        with evaluating(model), without_git():
            found = simple_evaluate(
                SharedModel(model, tokenizer, *place, template if chat else None),
                tasks=[item for task in missing for item in task.items],
                task_manager=missing[0].manager,
                limit=limit,
                apply_chat_template=chat,
                system_instruction=system if chat else None,
                bootstrap_iters=1000,
                log_samples=True,
            )
    except (OSError, ImportError) as error:
        raise InputError(
            f"{HARNESS_PREFIX}{missing[0].name}: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        model.generation_config.eos_token_id = before
    rows = {name: value for task in missing for name, value in task.rows(limit).items()}
    (results,) = gather([results_of(found, setting, fingerprints, rows)] if rank == 0 else [], world)
    return measuring.results(results)


def results_of(
    found: Mapping[str, Any], setting: Evaluation, fingerprints: Mapping[str, str], rows: Mapping[str, str]
) -> Results:
    """The harness's own numbers and samples in our form; a group has numbers alone. `rows` are what tells
    the tasks' rows from others."""
    tasks, predictions = {}, []
    for name, metrics in found["results"].items():
        samples = found.get("samples", {}).get(name, [])
        # Every filter has its own copy of the samples, and those of several processes follow one another.
        samples = [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]
        samples.sort(key=lambda sample: sample.get("doc_id", 0))
        tasks[name] = _score(name, metrics, found, samples).model_copy(
            update={"fingerprint": fingerprints.get(name), "rows_sha256": rows.get(name)}
        )
        predictions += _rows(name, samples)
    return Results(averaged(setting.model_copy(update={"tasks": tasks})), predictions)


def _score(
    name: str, metrics: Mapping[str, Any], found: Mapping[str, Any], samples: Sequence[Any]
) -> TaskScore:
    values = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or isinstance(value, (str, bool)) or value is None:
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        error = error if isinstance(error, (int, float)) else None
        is_share = not any(word in metric for word in _ELSE) and 0 <= value <= 1
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        bounds = normal_interval(value, error, 0.0, 1.0) if is_share else None
        values[label] = Metric(value=value, stderr=error, interval=bounds, is_share=is_share)
    first = next((label for one in ACCURACIES for label in values if label.split(" ")[0] == one), None)
    counted = values.pop(first) if first and values[first].is_share else None
    version = found.get("versions", {}).get(name)
    shots = found.get("n-shot", {}).get(name)
    return TaskScore(
        accuracy=counted.value if counted else None,
        stderr=counted.stderr if counted else None,
        interval=counted.interval if counted else None,
        n=len(samples) if samples else None,
        is_group=not samples,
        metrics=values,
        source=f"lm-evaluation-harness, version {version}, {shots} examples"
        + (f", {first}" if first else ""),
        measured_at=now(),
    )


def _rows(name: str, samples: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    return [
        {
            "index": index,
            "task": name,
            "prediction": str(sample.get("filtered_resps")),
            "answer": str(sample.get("target")),
            "correct": _correct(sample),
        }
        for index, sample in enumerate(samples)
    ]


def _correct(sample: Mapping[str, Any]) -> bool | None:
    """Whether the sample counts as right by the first of its metrics that says so; None without any."""
    for metric in ACCURACIES:
        value = sample.get(metric)
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
    return None
