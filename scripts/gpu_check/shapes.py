"""Checkpoints of random weights in the shape of known models, made here, with a tokenizer made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linchain_cli.data.everyday import everyday_rows

# Llama 3.2 1B and Llama 3 8B; `tiny` is for the check of the check.
LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "tiny": {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TOKENS = 4000  # of the tokenizer, where the shape has room for them
SPREAD = 0.02  # standard deviation of the weights, as in transformers' own initialisation
SHARD_BYTES = 2 << 30


def tensor_shapes(shape: str) -> dict[str, torch.Size]:
    """The tensors of a checkpoint of this shape, by name; tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(shape))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def bfloat16_bytes(shape: str) -> int:
    """The size of the checkpoint."""
    return 2 * sum(size.numel() for size in tensor_shapes(shape).values())


def write_checkpoint(shape: str, directory: Path, device: torch.device) -> Path:
    """A checkpoint in bfloat16, its numbers drawn on `device`, with a byte-level tokenizer of some rows."""
    from safetensors.torch import save_file

    directory.mkdir()
    _config(shape).save_pretrained(directory)
    _tokenizer(min(TOKENS, SHAPES[shape]["vocab_size"])).save_pretrained(directory)
    index = {}
    for number, shard in enumerate(_shards(tensor_shapes(shape), device)):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def _shards(shapes: dict[str, torch.Size], device: torch.device) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    shard, held = {}, 0
    for name, size in shapes.items():
        tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
        if len(size) > 1:  # the others are the norms'
            tensor.normal_(std=SPREAD, generator=generator)
        shard[name] = tensor.cpu()
        held += tensor.nbytes
        if held > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    yield shard


def _config(shape: str):
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _tokenizer(size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["instruction"] for row in everyday_rows("train")), trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
