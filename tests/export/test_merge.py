"""Merging, architecture by architecture, against the adapted model and against sums in exact arithmetic."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linchain_cli.chain import Adapter, ChainTensors, attach, chain_layers, delta_weight
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export.card import Origin
from linchain_cli.export.merge import MergeOptions, MergeResult, merge_checkpoint
from linchain_cli.export.shards import write_checkpoint
from linchain_cli.export.sums import new_tensors, plan_merge
from linchain_cli.model.checkpoint import open_checkpoint
from linchain_cli.model.config import empty_model
from linchain_cli.model.loading import load_model

PROMPTS = [[5, 6, 7, 8, 9, 20, 30], [1, 2, 3]]
NAMES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "mistral",
    "mixtral",
    "gpt2",
    "gpt2_bare",
    "gpt_neox",
    "phi",
    "phi3",
    "olmo2",
    "hrm_text",
]


def merge(base: Path, adapter: Adapter, out: Path, **options) -> MergeResult:
    return merge_checkpoint(base, adapter, out, MergeOptions(**options), Origin("test"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("architecture", NAMES)
def test_the_merged_model_is_the_adapted_model(tmp_path, base_of, adapter_of_base, architecture):
    base = base_of(architecture)
    adapter = adapter_of_base(base)
    result = merge(base, adapter, tmp_path / "out", prompts=PROMPTS)
    adapted = load_model(base, dtype="float32", device="cpu")
    attach(adapted, adapter)
    merged = load_model(tmp_path / "out", dtype="float32", device="cpu")
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        ours, theirs = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    logits = result.receipt.logits
    assert logits.largest_difference < 1e-5 < logits.adapter_effect
    assert logits.top1_agreement == 1.0 and not logits.adapter_lost
    assert result.receipt.generated > 0 and not result.receipt.not_proven
    counts = result.receipt.tensors
    assert counts["changed"] + counts["untouched"] == len(tensors_of(base))
    assert tensors_of(base).keys() == tensors_of(tmp_path / "out").keys()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "hrm_text"])
def test_bfloat16_weights_are_the_exact_sum_rounded_once(tmp_path, base_of, adapter_of_base, architecture):
    base = base_of(architecture, torch.bfloat16)
    adapter = adapter_of_base(base)
    result = merge(base, adapter, tmp_path / "out")
    assert result.receipt.largest_ulp <= 0.5
    # Loaded in float64, both models hold exactly what their files do.
    before = load_model(base, dtype="float32", device="cpu").double().state_dict()
    after = load_model(tmp_path / "out", dtype="float32", device="cpu").double().state_dict()
    model = empty_model(base)
    scaling = adapter.config.alpha / adapter.config.rank
    touched = {f"{path}.weight": (path, chain) for path, chain in adapter.tensors.items()}
    for name, old in before.items():
        exact = old
        if name in touched:
            path, chain = touched[name]
            delta = delta_weight(*chain, scaling, torch.float64)
            exact = old + (delta.T if type(model.get_submodule(path)).__name__ == "Conv1D" else delta)
        nearest = exact.float().bfloat16().double()  # twice rounded: off by one neighbour at most, and seldom
        assert float((after[name] != nearest).double().mean()) < 1e-3, name
        spacing = 2.0 ** (torch.frexp(exact).exponent.double() - 8)
        assert bool(((after[name] - exact).abs() <= spacing / 2).all()), name


FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "llama4_text",
]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    ("targets", "dtype"),
    [(["all-linear", "experts"], torch.float32), (["experts.down_proj"], torch.bfloat16)],
    ids=["all", "down_proj"],
)
def test_experts_are_merged_into_the_tensors_of_their_files(
    tmp_path, base_of, adapter_of_base, architecture, targets, dtype
):
    base = base_of(architecture, dtype)
    adapter = adapter_of_base(base, targets)
    result = merge(base, adapter, tmp_path / "out", prompts=PROMPTS if dtype == torch.float32 else ())
    assert result.receipt.largest_ulp <= 0.5
    if logits := result.receipt.logits:
        assert logits.largest_difference < 2e-5 < logits.adapter_effect and not logits.adapter_lost
        assert logits.top1_agreement == 1.0 and not result.receipt.not_proven
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(result.receipt.changed)
    assert (dtype == torch.float32) == (logits is not None)
    if len(targets) == 1:
        wanted = {"mixtral": ".w2.weight", "gpt_oss": "experts.down_proj", "llama4_text": "experts.down_proj"}
        end = wanted.get(architecture, ".down_proj.weight")
        assert changed == {
            key for key in before if ".experts." in key and key.endswith(end) and "shared" not in key
        }


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_untouched_tensors_are_the_same_bytes(tmp_path, base_of, adapter_of_base, shard_bytes):
    base = base_of("llama", torch.bfloat16)
    adapter = adapter_of_base(base, targets=["v_proj"])
    result = merge(base, adapter, tmp_path / "out", max_shard_bytes=shard_bytes)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert (
        changed
        == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}
        == set(result.receipt.changed)
    )
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 1 if shard_bytes == 10**9 else len(shards) > 3
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_sharded_and_a_pickled_base_merge_to_the_same_values(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base)
    adapter = replace(adapter, base={**adapter.base, "hash": None})
    merge(base, adapter, tmp_path / "single")
    sharded, pickled = tmp_path / "sharded-base", tmp_path / "pickled-base"
    load_model(base, dtype="float32", device="cpu").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pickled.mkdir()
    shutil.copy(base / "config.json", pickled)
    torch.save(tensors_of(base), pickled / "pytorch_model.bin")
    for directory in (sharded, pickled):
        merge(directory, adapter, tmp_path / f"{directory.name}-out")
        found, wanted = tensors_of(tmp_path / f"{directory.name}-out"), tensors_of(tmp_path / "single")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not list((tmp_path / "pickled-base-out").glob("*.bin"))


def test_a_hub_snapshot_of_links_becomes_a_directory_of_files(tmp_path, base_of, adapter_of_base):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(base_of("llama"), blobs)
    (blobs / "additional_chat_templates").mkdir()
    (blobs / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for path in blobs.rglob("*.*"):
        (snapshot / path.relative_to(blobs)).symlink_to(path)
    merge(snapshot, adapter_of_base(base_of("llama")), tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in written)
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert names == {str(path.relative_to(snapshot)) for path in snapshot.rglob("*.*")} | {
        "README.md",
        "merge.json",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_recasts_every_float_and_says_so_in_the_config(tmp_path, base_of, adapter_of_base, dtype):
    base = base_of("gemma3")
    adapter = adapter_of_base(base, targets=["q_proj"])
    result = merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    named = [
        part["dtype"] for part in (config, *config.values()) if isinstance(part, dict) and "dtype" in part
    ]
    assert set(named) == {name} and result.receipt.dtype == name
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == dtype


def test_float16_that_overflows_is_refused_by_name(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])
    path = "model.layers.1.self_attn.q_proj"
    chain = adapter.tensors[path]
    adapter.tensors[path] = chain._replace(B=1e6 * chain.B)
    with pytest.raises(LinchainError, match=f"{path}.weight: a value is beyond float16"):
        merge(base, adapter, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_tied_embeddings_stay_tied_and_are_not_merged_into(
    tmp_path, tiny_tied_dir, tiny_llama_dir, adapter_of_base
):
    adapter = adapter_of_base(tiny_tied_dir)
    merge(tiny_tied_dir, adapter, tmp_path / "out", prompts=PROMPTS)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    with_head = changed(adapter_of_base(tiny_llama_dir, targets=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match=r"'lm_head' shares its weight with model\.embed_tokens\.weight"):
        merge(tiny_tied_dir, with_head, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_untied_head_can_be_merged(tmp_path, base_of, adapter_of_base):
    base = base_of("gpt_neox")
    adapter = adapter_of_base(base, targets=["lm_head"])
    result = merge(base, adapter, tmp_path / "out", prompts=PROMPTS)
    assert result.receipt.changed.keys() == {"embed_out.weight"}
    assert result.receipt.logits.largest_difference < 1e-5


def changed(adapter: Adapter, **tensors: ChainTensors) -> Adapter:
    return Adapter(adapter.config, {**adapter.tensors, **tensors}, {"path": "base", "hash": None})


def test_modules_that_are_not_there_or_do_not_fit_are_named(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])
    path = "model.layers.0.self_attn.q_proj"
    chain = adapter.tensors[path]
    with pytest.raises(
        InputError, match=r"'model\.layers\.0\.self_attn\.q_prj'.* has no such module.*Did you mean .*q_proj"
    ):
        merge(base, changed(adapter, **{path.replace("q_proj", "q_prj"): chain}), tmp_path / "out")
    with pytest.raises(
        InputError, match=r"'model\.layers\.0\.self_attn\.q_proj' \(60 → 64\), and Llama.* has 64 → 64 there"
    ):
        merge(base, changed(adapter, **{path: chain._replace(A=chain.A[:, :60])}), tmp_path / "out")
    with pytest.raises(InputError, match="LlamaRMSNorm there, which is not a linear layer"):
        merge(base, changed(adapter, **{"model.norm": chain}), tmp_path / "out")
    with pytest.raises(InputError, match="values for .* are not finite"):
        merge(
            base,
            changed(adapter, **{path: chain._replace(B=torch.full_like(chain.B, torch.nan))}),
            tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken_base(tmp_path, base_of):
    """A copy of the tiny Llama whose tensors a function may change."""

    def build(change) -> Path:
        directory = tmp_path / "broken"
        shutil.copytree(base_of("llama"), directory)
        tensors = tensors_of(directory)
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return build


KEY = "model.layers.0.self_attn.q_proj.weight"


def test_another_base_is_refused_by_its_hash(tmp_path, base_of, adapter_of_base, broken_base):
    adapter = adapter_of_base(base_of("llama"), targets=["q_proj"])
    other = broken_base(lambda tensors: tensors[KEY].add_(1))
    with pytest.raises(InputError, match="the adapter was trained on other weights"):
        merge(other, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(KEY), "no tensor of the checkpoint is the weight of"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY][:60]}),
            r"is \(60, 64\), but the adapter was trained on 64 → 64",
        ),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.uint8)}),
            "stored as U8, not as a floating-point",
        ),
    ],
)
def test_a_base_whose_file_does_not_fit_is_refused_before_writing(
    tmp_path, base_of, adapter_of_base, broken_base, change, message
):
    adapter = changed(adapter_of_base(base_of("llama"), targets=["q_proj"]))
    with pytest.raises(InputError, match=message):
        merge(broken_base(change), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_computes_is_refused_by_name(tmp_path, base_of, adapter_of_base, monkeypatch):
    from linchain_cli.model.names import Conversion, ConversionError

    def refuse(self, shapes):
        raise ConversionError(f"the conversion of {self.keys[0]} computes the values")

    base = base_of("hrm_text")
    adapter = adapter_of_base(base, targets=["q_proj"])
    monkeypatch.setattr(Conversion, "element_sources", refuse)
    with pytest.raises(
        InputError, match=r"self_attn\.q_proj' cannot be merged: the conversion of .*gqkv_proj"
    ):
        merge(base, adapter, tmp_path / "out")


def test_what_mixtral_holds_as_experts_is_copied(tmp_path, base_of, adapter_of_base):
    base = base_of("mixtral")
    result = merge(base, adapter_of_base(base), tmp_path / "out", prompts=PROMPTS)
    assert all("self_attn" in key for key in result.receipt.changed)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    experts = [key for key in before if ".experts." in key]
    assert len(experts) == 24 and all(torch.equal(before[key], after[key]) for key in experts)


def test_a_merge_that_fails_its_proof_leaves_nothing(tmp_path, base_of, adapter_of_base, monkeypatch):
    from linchain_cli.export import merge as merging

    def write_wrong(directory, tensors, *rest):
        wrong = [replace(tensor, data=tensor.data) for tensor in tensors]
        paths = write_checkpoint(directory, wrong, *rest)
        loaded = load_file(paths[0])
        loaded[KEY] += 1
        save_file(loaded, paths[0], {"format": "pt"})
        return paths

    monkeypatch.setattr(merging, "write_checkpoint", write_wrong)
    base = base_of("llama")
    with pytest.raises(LinchainError, match=f"{KEY} is off"):
        merge(base, adapter_of_base(base, targets=["q_proj"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_receipt_depends_on_the_inputs_alone(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj", "down_proj"])
    for name in ("one", "two"):
        merge(base, adapter, tmp_path / name, prompts=PROMPTS)
    one, two = ((tmp_path / name / "merge.json").read_bytes() for name in ("one", "two"))
    assert one == two
    receipt = json.loads(one)
    assert receipt["base"]["hash"] == receipt["base"]["hash_expected"] == adapter.base["hash"]
    assert receipt["files"].keys() == {path.name for path in (tmp_path / "one").iterdir()} - {
        "merge.json",
        "README.md",
    }
    assert str(tmp_path) not in one.decode() and str(base) not in one.decode()


def test_a_quantised_run_merges_into_the_original_weights(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])
    result = merge(base, adapter, tmp_path / "out", prompts=PROMPTS, quantization="nf4")
    assert result.receipt.logits.largest_difference < 1e-5
    assert result.receipt.quantized.largest_difference > 1e-3


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", "all-linear"), ("deepseek_v3", ["all-linear", "experts"])],
    ids=["llama", "deepseek_v3"],
)
def test_a_base_in_fewer_bits_merges_as_the_weights_that_it_stands_for(
    tmp_path, base_of, adapter_of_base, architecture, targets
):
    base = base_of(architecture)
    plain, packed = (Path(shutil.copytree(base, tmp_path / name)) for name in ("plain", "packed"))
    stored, exact = {}, {}
    for key, weight in tensors_of(plain).items():
        if weight.dim() < 2 or "layers" not in key:
            stored[key] = exact[key] = weight.bfloat16()
        else:
            scale = (weight.abs().amax(1, keepdim=True) / 448).clamp_min(1e-9)
            stored[key], stored[f"{key}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale
            exact[key] = (stored[key].float() * scale).bfloat16()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": None}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    result = merge(packed, adapter_of_base(packed, targets), tmp_path / "out", prompts=PROMPTS)
    merge(plain, adapter_of_base(plain, targets), tmp_path / "expected")
    ours, expected = (tensors_of(tmp_path / name) for name in ("out", "expected"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert result.receipt.logits.top1_agreement == 1.0 and not result.receipt.not_proven
    assert "quantised (fp8) were restored to bfloat16" in result.receipt.changes[0]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"


def test_merging_leaves_the_library_path_untouched(base_of, adapter_of_base):
    """What `chain.merge` does in memory is what the file merge writes, to float32 rounding."""
    from linchain_cli.chain import merge as merge_in_memory

    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["o_proj"])
    model = load_model(base, dtype="float32", device="cpu")
    attach(model, adapter)
    merge_in_memory(model)
    assert not chain_layers(model)
    plan = plan_merge(open_checkpoint(base), adapter, empty_model(base))
    for tensor in new_tensors(plan):
        if tensor.key in plan.plain:
            ours = torch.cat([make().clone() for _, make in tensor.data()])
            torch.testing.assert_close(ours, model.get_parameter(tensor.key), rtol=1e-6, atol=1e-7)
