"""Adapters of other tools as chains: the same function, or a refusal that says why."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from linchain_cli.chain import attach, delta_weight
from linchain_cli.errors import InputError
from linchain_cli.importing.convert import import_adapter
from linchain_cli.importing.foreign import read_foreign
from linchain_cli.model.loading import load_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30]])
PATH = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{PATH}"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(directory: Path, tensors: dict, pickled: bool = False, **config) -> Path:
    """A checkpoint directory of rank 4 and alpha 8, unless `config` says otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    if pickled:
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def lora(prefix: str = PREFIX, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.lora_A.weight": draw(rank, 64, seed=seed),
        f"{prefix}.lora_B.weight": draw(64, rank, seed=seed + 1),
    }


def mixers(count: int, bias: bool, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    tensors = {}
    for place in range(count):
        tensors[f"{prefix}.lora_mixer.{place}.weight"] = draw(4, 4, seed=10 + place)
        if bias:
            tensors[f"{prefix}.lora_mixer.{place}.bias"] = draw(4, seed=20 + place)
    return tensors


def imported(directory: Path, drop_bias: bool = False):
    return import_adapter(
        read_foreign(directory), drop_bias=drop_bias, base={"path": "base", "hash": None}, names={}
    )


def delta(result, path: str = PATH) -> torch.Tensor:
    adapter = result.adapter
    return delta_weight(*adapter.tensors[path], adapter.config.alpha / adapter.config.rank, torch.float64)


def product(*factors: torch.Tensor) -> torch.Tensor:
    result = factors[0].double()
    for factor in factors[1:]:
        result = result @ factor.double()
    return result


@pytest.mark.parametrize("pickled", [False, True])
def test_a_lora_is_a_chain_of_depth_zero_bit_for_bit(tmp_path, pickled):
    tensors = lora()
    result = imported(write(tmp_path, tensors, pickled))
    chain = result.adapter.tensors[PATH]
    assert torch.equal(chain.A, tensors[f"{PREFIX}.lora_A.weight"])
    assert torch.equal(chain.B, tensors[f"{PREFIX}.lora_B.weight"])
    assert chain.links.shape == (0, 4, 4)
    assert (result.adapter.config.rank, result.adapter.config.depth, result.adapter.config.alpha) == (
        4,
        0,
        8.0,
    )
    assert not (result.padded or result.rescaled or result.losses)


@pytest.mark.parametrize("key", ["lora_AB.weight", "lora_mixer.weight", "lora_mixer.default.weight"])
def test_a_moslora_is_a_chain_of_depth_one(tmp_path, key):
    tensors = lora() | {f"{PREFIX}.{key}": draw(4, 4, seed=9)}
    result = imported(write(tmp_path, tensors, lora_use_mixer=True))
    A, B, mixer = (tensors[f"{PREFIX}.{name}"] for name in ("lora_A.weight", "lora_B.weight", key))
    torch.testing.assert_close(delta(result), 2 * product(B, mixer, A), rtol=1e-12, atol=1e-12)
    assert result.adapter.config.depth == 1


class AuthorsLinear(nn.Module):
    """What the LinChain authors compute beside a frozen layer: B(W3(W2(W1 A x + b1) + b2) + b3)·α/r."""

    def __init__(self, tensors: dict[str, torch.Tensor], depth: int):
        super().__init__()
        self.A = nn.Linear(64, 4, bias=False)
        self.mixer = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.B = nn.Linear(4, 64, bias=False)
        renamed = {key.removeprefix(f"{PREFIX}.lora_"): value for key, value in tensors.items()}
        self.load_state_dict(renamed)

    def forward(self, x):
        h = self.A(x)
        for mixer in self.mixer:
            h = mixer(h)
        return 2 * self.B(h)


def test_an_authors_checkpoint_loses_exactly_the_constant_it_reports(tmp_path):
    tensors = lora() | mixers(3, bias=True)
    write(tmp_path, tensors, pickled=True, lora_use_mixer=True, mixer_num=3)
    with pytest.raises(
        InputError, match=r"1 modules carry trained biases.*norm .* \(model\.layers\.0.*--drop-bias"
    ):
        imported(tmp_path)
    result = imported(tmp_path, drop_bias=True)
    assert result.adapter.config.depth == 3
    module = AuthorsLinear(tensors, 3).double()
    x = draw(5, 64, seed=3).double()
    lost = module(x).detach() - x @ delta(result).T
    constant = module(torch.zeros(1, 64, dtype=torch.float64)).detach()
    torch.testing.assert_close(lost, constant.expand(5, -1), rtol=1e-9, atol=1e-9)
    (loss,) = result.losses
    assert loss.norm == pytest.approx(float(constant.norm()), rel=1e-9)
    assert loss.share == pytest.approx(float(constant.norm() / delta(result).norm()), rel=1e-9)


def test_biases_of_zero_lose_nothing(tmp_path):
    tensors = lora() | {k: v * (0 if k.endswith("bias") else 1) for k, v in mixers(2, bias=True).items()}
    assert not imported(write(tmp_path, tensors, lora_use_mixer=True, mixer_num=2)).losses


def test_a_bias_behind_b_and_the_bases_own_bias_are_told(tmp_path):
    tensors = lora() | {f"{PREFIX}.lora_B.bias": draw(64), f"{PREFIX}.bias": draw(64, seed=1)}
    write(tmp_path, tensors, bias="lora_only", lora_bias=True)
    with pytest.raises(InputError, match="2 modules carry trained biases"):
        imported(tmp_path)
    losses = {loss.path: loss.norm for loss in imported(tmp_path, drop_bias=True).losses}
    assert losses[PATH] == pytest.approx(2 * float(draw(64).norm()), rel=1e-6)
    assert losses[f"{PATH} (the base's own bias, trained along)"] == pytest.approx(
        float(draw(64, seed=1).norm())
    )


def peft_adapter(base: Path, directory: Path, **options) -> torch.Tensor:
    """Makes PEFT write an adapter with random B; returns the logits it gives."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
        model = get_peft_model(load_model(base, dtype="float32", device="cpu"), config)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.data.copy_(0.2 * draw(*parameter.shape, seed=index))
        model.save_pretrained(directory)
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("options", "padded", "rescaled"),
    [
        ({}, 0, 0),
        ({"use_rslora": True}, 0, 0),
        ({"rank_pattern": {"down_proj": 2}}, 2, 2),
        ({"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7}}, 3, 1),
        ({"alpha_pattern": {"q_proj": 3}}, 0, 2),
        ({"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2}, "use_rslora": True}, 2, 2),
        ({"target_modules": r".*layers\.0.*\.(q_proj|up_proj)"}, 0, 0),
    ],
)
def test_what_peft_writes_gives_the_same_logits(tmp_path, base_of, options, padded, rescaled):
    base = base_of("llama")
    wanted = peft_adapter(base, tmp_path, **options)
    result = imported(tmp_path)
    model = load_model(base, dtype="float32", device="cpu")
    attach(model, result.adapter)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    assert (len(result.padded), len(result.rescaled)) == (padded, rescaled)


def test_gpt2_adapters_of_peft_fit_conv1d(tmp_path, base_of):
    base = base_of("gpt2")
    wanted = peft_adapter(base, tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = load_model(base, dtype="float32", device="cpu")
    attach(model, imported(tmp_path).adapter)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)


def test_half_precision_is_read_as_it_is(tmp_path):
    tensors = {key: value.bfloat16() for key, value in lora().items()}
    chain = imported(write(tmp_path, tensors)).adapter.tensors[PATH]
    assert torch.equal(chain.A, tensors[f"{PREFIX}.lora_A.weight"].float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA cannot be imported"),
        ({"use_dora": True}, "'use_dora' is set.*DoRA rescales"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is set.*whole modules"),
        ({"target_parameters": ["experts"]}, "'target_parameters' is set"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which also changes the base",
        ),
        ({"r": 0}, "expected a whole r"),
        ({"lora_alpha": "8"}, "lora_alpha > 0, found"),
        ({"lora_alpha": float("inf")}, "a finite lora_alpha > 0, found .* inf"),
        ({"lora_alpha": True}, "lora_alpha > 0, found"),
        ({"alpha_pattern": {"(q_proj": 4}}, r"alpha_pattern: '\(q_proj' is no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\], expected an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: 'q_proj' is '4', expected a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: 'q_proj' is nan"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected a text"),
        ({"mixer_num": "three", "lora_use_mixer": True}, "mixer_num is 'three', expected a whole number"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "is of mlx-lm, whose adapters"),
    ],
)
def test_kinds_that_no_chain_can_hold_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        imported(write(tmp_path, lora(), **config))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{PREFIX}.lora_magnitude_vector": draw(64)}, "belongs to DoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": draw(4, 64)}, "adapts an embedding"),
        ({"base_model.model.lm_head.modules_to_save.weight": draw(4, 4)}, "is a whole module"),
        ({"strange": draw(2)}, "'strange' is not a tensor of a LoRA"),
        ({f"{PREFIX}.lora_A.other.weight": draw(4, 64)}, "is there twice"),
        ({f"{PREFIX}.lora_A.bias": draw(4)}, "is not a tensor of a LoRA"),
        ({f"{PREFIX}.lora_A.weight": torch.tensor(1.0)}, r"has lora_A \(\) and lora_B"),
        ({f"{PREFIX}.lora_B.weight": draw(64)}, r"lora_B \(64,\), which do not fit each other"),
        ({f"{PREFIX}.lora_A.weight": torch.empty(0)}, "is empty .* DeepSpeed ZeRO-3"),
        ({f"{PREFIX}.lora_B.weight": torch.full((64, 4), torch.nan)}, "values that are no finite numbers"),
        ({f"{PREFIX}.lora_mixer.0.weight": torch.full((4, 4), torch.inf)}, "no finite numbers"),
    ],
)
def test_tensors_that_no_chain_can_hold_are_refused_by_name(tmp_path, extra, message):
    with pytest.raises(InputError, match=message):
        imported(write(tmp_path, lora() | extra))


def without(tensors: dict, *names: str) -> dict:
    return {key: value for key, value in tensors.items() if not key.endswith(names)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (without(lora(), "lora_B.weight"), {}, "has no lora_B.weight"),
        (lora() | {f"{PREFIX}.lora_B.weight": draw(64, 5)}, {}, "do not fit each other"),
        (
            lora() | without(mixers(3, False), "mixer.1.weight"),
            {"mixer_num": 3, "lora_use_mixer": True},
            "one is missing",
        ),
        (
            lora(),
            {"mixer_num": 3, "lora_use_mixer": True},
            "0 mixers where .* promises 3.*PEFT drops them silently",
        ),
        (lora() | {f"{PREFIX}.lora_mixer.0.weight": draw(4, 3)}, {}, "mixer 0 .* is .4, 3., expected .4, 4."),
    ],
)
def test_checkpoints_with_something_missing(tmp_path, tensors, config, message):
    with pytest.raises(InputError, match=message):
        imported(write(tmp_path, tensors, **config))


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        read_foreign(tmp_path / "nothing")
    write(tmp_path, lora())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read as plain weights"):
        read_foreign(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        read_foreign(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(InputError, match="cannot be read as plain weights|something else than tensors"):
        read_foreign(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="does not describe a LoRA"):
        read_foreign(tmp_path)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    write(tmp_path, {"x": Harmful(str(tmp_path / "run"))}, pickled=True)
    with pytest.raises(InputError, match="code in it is never run"):
        read_foreign(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_file_of_the_checkpoint_means_its_directory(tmp_path):
    write(tmp_path, lora(), pickled=True)
    assert read_foreign(tmp_path / "adapter_model.bin").modules.keys() == {PATH}
