"""A stopped run that goes on: what may differ, what may not, and what is the same afterwards."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory, read_jsonl


def adapter_bytes(run: RunDirectory) -> bytes:
    return (run.adapter_dir / "chain.safetensors").read_bytes()


@pytest.mark.parametrize("exists", [False, True])
def test_a_resume_without_a_checkpoint_starts_at_step_0_and_says_so(run_tiny, dies_after, capfd, exists):
    if exists:
        with dies_after(1):
            run_tiny()
    job = run_tiny(resume=True)
    assert "has no checkpoint yet: starting at step 0" in capfd.readouterr().err
    assert [row["step"] for row in read_jsonl(job.run.rows_path)] == [1, 2, 3, 4, 5, 6]
    assert job.run.read_status().status == "finished"


DIFFERENCES = [
    ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
    ({"training.learning_rate": 0.02}, "training.learning_rate: 0.01 in the checkpoint, 0.02 now"),
    ({"adapter.alpha": 4}, "adapter.alpha: 8.0 in the checkpoint, 4.0 now"),
    ({"adapter.rank": 8}, "adapter.rank: 4 in the checkpoint, 8 now"),
    ({"data.validation": 5}, "data.validation: 6 in the checkpoint, 5 now"),
    ({"data.max_length": 190}, "data.max_length: 192 in the checkpoint, 190 now"),
    ({"training.keep": "last"}, "training.keep: 'best' in the checkpoint, 'last' now"),
]


def test_a_resume_that_would_be_another_run_is_refused_with_each_difference(run_tiny, recipe_of, dies_after):
    with dies_after(3):
        run_tiny()
    run = RunDirectory(recipe_of().run_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for changes, message in DIFFERENCES:
        with pytest.raises(InputError, match="cannot be resumed as it is") as caught:
            run_tiny(changes, resume=True)
        assert message in str(caught.value)
    with pytest.raises(InputError) as caught:
        run_tiny({key: value for changes, _ in DIFFERENCES for key, value in changes.items()}, resume=True)
    assert all(message in str(caught.value) for _, message in DIFFERENCES), "all differences in one message"
    assert "adapter.rank=4" in str(caught.value) and "training.keep=best" in str(caught.value)
    assert "name=NEW adapter.init_from=" in str(caught.value)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_other_rows_another_base_or_more_threads_are_refused(
    run_tiny, dies_after, tmp_path, commonsense_rows, base, monkeypatch
):
    with dies_after(3):
        run_tiny()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(commonsense_rows(46, seed=5)))
    with pytest.raises(
        InputError,
        match=r"data: \w+ in the checkpoint, \w+ now \(.*other.json\): the rows' files, or how they become "
        "tokens, are others",
    ):
        run_tiny({"data.train": str(other)}, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(base, "hash", f"tensors:{'0' * 64}")
        with pytest.raises(InputError, match=r"base: .* now \(.*\): the base model's weights are others"):
            run_tiny(resume=True)

    with monkeypatch.context() as patch:
        patch.setattr(base, "config", {**base.config, "rms_norm_eps": 0.25})
        with pytest.raises(InputError, match=r"config.json: rms_norm_eps: 1e-06, now 0.25"):
            run_tiny(resume=True)

    torch.set_num_threads(2)
    try:
        with pytest.raises(
            InputError,
            match=r"(?s)threads: 1 in the checkpoint, 2 now: sums would be formed in another order.*"
            r"\(OMP_NUM_THREADS=1 in the environment\)",
        ):
            run_tiny(resume=True)
    finally:
        torch.set_num_threads(1)


def test_the_same_rows_and_base_in_another_place_are_no_difference(run_tiny, dies_after, tmp_path, rows_file):
    with dies_after(3):
        run_tiny()
    moved = tmp_path / "moved.json"
    moved.write_bytes(rows_file.read_bytes())
    assert run_tiny({"data.train": str(moved)}, resume=True).state.step == 6


def test_as_many_rows_held_out_are_no_difference_however_they_were_asked_for(run_tiny, dies_after):
    with dies_after(3):
        run_tiny({"data.validation": 4})
    assert run_tiny({"data.validation": "auto"}, resume=True).state.step == 6


def test_length_and_intervals_may_change_and_the_schedule_follows(run_tiny, dies_after, capfd):
    with dies_after(3):
        run_tiny()
    changes = {
        "training.max_steps": 8,
        "training.log_every": 2,
        "training.save_every": 4,
        "training.eval_every": 4,
        "training.keep_checkpoints": 1,
    }
    job = run_tiny(changes, resume=True)
    assert (
        "the run now ends at step 8 instead of 6: the learning rate follows the new length"
        in capfd.readouterr().err
    )
    rates = {row["step"]: row["learning_rate"] for row in read_jsonl(job.run.metrics_path) if "loss" in row}
    assert (
        rates[2] == 0.01
        and rates[4] == pytest.approx(0.01 * (1 - 1 / 6))
        and rates[8] == pytest.approx(0.01 / 6)
    )
    assert job.run.read_status().total_steps == 8
    assert [path.name for path in job.run.checkpoints_dir.iterdir()] == ["step-000008"]


def test_what_makes_a_run_fit_may_change_on_the_way_and_is_said(run_tiny, dies_after, capfd):
    whole = run_tiny({"name": "whole"})
    with dies_after(3):
        run_tiny({"adapter.dropout": 0.0})
    capfd.readouterr()
    changes = {"training.micro_batch_size": 1, "training.gradient_checkpointing": True}
    job = run_tiny(changes, resume=True)
    printed = capfd.readouterr().err
    assert "training.micro_batch_size is 1 now (was 2): sums are formed in another order" in printed
    assert "training.gradient_checkpointing is true now (was false): the result stays the same" in printed
    assert job.state.micro_batch_size == 1 == job.run.read_status().micro_batch_size
    ours, theirs = (load_file(run.adapter_dir / "chain.safetensors") for run in (job.run, whole.run))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-3 * max(1e-3, tensor.abs().max())


def test_recomputing_from_the_middle_on_moves_no_bit(run_tiny, dies_after):
    whole = run_tiny({"name": "whole", "adapter.dropout": 0.2})
    with dies_after(3):
        run_tiny({"adapter.dropout": 0.2})
    job = run_tiny({"adapter.dropout": 0.2, "training.gradient_checkpointing": True}, resume=True)
    assert adapter_bytes(job.run) == adapter_bytes(whole.run)


def test_other_micro_batches_draw_other_dropout_which_is_said(run_tiny, dies_after, capfd):
    with dies_after(3):
        run_tiny({"adapter.dropout": 0.2})
    run_tiny({"adapter.dropout": 0.2, "training.micro_batch_size": 4}, resume=True)
    assert "with other micro-batches dropout draws other masks from here on" in capfd.readouterr().err


def test_a_finished_run_goes_on_when_the_recipe_asks_for_more(run_tiny, recipe_of, capfd):
    whole = run_tiny({"name": "whole", "training.max_steps": 8, "training.lr_scheduler": "constant"})
    changes = {"training.lr_scheduler": "constant"}
    run_tiny(changes)
    capfd.readouterr()
    assert run_tiny({**changes, "training.max_steps": 5}, resume=True) is None
    assert run_tiny({**changes, "training.log_every": 2}, resume=True) is None
    assert capfd.readouterr().err.count("finished already; nothing to resume") == 2
    job = run_tiny({**changes, "training.max_steps": 8}, resume=True)
    assert "resuming" in (printed := capfd.readouterr().err) and "after step 6 of 8" in printed
    status = job.run.read_status()
    assert (status.status, status.step, status.total_steps) == ("finished", 8, 8)
    assert adapter_bytes(job.run) == adapter_bytes(whole.run)
    assert [row["step"] for row in read_jsonl(job.run.rows_path)] == list(range(1, 9))


def test_a_finished_run_without_checkpoints_does_not_begin_again(run_tiny):
    job = run_tiny()
    shutil.rmtree(job.run.checkpoints_dir)
    before = adapter_bytes(job.run)
    with pytest.raises(InputError, match="has no checkpoint to go on from.* adapter.init_from="):
        run_tiny({"training.max_steps": 8}, resume=True)
    assert adapter_bytes(job.run) == before and job.run.read_status().finished


def test_a_run_cannot_end_before_where_it_stands(run_tiny, dies_after):
    with dies_after(5):
        run_tiny()
    with pytest.raises(InputError, match="has taken 4 steps already: it cannot end at step 3"):
        run_tiny({"training.max_steps": 3}, resume=True)
    job = run_tiny({"training.max_steps": 4}, resume=True)
    assert job.state.step == 4 and job.run.read_status().status == "finished"
