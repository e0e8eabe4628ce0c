"""A chain as a LoRA in GGUF, for llama.cpp and what is built on it (Ollama, LM Studio).

adapter.gguf holds, per module, `<tensor>.lora_a` (r, d_in) and `<tensor>.lora_b` (d_out, r) in float32, named
after the base's tensor in llama.cpp, and α. A and B lie as llama.cpp stores the weight that they belong to:
where it pairs neighbouring rows of a head for the rotary embeddings and transformers pairs its halves, B's
rows are put in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linchain_cli.chain import Adapter, with_depth
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export.output import check_factors
from linchain_cli.export.peft import FactorProof, check_modules, factor_proof
from linchain_cli.model.config import text_decoder_prefix

if TYPE_CHECKING:
    from gguf import TensorNameMap
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter.gguf"


@dataclass(frozen=True)
class _Layout:
    """How llama.cpp holds a model type: under which architecture, and which modules' rows of a head it pairs
    (module name -> the configuration's key for the number of its heads)."""

    architecture: str
    paired: tuple[tuple[str, str], ...] = ()


_PAIRED = (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
# Model types whose linear weights llama.cpp stores as transformers does, but for the order of those rows.
# Others (Falcon, BLOOM, GPT-NeoX, DeepSeek) are rearranged or split when they are converted.
LAYOUTS = {
    "llama": _Layout("llama", _PAIRED),
    "mistral": _Layout("llama", _PAIRED),
    "mixtral": _Layout("llama", _PAIRED),
    "smollm3": _Layout("smollm3", _PAIRED),
    "granite": _Layout("granite", _PAIRED),
    "olmo": _Layout("olmo", _PAIRED),
    "olmo2": _Layout("olmo2"),
    "qwen2": _Layout("qwen2"),
    "qwen2_moe": _Layout("qwen2moe"),
    "qwen3": _Layout("qwen3"),
    "qwen3_moe": _Layout("qwen3moe"),
    "gemma": _Layout("gemma"),
    "gemma2": _Layout("gemma2"),
    "gemma3": _Layout("gemma3"),
    "gemma3_text": _Layout("gemma3"),
    "phi": _Layout("phi2"),
    "phi3": _Layout("phi3"),
    "gpt2": _Layout("gpt2"),
    "starcoder2": _Layout("starcoder2"),
    "stablelm": _Layout("stablelm"),
    "nemotron": _Layout("nemotron"),
    "cohere": _Layout("command-r"),
    "cohere2": _Layout("cohere2"),
}


# Weights that llama.cpp's graphs multiply without looking for an adapter.
_UNADAPTED = ("ffn_gate_inp_shexp.weight",)


def write_gguf(adapter: Adapter, model: PreTrainedModel, directory: Path) -> FactorProof:
    """Writes adapter.gguf into `directory`, reads it back and compares every ΔW with the chain's.

    Raises:
        InputError: the adapter does not fit `model` (on the meta device will do), its training diverged, or
        llama.cpp's layout of the model or of a module is not known here.
        LinchainError: what was read back is off.
    """
    import gguf

    check_factors(adapter)
    check_modules(adapter, model, "a GGUF adapter")
    layout = _layout(model)
    names = tensor_names(adapter, model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(directory / ADAPTER_FILE), layout.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(adapter.config.alpha))
    for path, chain in with_depth(adapter, 0).tensors.items():
        order = _row_order(layout, path, model, len(chain.B))
        writer.add_tensor(f"{names[path]}.lora_a", chain.A.contiguous().numpy())
        writer.add_tensor(f"{names[path]}.lora_b", chain.B[order].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return prove_gguf(adapter, model, directory)


def tensor_names(adapter: Adapter, model: PreTrainedModel) -> dict[str, str]:
    """llama.cpp's name of each adapted module's weight.

    Raises:
        InputError: it has no such tensor; the message names the module.
    """
    layout, table = _layout(model), _name_map(model)
    prefix = text_decoder_prefix(model)
    found = {}
    for path in adapter.tensors:
        if prefix and not path.startswith(f"{prefix}."):
            raise InputError(f"'{path}' lies outside the text decoder; a GGUF adapter cannot reach it")
        plain = f"model.{path.removeprefix(f'{prefix}.')}" if prefix else path
        name = table.get_name(f"{plain}.weight", try_suffixes=(".weight",))
        if name is None:
            raise InputError(
                f"llama.cpp's '{layout.architecture}' has no tensor for '{path}', so that no GGUF adapter can"
                " hold it. Merge instead: linchain merge."
            )
        if name.endswith(_UNADAPTED):
            raise InputError(
                f"llama.cpp applies no adapter to '{path}': what it learned would be lost. Merge instead:"
                " linchain merge."
            )
        if name == "output.weight" and model.config.get_text_config().tie_word_embeddings:
            raise InputError(f"'{path}' has no tensor of its own in llama.cpp: it shares the embeddings'")
        found[path] = name
    return found


def _layout(model: PreTrainedModel) -> _Layout:
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise InputError(
            f"a GGUF adapter for '{kind}' cannot be written: it is not known here how llama.cpp lays its"
            f" weights out. Known: {', '.join(LAYOUTS)}. Merge instead (linchain merge), and let llama.cpp"
            " convert that."
        )
    return LAYOUTS[kind]


def _name_map(model: PreTrainedModel) -> TensorNameMap:
    import gguf

    by_name = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = model.config.get_text_config().num_hidden_layers
    return gguf.get_tensor_name_map(by_name[_layout(model).architecture], blocks)


def _row_order(layout: _Layout, path: str, model: PreTrainedModel, rows: int) -> Tensor:
    """Where each row of llama.cpp's weight is in transformers' (rows,)."""
    order = torch.arange(rows)
    for name, key in layout.paired:
        if path.endswith(f".{name}"):
            config = model.config.get_text_config()
            heads = getattr(config, key, None) or config.num_attention_heads
            return order.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
    return order


def prove_gguf(adapter: Adapter, model: PreTrainedModel, directory: Path) -> FactorProof:
    """Compares adapter.gguf in `directory` with the adapter it was made from, module by module, in float64.

    Raises:
        LinchainError: a tensor is missing, surplus, or off. The message names it.
    """
    import gguf

    reader = gguf.GGUFReader(directory / ADAPTER_FILE)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    if len(tensors) != 2 * len(adapter.tensors):
        raise LinchainError(
            f"{ADAPTER_FILE} holds {len(tensors)} tensors where {2 * len(adapter.tensors)} were written"
        )
    layout, names = _layout(model), tensor_names(adapter, model)

    def read(path: str) -> tuple[Tensor, Tensor]:
        A, stored = tensors[f"{names[path]}.lora_a"], tensors[f"{names[path]}.lora_b"]
        B = torch.empty_like(stored)
        B[_row_order(layout, path, model, len(stored))] = stored
        return A, B

    return factor_proof(adapter, read, reader.fields["adapter.lora.alpha"].contents())
