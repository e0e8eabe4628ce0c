"""Tiny models of several architectures, and the slow way to score options that the fast one is held to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

VOCABULARY = 80
END = 2

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.3, "attn_pdrop": 0.3}
ARCHITECTURES = {
    "llama": {},
    "gpt2": _GPT2,
    # Two windows: rows here are longer than the first, shorter than the second.
    "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 400},
    "mixtral": {"num_local_experts": 4},
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi, no position_ids
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.3},  # positions from the attention mask
    "mamba": {},  # no attention: neither masks nor a cache that can be spread over a batch
}


def _build(name: str, dtype: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_COMMON, **ARCHITECTURES[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = END
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., object]:
    """`tiny_model(architecture, dtype="float32")`: randomly initialised, in eval mode, each built once."""
    built: dict[tuple[str, str], object] = {}

    def get(name: str, dtype: str = "float32"):
        if (name, dtype) not in built:
            built[name, dtype] = _build(name, dtype)
        return built[name, dtype]

    return get


def naive_scores(model, sequences: Sequence[Sequence[int]], start: int) -> list[float]:
    """Each sequence read alone, from its first token to its last: the log-probability of its tokens from
    `start` on.
    """
    import torch

    scores = []
    for tokens in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(tokens)])).logits[0]
        log_probs = logits.double().log_softmax(-1)
        scores.append(sum(log_probs[at - 1, tokens[at]].item() for at in range(start, len(tokens))))
    return scores


def forked(store: Path, work: Callable[[int], object]) -> list[int | None]:
    """Runs `work(rank)` in two processes that know each other by the file `store`; their exit statuses."""
    context = multiprocessing.get_context("fork")  # nothing to import again, and the parent runs one thread
    processes = [context.Process(target=_work, args=(rank, store, work)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    return [process.exitcode for process in processes]


def _work(rank: int, store: Path, work: Callable[[int], object]) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work(rank)
    distributed.destroy_process_group()
