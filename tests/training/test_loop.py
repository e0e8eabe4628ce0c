"""The optimizer step against plain references: how rows are cut, and which path computes them, changes
nothing.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linchain_cli.chain import chain_layers, find_siblings, folded, inject
from linchain_cli.chain.inject import ChainConfig
from linchain_cli.data.batches import IGNORED, Batch, collate, micro_batches, step_rows
from linchain_cli.errors import LinchainError
from linchain_cli.model.attention import GROUPED, use_attention
from linchain_cli.model.fast import is_replaced
from linchain_cli.model.flat_rows import TOKEN_STEP, attention_way, flat_hidden_states, share_beginnings
from linchain_cli.run import read_jsonl
from linchain_cli.training import loop, loss, runner
from linchain_cli.training.base import suit_to_training
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import dropout_seed, optimizer_step

CPU = torch.device("cpu")


def make_different_from_base(model, seed: int = 0) -> None:
    """B = 0 would hide errors in everything behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in chain_layers(model).values():
            layer.B.normal_(0.0, 0.1, generator=generator)


def load(directory, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    return model.requires_grad_(False)


def batch_of(lengths: list[int], vocabulary: int, seed: int = 0) -> Batch:
    """Random right-padded rows, the last third of each labelled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    labelled = mask & (torch.arange(shape[1])[None] >= torch.tensor(lengths)[:, None] * 2 // 3)
    ids = torch.where(mask, ids, 0)
    return Batch(ids, mask.long(), torch.where(labelled, ids, IGNORED))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for path, layer in chain_layers(model).items():
        for name in ("A", "links", "B"):
            found[f"{path}.{name}"] = getattr(layer, name).grad.clone()
            getattr(layer, name).grad = None
    return found


@pytest.fixture(params=["llama", "gpt2", "tied"])
def chained(request, tiny_llama_dir, tiny_gpt2_dir, tiny_tied_dir):
    """A float64 model with chains whose ΔW is not zero."""
    directory = {"llama": tiny_llama_dir, "gpt2": tiny_gpt2_dir, "tied": tiny_tied_dir}[request.param]
    model = load(directory)
    inject(model, ChainConfig(rank=4, depth=2, alpha=8, target_modules="all-linear"))
    make_different_from_base(model)
    return model.double()


def test_the_loss_and_its_gradients_are_those_of_the_whole_model(chained):
    batch = batch_of([20, 13, 7], chained.config.vocab_size)
    count = int((batch.labels[:, 1:] != IGNORED).sum())
    logits = chained(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    expected.backward()
    plain = gradients(chained)
    with folded(chained):
        value = loss.add_gradients(chained, batch, 1 / count, CPU)
    ours = gradients(chained)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)  # it is summed up in float32
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_models_own(chained):
    """transformers' `labels` argument: the same shift, the same mean over labelled tokens."""
    batch = batch_of([20, 13, 7], chained.config.vocab_size)
    count = int((batch.labels[:, 1:] != IGNORED).sum())
    theirs = chained(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert loss.add_gradients(chained, batch, 1 / count, CPU).item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (loss.summed_loss(chained, batch, CPU) / count).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_logits_in_pieces_give_what_logits_at_once_give(chained, monkeypatch):
    batch = batch_of([20, 13, 7], chained.config.vocab_size)
    whole = loss.add_gradients(chained, batch, 0.01, CPU), gradients(chained)
    summed = loss.summed_loss(chained, batch, CPU)
    monkeypatch.setattr(loss, "LOGITS_BUDGET", 3 * chained.config.vocab_size)  # three positions at a time
    pieces = loss.add_gradients(chained, batch, 0.01, CPU), gradients(chained)
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-6, atol=0)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(pieces[1][name], gradient, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(loss.summed_loss(chained, batch, CPU), summed)


@pytest.mark.parametrize("labelled", [1, 15, 16, 17, 36])
def test_on_a_cpu_the_head_sees_few_shapes(chained, monkeypatch, labelled):
    """Each shape of a product costs a program of oneDNN's; what fills up counts nothing."""
    batch = batch_of([20, 13, 7], chained.config.vocab_size)
    batch.labels.view(-1)[(batch.labels.view(-1) != IGNORED).nonzero()[labelled:]] = IGNORED
    count = int((batch.labels[:, 1:] != IGNORED).sum())
    logits = chained(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    seen, head_logits = [], loss.head_logits
    monkeypatch.setattr(
        loss, "head_logits", lambda model, hidden: seen.append(len(hidden)) or head_logits(model, hidden)
    )
    assert loss.summed_loss(chained, batch, CPU).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(seen) == count + -count % TOKEN_STEP and all(size % TOKEN_STEP == 0 for size in seen)


def test_how_many_positions_logits_are_computed_at_once():
    """Few on a CPU, whole tiles on a GPU."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [loss.positions_at_once(size, cpu) for size in (32_000, 49_152, 262_144)] == [160, 160, 128]
    assert [loss.positions_at_once(size, cuda) for size in (32_000, 49_152, 262_144)] == [1024, 512, 256]
    assert [loss.positions_at_once(2**26, device) for device in (cpu, cuda)] == [1, 256]


def test_rows_without_labels_take_part_and_change_nothing(chained):
    batch = batch_of([9, 5], chained.config.vocab_size)
    batch.labels[:] = IGNORED
    assert loss.add_gradients(chained, batch, 1.0, CPU).item() == 0
    assert all(not gradient.any() for gradient in gradients(chained).values())
    assert loss.summed_loss(chained, batch, CPU).item() == 0


def test_what_stands_behind_a_row_does_not_reach_it(chained):
    batch = batch_of([20, 13, 7], chained.config.vocab_size)
    before = loss.summed_loss(chained, batch, CPU)
    batch.input_ids[batch.attention_mask == 0] = 5
    assert loss.summed_loss(chained, batch, CPU).item() == before.item()


@pytest.mark.parametrize(("fixture", "tolerance"), [("tiny_gpt2_dir", 1e-12), ("tiny_llama_dir", 1e-6)])
def test_micro_batches_do_not_change_the_gradient(request, fixture, tolerance):
    """Eight rows cut into 1, 2, 3 or 8 micro-batches, in float64 (of which Llama's norms compute a part in
    float32).
    """
    model = load(request.getfixturevalue(fixture))
    inject(model, ChainConfig(rank=4, depth=2, alpha=8, target_modules="all-linear"))
    make_different_from_base(model)
    model.double()
    batch = batch_of([30, 29, 22, 14, 14, 9, 6, 5], model.config.vocab_size)
    lengths = batch.attention_mask.sum(1).numpy()
    scale = 1 / int((batch.labels[:, 1:] != IGNORED).sum())
    reference = None
    for size in (8, 4, 3, 1):
        parts = micro_batches(np.arange(8), lengths, size)
        assert len(parts) == math.ceil(8 / size)
        total = 0.0
        with folded(model):
            for part in parts:
                longest = int(lengths[part].max())
                cut = Batch(
                    *(
                        tensor[part][:, :longest]
                        for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
                    )
                )
                total += loss.add_gradients(model, cut, scale, CPU).item()
        result = gradients(model)
        reference = reference or (total, result)
        assert total == pytest.approx(reference[0], rel=1e-6)
        for name, gradient in result.items():
            assert (gradient - reference[1][name]).abs().max() <= tolerance * gradient.abs().max()


def test_a_step_is_adamw_on_that_gradient(job_of):
    """optimizer_step against torch's AdamW on the plain model's gradient, clipped."""
    job = job_of({"training.global_batch_size": 6, "training.max_grad_norm": 0.05})
    make_different_from_base(job.model)
    start = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    rows = step_rows(len(job.data.train), job.recipe.seed, 6, 0)
    batch = collate(job.data.train, rows, job.base.pad_id)
    job.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss.backward()
    expected_gradients = {name: parameter.grad.clone() for name, parameter in job.parameters.items()}
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    for name, parameter in reference.items():
        parameter.grad = expected_gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(reference.values(), 0.05)
    torch.optim.AdamW(reference.values(), lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()
    job.optimizer.zero_grad()

    step = optimizer_step(job, rows, 0.01, StopRequest()).result()
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
    for name, parameter in job.parameters.items():
        # Adam divides by the gradient's size: where it is nearly zero, its sign alone decides. Float32 on
        # both sides.
        big = expected_gradients[name].abs() > 1e-5
        torch.testing.assert_close(parameter[big], reference[name][big], rtol=1e-4, atol=1e-5)
        assert not parameter.grad.any()


def test_step_zero_is_the_base_model(job_of):
    job = job_of()
    batch = batch_of([20, 13, 7], job.model.config.vocab_size)
    layers = chain_layers(job.model)
    chained = job.model(input_ids=batch.input_ids).logits
    for layer in layers.values():
        layer.enabled = False
    assert torch.equal(chained, job.model(input_ids=batch.input_ids).logits)
    for layer in layers.values():
        layer.enabled = True


def test_dropout_is_on_in_steps_alone_and_a_function_of_the_step(job_of):
    job = job_of({"adapter.dropout": 0.5})
    make_different_from_base(job.model)
    assert loop.validation(job) == loop.validation(job)
    rows = np.arange(4)

    def gradient_of(step: int) -> torch.Tensor:
        job.state.step = step
        captured = []
        job.optimizer.register_step_pre_hook(
            lambda *_: captured.append(next(iter(job.parameters.values())).grad.clone())
        )
        optimizer_step(job, rows, 0.0, StopRequest())
        return captured[0]

    torch.manual_seed(5)
    first = gradient_of(3)
    torch.manual_seed(6)
    assert torch.equal(gradient_of(3), first)
    assert not torch.equal(gradient_of(4), first)
    assert not any(layer.training for layer in job.layers.values())


def test_dropout_streams_differ_in_all_they_depend_on():
    seeds = {
        dropout_seed(*values)
        for values in ((1, 2, 3, 0), (2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1))
    }
    assert len(seeds) == 5


def test_the_first_step_uses_dropout(run_tiny):
    """It once came on with the first validation only."""
    with_dropout = run_tiny({"name": "with", "adapter.dropout": 0.5, "training.max_steps": 2})
    without = run_tiny({"name": "without", "training.max_steps": 2})
    losses = [
        [row["loss"] for row in read_jsonl(job.run.metrics_path) if "loss" in row]
        for job in (with_dropout, without)
    ]
    assert losses[0][0] == losses[1][0]  # B is zero
    assert losses[0][1] != losses[1][1]


def test_freed_memory_goes_back_now_and_then(run_tiny, monkeypatch):
    """A process that trained on rows of many lengths grew from 1.4 to 2.8 GB in 80 steps."""
    released = []
    monkeypatch.setattr(loop, "release_memory", lambda: released.append(1))
    run_tiny({"name": "seldom", "training.max_steps": 3})
    assert not released
    monkeypatch.setattr(loop, "_RELEASE_SECONDS", 0.0)
    run_tiny({"name": "always", "training.max_steps": 3})
    assert len(released) == 3


def test_validation_is_the_mean_over_supervised_tokens(job_of):
    job = job_of()
    make_different_from_base(job.model)
    total = tokens = 0
    for index in range(len(job.data.validation)):
        batch = collate(job.data.validation, [index], 0)
        count = int((batch.labels[:, 1:] != IGNORED).sum())
        total += job.model(input_ids=batch.input_ids, labels=batch.labels).loss.item() * count
        tokens += count
    assert loop.validation(job)["loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update_and_names_step_and_rows(
    run_tiny, recipe_of, monkeypatch, value, where
):
    original = loss.add_gradients
    calls = 0

    def spoilt(model, batch, scale, device):
        nonlocal calls
        calls += 1
        result = original(model, batch, scale, device)
        if calls == 2 * 3 + 1:  # two micro-batches a step: the fourth step
            if where == "loss":
                return result * value
            next(iter(chain_layers(model).values())).B.grad += value
        return result

    monkeypatch.setattr(runner, "run_heaviest", lambda job: None)
    monkeypatch.setattr(loss, "add_gradients", spoilt)
    with pytest.raises(LinchainError, match=r"step 4: the loss is .* nothing was updated") as caught:
        run_tiny({"training.save_every": 1})
    from linchain_cli.run import RunDirectory

    run = RunDirectory(recipe_of().run_path)
    rows = step_rows(40, 42, 4, 3).tolist()
    assert str(rows) in str(caught.value) and caught.value.exit_code == 1
    assert run.read_status().status == "failed"
    assert [row["step"] for row in read_jsonl(run.rows_path)] == [1, 2, 3]
    assert sorted(path.name for path in run.checkpoints_dir.iterdir()) == ["step-000002", "step-000003"]

    monkeypatch.setattr(loss, "add_gradients", original)
    job = run_tiny({"training.save_every": 1}, resume=True)
    assert job.state.step == 6


def alike_up_to(count: int, batch: Batch) -> Batch:
    """Every token is labelled, and rows have the first `count` in common."""
    ids = batch.input_ids.clone()
    ids[:, :count] = ids[0, :count]
    return Batch(ids, batch.attention_mask, torch.where(batch.attention_mask.bool(), ids, IGNORED))


@pytest.mark.parametrize("change", [lambda batch: batch, partial(alike_up_to, 9), partial(alike_up_to, 4)])
def test_the_fast_ways_together_have_the_plain_gradients_in_float64(tiny_llama_dir, change):
    """Grouped attention, rows without padding, common beginnings computed once, siblings, lean norms and
    folding, against transformers' own forward with the written-out loss."""
    fast, plain = load(tiny_llama_dir), load(tiny_llama_dir)
    for model in (fast, plain):
        inject(
            model, ChainConfig(rank=4, depth=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
        )
        for layer in chain_layers(model).values():
            layer.double()
        make_different_from_base(model)
    assert use_attention(fast, GROUPED)
    suit_to_training(fast)
    batches = [change(batch_of([17, 5, 11], 600, seed)) for seed in range(2)]
    assert len(find_siblings(fast, lambda: fast(batches[0].input_ids))) == fast.config.num_hidden_layers
    with folded(fast):
        ours = sum(loss.add_gradients(fast, batch, 0.01, CPU) for batch in batches)
    theirs = 0.0
    for batch in batches:
        logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits
        labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        value = 0.01 * F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        value.backward()
        theirs += value.detach()
    assert attention_way(fast, 17) is not None and ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    reference = gradients(plain)
    for name, gradient in gradients(fast).items():
        # Norms compute in float32 on either way.
        torch.testing.assert_close(
            gradient, reference[name], rtol=1e-4, atol=1e-5 * reference[name].abs().max()
        )


def test_with_dropout_each_row_has_its_own(job_of, monkeypatch):
    """Chains drop other entries in every row, also where rows begin alike."""
    counts = []
    monkeypatch.setattr(
        loss,
        "flat_hidden_states",
        lambda model, rows: counts.append(rows.input_ids.shape[1]) or flat_hidden_states(model, rows),
    )
    batch = alike_up_to(30, batch_of([40, 40, 40], 600))
    for dropout in (0.0, 0.1):
        job = job_of({"adapter.dropout": dropout})
        with job.dropping_out():
            loss.add_gradients(job.model, batch, 0.01, CPU)
        loss.summed_loss(job.model, batch, CPU)
    # 60 different tokens in steps of 16; 120 in rows of their own.
    assert counts == [64, 64, 128, 64]


def test_beginnings_are_read_apart_where_they_are_to_be(job_of, monkeypatch):
    counts = []
    monkeypatch.setattr(
        loss,
        "flat_hidden_states",
        lambda model, rows: counts.append(rows.input_ids.shape[1]) or flat_hidden_states(model, rows),
    )
    job, batch = job_of(), alike_up_to(30, batch_of([40, 40, 40], 600))
    values = []
    for wanted in (True, False, True):
        share_beginnings(job.model, wanted)
        values.append(loss.summed_loss(job.model, batch, CPU).item())
    assert counts == [64, 128, 64]
    assert values[1] == pytest.approx(values[0], rel=1e-6) and values[2] == values[0]


def test_what_the_fast_base_computes_is_in_use(base):
    model = base.model
    assert model.config._attn_implementation == "grouped" and attention_way(model, 100) is not None
    assert sum(is_replaced(module) for module in model.modules()) == 2 * model.config.num_hidden_layers + 1
