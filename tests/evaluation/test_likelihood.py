"""Option scores, held to reading every text alone, on architectures that differ in what they can do."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from linchain_cli.evaluation import likelihood, tryout
from linchain_cli.evaluation.likelihood import OptionScorer, plan_batches
from linchain_cli.evaluation.options import build_tree, loss_tree, tree_mask
from linchain_cli.evaluation.tryout import continues_from_cache, ignores_padding, reads_tree_masks
from linchain_cli.model import logits
from linchain_cli.model.attention import attention_window
from linchain_cli.model.fast import record

from .conftest import ARCHITECTURES, END, VOCABULARY, naive_scores


def rows(n=12, seed=0):
    """Options as token sequences: last tokens that differ, free texts, and options that begin others."""
    rng = random.Random(seed)

    def some(low, high):
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(low, high))]

    start, made = some(6, 7), []
    for index in range(n):
        prompt = start + some(3, 22)
        if index % 3 == 0:
            made.append([[*prompt, 10, last] for last in (20, 21, 22)])
        elif index % 3 == 1:
            made.append([[*prompt, first, *some(1, 5)] for first in rng.sample(range(3, VOCABULARY), 4)])
        else:
            made.append([[*prompt, 10], [*prompt, 10, 11], [*prompt, 10, 11, 12], [*prompt, 9, 9]])
    return made


def expected(model, sequences):
    if any(len(one) < len(other) and other[: len(one)] == one for one in sequences for other in sequences):
        sequences = [[*sequence, END] for sequence in sequences]
    tree = build_tree(sequences)
    return naive_scores(model, sequences, tree.first_read + 1)


def all_scores(model, made, max_tokens=200):
    scorer = OptionScorer(model, [build_tree(sequences, END) for sequences in made], max_tokens)
    return {
        row: scores
        for batch in scorer.batches
        for row, scores in zip(batch, scorer.scores(batch), strict=True)
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_each_text_alone(tiny_model, name):
    model, made = tiny_model(name), rows()
    scores = all_scores(model, made)
    for row, sequences in enumerate(made):
        # The sums run in another order: float32 rounding of log-probabilities around -50.
        assert scores[row] == pytest.approx(expected(model, sequences), abs=2e-4)


def test_architectures_differ_in_what_they_can_do(tiny_model):
    """Otherwise the tests above would not try the ways around."""
    assert all(
        trial(tiny_model("llama")) for trial in (continues_from_cache, reads_tree_masks, ignores_padding)
    )
    assert not reads_tree_masks(tiny_model("bloom")) and continues_from_cache(tiny_model("bloom"))
    assert not continues_from_cache(tiny_model("mamba")) and not reads_tree_masks(tiny_model("mamba"))
    assert attention_window(tiny_model("gemma2")) == 8 and attention_window(tiny_model("mistral")) == 400


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("max_tokens", [1, 40, 300, 10_000])
def test_neither_batch_size_nor_order_changes_a_score(tiny_model, name, max_tokens):
    model, made = tiny_model(name), rows(9)
    reference = all_scores(model, made)
    order = random.Random(max_tokens).sample(range(len(made)), len(made))
    shuffled = all_scores(model, [made[row] for row in order], max_tokens)
    for place, row in enumerate(order):
        assert shuffled[place] == pytest.approx(reference[row], abs=2e-4)


def test_one_pass_per_batch_reads_each_shared_token_once(tiny_model, monkeypatch):
    """Prompts are read without their common beginning and without the options' last tokens, logits only where
    read.
    """
    model, shapes = tiny_model("llama"), []
    made = [sequences for sequences in rows(30) if len({tuple(s[:-1]) for s in sequences}) == 1]
    scorer = OptionScorer(model, [build_tree(sequences, END) for sequences in made], 10_000)
    assert scorer.prefix == 6 and len(scorer.batches) == 1
    original = torch.nn.Linear.forward

    def spy(module, hidden):
        if module is model.get_output_embeddings():
            shapes.append(tuple(hidden.shape))
        return original(module, hidden)

    scorer.scores(scorer.batches[0])  # reads the prefix
    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    tokens = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scorer.scores(scorer.batches[0])
    handle.remove()
    longest = max(len(sequences[0]) - 1 for sequences in made)
    assert tokens == [(len(made), longest - 6)]
    assert shapes == [(1, len(made), 64)]


def test_a_branching_row_is_read_in_one_sequence_where_masks_allow(tiny_model):
    made = [row for row in rows(6) if len({tuple(s[:-1]) for s in row}) > 1]
    packed = OptionScorer(tiny_model("llama"), [build_tree(row, END) for row in made], 500)
    assert all(len(sequences) == 1 for sequences in packed.sequences)
    for name in ("bloom", "gemma2"):  # no positions; rows longer than the window
        unpacked = OptionScorer(tiny_model(name), [build_tree(row, END) for row in made], 500)
        assert any(len(sequences) > 1 for sequences in unpacked.sequences)


def test_a_mask_that_is_ignored_is_noticed(tiny_model, monkeypatch):
    """A model that reads trees causally, whatever the mask says, must not be trusted with one."""

    def causal(trees, start, length):
        mask, positions = tree_mask(trees, start, length)
        return torch.ones_like(mask).tril(), positions

    model = tiny_model("llama")
    assert reads_tree_masks(model)
    monkeypatch.setattr(tryout, "tree_mask", causal)
    assert reads_tree_masks(model), "what was found out is remembered"
    record(model).pop("tryouts")
    assert not reads_tree_masks(model)
    record(model).pop("tryouts")


def test_memory_that_is_full_says_nothing_of_a_model(tiny_model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    record(model).pop("tryouts", None)
    with monkeypatch.context() as patch:
        patch.setattr(tryout, "last_logits", full)
        with pytest.raises(torch.OutOfMemoryError):
            continues_from_cache(model)
    assert continues_from_cache(model), "nothing was remembered"


def test_batches_hold_like_lengths_and_their_budget():
    lengths = [5, 90, 31, 30, 7, 88, 6]
    batches = plan_batches(lengths, 100)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches == [[1], [5], [2, 3], [4, 6, 0]]
    assert plan_batches([10, 10, 10], 40, copies=[3, 1, 4]) == [[0, 1], [2]]
    assert plan_batches([50], 10) == [[0]] and plan_batches([], 10) == []


def test_no_other_cut_computes_fewer_tokens():
    """Every way to cut eight sorted rows, against the one that is taken."""
    generator = random.Random(0)
    for _ in range(50):
        lengths = sorted((generator.randint(1, 60) for _ in range(8)), reverse=True)

        def cost(batches, lengths=lengths):
            return sum(len(batch) * lengths[batch[0]] + 10 for batch in batches)

        ways = []
        for cuts in itertools.product((False, True), repeat=7):
            batches = [[0]]
            for index, cut in enumerate(cuts, start=1):
                batches.append([index]) if cut else batches[-1].append(index)
            if all(len(batch) * lengths[batch[0]] <= 160 for batch in batches):
                ways.append(cost(batches))
        assert cost(plan_batches(lengths, 160)) == min(ways)


def test_the_prefix_leaves_every_row_something_to_read(tiny_model):
    same = [[3, 4, 5, 6, 7, 8, 10], [3, 4, 5, 6, 7, 8, 11]]
    scorer = OptionScorer(tiny_model("llama"), [build_tree(same), build_tree(same)], 100)
    assert scorer.prefix == 5
    assert scorer.scores([0])[0] == pytest.approx(naive_scores(tiny_model("llama"), same, 6), abs=1e-4)


class LargestAlive(TorchDispatchMode):
    """The most bytes that results of operations took at once."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if value[0]() is not None}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_of_a_long_text_are_in_memory_once(dtype, monkeypatch):
    monkeypatch.setattr(logits, "VOCABULARY_BLOCK", 1024)
    monkeypatch.setattr(likelihood, "_NORMED_AT_ONCE", 32)
    vocabulary, tokens = 8000, 256
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    tree = loss_tree([(range(tokens + 1), [True] * (tokens + 1))])
    scorer = OptionScorer(model, [tree], tokens)
    with LargestAlive() as largest:
        ((loss,),) = scorer.scores([0])
    assert largest.bytes < 1.5 * 4 * tokens * vocabulary
    torch.testing.assert_close(loss, naive_scores(model, [list(range(tokens + 1))], 1)[0], rtol=1e-4, atol=0)
