"""Classifiers and regressions: the same loop over another loss, with a head that is trained whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from linchain_cli.chain import detach, load_adapter
from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, load_recipe
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training.base import load_base
from linchain_cli.training.job import prepare, warnings
from linchain_cli.training.loop import validation
from linchain_cli.training.processes import connect
from linchain_cli.training.runner import run_training
from linchain_cli.training.signals import stop_requests
from linchain_cli.training.step import optimizer_step

from ..classifiers import KINDS, make_checkpoint, make_encoder, pair_rows, write_rows


@pytest.fixture(scope="session")
def classifier_base(tmp_path_factory):
    """classifier_base(kind): the directory of a tiny checkpoint, made once."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            if kind in KINDS:
                make_checkpoint(kind, made[kind])
            else:
                model, tokenizer = make_encoder(kind)
                model.base_model.save_pretrained(made[kind])
                tokenizer.save_pretrained(made[kind])
        return made[kind]

    return build


@pytest.fixture
def label_recipe(tmp_path, classifier_base):
    """label_recipe(kind, **dotted): a recipe of a tiny classification below the test's directory."""
    write_rows(tmp_path / "train.jsonl", pair_rows(48))
    write_rows(tmp_path / "dev.jsonl", pair_rows(21, first=100))

    def build(kind: str = "bert", changes: dict | None = None) -> Recipe:
        _, targets = KINDS.get(kind, ({}, "all-linear"))
        values = {
            "task": "classification",
            "name": "run",
            "output_dir": str(tmp_path / "runs"),
            "model.path": str(classifier_base(kind)),
            "model.dtype": "float32",
            "adapter.rank": 4,
            "adapter.depth": 2,
            "adapter.alpha": 8,
            "adapter.target_modules": targets,
            "data.train": str(tmp_path / "train.jsonl"),
            "data.validation": str(tmp_path / "dev.jsonl"),
            "training.max_steps": 4,
            "training.global_batch_size": 8,
            "training.micro_batch_size": 4,
            "training.learning_rate": 0.02,
            "training.lr_scheduler": "constant",
            "training.warmup_steps": 0,
            "training.log_every": 1,
            "training.eval_every": 2,
            "training.save_every": 2,
        }
        return Recipe.from_flat({**values, **(changes or {})})

    return build


def job_of(recipe: Recipe):
    accelerator = connect()
    job = prepare(recipe, RunDirectory(recipe.run_path), accelerator, load_base(recipe, accelerator))
    job.state.micro_batch_size = recipe.training.micro_batch_size
    return job


def step(job, rows):
    with stop_requests("") as stop:
        return optimizer_step(job, np.asarray(rows), 0.01, stop).result()


@pytest.mark.parametrize("changes", [{}, {"adapter.target_modules": "all-linear"}], ids=["named", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_chains_and_head_of_every_kind_of_model_learn(label_recipe, kind, changes):
    job = job_of(label_recipe(kind, changes))
    before = {name: value.detach().clone() for name, value in job.parameters.items()}
    base = {n: p.clone() for n, p in job.model.named_parameters() if not p.requires_grad}
    losses = [step(job, range(48)).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = [name for name, value in job.parameters.items() if not torch.equal(value, before[name])]
    assert set(moved) == set(job.parameters), "everything that is trained has moved"
    assert job.head and not any(".pooler." in name for name in job.layers)
    assert not set(job.layers) & {name.rpartition(".")[0] for name in job.head}, "the head has no chain"
    assert all(torch.equal(p, base[n]) for n, p in job.model.named_parameters() if n in base)


@pytest.mark.parametrize("kind", [*KINDS, "xlnet", "funnel"])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(label_recipe, kind):
    """A row is told the same whatever stands beside it: its padding is masked, and stands before the rows for
    XLNet, whose head reads the last place."""
    found = []
    for size in (1, 8):
        job = job_of(label_recipe(kind, {"training.micro_batch_size": size, "adapter.init": "kaiming"}))
        found.append((step(job, range(8)).loss, {n: p.detach() for n, p in job.parameters.items()}))
    for loss, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, value in parameters.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("kind", ["bert", "convbert"])
def test_what_takes_padding_for_text_is_trained_with_a_warning(label_recipe, kind):
    told = [one for one in warnings(job_of(label_recipe(kind))) if "reads padding like text" in one]
    assert len(told) == (kind == "convbert")


def test_the_loss_is_that_of_transformers(label_recipe):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    recipe = label_recipe()
    job = job_of(recipe)
    theirs = AutoModelForSequenceClassification.from_pretrained(recipe.model.path).eval()
    with torch.no_grad():
        for name in job.head:
            theirs.get_parameter(name).copy_(job.parameters[name])
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = pair_rows(8)
    texts = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    labels = torch.tensor([job.base.outputs.classes.index(row["label"]) for row in rows])
    expected = theirs(**tokenizer(*texts, padding=True, return_tensors="pt"), labels=labels).loss
    assert step(job, range(8)).loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_in_a_bfloat16_base_is_trained_in_float32(label_recipe):
    job = job_of(label_recipe(changes={"model.dtype": "bfloat16"}))
    assert job.model.dtype == torch.bfloat16
    assert {value.dtype for value in job.parameters.values()} == {torch.float32}
    assert np.isfinite(step(job, range(8)).loss)


def test_the_heads_own_rate(label_recipe):
    job = job_of(label_recipe(changes={"training.lr_multiplier.head": 0.0}))
    before = {name: job.parameters[name].detach().clone() for name in job.head}
    step(job, range(8))
    assert all(torch.equal(job.parameters[name], before[name]) for name in job.head)
    assert [group["rate_scale"] for group in job.optimizer.param_groups] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_new_head_follows_the_seed_and_nothing_else(label_recipe):
    heads = [
        {name: job.parameters[name].detach() for name in job.head}
        for job in map(job_of, (label_recipe(), label_recipe(), label_recipe(changes={"seed": 7})))
    ]
    weight = "classifier.weight"
    assert torch.equal(heads[0][weight], heads[1][weight])
    assert not torch.equal(heads[0][weight], heads[2][weight])
    assert heads[0][weight].std() == pytest.approx(0.02, rel=0.4) and not heads[0]["classifier.bias"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_on_a_base_that_served_another(label_recipe, kind, dtype):
    """A head once began with values of the base's 16 bits on a new base, and of 32 on one that had served."""
    recipe = label_recipe(kind, {"name": "run", "model.dtype": dtype})
    another = {"name": "another", "seed": 7, "adapter.depth": 0, "training.gradient_checkpointing": True}
    first = run_training(recipe)
    served = run_training(label_recipe(kind, {"model.dtype": dtype, **another}))
    detach(served.model)
    second = run_training(label_recipe(kind, {"model.dtype": dtype, "name": "second"}), base=served.base)
    files = [(job.run.adapter_dir / "chain.safetensors").read_bytes() for job in (first, second)]
    assert files[0] == files[1]


def test_a_base_whose_padding_is_known_by_now_serves_another_run(label_recipe):
    """transformers looks at the tokens of a row that comes without a mask, which fails for Funnel."""
    first = run_training(label_recipe("funnel"))
    detach(first.model)
    second = run_training(label_recipe("funnel", {"name": "second"}), base=first.base)
    files = [(job.run.adapter_dir / "chain.safetensors").read_bytes() for job in (first, second)]
    assert files[0] == files[1]


def test_a_run_keeps_its_head_and_names_its_classes(label_recipe):
    job = run_training(label_recipe())
    status = job.run.read_status()
    assert status.finished and status.classes == ["bad", "good"]
    description = json.loads((job.run.adapter_dir / "chain.json").read_text())
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert description["head"] == {"classes": ["bad", "good"], "tensors": names}
    adapter = load_adapter(job.run.adapter_dir)
    assert adapter.head.classes == ("bad", "good") and list(adapter.head.tensors) == names
    assert status.trainable_parameters == sum(p.numel() for p in job.parameters.values())
    assert load_recipe(job.run.recipe_path).training.best_by == "accuracy"
    validations = [row for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row]
    assert {"eval_accuracy", "eval_f1", "eval_matthews"} <= validations[0].keys()


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(label_recipe):
    whole = run_training(label_recipe(changes={"name": "whole", "training.max_steps": 6}))
    run_training(label_recipe(changes={"name": "parts"}))
    parts = run_training(label_recipe(changes={"name": "parts", "training.max_steps": 6}), resume=True)
    files = [run.run.adapter_dir / "chain.safetensors" for run in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole.state.best_metric == parts.state.best_metric


def test_the_best_by_a_metric_is_kept_and_of_equals_the_lower_loss(label_recipe):
    from linchain_cli.training.state import TrainingState

    state = TrainingState()
    assert state.is_better(1.0, 0.5)
    state.best_loss, state.best_metric = 1.0, 0.5
    assert state.is_better(2.0, 0.6) and state.is_better(0.9, 0.5)
    assert not state.is_better(0.1, 0.4) and not state.is_better(1.0, 0.5)
    job = run_training(label_recipe(changes={"training.best_by": "matthews", "training.max_steps": 8}))
    rows = [row for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row]
    best = max(rows, key=lambda row: (row["eval_matthews"], -row["eval_loss"]))
    assert job.run.read_status().adapter.step == best["step"]
    assert validation(job)["matthews"] == pytest.approx(best["eval_matthews"])


def test_a_regression_learns_a_number(label_recipe, tmp_path):
    texts = {"good cat": 2.5, "good dog": 2.0, "bad cat": -1.0, "bad dog": -1.5, "a mat": 0.25, "rain": 0.5}
    rows = [{"text": text, "label": label} for text, label in texts.items()] * 4
    path = str(write_rows(tmp_path / "numbers.jsonl", rows))
    changes = {
        "task": "regression",
        "data.train": path,
        "data.validation": path,
        "training.max_steps": 40,
        "training.eval_every": 40,
        "training.learning_rate": 0.01,
    }
    job = run_training(label_recipe(changes=changes))
    (row,) = (row for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row)
    assert row["eval_pearson"] > 0.8 and {"eval_spearman"} <= row.keys()
    assert job.run.read_status().classes == [] and load_adapter(job.run.adapter_dir).head.classes == ()


def test_an_adapter_begins_with_the_values_of_another_ones_head(label_recipe):
    first = run_training(label_recipe(changes={"name": "first"}))
    job = job_of(label_recipe(changes={"adapter.init_from": str(first.run.adapter_dir)}))
    for name, value in load_adapter(first.run.adapter_dir).head.tensors.items():
        assert torch.equal(job.parameters[name], value) and job.parameters[name].requires_grad


@pytest.mark.parametrize("kind", [*KINDS, "xlnet", "funnel"])
def test_gradient_checkpointing_gives_the_same_step(label_recipe, kind):
    jobs = [job_of(label_recipe(kind, {"training.gradient_checkpointing": each})) for each in (False, True)]
    losses = [step(job, range(8)).loss for job in jobs]
    assert losses[0] == losses[1]
    for name, value in jobs[0].parameters.items():
        torch.testing.assert_close(value, jobs[1].parameters[name], msg=name)


def test_a_classifier_of_other_classes_gets_a_new_head(label_recipe, classifier_base, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = classifier_base("bert")
    five = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    five.save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "five")
    job = job_of(label_recipe(changes={"model.path": str(tmp_path / "five")}))
    assert job.parameters["classifier.weight"].shape == (2, 32)
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(job.parameters[pooler], five.get_parameter(pooler)), "which goes on from what it was"


def test_a_pooler_of_the_checkpoint_is_trained_from_its_values(label_recipe, classifier_base, tmp_path):
    """It lies between the blocks and the classes: MiniLM's, made for nothing like them, hides what the blocks
    learn as long as it is frozen."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base, name = classifier_base("bert"), "bert.pooler.dense.weight"
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.bert.save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "bare")
    job = job_of(label_recipe(changes={"model.path": str(tmp_path / "bare")}))
    assert torch.equal(job.parameters[name], model.get_parameter(name))
    step(job, range(8))
    assert not torch.equal(job.parameters[name], model.get_parameter(name))


def test_a_base_without_a_layer_is_still_refused(label_recipe, classifier_base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(classifier_base("bert"), tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    gone = next(name for name in tensors if "layer.1.output.dense.weight" in name)
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of the model's weights.*layer.1.output.dense.weight"):
        job_of(label_recipe(changes={"model.path": str(broken)}))


def test_an_encoder_that_should_write_is_told_what_it_can(label_recipe):
    with pytest.raises(InputError, match="is an encoder.*task: classification"):
        job_of(label_recipe(changes={"task": "causal", "data.template": "plain"}))


def test_two_processes_learn_what_one_does(label_recipe, starter, tmp_path):
    """Every second row each; a validation of 21 rows does not go round."""
    changes = {"training.max_steps": 2, "training.micro_batch_size": 3}
    alone = run_training(label_recipe(changes={**changes, "name": "alone"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(label_recipe(changes={**changes, "name": "together"}).to_yaml())
    for process in starter.ranks(2, "train", path):
        assert process.wait() == 0, process.log
    together = RunDirectory(alone.run.path.with_name("together"))
    ours, theirs = (load_adapter(run.adapter_dir) for run in (alone.run, together))
    for name, tensor in ours.head.tensors.items():
        torch.testing.assert_close(theirs.head.tensors[name], tensor, atol=1e-3, rtol=0, msg=name)
    rows = [
        [row for row in read_jsonl(run.metrics_path) if "eval_loss" in row] for run in (alone.run, together)
    ]
    for one, two in zip(*rows, strict=True):
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
        assert two["eval_accuracy"] == one["eval_accuracy"]
