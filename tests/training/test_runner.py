"""One run from its start to its end: what is refused, recorded and kept."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from linchain_cli.chain import detach
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.machine import resident_bytes
from linchain_cli.run import KeptAdapter, RunDirectory, read_jsonl
from linchain_cli.training import loop, runner
from linchain_cli.training.base import load_base
from linchain_cli.training.checkpoints import CheckpointStore
from linchain_cli.training.processes import connect


def adapter_bytes(run: RunDirectory) -> bytes:
    return (run.adapter_dir / "chain.safetensors").read_bytes()


def test_each_source_of_the_validation_rows_has_its_loss(run_tiny, commonsense_rows, tmp_path, capfd):
    for name, rows in (("easy", commonsense_rows(9)), ("hard", commonsense_rows(14)[9:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    paths = [{"path": str(tmp_path / f"{name}.json")} for name in ("easy", "hard")]
    job = run_tiny({"data.validation": paths, "training.max_steps": 2, "training.eval_every": 1})
    rows = [row for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row]
    counts = job.data.validation.supervised_counts
    for row in rows:
        each = [row["eval_loss/easy.json"] * counts[:9].sum(), row["eval_loss/hard.json"] * counts[9:].sum()]
        assert sum(each) / counts.sum() == pytest.approx(row["eval_loss"], rel=1e-9)
        assert row["eval_loss/easy.json"] != row["eval_loss/hard.json"]
    last = rows[-1]
    told = f"easy.json {last['eval_loss/easy.json']:.4f}, hard.json {last['eval_loss/hard.json']:.4f}"
    assert told in capfd.readouterr().err


def test_a_finished_run(run_tiny, recipe_of):
    job = run_tiny()
    run, status = job.run, job.run.read_status()
    assert sorted(path.name for path in run.path.iterdir()) == [
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "recipe.yaml",
        "rows.jsonl",
        "run.json",
    ]
    assert status.status == "finished" and status.step == 6 and status.total_steps == 6
    assert set(status.versions) == {"linchain", "python", "torch", "transformers", "accelerate"}
    assert (
        all(len(status.hashes[name].removeprefix("tensors:")) == 64 for name in ("recipe", "base"))
        and status.hashes["data"]
    )
    assert status.seed == 42 and status.machine.threads == 1 and status.machine.processes == 1
    assert status.trainable_parameters == sum(p.numel() for p in job.parameters.values())
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert status.coverage["weights"] == matrices
    assert status.coverage["without_chain"] == {
        "mlp.gate_proj": 2 * 64 * 128,
        "mlp.up_proj": 2 * 64 * 128,
        "self_attn.o_proj": 2 * 64 * 64,
        "self_attn.k_proj": 2 * 64 * 32,
    }
    assert status.rows["kept"] == 46 and status.rows["skipped"] == 0
    assert status.adapter == KeptAdapter(step=6, kept="best")
    assert status.timings.prepare_seconds > 0 and status.timings.train_seconds > 0
    settled = {"data.template": "alpaca"}  # what `auto` came to
    assert run.recipe_path.read_text() == recipe_of(settled).to_yaml()

    rows = read_jsonl(run.metrics_path)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert set(logged[0]) >= {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_bytes",
    }
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    lengths, labels = job.data.train.lengths, job.data.train.supervised_counts
    consumed = [index for row in read_jsonl(run.rows_path) for index in row["rows"]]
    assert len(consumed) == len(set(consumed)) == 24
    assert logged[-1]["tokens"] == status.tokens == lengths[consumed].sum()
    assert logged[-1]["supervised_tokens"] == status.supervised_tokens == labels[consumed].sum()
    assert logged[-1]["epoch"] == pytest.approx(0.6)


def test_an_existing_run_is_refused_resumed_or_replaced(run_tiny, recipe_of, dies_after, capfd):
    with dies_after(3):
        run_tiny()
    run = RunDirectory(recipe_of().run_path)
    assert run.read_status().status == "failed" and run.read_status().reason == "pulled the plug"
    with pytest.raises(
        InputError, match="holds a run that failed. Use --resume to continue it or --fresh to start over."
    ):
        run_tiny()
    capfd.readouterr()
    run_tiny(resume=True)
    assert "resuming" in (printed := capfd.readouterr().err) and "after step 2 of 6" in printed
    status = run.read_status()
    assert status.status == "finished" and status.reason is None and status.resumed_from == 2
    resumed = adapter_bytes(run)

    assert run_tiny(resume=True) is None
    assert "finished already; nothing to resume" in capfd.readouterr().err
    with pytest.raises(InputError, match="holds a finished run. Use --fresh to replace it, or another name"):
        run_tiny()
    (run.path / "mine.txt").write_text("note")
    with pytest.raises(InputError, match="it also holds mine.txt, which linchain did not write"):
        run_tiny(fresh=True)
    (run.path / "mine.txt").unlink()
    run_tiny(fresh=True)
    assert run.read_status().resumed_from is None and adapter_bytes(run) == resumed


OTHERS = {
    "recomputed": {"adapter.depth": 0, "training.gradient_checkpointing": True},
    "everywhere": {"adapter.target_modules": "all-linear", "adapter.dropout": 0.1, "adapter.rank": 2},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_run_is_the_same_on_a_base_that_served_another(recipe_of, other, dtype):
    """As the runs of a comparison have it, of which each may be the first one after a stop."""
    same = {"model.dtype": dtype, "training.max_steps": 3}
    alone = runner.run_training(recipe_of({"name": "alone", **same}))
    shared = load_base(recipe_of(same), connect())
    runner.run_training(recipe_of({"name": "other", "seed": 7, **same, **other}), base=shared)
    detach(shared.model)
    later = runner.run_training(recipe_of({"name": "later", **same}), base=shared)
    assert adapter_bytes(later.run) == adapter_bytes(alone.run)


def test_an_output_head_of_its_own_trains(run_tiny, capfd):
    job = run_tiny({"adapter.target_modules": ["q_proj", "lm_head"], "training.max_steps": 2})
    assert job.run.read_status().status == "finished" and job.layers["lm_head"].B.abs().max() > 0
    assert "chains on 11.1% of the blocks' weights; without: mlp.gate_proj 22.2%" in capfd.readouterr().err


def test_a_directory_whose_name_no_file_can_hold_is_refused_at_once(
    run_tiny, recipe_of, tmp_path, monkeypatch
):
    (place := tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=r"caf\\xe9: this directory's name is not UTF-8"):
        run_tiny()
    assert not recipe_of().run_path.exists()


def test_a_directory_that_is_no_run_is_left_alone(run_tiny, recipe_of):
    path = recipe_of().run_path
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    for options in ({}, {"fresh": True}, {"resume": True}):
        with pytest.raises(InputError, match="is not a run directory; it is left alone"):
            run_tiny(**options)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_what_is_wrong_with_the_recipe_costs_no_earlier_run(run_tiny, tmp_path):
    job = run_tiny()
    before = adapter_bytes(job.run)
    with pytest.raises(InputError):
        run_tiny({"data.train": str(tmp_path / "missing.json")}, fresh=True)
    with pytest.raises(InputError, match="matches no linear module"):
        run_tiny({"adapter.target_modules": ["nothing"]}, fresh=True)
    assert adapter_bytes(job.run) == before and job.run.read_status().status == "finished"


def test_a_second_start_is_refused_while_the_first_one_lives(run_tiny, recipe_of):
    run = RunDirectory(recipe_of().run_path)
    with run.lock():
        for options in ({}, {"fresh": True}, {"resume": True}):
            with pytest.raises(InputError, match="in use by another linchain process"):
                run_tiny(**options)
    assert not run.path.exists()
    run_tiny()


@pytest.fixture
def meddle(monkeypatch):
    """meddle(change): `change` is called once, before the third step."""

    def install(change) -> None:
        real, calls = loop.optimizer_step, []

        def step(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                change()
            return real(*arguments)

        monkeypatch.setattr(loop, "optimizer_step", step)

    return install


def test_a_run_whose_directory_is_removed_says_so_and_ends(run_tiny, recipe_of, meddle):
    place = recipe_of().run_path
    meddle(lambda: shutil.rmtree(place.parent))
    with pytest.raises(LinchainError, match="was removed while the run was going on") as caught:
        run_tiny()
    assert "continue" not in str(caught.value) and not place.parent.exists()


def test_a_run_writes_nothing_into_another_one_in_its_place(run_tiny, recipe_of, meddle):
    place = recipe_of().run_path

    def replace() -> None:
        shutil.rmtree(place.parent)  # the lock with it, so that another run may begin
        with RunDirectory(place).lock():
            RunDirectory(place).create("name: other\n")

    meddle(replace)
    with pytest.raises(LinchainError, match="was removed while"):
        run_tiny()
    assert sorted(path.name for path in place.iterdir()) == ["recipe.yaml", "run.json"]
    assert RunDirectory(place).read_status().status == "running"


def test_a_run_that_is_moved_says_where_it_is_and_goes_on_when_it_is_back(run_tiny, recipe_of, meddle):
    place = recipe_of().run_path
    meddle(lambda: place.rename(place.with_name("moved")))
    with pytest.raises(LinchainError, match=f"was moved to {place.with_name('moved')} .*--resume"):
        run_tiny()
    assert not place.exists()
    place.with_name("moved").rename(place)
    assert run_tiny(resume=True).run.read_status().finished


@pytest.mark.parametrize("error", [None, errno.ESTALE, errno.ETIMEDOUT])
def test_a_share_that_gives_other_numbers_or_does_not_answer_for_once_stops_no_run(
    run_tiny, recipe_of, meddle, monkeypatch, error
):
    place, real, asked = recipe_of().run_path, os.stat, []

    def stat(path, *arguments, **options):
        if path == place:
            asked.append(path)
            if error and len(asked) == 1:
                raise OSError(error, os.strerror(error))
        return real(path, *arguments, **options)

    def change() -> None:
        monkeypatch.setattr(os, "stat", stat)
        if not error:
            monkeypatch.setattr(os.path, "samestat", lambda one, other: False)

    meddle(change)
    assert run_tiny().run.read_status().finished and asked


def test_a_validation_loss_that_is_not_finite_stops_the_run(run_tiny, recipe_of, monkeypatch):
    worsening(monkeypatch, [1.0, float("nan")])
    with pytest.raises(LinchainError, match="step 6: the validation loss is nan"):
        run_tiny()
    run = RunDirectory(recipe_of().run_path)
    assert run.read_status().status == "failed"
    assert CheckpointStore(run.checkpoints_dir, 2).steps() == [2, 4]


def test_an_epoch_is_every_row_once(run_tiny):
    job = run_tiny({"training.max_steps": None, "training.epochs": 1.5, "training.global_batch_size": 16})
    rows = read_jsonl(job.run.rows_path)
    assert [len(row["rows"]) for row in rows] == [16, 16, 8, 16, 16]  # 1.5 epochs of 3 steps
    assert sorted(index for row in rows[:3] for index in row["rows"]) == list(range(40))


def test_validation_and_checkpoints_may_be_told_in_epochs(run_tiny):
    """Ten steps an epoch."""
    changes = {"training.max_steps": 12, "training.eval_every": "epoch/2", "training.save_every": "epoch"}
    job = run_tiny({**changes, "training.keep_checkpoints": 9})
    validated = [row["step"] for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row]
    assert validated == [5, 10, 12]
    assert sorted(path.name for path in job.run.checkpoints_dir.iterdir()) == ["step-000010", "step-000012"]


def worsening(monkeypatch, losses: list[float]) -> None:
    values = iter(losses)
    monkeypatch.setattr(loop, "validation", lambda job: {"loss": next(values)})


def test_keep_best_and_last(run_tiny, monkeypatch):
    losses = [3.0, 1.0, 2.0]
    changes = {"training.eval_every": 2, "training.save_every": 1, "training.keep_checkpoints": 9}
    worsening(monkeypatch, losses)
    best = run_tiny({**changes, "name": "best"})
    worsening(monkeypatch, losses)
    last = run_tiny({**changes, "name": "last", "training.keep": "last"})
    saved = {
        step: (best.run.checkpoints_dir / f"step-{step:06d}" / "chain.safetensors").read_bytes()
        for step in (4, 6)
    }
    assert adapter_bytes(best.run) == saved[4] and best.run.read_status().adapter == KeptAdapter(
        step=4, kept="best"
    )
    assert adapter_bytes(last.run) == saved[6] and last.run.read_status().adapter == KeptAdapter(
        step=6, kept="last"
    )
    assert best.run.read_status().validation_loss == 1.0
    # The model carries what adapter/ holds.
    values = load_file(best.run.adapter_dir / "chain.safetensors")
    assert all(
        (parameter == values[name]).all() for name, parameter in best.parameters.items() if name in values
    )


def test_the_best_adapter_survives_a_resume(run_tiny, monkeypatch, dies_after):
    changes = {"training.eval_every": 1, "training.save_every": 1, "training.keep_checkpoints": 9}
    worsening(monkeypatch, [3.0, 1.0, 2.0, 2.5, 4.0, 5.0])
    untouched = run_tiny({**changes, "name": "untouched"})
    worsening(monkeypatch, [3.0, 1.0, 2.0, 2.5])
    with dies_after(4):
        run_tiny(changes)
    worsening(monkeypatch, [4.0, 5.0])
    job = run_tiny(changes, resume=True)
    assert job.state.best_step == 2
    assert adapter_bytes(job.run) == adapter_bytes(untouched.run)


def test_early_stopping(run_tiny, monkeypatch, capfd):
    changes = {"training.eval_every": 1, "training.early_stopping": 2, "training.save_every": 100}
    worsening(monkeypatch, [3.0, 1.0, 2.0, 1.0])  # as low as the best is not lower
    job = run_tiny(changes)
    assert "stopped early at step 4: 2 validations without a better one" in capfd.readouterr().err
    status = job.run.read_status()
    assert status.status == "finished" and status.step == 4 and status.adapter.step == 2
    assert [row["step"] for row in read_jsonl(job.run.rows_path)] == [1, 2, 3, 4]

    # Killed between the early stop's checkpoint and the end: it does not train on.
    job.run.update_status(status="running")
    before = adapter_bytes(job.run)
    monkeypatch.setattr(loop, "optimizer_step", None)
    again = run_tiny(changes, resume=True)
    assert again.state.step == 4 and adapter_bytes(job.run) == before


def test_no_validation_rows(run_tiny):
    job = run_tiny({"data.validation": 0, "training.keep": "last"})
    assert job.run.read_status().validation_loss is None
    assert not [row for row in read_jsonl(job.run.metrics_path) if "eval_loss" in row]


def test_what_the_run_is_too_short_for_is_told(run_tiny, capfd):
    run_tiny({"training.warmup_steps": 100, "training.max_steps": 2})
    printed = capfd.readouterr().err
    assert "warning: training.warmup_steps: the run has 2 steps, and warm-up takes 100" in printed


def test_a_pad_token_without_an_embedding_pads_nothing(run_tiny, base, monkeypatch):
    plain = run_tiny({"name": "plain"})
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|the model has never seen me|>"})
    assert tokenizer.pad_token_id == base.model.get_input_embeddings().num_embeddings
    monkeypatch.setattr(base, "tokenizer", tokenizer)
    job = run_tiny()
    assert job.base.pad_id == tokenizer.eos_token_id
    assert adapter_bytes(job.run) == adapter_bytes(plain.run), "nothing reads padding"


def test_rows_that_the_model_cannot_read_are_refused_before_the_first_step(
    run_tiny, base, monkeypatch, capfd
):
    monkeypatch.setattr(base.model.config, "max_position_embeddings", 50)
    run_tiny({"training.max_steps": 1})
    assert "warning: the longest row has 1" in capfd.readouterr().err
    table = torch.nn.Embedding(50, 4)
    monkeypatch.setattr(base.model, "wpe", table, raising=False)
    with pytest.raises(InputError, match="the model has 50 positions: set data.max_length to at most 50"):
        run_tiny({"name": "other"})
    assert not (base.directory / "other").exists()


def test_warnings_of_the_data_are_shown(run_tiny, tmp_path, commonsense_rows, capfd):
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(commonsense_rows(30) * 2))
    run_tiny({"data.train": str(path), "training.max_steps": 1})
    assert (
        "warning: " in (printed := capfd.readouterr().err) and "also occur among the training rows" in printed
    )


def test_the_peak_is_trainings_own(run_tiny, monkeypatch):
    """What loading, or a search for the micro-batch, held before the first step is not it."""

    def much(job):
        held = bytearray(400 << 20)
        held[::4096] = b"1" * len(held[::4096])

    monkeypatch.setattr(runner, "run_heaviest", much)
    before = resident_bytes()
    job = run_tiny({"training.max_steps": 2})
    peaks = [row["peak_memory_bytes"] for row in read_jsonl(job.run.metrics_path) if "loss" in row]
    assert len(peaks) == 2 and max(peaks) < before + (200 << 20)
