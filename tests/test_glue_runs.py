"""scripts/glue_runs: both studies on tiny rows, rates from held-out rows, and workers that fail."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from linchain_cli.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from scripts.glue_runs import __main__ as glue_runs  # noqa: E402
from scripts.glue_runs.plan import CHOOSING_SEED, Cell, Plan  # noqa: E402
from scripts.glue_runs.pool import Results, work, work_in_processes  # noqa: E402
from scripts.glue_runs.tables import tables  # noqa: E402

from . import pretend_gpu  # noqa: E402
from .classifiers import make_checkpoint, pair_rows  # noqa: E402

BERTS = ["query", "key", "value", "intermediate.dense"]
ONE = Plan(["all"], ["rte"], [16], {"all": 2, "few": 2}, {"all": 1, "few": 1}, ["LoRA"])
SHORT = replace(ONE, length=0.003)  # a step or two


@dataclass(frozen=True)
class Named:
    name: str


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with a tiny BERT and files as RTE's."""
    monkeypatch.setenv("LINCHAIN_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    make_checkpoint("bert", tmp_path / "bert")
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    for name, rows in (("train", pair_rows(64)), ("dev", pair_rows(24, first=101))):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for number, row in enumerate(rows):
            label = "entailment" if row["label"] == "good" else "not_entailment"
            lines.append(f"{number}\t{row['sentence1']}\t{row['sentence2']}\t{label}")
        (tmp_path / "glue" / "RTE" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_both_studies_on_tiny_rows(place, capsys):
    arms = "LoRA;full fine-tuning;depth 0;depth 3, small"
    arguments = [str(place / "bert"), "--out", str(place / "out"), "--tasks", "rte", "--length", "0.01"]
    arguments += "--seeds 2 --few-seeds 2 --few-choosing 1 --few-rows 16 --arms".split() + [arms]
    assert glue_runs.main(arguments) == 0
    shown = capsys.readouterr().out
    rows = rows_of(place / "out")
    assert len(rows) == 2 * (5 + 2) + 2 * (4 + 2)
    few = [row for row in rows if row["study"] == "few"]
    assert {row["train_rows"] for row in few} == {16}
    assert {(row["phase"], row["train_rows"]) for row in rows if row["study"] == "all"} == {
        ("choose", 48),
        ("final", 64),
    }
    for row in rows:
        chosen_by = row["phase"] == "choose"
        assert chosen_by == (row["seed"] > CHOOSING_SEED) == ("told" not in row)
        assert chosen_by or len(row["told"]) == len(row["targets"]) == 24
        if not chosen_by:
            right = sum(a == b for a, b in zip(row["told"], row["targets"], strict=True))
            assert row["scores"]["accuracy"] == pytest.approx(right / 24)
    for line in (
        "| rte: accuracy on dev | best rate |",
        "| LoRA | ",
        "| full fine-tuning | ",
        "| depth 3, small | ",
    ):
        assert line in shown
    assert "rte: 2 seeds each." in shown and "| rte: accuracy, less depth 0 | 16 rows |" in shown
    # Called again, it has nothing to do.
    before = (place / "out" / "results.jsonl").read_bytes()
    assert glue_runs.main(arguments) == 0
    assert capsys.readouterr().out == shown and (place / "out" / "results.jsonl").read_bytes() == before


def test_a_decoder_is_as_good(place):
    make_checkpoint("llama", place / "llama")
    arguments = [str(place / "llama"), "--out", str(place / "out"), "--tasks", "rte", "--length", "0.01"]
    arguments += ["--studies", "all", "--seeds", "1", "--arms", "LoRA;full fine-tuning"]
    with pytest.raises(InputError, match="target_modules"):
        glue_runs.main(arguments)
    arguments += ["--batch", "4", "--held-out", "8"]
    assert glue_runs.main([*arguments, "--targets", "q_proj,v_proj"]) == 0
    rows = rows_of(place / "out")
    assert len(rows) == 2 * (5 + 1)
    # 0.04 of an epoch chooses, 0.1 is reported: as many rows whatever the batch
    assert {(row["phase"], row["train_rows"], row["steps"]) for row in rows} == {
        ("choose", 56, 21),
        ("final", 64, 53),
    }


def test_boolq_is_its_questions_with_their_answers(place):
    from scripts.glue_runs.learn import Learner
    from scripts.glue_runs.plan import TASKS, Run

    (place / "boolq").mkdir()
    for name, count in (("train", 40), ("test", TASKS["boolq"].told + 5)):
        rows = [
            {
                "instruction": "Please answer the following question with true or false, question:"
                f" is {number} even?\n\nAnswer format: true/false",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
            for number in range(count)
            for answer in ["false" if number % 2 else "true"]
        ]
        (place / "boolq" / f"{name}.json").write_text(json.dumps(rows))
    learner = Learner(str(place / "bert"), BERTS, "float32", place / "out", SHORT)
    row = learner.do(Run(Cell("few", "boolq", 16, "depth 0"), False, 1e-3, 1))
    assert len(row["told"]) == TASKS["boolq"].told and row["train_rows"] == 16
    assert row["targets"] == "10" * (TASKS["boolq"].told // 2)  # classes by name: false, true
    written = [json.loads(line) for line in (place / "out" / "boolq-train.jsonl").read_text().splitlines()]
    assert written[:2] == [{"text": "is 0 even?", "label": "true"}, {"text": "is 1 even?", "label": "false"}]
    assert len(written) == 40


def outcome(run, accuracy: float, loss: float) -> dict:
    return run.as_row() | {"scores": {"accuracy": accuracy, "loss": loss}}


def test_the_rate_that_tells_held_out_rows_best_is_reported():
    cell = Cell("all", "rte", 0, "LoRA")
    choosing = ONE.choosing_runs(cell)
    assert ONE.possible({}) == choosing or {run.name for run in ONE.possible({})} == {
        r.name for r in choosing
    }
    scores = {1e-4: (0.5, 0.6), 3e-4: (0.6, 0.7), 1e-3: (0.7, 0.69), 2e-3: (0.7, 0.68), 4e-3: (0.9, 0.5)}
    done = {run.name: outcome(run, *scores[run.rate]) for run in choosing}
    done[choosing[-1].name] = choosing[-1].as_row() | {"failed": "the loss is nan"}
    assert ONE.best_rate(cell, done) == 2e-3  # of equal ones that with the lower loss
    assert [(run.rate, run.seed) for run in ONE.possible(done)] == [(2e-3, 1), (2e-3, 2)]
    del done[choosing[0].name]
    assert ONE.best_rate(cell, done) is None and ONE.possible(done) == choosing[:1]


def test_a_rate_that_is_given_is_not_chosen():
    plan = replace(ONE, studies=["few"], arms=["depth 0"], rate=3e-4)
    runs = plan.possible({})
    assert [(run.choosing, run.rate, run.seed) for run in runs] == [(False, 3e-4, 1), (False, 3e-4, 2)]
    done = {run.name: outcome(run, 0.5, 0.6) for run in runs}
    assert plan.possible(done) == []
    assert "| depth 0 | 50.0 ± 0.0 (0.0003) |" in "\n".join(tables(plan, done))  # the lowest rate, unmarked


def test_factors_begin_small_and_orthogonal(place, monkeypatch):
    import torch

    from scripts.glue_runs import learn
    from scripts.glue_runs.plan import SMALL_OF_FIVE, Run

    seen, step = {}, learn.optimizer_step

    def look(job, rows, rate, stop):
        seen.update({path: layer for path, layer in job.layers.items()})
        (layer, *_) = job.layers.values()
        seen["factors"] = [
            layer.A.detach().clone(),
            *layer.links.detach().clone(),
            layer.B.detach().clone().mT,
        ]
        return step(job, rows, rate, stop)

    monkeypatch.setattr(learn, "optimizer_step", look)
    learner = learn.Learner(str(place / "bert"), BERTS, "float32", place / "out", SHORT)
    run = Run(Cell("few", "rte", 16, "depth 3, small"), True, 1e-3, 101)
    assert "failed" not in learner.do(run)
    assert len(seen["factors"]) == 5
    for factor in seen["factors"]:
        torch.testing.assert_close(factor @ factor.mT, SMALL_OF_FIVE**2 * torch.eye(8), rtol=1e-4, atol=1e-9)


def test_nothing_stays_on_the_host_where_there_is_a_gpu(place, monkeypatch):
    from scripts.glue_runs import learn
    from scripts.glue_runs.plan import Run

    alone = {"num_processes": 1, "process_index": 0, "is_main_process": True}
    gpu = SimpleNamespace(device=pretend_gpu.DEVICE, reduce=lambda tensor, reduction: tensor, **alone)
    monkeypatch.setattr(learn, "connect", lambda: gpu)
    learner = learn.Learner(str(place / "bert"), BERTS, "float32", place / "out", SHORT)
    for cell in (Cell("few", "rte", 16, "depth 3, small"), Cell("all", "rte", 0, "full fine-tuning")):
        with pretend_gpu.PretendGpu() as seen:
            row = learner.do(Run(cell, False, 1e-3, 1))
        assert seen.launched > 100 and row["device"] == pretend_gpu.DEVICE.type


WORKER = """
import json, os, signal, sys, time
from dataclasses import dataclass, replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from scripts.glue_runs.pool import Results, work

@dataclass(frozen=True)
class Named:
    name: str

def do(run):
    if run.name == "deadly":
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if run.name == "wrong":
        raise ValueError("wrong")
    time.sleep(0.02)
    return {"name": run.name, "by": os.getpid()}

def possible(done):
    names = ["deadly", "wrong", *map(str, range(12))] + (["last"] if len(done) >= 12 else [])
    return [Named(name) for name in names if name not in done]

work(Results(Path(sys.argv[1])), possible, do)
"""


def test_workers_that_end_badly_are_told_and_cost_their_run_alone(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"name": "0"}\n{"name": "half a li')
    results = Results(tmp_path)
    assert set(results.done) == {"0"}
    results.forget_claims()
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(ROOT)]
    told = work_in_processes(command, tmp_path, results, 4, time.time() + 60)
    results.refresh()
    assert set(results.done) == {*map(str, range(12)), "last"}
    assert len(rows := [line for line in results.path.read_text().splitlines() if "by" in line]) == len(
        set(rows)
    )
    assert len(rows) == 12
    assert sum("about to die" in each and "ended with -9" in each for each in told) == 1
    assert sum("ValueError: wrong" in each and "ended with 1" in each for each in told) == 1
    assert len(told) == 2


def test_no_run_starts_when_time_is_up_and_what_is_late_is_ended(tmp_path, monkeypatch):
    results = Results(tmp_path)
    results.forget_claims()
    names: list[str] = []
    work(results, lambda done: [Named("a")], lambda run: names.append(run.name), until=time.time() - 1)
    assert names == []
    monkeypatch.setattr("scripts.glue_runs.pool.GRACE", 0.2)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.time()
    (told,) = work_in_processes(command, tmp_path, results, 1, time.time())
    assert "time was up" in told and time.time() - began < 20


def test_what_is_asked_for_must_exist(capsys):
    for option, value in (("--studies", "most"), ("--few-rows", "17"), ("--arms", "LoRa")):
        with pytest.raises(SystemExit):
            glue_runs.main(["model", "--out", "out", option, value])
        assert f"{option}: " in capsys.readouterr().err
