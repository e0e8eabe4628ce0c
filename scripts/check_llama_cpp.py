"""Loads an exported adapter in llama.cpp and compares its logits with those of the chain it was made from.

Needs llama-cpp-python and a Llama-shaped run whose base is a .gguf file. The LoRA of `linchain export`
becomes a GGUF adapter (llama.cpp's own converter needs its source tree), and the base a float32 GGUF, so that
what is compared is the adapter and not the rounding of 4-bit weights. llama.cpp keeps keys and values in
float16, which is the floor of the differences: the base's own is printed beside them.

    python scripts/check_llama_cpp.py RUN MODEL.gguf
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from linchain_cli.chain import attach, disabled, load_adapter
from linchain_cli.export.peft import write_peft
from linchain_cli.model.loading import empty_model, load_model, load_tokenizer, locate

TEXT = "The kettle began to whistle, so she took two cups from the shelf and"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rows of a head for the rotation, transformers pairs its halves."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf_lora(peft: Path, config, path: Path) -> None:
    """The two PEFT files as a GGUF adapter for a Llama."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", json.loads((peft / "adapter_config.json").read_bytes())["lora_alpha"]
    )
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for key, tensor in load_file(peft / "adapter_model.safetensors").items():
        layer, module = key.split(".layers.")[1].split(".", 1)
        module, factor = module.removesuffix(".weight").rsplit(".lora_", 1)
        values = tensor.numpy()
        if factor == "B" and module in heads:
            values = interleaved(values, heads[module])
        name = f"blk.{layer}.{NAMES[module]}.weight.lora_{factor.lower()}"
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(model: Path, lora: Path | None, tokens: list[int]) -> np.ndarray:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model), n_ctx=256, logits_all=True, verbose=False, lora_path=str(lora) if lora else None
    )
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def as_float32(model: Path, target: Path) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    if llama_cpp.llama_model_quantize(str(model).encode(), str(target).encode(), options):
        raise SystemExit(f"llama.cpp cannot rewrite {model}")


def difference(one: np.ndarray, other: np.ndarray) -> str:
    gap = np.abs(one - other)
    return f"largest {gap.max():.4f}, root mean square {np.sqrt((gap**2).mean()):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    base = locate(str(args.model))
    adapter = load_adapter(args.run / "adapter")
    tokens = load_tokenizer(base)(TEXT)["input_ids"]
    model = load_model(base, dtype="float32", device="cpu", attention="eager")
    attach(model, adapter)
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
        with disabled(model):
            bare = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_peft(adapter, empty_model(base), work / "peft")
        write_gguf_lora(work / "peft", model.config, work / "lora.gguf")
        as_float32(args.model, work / "base.gguf")
        theirs = llama_cpp_logits(work / "base.gguf", work / "lora.gguf", tokens)
        theirs_bare = llama_cpp_logits(work / "base.gguf", None, tokens)
    print(f"base, llama.cpp against transformers:     {difference(theirs_bare, bare)}")
    print(f"adapted, llama.cpp against transformers:  {difference(theirs, ours)}")
    print(f"what the adapter does, in transformers:   {difference(ours, bare)}")
    print(f"what the adapter does, in llama.cpp:      {difference(theirs, theirs_bare)}")
    correlation = np.corrcoef((theirs - theirs_bare).ravel(), (ours - bare).ravel())[0, 1]
    print(f"correlation of the two: {correlation:.5f}")


if __name__ == "__main__":
    main()
