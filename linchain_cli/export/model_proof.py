"""The proof of a merged checkpoint as a model: it and the adapted model read the same prompts, one in memory
at a time, and transformers' `generate` goes on from one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linchain_cli.chain import Adapter, attach, disabled
from linchain_cli.errors import LinchainError, first_line
from linchain_cli.export.classifier import outputs_of
from linchain_cli.export.logits import LogitProof, compare_logits
from linchain_cli.machine import available_memory, collect_memory, is_out_of_memory
from linchain_cli.model.checkpoint import Checkpoint
from linchain_cli.model.classifier import drawn_names, is_classifier
from linchain_cli.model.loading import default_device, load_model
from linchain_cli.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

READ_POSITIONS = 16  # the last ones of each prompt, so that logits of a large vocabulary stay small


@torch.inference_mode()
def read_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Logits (n, vocabulary) in float32 on the CPU at the last `READ_POSITIONS` positions of each prompt, one
    by one; of a classifier (1, classes)."""
    from linchain_cli.model.logits import logits_at

    device = model.get_input_embeddings().weight.device
    for prompt in prompts:
        if is_classifier(model):
            yield model(input_ids=torch.tensor([list(prompt)], device=device)).logits.float().cpu()
            continue
        positions = torch.zeros(1, len(prompt), dtype=torch.bool)
        positions[:, -READ_POSITIONS:] = True
        with logits_at(model, positions):
            output = model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=False)
        yield output.logits[0].float().cpu()


@dataclass(frozen=True, kw_only=True)
class ModelProof:
    """What models in memory showed of a merged checkpoint.

    logits: merged against adapted model
    quantized: merged against the adapter on the base as the run had rounded it
    generated: tokens that transformers' `generate` made with the merged checkpoint and its own settings
    not_proven: what was not shown, and why
    """

    logits: LogitProof | None = None
    quantized: LogitProof | None = None
    generated: int | None = None
    not_proven: tuple[str, ...] = ()


def prove_model(
    base: Checkpoint,
    adapter: Adapter,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    quantization: str = "none",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelProof:
    """Loads adapted and merged model, one at a time, and has them read the same prompts; then the merged one
    goes on by itself, as transformers' `generate` makes it. A GPU too small for that leaves it to the CPU.

    What cannot be done here (memory, a base that transformers cannot run) is said in the result.

    Args:
        quantization: how the run had rounded its base: the adapter on that base is compared as well.
        progress: called with the number of models that were read, and of those that there are.

    Raises:
        LinchainError: the merged checkpoint cannot be loaded, or gives no finite number, or generates
        nothing, where the base does.
    """
    reasons: list[str] = []
    for device in dict.fromkeys((default_device(), torch.device("cpu"))):
        dtype = _proof_dtype(base, device)
        if dtype is None:
            reasons.append(f"no model of this size fits into the memory that is free ({device.type})")
            continue
        try:
            return _prove_on(device, dtype, base, adapter, merged, prompts, quantization, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reasons.append(f"out of memory ({device.type})")
        collect_memory()
    return ModelProof(not_proven=(f"logits and generation: {', then '.join(reasons)}",))


def _prove_on(
    device: torch.device,
    dtype: str,
    base: Checkpoint,
    adapter: Adapter,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    quantization: str,
    progress: Callable[[int, int], None],
) -> ModelProof:
    total = 2 if quantization == "none" else 3
    settings = _generation_settings(merged)
    try:
        adapted = _read_adapted(base.directory, adapter, prompts, dtype, "none", device, settings)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What is wrong with the base is not wrong with the merge, which has its tensors proven.
        reason = f"logits and generation: the base model does not run here ({first_line(error)})"
        return ModelProof(not_proven=(reason,))
    collect_memory()  # of the adapted model, which refers to itself
    progress(1, total)
    outputs = outputs_of(adapter.head)
    model = load_model(merged, dtype=dtype, device=device, attention="eager", outputs=outputs)
    if lacking := drawn_names(model):
        raise LinchainError(f"transformers does not find the head's '{lacking[0]}' in it")
    ours = list(read_logits(model, prompts))
    logits = compare_logits(adapted.logits, ours, adapted.bare, dtype)
    missing = []
    generated: int | None = None
    try:
        if outputs is None:
            generated = _generate(model, prompts[0], settings)
    except Exception as error:
        if is_out_of_memory(error) or adapted.generates:
            raise LinchainError(f"transformers cannot generate with it: {first_line(error)}") from error
        missing.append(f"generation: the base model cannot generate either ({first_line(error)})")
    del model
    collect_memory()
    progress(2, total)
    quantized = None
    if quantization != "none":
        try:
            rounded = _read_adapted(base.directory, adapter, prompts, dtype, quantization, device, None)
            quantized = compare_logits(rounded.logits, ours, rounded.bare, dtype)
        except Exception as error:
            missing.append(f"logits on the {quantization} base: {first_line(error)}")
        progress(3, total)
    return ModelProof(logits=logits, quantized=quantized, generated=generated, not_proven=tuple(missing))


@dataclass(frozen=True)
class _Adapted:
    """Logits of the base with the adapter and of the bare base, and whether the base can generate."""

    logits: list[Tensor]
    bare: list[Tensor]
    generates: bool


def _read_adapted(
    directory: Path,
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    dtype: str,
    quantization: str,
    device: torch.device,
    settings: GenerationConfig | None,
) -> _Adapted:
    model = load_model(
        directory,
        dtype=dtype,
        device=device,
        quantization=quantization,
        attention="eager",
        outputs=outputs_of(adapter.head),
    )
    attach(model, adapter)
    logits = list(read_logits(model, prompts))
    with disabled(model):
        bare = list(read_logits(model, prompts))
        try:
            generates = adapter.head is None and bool(_generate(model, prompts[0], settings))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            generates = False
    return _Adapted(logits, bare, generates)


def _generation_settings(directory: Path) -> GenerationConfig | None:
    """What `generate` takes when nothing is asked for; None where the checkpoint holds no settings."""
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(directory)


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Sequence[int], settings: GenerationConfig | None) -> int:
    """How many tokens `generate` makes after the prompt, a few at most."""
    ids = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []), quiet():
        output = model.generate(**inputs, generation_config=settings, max_new_tokens=4)
    return output.shape[1] - ids.shape[1]


def _proof_dtype(base: Checkpoint, device: torch.device) -> str | None:
    """float32 if a model of it fits into the memory that is free, else bfloat16 if that does, else None."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    parameters = sum(shape.numel() for shape in base.shapes.values())
    for name, width in (("float32", 4), ("bfloat16", 2)):
        if parameters * width <= 0.8 * free:
            return name
    return None
