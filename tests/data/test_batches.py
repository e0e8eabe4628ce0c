"""Which rows a step takes, how they are cut, and what the tensors hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_cli.data.batches import collate, micro_batches, step_rows, steps_per_epoch

sizes = settings(max_examples=100, derandomize=True, deadline=None)


@sizes
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_row_comes_once_per_epoch(rows, batch, seed):
    steps = steps_per_epoch(rows, batch)
    for epoch in range(3):
        taken = [step_rows(rows, seed, batch, epoch * steps + step) for step in range(steps)]
        assert all(len(part) == batch for part in taken[:-1]) and 1 <= len(taken[-1]) <= batch
        assert sorted(np.concatenate(taken)) == list(range(rows))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    first = step_rows(1000, 1, 1000, 0)
    step_rows(1000, 2, 16, 5)
    np.random.seed(0)
    assert np.array_equal(step_rows(1000, 1, 1000, 0), first)
    assert np.array_equal(np.concatenate([step_rows(1000, 1, 16, step) for step in range(63)]), first)
    assert not np.array_equal(step_rows(1000, 1, 1000, 1), first)
    assert not np.array_equal(step_rows(1000, 2, 1000, 0), first)


def test_the_order_never_changes_between_versions():
    assert step_rows(10, 42, 10, 0).tolist() == [7, 6, 8, 0, 4, 3, 5, 1, 9, 2]
    assert step_rows(10, 42, 4, 3).tolist() == step_rows(10, 42, 10, 1).tolist()[:4]


@sizes
@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 9), st.integers(1, 5))
def test_micro_batches_deal_out_every_row_once(lengths, micro, world):
    lengths = np.array(lengths, dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)[::-1]
    shares = [micro_batches(rows, lengths, micro, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "every process takes part in every micro-batch"
    parts = [part for share in shares for part in share]
    assert all(len(part) <= micro for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for share in shares:
        taken = lengths[np.concatenate(share)]
        assert (np.diff(taken) <= 0).all()


@sizes
@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 900), st.integers(1, 5))
def test_a_budget_of_tokens_deals_out_every_row_once(lengths, tokens, world):
    lengths = np.array(lengths, dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)[::-1]
    shares = [micro_batches(rows, lengths, None, rank, world, tokens) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "every process takes part in every micro-batch"
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    for share in shares:
        sizes = [len(part) * lengths[part].max(initial=0) for part in share]
        assert all(size <= tokens or len(part) == 1 for size, part in zip(sizes, share, strict=True))
        assert world > 1 or sizes == sorted(sizes, reverse=True), "the largest comes first"
    counts = [[len(part) for part in share] for share in shares]
    assert all(0 <= first - last <= 1 for first, last in zip(counts[0], counts[-1], strict=True))


def test_a_budget_makes_one_micro_batch_of_short_rows_and_of_a_long_one():
    lengths = np.array([*[60] * 16, 2000, 900, 1100], dtype=np.int32)
    parts = micro_batches(np.arange(19), lengths, None, tokens=1920)
    # 2000; 1100 alone, for two rows would be 2200; 900 and one of 60, padded to 1800; the fifteen others.
    assert [len(part) for part in parts] == [1, 2, 1, 15] and parts[0].tolist() == [16]
    assert micro_batches(np.arange(16), lengths, None, tokens=960)[0].tolist() == list(range(16))


def test_sorting_leaves_the_least_padding():
    lengths = np.array([5, 100, 6, 99], dtype=np.int32)
    assert [part.tolist() for part in micro_batches(np.arange(4), lengths, 2)] == [[1, 3], [2, 0]]
    assert [part.tolist() for part in micro_batches(np.arange(4), lengths, 2, rank=1, world=2)] == [[3, 0]]


def encoded_rows():
    rows = [([7, 8, 9], [0, 0, 1]), ([4, 2], [0, 1]), ([5], [0])]
    return [(np.array(ids, np.int32), np.array(supervised, bool)) for ids, supervised in rows]


def test_collate_pads_on_the_right_and_labels_what_is_supervised():
    batch = collate(encoded_rows(), [1, 0], pad_token_id=2)
    assert batch.input_ids.tolist() == [[4, 2, 2], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    # The supervised EOS (2) keeps its label although it is also the padding.
    assert batch.labels.tolist() == [[-100, 2, -100], [-100, -100, 9]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.to(torch.device("meta")).labels.shape == (2, 3)


def test_an_empty_micro_batch_has_tensors_too():
    batch = collate(encoded_rows(), [], pad_token_id=3)
    assert (
        batch.input_ids.tolist() == [[3]]
        and batch.labels.tolist() == [[-100]]
        and batch.attention_mask.tolist() == [[1]]
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(world, micro):
    """In float64: summed loss over micro-batches and ranks, divided by the step's supervised tokens."""
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(0, 11, n).astype(np.int32), generator.random(n) < 0.4)
        for n in generator.integers(2, 30, size=8)
    ]
    lengths = np.array([len(ids) for ids, _ in rows], np.int32)
    count = sum(int(supervised[1:].sum()) for _, supervised in rows)

    def gradient(parts):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)).double()
        for part in parts:
            batch = collate(rows, part, pad_token_id=0)
            logits = model(batch.input_ids)[:, :-1].flatten(0, 1)
            loss = (
                torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
                / count
            )
            loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradient([np.arange(8)])
    cut = [part for rank in range(world) for part in micro_batches(np.arange(8), lengths, micro, rank, world)]
    assert torch.allclose(gradient(cut), whole, rtol=0, atol=1e-14)
    assert whole.abs().max() > 1e-3


@sizes
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 3))
def test_a_conversations_rows_stay_together(counts, batch, epoch):
    starts = np.cumsum([0, *counts[:-1]]).astype(np.int32)
    rows, steps = sum(counts), -(-sum(counts) // batch)
    taken = [step_rows(rows, 5, batch, epoch * steps + step, starts) for step in range(steps)]
    assert [len(part) for part in taken[:-1]] == [batch] * (steps - 1)
    order = np.concatenate(taken)
    assert np.array_equal(order, step_rows(rows, 5, rows, epoch, starts))
    assert sorted(order) == list(range(rows))
    begins = order.tolist().index
    for start, count in zip(starts.tolist(), counts, strict=True):
        place = begins(start)
        assert order[place : place + count].tolist() == list(range(start, start + count))


def test_conversations_are_drawn_anew_in_every_epoch():
    starts = np.arange(0, 60, 3, dtype=np.int32)
    one, two = (step_rows(60, 1, 60, epoch, starts).tolist() for epoch in (0, 1))
    assert one != two and one[::3] != sorted(one[::3])


@pytest.mark.parametrize("tokens", [None, 70])
def test_a_conversations_rows_share_a_micro_batch(tokens):
    """Sorted by length alone, rows of other conversations would come between them."""
    lengths = np.array([10, 20, 30, 12, 21, 31, 14], dtype=np.int32)
    starts = np.array([0, 3, 6], dtype=np.int32)
    parts = micro_batches(np.arange(7), lengths, None if tokens else 3, tokens=tokens, starts=starts)
    found = [part.tolist() for part in parts]
    assert found == ([[5, 4, 3], [2, 1], [0, 6]] if tokens is None else [[5, 4], [3, 2], [1, 0, 6]])


@sizes
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 900), st.integers(1, 4))
def test_a_budget_holds_for_conversations_too(lengths, tokens, world):
    lengths = np.array(lengths, dtype=np.int32)
    starts = np.arange(0, len(lengths), 3, dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int32)
    shares = [micro_batches(rows, lengths, None, rank, world, tokens, starts) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    assert all(len(part) <= 1 or len(part) * lengths[part].max() <= tokens for part in parts)
