"""Several processes (gloo, on the CPU) against one: gradients, adapters, row order, signals and errors.

The ranks are forked processes that get the environment a launcher would give them; see test_launch.py for
launchers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from linchain_cli.errors import LinchainError
from linchain_cli.run import KeptAdapter, RunDirectory, read_jsonl
from linchain_cli.training import processes


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


# The sums of a step are formed in another order, in float32; Adam's division makes the most of it.
GRADIENT_TOLERANCE = 1e-4
ADAPTER_TOLERANCE = 2e-3
WHOLE_BYTES = 4 * (2 * 64 * 600 + 64)  # embeddings, head and final norm, which stay whole on every process


@pytest.fixture
def compared(starter, recipe_file, recipe_of, tmp_path):
    """compared(world, *overrides): a run of `world` processes; its directory, and its gradients of the third
    step.
    """
    recipe = recipe_file({"training.global_batch_size": 6, "training.max_steps": 4, "training.save_every": 4})

    def run(world: int, *overrides: str):
        name = f"world-{world}-{len(starter.started)}"
        gradients = tmp_path / f"{name}.safetensors"
        options = {"hook": "record_gradients", "step": 2, "path": str(gradients)}
        arguments = ("train", recipe, f"name={name}", *overrides)
        ranks = (
            [starter.start(*arguments, **options)]
            if world == 1
            else starter.ranks(world, *arguments, **options)
        )
        assert [rank.wait(120) for rank in ranks] == [0] * world, "".join(rank.log for rank in ranks)
        said = [rank.log for rank in ranks[1:] if rank.log]
        assert not said, "one process speaks for all"
        return RunDirectory(recipe_of({"name": name}).run_path), load_file(gradients)

    return run


def test_two_and_four_processes_train_as_one_does(compared):
    one, gradients = compared(1)
    losses = [row["loss"] for row in read_jsonl(one.metrics_path) if "loss" in row]
    validation = one.read_status().validation_loss
    for world in (2, 4):
        # Of four processes, two get one row of six and the others two: the micro-batches do not go round.
        several, their_gradients = compared(world)
        close(their_gradients, gradients, GRADIENT_TOLERANCE)
        close(
            load_file(several.adapter_dir / "chain.safetensors"),
            load_file(one.adapter_dir / "chain.safetensors"),
            ADAPTER_TOLERANCE,
        )
        assert several.rows_path.read_bytes() == one.rows_path.read_bytes()
        assert [row["loss"] for row in read_jsonl(several.metrics_path) if "loss" in row] == pytest.approx(
            losses, rel=1e-5
        )
        status = several.read_status()
        assert status.validation_loss == pytest.approx(validation, rel=1e-5)
        assert status.machine.processes == world and not status.machine.sharded
        for key in ("tokens", "supervised_tokens", "step"):
            assert getattr(status, key) == getattr(one.read_status(), key)


def test_a_sharded_base_trains_as_a_whole_one_does(compared, starter):
    """Micro-batches of one row in six: with two processes their numbers of head passes differ."""
    changes = ("training.micro_batch_size=1", "adapter.dropout=0.1", "training.eval_every=2")
    tasks = ("evaluation.tasks=[everyday]", "evaluation.limit=3")
    whole, gradients = compared(2, *changes)
    sharded, their_gradients = compared(2, *changes, *tasks, "training.parallel=shard")
    sizes = [found.pop("base bytes").item() - WHOLE_BYTES for found in (gradients, their_gradients)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    assert json.loads((sharded.eval_dir / "likelihood.json").read_bytes())["tasks"]["everyday"]["n"] == 3
    assert all(torch.equal(their_gradients[name], gradient) for name, gradient in gradients.items())
    for path in ("adapter/chain.safetensors", "rows.jsonl"):
        assert (sharded.path / path).read_bytes() == (whole.path / path).read_bytes()
    assert sharded.read_status().machine.sharded and not whole.read_status().machine.sharded
    merging = starter.start("merge", sharded.path)
    assert merging.wait(120) == 0, merging.log


def test_a_4_bit_base_in_shards_trains_as_a_whole_one_does(compared):
    changes = ("model.quantization=nf4", "adapter.dropout=0.1")
    _, gradients = compared(2, *changes)
    _, their_gradients = compared(2, *changes, "training.parallel=shard")
    sizes = [found.pop("base bytes").item() - WHOLE_BYTES for found in (gradients, their_gradients)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)
    assert all(torch.equal(their_gradients[name], gradient) for name, gradient in gradients.items())


def test_several_processes_resume_bit_for_bit(starter, recipe_file, recipe_of):
    """On a base in shards, against a run that was not interrupted and held it whole."""
    recipe = recipe_file({"adapter.dropout": 0.1})
    shard = "training.parallel=shard"
    for rank in starter.ranks(2, "train", recipe, "name=whole"):
        assert rank.wait(120) == 0, rank.log
    run = RunDirectory(recipe_of({"name": "killed"}).run_path)
    ranks = starter.ranks(2, "train", recipe, "name=killed", shard, hook="slow_steps", seconds=0.1)
    ranks[0].wait_for_step(run, 3)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-9, -9]
    for rank in starter.ranks(2, "train", recipe, "name=killed", shard, "--resume"):
        assert rank.wait(120) == 0, rank.log
    whole = RunDirectory(recipe_of({"name": "whole"}).run_path)
    for path in ("adapter/chain.safetensors", "checkpoints/step-000006/optimizer.safetensors", "rows.jsonl"):
        assert (run.path / path).read_bytes() == (whole.path / path).read_bytes()
    alone = starter.start("train", recipe, "name=killed", shard, "--resume")
    assert alone.wait() == 0 and "finished already" in alone.log


def test_each_process_resumes_with_the_micro_batches_it_had(starter, recipe_file, recipe_of):
    """Memory ran out on the second in the second step, and has room again after the kill."""
    recipe = recipe_file({"training.micro_batch_size": "auto", "training.save_every": 1})
    hook = {"hook": "run_out_of_memory", "rank": 1, "step": 1}
    runs = [RunDirectory(recipe_of({"name": name}).run_path) for name in ("whole", "killed")]
    ranks = starter.ranks(2, "train", recipe, "name=whole", **hook, seconds=0)
    assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].log
    assert "Out of memory: micro-batches have up to" in ranks[1].log
    ranks = starter.ranks(2, "train", recipe, "name=killed", **hook, seconds=0.3)
    ranks[0].wait_for_step(runs[1], 3)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-9, -9]
    ranks = starter.ranks(2, "train", recipe, "name=killed", "--resume")
    assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].log
    for path in ("adapter/chain.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (runs[0].path / path).read_bytes() == (runs[1].path / path).read_bytes()
    for run in runs:
        state = json.loads((run.path / "checkpoints/step-000006/state.json").read_bytes())
        first, second = state["micro_batch_tokens"]
        assert second < first, "memory ran out on the second alone"


def test_all_processes_evaluate_the_adapter_that_is_kept(starter, recipe_file, recipe_of):
    changes = {"evaluation.tasks": ["everyday"], "evaluation.limit": 6}
    values = {"hook": "validation_losses", "values": [1.0, 2.0]}  # after steps 3 and 6
    for rank in starter.ranks(2, "train", recipe_file(changes), **values):
        assert rank.wait(120) == 0, rank.log
    run = RunDirectory(recipe_of().run_path)
    assert run.read_status().adapter == KeptAdapter(step=3, kept="best")
    alone = starter.start("train", recipe_file(changes), "name=alone", **values)
    assert alone.wait(120) == 0
    # The processes' best adapter is that of one process, and so are the scores of all rows.
    scores = [
        [row["scores"] for row in read_jsonl(RunDirectory(path).eval_dir / "likelihood.predictions.jsonl")]
        for path in (run.path, run.path.with_name("alone"))
    ]
    assert len(scores[0]) == 6
    for ours, theirs in zip(*scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("type", lambda status: status.base.dtype == "float32"),
        ("memory", lambda status: status.machine.sharded),
        ("rounding", lambda status: True),
    ],
    ids=["type", "memory", "rounding"],
)
def test_processes_on_unlike_devices_hold_one_model(starter, recipe_file, recipe_of, what, told):
    """`auto` means for all what it means for the least of them, and what is kept is the first one's."""
    changes = {"model.dtype": "auto", "evaluation.tasks": ["everyday"], "evaluation.limit": 6}
    for rank in starter.ranks(2, "train", recipe_file(changes), hook="unlike_devices", rank=1, what=what):
        assert rank.wait(120) == 0, rank.log
    run = RunDirectory(recipe_of().run_path)
    assert told(run.read_status())
    assert json.loads((run.eval_dir / "likelihood.json").read_bytes())["tasks"]["everyday"]["n"] == 6


def test_another_number_of_processes_does_not_resume(starter, recipe_file, recipe_of):
    recipe = recipe_file({"training.max_steps": 500, "training.save_every": 2})
    run = RunDirectory(recipe_of().run_path)
    process = starter.start("train", recipe)
    process.wait_for_step(run, 3)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    ranks = starter.ranks(2, "train", recipe, "--resume")
    assert [rank.wait(120) for rank in ranks] == [2, 2]
    assert "world_size: 1 in the checkpoint, 2 now: rows would be shared out otherwise" in ranks[0].log
    newest = max(run.checkpoints_dir.iterdir())
    assert "Restore what differs (--nproc 1)" in ranks[0].log
    assert f"name=NEW adapter.init_from={newest}" in " ".join(ranks[0].log.split())
    assert ranks[1].log == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_any_one_process_stops_all_of_them(starter, recipe_file, recipe_of, number, code):
    recipe = recipe_file({"training.max_steps": 500, "training.save_every": 500, "training.eval_every": 500})
    run = RunDirectory(recipe_of().run_path)
    ranks = starter.ranks(3, "train", recipe, hook="slow_steps", seconds=0.02)
    ranks[0].wait_for_step(run, 2)
    os.kill(ranks[2].pid, number)
    assert [rank.wait() for rank in ranks] == [code] * 3
    step = run.read_status().step
    assert run.read_status().status == "stopped"
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"step-{step:06d}"]
    assert f"stopped at step {step} of 500" in ranks[0].log and ranks[1].log == ranks[2].log == ""


def test_a_signal_to_all_of_them_while_they_load_is_told_as_that(starter, recipe_file, recipe_of, tmp_path):
    """As a terminal sends it. The first process says it, also if the others have ended by then."""
    marker = tmp_path / "loading"
    ranks = starter.ranks(2, "train", recipe_file(), hook="slow_loading", seconds=60, marker=str(marker))
    ranks[0].wait_until(marker.exists, "loading")
    for rank in reversed(ranks):
        os.kill(rank.pid, signal.SIGINT)
    assert [rank.wait(60) for rank in ranks] == [130, 130], ranks[0].log + ranks[1].log
    assert "error: stopped before the first step: nothing was written" in ranks[0].log
    assert ranks[1].log == "" and not recipe_of().run_path.exists()


def test_a_signal_to_the_first_alone_ends_it_on_the_spot(starter, recipe_file, recipe_of, tmp_path):
    """What the others are loading meanwhile is not waited for; whoever launched them ends them, too."""
    marker = tmp_path / "loading"
    ranks = starter.ranks(2, "train", recipe_file(), hook="slow_loading", seconds=60, marker=str(marker))
    ranks[0].wait_until(marker.exists, "loading")
    time.sleep(2)  # until both are at it
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert ranks[0].wait(30) == 143
    assert "error: stopped before the first step: nothing was written" in ranks[0].log
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ranks[1].wait(30) == 143 and ranks[1].log == ""


def test_a_process_that_is_killed_while_they_load_is_named(starter, recipe_file, recipe_of, tmp_path):
    marker = tmp_path / "loading"
    ranks = starter.ranks(2, "train", recipe_file(), hook="slow_loading", seconds=3, marker=str(marker))
    ranks[0].wait_until(marker.exists, "loading")
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [1, -signal.SIGKILL]
    assert "error: another process of this run ended while this one waited for it" in ranks[0].log
    assert not recipe_of().run_path.exists()


@pytest.mark.parametrize(
    ("where", "kind", "codes", "message"),
    [
        ("prepare", "bug", [1, 1], "ValueError: a bug"),
        ("size", "memory", [1, 1], "out of memory: 2.00 GiB were asked for on cpu"),
        ("heaviest", "memory", [1, 1], "out of memory: 2.00 GiB were asked for on cpu"),
        ("step", "memory", [1, 1], "out of memory: 2.00 GiB were asked for on cpu"),
        ("step", "exit", [1, 7], ""),
    ],
)
def test_an_error_on_one_process_ends_all_of_them(
    starter, recipe_file, recipe_of, where, kind, codes, message
):
    began = time.monotonic()
    recipe = recipe_file({"training.micro_batch_size": "auto"} if where == "size" else {})
    ranks = starter.ranks(2, "train", recipe, hook="fail_on_rank", rank=1, where=where, kind=kind)
    assert [rank.wait(90) for rank in ranks] == codes, ranks[0].log + ranks[1].log
    assert message in ranks[1].log
    run = RunDirectory(recipe_of().run_path)
    if where != "step":
        assert "error" not in ranks[0].log and not run.path.exists()
    else:
        told = "another process of this run ended while this one waited for it"
        told = f"{told}: process 1 (pid {ranks[1].pid} on "
        assert f"error: {told}" in ranks[0].log
        assert run.read_status().status == "failed" and told in run.read_status().reason
    assert time.monotonic() - began < 90
    assert all("Traceback" not in rank.log for rank in ranks)


def test_a_process_that_does_not_answer_ends_the_others_soon(starter, recipe_file, recipe_of):
    hook = {"hook": "hang_on_rank", "rank": 1, "seconds": 60, "patience": 3}
    ranks = starter.ranks(2, "train", recipe_file(), **hook)
    assert ranks[0].wait(60) == 1
    assert "error: another process of this run has not answered for 0.05 minutes" in ranks[0].log
    assert "has not answered" in RunDirectory(recipe_of().run_path).read_status().reason


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_would_take_the_model_apart_is_refused(starter, recipe_file, variable):
    ranks = starter.ranks(2, "train", recipe_file(), environment={variable: "true"})
    assert [rank.wait(90) for rank in ranks] == [2, 2]
    name = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}[variable.rpartition("_")[2]]
    assert f"error: accelerate launch is configured for {name}" in ranks[0].log
    assert "training.parallel to shard" in ranks[0].log and ranks[1].log == ""


def test_gpus_sum_over_nccl_and_everything_else_goes_over_gloo(monkeypatch, group_of_gpus, launched_as):
    """Accelerate finds the process group that is there."""
    asked = group_of_gpus
    alone = SimpleNamespace(process_index=0, num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda **options: alone)
    launched_as(3, of=4)
    processes.connect()
    assert asked == [1, ("cpu:gloo,cuda:nccl", processes.PATIENCE)]


@pytest.mark.parametrize(
    ("reason", "gone", "told"),
    [
        ("Duplicate GPU detected : rank 1 and rank 0", [], "computed: Duplicate GPU detected"),
        ("Duplicate GPU detected : rank 1 and rank 0", ["process 1"], "this one waited for it: process 1"),
        ("socket: Connection reset by peer", [], "another process of this run ended"),
    ],
)
def test_what_nccl_says_is_told_unless_a_process_is_gone(monkeypatch, reason, gone, told):
    monkeypatch.setattr(processes.peers, "gone", lambda: gone)
    error = torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version"
        " 2.28.9\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        f"Last error:\n{reason}\n"
    )
    assert told in processes.lost_connection(error)


def test_wrong_input_is_told_once(starter, recipe_file):
    ranks = starter.ranks(2, "train", recipe_file({"model.path": "/nowhere"}))
    assert [rank.wait(90) for rank in ranks] == [2, 2]
    assert ranks[0].log.startswith("error: ") and ranks[1].log == ""


def test_what_the_first_process_alone_looks_at_fails_for_all(starter, recipe_file):
    """Whether a finished run has been evaluated."""
    for rank in starter.ranks(2, "train", recipe_file({"training.max_steps": 1})):
        assert rank.wait(90) == 0, rank.log
    changes = {"training.max_steps": 1, "evaluation.tasks": ["everyday"]}
    options = {"hook": "fail_on_rank", "rank": 0, "where": "results", "kind": "bug"}
    ranks = starter.ranks(2, "train", recipe_file(changes), "--resume", **options)
    assert [rank.wait(90) for rank in ranks] == [1, 1]
    assert "a bug" in ranks[0].log and ranks[1].log == ""


def test_sharding_is_refused_where_it_cannot_be(starter, recipe_file):
    alone = starter.start("train", recipe_file({"training.parallel": "shard"}))
    ranks = starter.ranks(
        2, "train", recipe_file({"training.parallel": "shard", "model.quantization": "int8"})
    )
    assert alone.wait() == 2 and "shard needs several processes (--nproc)" in alone.log
    assert [rank.wait(90) for rank in ranks] == [2, 2]
    assert "shard cannot spread a base in int8" in ranks[0].log


def test_an_evaluation_says_that_another_process_is_gone(launched_as):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="Connection closed"), processes.told_when_lost():
        raise lost
    launched_as(0, of=2)
    with pytest.raises(LinchainError, match="another process of this run ended"), processes.told_when_lost():
        raise lost
    with pytest.raises(RuntimeError, match="a fault"), processes.told_when_lost():
        raise RuntimeError("a fault of our own")
