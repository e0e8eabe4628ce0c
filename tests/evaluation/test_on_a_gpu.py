"""What scoring and generating would ask of a GPU, on a pretended one: nothing is computed, all is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linchain_cli.chain import ChainConfig, folded, inject
from linchain_cli.evaluation import generation
from linchain_cli.evaluation.generation import Generator
from linchain_cli.evaluation.likelihood import OptionScorer
from linchain_cli.evaluation.options import build_tree
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, note_reaches
from linchain_cli.model.fast import record
from linchain_cli.model.flat_rows import in_one_copy
from linchain_cli.model.loading import load_model

from .. import pretend_gpu

DEVICE = pretend_gpu.DEVICE
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2",
    "mixtral",
]  # fmt: skip
END, ANSWER = 2, 5


@pytest.fixture
def on_device(small_model, monkeypatch):
    """on_device(family): a model on the pretended GPU, about which trials, which need values, said yes."""
    monkeypatch.setattr(generation, "refuse_broken", lambda model: None)

    def build(family: str):
        model = small_model(family)
        name = FLAT_SDPA if model._supports_sdpa else GROUPED
        model.set_attn_implementation(name)
        note_reaches(model)
        trials = ("continues_from_cache", "reads_tree_masks", "ignores_padding")
        record(model)["tryouts"] = {(trial, name): True for trial in trials}
        return model.to(torch.bfloat16).to(DEVICE)

    return build


def prompts(lengths: list[int]) -> list[list[int]]:
    random = np.random.RandomState(0)
    return [[7, 8, 9, 10, *random.randint(30, 100, length).tolist()] for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_options_waits_for_the_device_once(on_device, family):
    """For the scores; its tokens, masks and places go over in bulk."""
    model = on_device(family)
    branches = ((20, 21), (22, 23, 24), (22, 25))
    trees = [build_tree([[*prompt, *branch] for branch in branches]) for prompt in prompts([3, 1, 2, 2])]
    with pretend_gpu.PretendGpu() as gpu:
        scorer = OptionScorer(model, trees, 10_000)
        assert scorer.prefix == 4 and len(scorer.batches) == 1
        for _ in range(2):  # the first one reads what all rows begin with
            gpu.clear()
            scorer.scores(scorer.batches[0])
    assert len(gpu.reads) == 1 and "likelihood.py" in gpu.reads[0], gpu.reads
    large = [copy for copy in gpu.copies if copy.bytes > 8]
    assert len(large) == 2 and all(copy.asynchronous for copy in large), gpu.copies


def test_a_mask_goes_over_to_where_its_kernel_can_read_it(on_device):
    """Three rows of 11 tokens in front of it are 264 bytes; its own rows of 16 numbers fit as they are."""
    branches = ((20, 21), (22, 23, 24), (22, 25))
    starts = [[7, 8, 9, 10, 11, first, *range(40, 47)] for first in (30, 31, 32)]
    trees = [build_tree([[*start, *branch] for branch in branches]) for start in starts]
    model = on_device("llama")
    with pretend_gpu.PretendGpu():
        scorer = OptionScorer(model, trees, 10_000)
        assert scorer.prefix == 5 and len(scorer.batches) == 1
        assert {len(tree.tokens) for tree in trees} == {16}
        scorer.scores(scorer.batches[0])


@pytest.mark.parametrize(("branches", "reads"), [(((20, 21), (22, 23)), 1), ((20, 21), 2)])
def test_options_without_a_common_beginning(on_device, branches, reads):
    """Where no option is longer than a token, transformers looks whether the rows are packed."""
    model = on_device("llama")
    branches = [branch if isinstance(branch, tuple) else (branch,) for branch in branches]
    starts = [[30, 31, 32], [40, 41, 42]]
    trees = [build_tree([[*start, *branch] for branch in branches]) for start in starts]
    with pretend_gpu.PretendGpu() as gpu:
        scorer = OptionScorer(model, trees, 10_000)
        assert scorer.prefix == 0 and len(scorer.batches) == 1
        gpu.clear()
        scorer.scores(scorer.batches[0])
    assert len(gpu.reads) == reads, gpu.reads


@pytest.mark.parametrize(("family", "beams"), [*((family, 4) for family in FAMILIES), ("llama", 1)])
def test_an_answer_waits_for_the_device_once_per_token(on_device, family, beams):
    """To learn which rows are done; behind the last one, for the answers."""
    model = on_device(family)
    with pretend_gpu.PretendGpu(scalar=0.0) as gpu:  # no row is done before the last token
        generator = Generator(model, [END], prompts([3, 1, 3]), beams, ANSWER, 10_000)
        # Prompts beyond a window are not padded.
        assert generator.batches in ([[0, 2, 1]], [[0, 2], [1]])
        for batch in generator.batches:
            gpu.clear()
            generator.generate(batch)
            assert len(gpu.reads) == ANSWER, gpu.reads
            assert all("generation.py" in read for read in gpu.reads), gpu.reads
            assert all(copy.asynchronous for copy in gpu.copies if copy.bytes > 8), gpu.copies


def test_an_answer_is_read_by_4_bit_weights_as_they_are_packed(small_model, tmp_path, monkeypatch):
    """Of four beams; the prompt's tokens are many, and for them the weights are restored."""
    monkeypatch.setattr(generation, "refuse_broken", lambda model: None)
    small_model("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16", device="cpu", quantization="nf4")
    model.set_attn_implementation(FLAT_SDPA)
    record(model)["tryouts"] = {
        (trial, FLAT_SDPA): True for trial in ("continues_from_cache", "ignores_padding")
    }
    model = pretend_gpu.four_bits_to_device(model)
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("this bitsandbytes restores the weights for an answer of four beams, too")
    layers = inject(model, ChainConfig(4, 3, 8.0, 0.0, "orthogonal", "all-linear"), 1)
    with pretend_gpu.PretendGpu(scalar=0.0) as gpu, folded(model):
        generator = Generator(model, [END], prompts([3]), 4, ANSWER, 10_000)
        generator.generate(generator.batches[0])
    assert gpu.launches["dequantize_4bit"] == len(layers), "once, for the prompt"
    assert gpu.launches["gemm_4bit"] == len(layers) * (ANSWER - 1)


@pytest.mark.parametrize(("beams", "copied"), [(1, False), (4, True)])
def test_greedy_search_copies_no_cache(on_device, beams, copied):
    """As long as no row is done, every answer goes on where it stands."""
    model = on_device("llama")
    with pretend_gpu.PretendGpu(scalar=0.0) as gpu:
        generator = Generator(model, [END], prompts([3, 1, 3]), beams, ANSWER, 10_000)
        generator.generate(generator.batches[0])
    selections = sum(
        count for (name, place), count in gpu.places.items() if name == "index" and "cache_utils.py" in place
    )
    layers = model.config.num_hidden_layers
    assert selections == (2 * layers * (ANSWER - 1) if copied else 0)


def test_what_goes_over_in_one_copy_is_pinned_where_cuda_is(monkeypatch):
    """A copy that the host does not wait for is one only out of pinned memory."""
    asked = []

    def to(tensor, device, non_blocking=False):
        asked.append(("to", str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    value = {"ids": torch.arange(3), "mask": torch.tensor([[True, False]])}
    found = in_one_copy(value, torch.device("cuda"))
    assert asked == ["pinned", ("to", "cuda", True)]
    assert all(torch.equal(found[name], tensor) for name, tensor in value.items())
