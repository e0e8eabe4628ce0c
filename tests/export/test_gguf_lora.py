"""Chains as LoRAs in GGUF: named and laid out as llama.cpp holds the base, or refused by name."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import modeling_gguf_pytorch_utils as reading

from linchain_cli.chain import Adapter, ChainConfig, adapter_of, delta_weight, detach, inject
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export import gguf_lora
from linchain_cli.export.card import PublishedBase
from linchain_cli.export.gguf_lora import ADAPTER_FILE, LAYOUTS, prove_gguf, write_gguf
from linchain_cli.export.modelfile import modelfile
from linchain_cli.model.config import empty_model

from ..command_line import linchain

# Whose GGUF files transformers reads by itself, with its own knowledge of llama.cpp's names and layouts.
READ_BY_TRANSFORMERS = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "starcoder2",
    "stablelm",
    "nemotron",
]


def random_chains(model, targets="all-linear") -> Adapter:
    """Chains of depth 2 whose A, links and B are random."""
    config = ChainConfig(rank=4, depth=2, alpha=8.0, init="kaiming", target_modules=targets)
    for layer in inject(model, config, 1).values():
        layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    adapter = adapter_of(model, config, {"path": None, "hash": None})
    detach(model)
    return adapter


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_delta_where_the_chain_has_it(tmp_path, small_model, kind):
    model = small_model(kind)
    adapter = random_chains(model, ["q_proj", "o_proj", "down_proj"] if kind == "qwen2_moe" else "all-linear")
    proof = write_gguf(adapter, model, tmp_path)
    assert proof.modules == len(adapter.tensors) and proof.largest_error < 1e-7
    reader = gguf.GGUFReader(tmp_path / ADAPTER_FILE)
    name = reader.fields["general.architecture"].contents()
    assert name == LAYOUTS[model.config.model_type].architecture
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    scaling = reader.fields["adapter.lora.alpha"].contents() / adapter.config.rank
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    processor = reading.TENSOR_PROCESSORS.get(name, reading.TensorProcessor)(config=model.config.to_dict())
    known = "llama" if name == "llama" else model.config.model_type
    theirs = reading.get_gguf_hf_weights_map(model, processor, model_type=known)
    read = {}
    for key in {key.rpartition(".lora_")[0] for key in stored}:
        delta = scaling * stored[f"{key}.lora_b"] @ stored[f"{key}.lora_a"]
        weights = processor.process(
            weights=delta.numpy(), name=key, tensor_key_mapping=theirs, parsed_parameters={}
        )
        read[theirs[key]] = torch.from_numpy(weights.weights.copy())
    assert read.keys() == {f"{path}.weight" for path in adapter.tensors}
    for path, chain in adapter.tensors.items():
        exact = delta_weight(*chain, 2.0, torch.float64)
        if kind == "gpt2":  # whose Conv1D holds (in, out)
            exact = exact.T
        torch.testing.assert_close(read[f"{path}.weight"], exact, rtol=1e-5, atol=1e-6)


def test_the_text_decoder_of_a_multimodal_model_is_named_as_a_text_model(tmp_path, base_of, adapter_of_base):
    base = base_of("gemma3")
    write_gguf(adapter_of_base(base, targets=["q_proj"]), empty_model(base), tmp_path)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / ADAPTER_FILE).tensors}
    assert "blk.1.attn_q.weight.lora_a" in names


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_known_layout_is_an_architecture_of_llama_cpp(kind):
    layout = LAYOUTS[kind]
    assert layout.architecture in gguf.MODEL_ARCH_NAMES.values()
    assert kind.replace("_text", "") == layout.architecture or kind in {
        "mistral",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "phi",
        "cohere",
    }


def test_what_llama_cpp_rearranges_or_lacks_is_refused_by_name(
    tmp_path, base_of, adapter_of_base, monkeypatch
):
    base = base_of("gpt_neox")
    with pytest.raises(InputError, match="a GGUF adapter for 'gpt_neox' cannot be written.*Merge instead"):
        write_gguf(adapter_of_base(base), empty_model(base), tmp_path / "out")
    base = base_of("hrm_text")
    monkeypatch.setitem(LAYOUTS, "hrm_text", LAYOUTS["qwen2"])
    with pytest.raises(InputError, match="llama.cpp's 'qwen2' has no tensor for 'model"):
        write_gguf(adapter_of_base(base), empty_model(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_to_which_llama_cpp_applies_no_adapter_is_refused(tmp_path, small_model):
    model = small_model("qwen2_moe")
    with pytest.raises(InputError, match="no adapter to 'model.layers.0.mlp.shared_expert_gate'"):
        write_gguf(random_chains(model, ["shared_expert_gate"]), model, tmp_path)


def test_the_proof_catches_rows_in_another_order(tmp_path, base_of, adapter_of_base, monkeypatch):
    base = base_of("llama")
    adapter, model = adapter_of_base(base, targets=["q_proj"]), empty_model(base)
    write_gguf(adapter, model, tmp_path)
    monkeypatch.setattr(gguf_lora, "_row_order", lambda layout, path, model, rows: torch.arange(rows))
    with pytest.raises(LinchainError, match="q_proj: the exported ΔW is off"):
        prove_gguf(adapter, model, tmp_path)


def test_the_same_adapter_gives_the_same_bytes(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    for name in ("one", "two"):
        write_gguf(adapter_of_base(base), empty_model(base), tmp_path / name)
    one, two = ((tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("one", "two"))
    assert one == two


def test_export_writes_the_adapter_with_a_modelfile(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    assert linchain("export", run.path, "--format", "gguf") == 0
    assert "a LoRA of rank 4 on 14 modules" in capsys.readouterr().out
    out = run.path / "gguf"
    assert {path.name for path in out.iterdir()} >= {ADAPTER_FILE, "Modelfile", "README.md", "export.json"}
    text = (out / "Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf\n" in text and "FROM ./base.gguf\n" in text
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:\n" in text
    assert linchain("export", run.path, "--format", "gguf") == 2
    assert linchain("export", run.path, "--format", "gguf", "--overwrite") == 0


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("plain", "{{ .Prompt }}\n"),
        ({"prompt": "Q: {question}\nA:", "response": " {answer}"}, "Q: {{ .Prompt }}\nA:"),
        ({"prompt": "{question} {context}", "response": "{answer}"}, None),
        ("chat", None),
        (None, None),
    ],
)
def test_the_modelfile_has_the_prompt_of_the_run(template, prompt, tmp_path):
    text = modelfile(PublishedBase.at(tmp_path / "tiny.gguf"), template, "adapter.gguf")
    assert "FROM ./tiny.gguf" in text
    assert f'TEMPLATE """{prompt}"""' in text if prompt else "TEMPLATE" not in text
