"""Loads an exported GGUF adapter in llama.cpp and compares its greedy answers with those of the chain.

Needs xllamacpp (llama.cpp as a package with wheels: pip install xllamacpp) and a run whose base is a .gguf
file. The base becomes a float32 GGUF, so that what is compared is the adapter and not the arithmetic of 4-bit
weights, and keys and values stay float32 as well.

    python scripts/check_llama_cpp.py RUN MODEL.gguf
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import torch
from check_transformers4 import PROMPTS

from linchain_cli.chain import attach, disabled, load_adapter
from linchain_cli.export.gguf_lora import ADAPTER_FILE, write_gguf
from linchain_cli.model.loading import empty_model, load_model, load_tokenizer, locate


def write_float32(source: Path, target: Path) -> None:
    """The same model with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1].tolist()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_answers(
    model: Path, lora: Path | None, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    """Greedy answers, as token ids."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 512, 1, 0, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "logprobs": 1}
        (choice,) = server.handle_completions({**asked, "cache_prompt": False})["choices"]
        found.append([token["id"] for token in choice["logprobs"]["content"]])
    return found


def transformers_answers(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def equal(one: list[list[int]], other: list[list[int]], end: int) -> int:
    """How many answers are the same up to the end token, which not every engine gives back."""
    until = lambda answer: answer[: answer.index(end)] if end in answer else answer  # noqa: E731
    return sum(until(a) == until(b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=24, help="length of each answer")
    args = parser.parse_args()
    base = locate(str(args.model))
    adapter, tokenizer = load_adapter(args.run / "adapter"), load_tokenizer(base)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = load_model(base, dtype="float32", device="cpu", attention="eager")
    attach(model, adapter)
    ours = transformers_answers(model, prompts, args.tokens)
    with disabled(model):
        bare = transformers_answers(model, prompts, args.tokens)
    end = model.config.eos_token_id
    del model
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_gguf(adapter, empty_model(base), work)
        write_float32(args.model, work / "base.gguf")
        theirs_bare = llama_cpp_answers(work / "base.gguf", None, prompts, args.tokens)
        theirs = llama_cpp_answers(work / "base.gguf", work / ADAPTER_FILE, prompts, args.tokens)
    found, number = equal(ours, theirs, end), len(prompts)
    print(f"base, llama.cpp and transformers:     {equal(bare, theirs_bare, end)} of {number} answers equal")
    print(f"adapted, llama.cpp and transformers:  {found} of {number} answers equal")
    changed = number - equal(ours, bare, end)
    print(f"the adapter changes, in transformers: {changed} of {number} answers")
    if not changed:
        print("An adapter that changes no answer shows nothing: take one that learned more.")
    sys.exit(found < number or not changed)


if __name__ == "__main__":
    main()
