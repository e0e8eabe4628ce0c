"""Starting from an adapter, trackers, secrets, and the deterministic switch."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from linchain_cli.errors import InputError, LinchainError
from linchain_cli.run import read_jsonl
from linchain_cli.training import runner, trackers


def test_init_from_continues_where_the_adapter_stands(run_tiny, job_of, base):
    from linchain_cli.chain import chain_layers

    first = run_tiny({"name": "first"})
    source = str(first.run.path)  # its adapter
    job = job_of({"adapter.init_from": source, "adapter.dropout": 0.1})
    values = load_file(first.run.adapter_dir / "chain.safetensors")
    for path, layer in chain_layers(base.model).items():
        assert layer.dropout == 0.1
        for name in ("A", "links", "B"):
            assert torch.equal(getattr(layer, name), values[f"{path}.{name}"])
    second = run_tiny({"name": "second", "adapter.init_from": source})
    before, after = (
        [row["loss"] for row in read_jsonl(run.run.metrics_path) if "loss" in row] for run in (first, second)
    )
    assert after[0] < before[0] - 0.1
    assert job.state.step == 0


def test_a_run_goes_on_when_what_it_started_from_is_gone(run_tiny, dies_after):
    first = run_tiny({"name": "first"})
    changes = {"name": "second", "adapter.init_from": str(first.run.path)}
    with dies_after(3):
        run_tiny(changes)
    whole = run_tiny({**changes, "name": "third"})
    first.run.path.rename(first.run.path.with_name("elsewhere"))
    second = run_tiny(changes, resume=True)
    files = [(one.run.adapter_dir / "chain.safetensors").read_bytes() for one in (second, whole)]
    assert files[0] == files[1]


def test_init_from_must_fit(run_tiny, tmp_path):
    source = str(run_tiny({"name": "first"}).run.adapter_dir)
    with pytest.raises(
        InputError,
        match="adapter.init_from: .* has rank 4, depth 2 and alpha 8; .* for rank 4, depth 1 and alpha 8",
    ):
        run_tiny({"name": "second", "adapter.init_from": source, "adapter.depth": 1})
    with pytest.raises(
        InputError, match=r"adapts other modules than the recipe does \(e.g. model.layers.0.mlp.up_proj\)"
    ):
        run_tiny(
            {
                "name": "second",
                "adapter.init_from": source,
                "adapter.target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"],
            }
        )
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    for theirs in (str(tmp_path / "peft"), "org/adapter"):
        with pytest.raises(InputError, match=f"chain.json is missing. If .* `linchain import {theirs} --out"):
            run_tiny({"name": "third", "adapter.init_from": theirs})
    with pytest.raises(InputError, match="adapter.init_from: .* holds no chain adapter"):
        run_tiny({"name": "second", "adapter.init_from": str(tmp_path)})
    assert not (tmp_path / "runs" / "second").exists()


def test_an_adapter_of_another_base_is_taken_with_a_warning(run_tiny, base, monkeypatch, capfd):
    source = str(run_tiny({"name": "first"}).run.adapter_dir)
    capfd.readouterr()
    run_tiny({"name": "second", "adapter.init_from": source})
    assert "warning" not in capfd.readouterr().err
    monkeypatch.setattr(base, "hash", "0" * 64)
    run_tiny({"name": "third", "adapter.init_from": source, "training.max_steps": 1})
    assert "was trained on another base model" in capfd.readouterr().err


def test_an_end_that_the_base_never_learned_to_write_is_told(run_tiny, base, capfd):
    head = base.model.get_output_embeddings().weight
    end, kept = base.tokenizer.eos_token_id, head[base.tokenizer.eos_token_id].clone()
    head[end] = 0
    try:
        run_tiny({"name": "first", "training.max_steps": 1})
        told = " ".join(capfd.readouterr().err.split())
        assert f"never taught to write {base.tokenizer.eos_token}: its output head" in told
        assert "adapter.target_modules: [all-linear, lm_head]" in told
        targets = ["q_proj", "lm_head"]  # whose chain can learn it
        run_tiny({"name": "second", "training.max_steps": 1, "adapter.target_modules": targets})
        assert "never taught" not in capfd.readouterr().err
    finally:
        head[end] = kept


def test_tensorboard_gets_the_metrics_and_the_recipe(run_tiny):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = run_tiny({"training.trackers": ["tensorboard"]})
    events = EventAccumulator(str(job.run.path / "trackers" / "linchain"))
    events.Reload()
    rows = [row for row in read_jsonl(job.run.metrics_path) if "loss" in row]
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [row["step"] for row in rows]
    assert [event.value for event in logged] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert [event.step for event in events.Scalars("eval_loss")] == [3, 6]
    (settings,) = (job.run.path / "trackers").rglob("hparams.yml")
    assert "training.learning_rate: 0.01" in settings.read_text()


def test_trackers_end_with_their_run(run_tiny, monkeypatch):
    """Or a comparison's arms would be one run to wandb, and mlflow would refuse the second."""
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    told, start = [], TensorBoardTracker.start
    monkeypatch.setattr(TensorBoardTracker, "start", lambda self: (told.append("start"), start(self)))
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: told.append("finish"))
    changes = {"training.trackers": ["tensorboard"], "training.max_steps": 1}
    run_tiny(changes)
    assert told == ["start", "finish"]

    def fail(*_):
        raise LinchainError("the loss is nan")

    monkeypatch.setattr(runner, "train", fail)
    with pytest.raises(LinchainError, match="nan"):
        run_tiny({**changes, "name": "second"})
    assert told == ["start", "finish"] * 2


def test_wandbs_project_is_that_of_the_environment(recipe_of, monkeypatch):
    started = []
    accelerator = SimpleNamespace(init_trackers=lambda project, **rest: started.append(project), trackers=[])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for names in (["wandb"], ["tensorboard"]):
        job = SimpleNamespace(
            recipe=recipe_of({"training.trackers": names}),
            run=SimpleNamespace(path="x"),
            state=SimpleNamespace(step=0),
            accelerator=accelerator,
        )
        with trackers.tracking(job):
            pass
    assert started == ["mine", "linchain"]


def test_no_tracker_unless_asked_for(run_tiny):
    job = run_tiny()
    assert job.accelerator.trackers == [] and not (job.run.path / "trackers").exists()


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_starts(run_tiny, recipe_of):
    with pytest.raises(
        InputError, match="training.trackers: aim cannot be used: its Python package is not installed"
    ):
        run_tiny({"training.trackers": ["aim"]})
    assert not recipe_of().run_path.exists()


SECRETS = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "COMET_API_KEY",
    "MY_PASSWORD",
]
CANARY = "hf_canary7f3a9c51"


@pytest.mark.parametrize("ending", ["finished", "failed", "wrong input"])
def test_no_secret_of_the_environment_reaches_a_file_or_a_log(starter, recipe_file, tmp_path, ending):
    pytest.importorskip("tensorboard")
    changes = {"training.trackers": ["tensorboard"], "training.max_steps": 2}
    if ending == "wrong input":
        changes["model.path"] = "someone/some-model"  # asked for on the hub, with the token
    options = (
        {"hook": "fail_on_rank", "rank": 0, "where": "step", "kind": "bug"} if ending == "failed" else {}
    )
    cache = tmp_path / "cache"
    secrets = {name: CANARY for name in SECRETS}
    places = {"LINCHAIN_CACHE": str(cache), "HF_HOME": str(tmp_path / "hf"), "RANK": "0"}
    process = starter.start(
        "train",
        recipe_file(changes),
        "--debug",
        environment={**secrets, **places},
        **options,
    )
    assert process.wait() == {"finished": 0, "failed": 1, "wrong input": 2}[ending], process.log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > (2 if ending == "wrong input" else 10) and process.log
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_deterministic_asks_torch_and_sets_it_back(run_tiny, monkeypatch):
    from linchain_cli.training import runner

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    train = runner.train

    def watched(*args):
        fills = torch.empty(8).isnan().all().item()  # which costs time, and nobody reads
        asked.append(
            (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"), fills)
        )
        return train(*args)

    monkeypatch.setattr(runner, "train", watched)
    run_tiny({"name": "yes", "training.deterministic": True})
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    run_tiny({"name": "no"})
    assert asked == [(True, ":4096:8", False), (False, None, False)]
