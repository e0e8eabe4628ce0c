"""The largest micro-batch that fits, and what is said when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linchain_cli.data.batches import collate, micro_batches, step_rows
from linchain_cli.errors import LinchainError
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training import loop, loss, memory, runner
from linchain_cli.training.state import STATE_FILE, read_state

GIB = memory.GIB
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(free, fixed, per_row): a made-up machine on which a probe over n rows takes fixed + n · per_row
    bytes.

    The sizes that were tried are collected in `.tried`.
    """

    def make(free: float, fixed: float, per_row: float):
        tried = []

        def peak(job, batch):
            rows, length = batch.input_ids.shape
            tried.append(rows if length > 8 else 0)
            return int(fixed + per_row * tried[-1])

        monkeypatch.setattr(memory, "_free", lambda device: int(free))
        monkeypatch.setattr(memory, "_in_use", lambda device: 0)
        monkeypatch.setattr(memory, "_peak_of", peak)
        return tried

    return make


CHANGES = {"training.micro_batch_size": "auto", "training.global_batch_size": 24}


@pytest.mark.parametrize(
    ("free", "fixed", "per_row", "rows"),
    [
        (100 * GIB, 0, GIB, 24),  # more than enough: the whole share of the global batch
        (10.1 * GIB, 0, GIB, 9.09),  # 9.09 GiB may be planned with
        (10.1 * GIB, 4 * GIB, GIB, 5.09),  # a cost that does not grow with the rows
        (10 * GIB, 0, 0, 24),  # rows that cost nothing
        (GIB / 2, 0, GIB, 1),  # not even one: left to fail with its message
    ],
)
def test_as_many_tokens_as_fit(job_of, machine, free, fixed, per_row, rows):
    tried = machine(free, fixed, per_row)
    notes, job = [], job_of(CHANGES)
    tokens, longest = memory.find_tokens(job, notes.append), int(job.data.train.lengths.max())
    assert tokens == pytest.approx(rows * longest, abs=1) and tokens <= rows * longest
    assert all(fixed + count * per_row <= free for count in tried[2:]), "nothing is tried that cannot fit"
    assert f"auto is {tokens:,} tokens, as many as {rows:.1f} of the 24 longest rows" in notes[0]


def test_the_room_is_measured_once_a_first_step_has_taken_its_own(job_of, machine, monkeypatch):
    """NCCL takes its buffers, and CUDA its kernels, with the first step and outside of torch's allocator."""
    machine(10 * GIB, 0, GIB)
    calls, free, work, add = [], memory._free, memory._forward_and_backward, memory.sum_over_processes
    monkeypatch.setattr(memory, "_free", lambda device: calls.append("measured") or free(device))
    monkeypatch.setattr(
        memory, "_forward_and_backward", lambda job, batch: calls.append("computed") or work(job, batch)
    )
    monkeypatch.setattr(
        memory, "sum_over_processes", lambda processes, sums: calls.append(len(sums)) or add(processes, sums)
    )
    job = job_of(CHANGES)
    memory.find_tokens(job, print)
    assert calls == ["computed", len(job.optimizer.sums), "measured"]
    assert not job.optimizer.sums.any()


def test_a_share_of_the_global_batch_is_the_most(job_of, machine):
    machine(1000 * GIB, 0, GIB)
    job = job_of({**CHANGES, "training.global_batch_size": 500})
    assert memory.find_tokens(job, print) == 40 * job.data.train.lengths.max()  # all rows


def test_the_probe_measures_and_leaves_nothing_behind(job_of):
    job = job_of(CHANGES)
    batch = collate(job.data.train, job.data.train.lengths.argsort()[::-1][:32], 0)
    before = memory._in_use(CPU)
    values = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    peak = memory._peak_of(job, batch)
    assert peak > before + 4_000_000, "32 rows of 190 tokens keep megabytes of attention weights alone"
    assert not job.optimizer.sums.any()
    assert all(torch.equal(parameter, values[name]) for name, parameter in job.parameters.items())


def test_a_run_with_auto_trains_as_with_any_other_size_and_keeps_it(run_tiny, dies_after, monkeypatch, capfd):
    fixed = run_tiny({"name": "fixed", "training.micro_batch_size": 4})
    auto = run_tiny({"name": "auto", "training.micro_batch_size": "auto"})
    tokens = int(4 * auto.data.train.lengths.max())
    assert auto.state.micro_batch_tokens == tokens == auto.run.read_status().micro_batch_tokens
    assert f"micro_batch_size: auto is {tokens:,} tokens" in capfd.readouterr().err
    assert (auto.run.adapter_dir / "chain.safetensors").read_bytes() == (
        fixed.run.adapter_dir / "chain.safetensors"
    ).read_bytes()

    with dies_after(3):
        run_tiny({"name": "auto", "training.micro_batch_size": "auto"}, fresh=True)
    # With less memory at hand than at the first start, the size stays what it was: the sums must not change.
    monkeypatch.setattr(memory, "_free", lambda device: 1)
    job = run_tiny({"name": "auto", "training.micro_batch_size": "auto"}, resume=True)
    assert job.state.micro_batch_tokens == tokens and job.state.micro_batch_size is None
    assert (job.run.adapter_dir / "chain.safetensors").read_bytes() == (
        fixed.run.adapter_dir / "chain.safetensors"
    ).read_bytes()


def test_a_real_allocation_failure_tells_numbers_and_keys(recipe_of):
    recipe = recipe_of()
    with pytest.raises(LinchainError) as caught, memory.explained(recipe, CPU):
        torch.empty(1 << 50, dtype=torch.uint8)
    message = str(caught.value)
    assert message.startswith("out of memory: 1048576.00 GiB were asked for on cpu, where ")
    assert "GiB were free" in message
    for key in (
        "leaves the result as it is, also with --resume: a smaller training.micro_batch_size (now 2)",
        "training.gradient_checkpointing=true",
        "a smaller data.max_length (now 192)",
        "model.quantization=nf4",
        "model.dtype=auto",
    ):
        assert key in message
    assert caught.value.exit_code == 1


def test_what_is_used_already_is_not_recommended(recipe_of):
    changes = {
        "training.micro_batch_size": 1,
        "training.gradient_checkpointing": True,
        "training.offload_activations": True,
        "model.quantization": "nf4",
        "model.dtype": "bfloat16",
    }
    with pytest.raises(LinchainError) as caught, memory.explained(recipe_of(changes), CPU):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which"
            " 1.44 GiB is free. Including non-PyTorch memory, this process has 77.70 GiB memory in use."
        )
    assert str(caught.value) == (
        "out of memory: 2.50 GiB were asked for on cpu, where 1.44 GiB were free."
        " What needs less and makes it another run: a smaller data.max_length (now 192)."
    )


def test_other_errors_pass(recipe_of):
    with pytest.raises(RuntimeError, match="^shapes$"), memory.explained(recipe_of(), CPU):
        raise RuntimeError("shapes")


def test_a_run_that_runs_out_of_memory_fails_with_a_reason(run_tiny, recipe_of, monkeypatch):
    monkeypatch.setattr(loop, "optimizer_step", lambda *args: torch.empty(1 << 50))
    with pytest.raises(LinchainError, match="out of memory: .* training.micro_batch_size"):
        run_tiny()
    status = RunDirectory(recipe_of().run_path).read_status()
    assert status.status == "failed" and status.reason.startswith("out of memory: ")
    assert read_jsonl(RunDirectory(recipe_of().run_path).rows_path) == []


def test_memory_runs_out_before_the_first_step_or_not_at_all(run_tiny, recipe_of, monkeypatch):
    """A micro-batch of the last step is too much: nothing is written, and no step is taken."""
    original = loss.add_gradients
    job = run_tiny({"name": "sizes", "training.max_steps": 10})
    sizes = []
    for row in read_jsonl(job.run.rows_path):
        part = micro_batches(np.array(row["rows"]), job.data.train.lengths, 2)[0]
        sizes.append(int(job.data.train.lengths[part].sum()))
    most = max(sizes)
    assert sizes.index(most) > 0

    def small(model, batch, scale, device):
        if int(batch.attention_mask.sum()) >= most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(model, batch, scale, device)

    monkeypatch.setattr(loss, "add_gradients", small)
    with pytest.raises(LinchainError, match="out of memory: 2.00 GiB were asked for"):
        run_tiny({"training.max_steps": 10})
    assert not recipe_of().run_path.exists()


def running_out(monkeypatch, most: int) -> list[int]:
    """A machine on which no micro-batch of more positions than `most` fits; the list receives those tried."""
    original, tried = loss.add_gradients, []

    def small(model, batch, scale, device):
        tried.append(batch.input_ids.numel())
        found = original(model, batch, scale, device)  # so that something is left of it
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(loss, "add_gradients", small)
    return tried


AUTO = {"training.micro_batch_size": "auto", "training.global_batch_size": 6, "training.max_steps": 4}


def test_a_run_goes_on_with_half_the_budget_where_memory_runs_out(run_tiny, monkeypatch, caplog):
    """In the third step, say because others use the GPU, too: what was computed of that step is dropped."""
    expected = run_tiny({**AUTO, "name": "roomy"})
    budget, longest = expected.state.micro_batch_tokens, int(expected.data.train.lengths.max())
    original = loop.optimizer_step

    def step(job, *args):
        if job.state.step == 2:
            running_out(monkeypatch, budget // 3)
        return original(job, *args)

    monkeypatch.setattr(loop, "optimizer_step", step)
    job = run_tiny({**AUTO, "name": "tight", "training.save_every": 1})
    assert job.state.micro_batch_tokens == budget // 4 > longest
    assert f"micro-batches have up to {budget // 4:,} tokens from here on" in caplog.text
    for name, parameter in job.parameters.items():
        torch.testing.assert_close(parameter, expected.parameters[name], rtol=1e-4, atol=1e-6)
    rows, reference = (read_jsonl(each.run.rows_path) for each in (job, expected))
    assert rows == reference and len(rows) == 4
    kept, _ = read_state(job.store.read(4)[STATE_FILE])
    assert kept.micro_batch_tokens == budget // 4, "a resumed run is cut as this one was"


def test_memory_that_runs_out_before_the_first_step_halves_the_budget(run_tiny, monkeypatch):
    budget = run_tiny({**AUTO, "name": "roomy"}).state.micro_batch_tokens
    monkeypatch.setattr(memory, "find_tokens", lambda job, note: budget)
    monkeypatch.setattr(runner, "find_tokens", lambda job, note: budget)
    tried = running_out(monkeypatch, budget // 2)
    job = run_tiny({**AUTO, "name": "tight"})
    assert job.state.micro_batch_tokens == budget // 2
    assert sum(size > budget // 2 for size in tried) == 1, "the largest one comes first"


def test_no_budget_is_smaller_than_the_longest_row(run_tiny, monkeypatch):
    longest = int(run_tiny({**AUTO, "name": "roomy"}).data.train.lengths.max())
    monkeypatch.setattr(runner, "find_tokens", lambda job, note: 3 * longest)
    running_out(monkeypatch, longest - 1)
    with pytest.raises(LinchainError, match="out of memory: 2.00 GiB were asked for"):
        run_tiny({**AUTO, "name": "tight"})


def test_a_validation_that_runs_out_of_memory_is_taken_in_smaller_parts(job_of, monkeypatch):
    job = job_of()
    expected = loop.validation(job)["loss"]
    job.state.micro_batch_size, job.state.micro_batch_tokens = None, 10_000
    original = loss.summed_loss

    def small(model, batch, device):
        if len(batch.labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(model, batch, device)

    monkeypatch.setattr(loss, "summed_loss", small)
    assert loop.validation(job)["loss"] == pytest.approx(expected, rel=1e-6)
    assert job.state.micro_batch_tokens < 1000


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tokens", [None, 1, 250, 500, 2000])
def test_the_heaviest_steps_are_those_that_trying_all_finds(world, tokens):
    lengths = np.random.RandomState(0).randint(5, 200, 45).astype(np.int32)
    for seed, ahead in ((1, range(0, 23)), (2, range(7, 12)), (3, range(13, 14))):
        in_all, positions = {}, {}
        for step in ahead:
            parts = micro_batches(step_rows(45, seed, 6, step), lengths, 4, 0, world, tokens)
            in_all[step] = max(lengths[part].sum() for part in parts)
            positions[step] = max(len(part) * lengths[part].max() for part in parts)
        found = memory.heaviest_steps(lengths, seed, 6, 4, ahead, world, tokens)
        assert max(in_all[step] for step in found) == max(in_all.values())
        assert max(positions[step] for step in found) == max(positions.values())
        assert len(found) <= 2
    assert memory.heaviest_steps(lengths, 1, 6, 4, range(9, 9)) == []
