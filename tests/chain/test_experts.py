"""Chains on routed experts against a reference that is written expert by expert in float64."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.func import functional_call

from linchain_cli.chain import (
    ChainConfig,
    adapter_of,
    attach,
    chain_layers,
    detach,
    disabled,
    folded,
    inject,
    load_adapter,
    merge,
    save_adapter,
    with_depth,
)
from linchain_cli.chain import experts as experts_room
from linchain_cli.chain.experts import ChainExperts, expert_matrices, is_transposed
from linchain_cli.errors import InputError
from linchain_cli.training.blocks import set_up_blocks

ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**ROUTED, "head_dim": 8},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 16},
    "olmoe": ROUTED,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "deepseek_v3": {**ROUTED, **DEEPSEEK, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 8},
    "glm4_moe": {**ROUTED, **DEEPSEEK, "head_dim": 8},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [0, 1],
                    "attention_chunk_size": 8},
    "nemotron_h": {**ROUTED, **DEEPSEEK, "head_dim": 8, "layers_block_type": ["attention", "moe"],
                   "moe_shared_expert_intermediate_size": 16},
}  # fmt: skip


def tiny(kind: str, dtype=torch.float64) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES[kind],
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=dtype).eval()
    for parameter in model.parameters():  # some start at zero, or are never set
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model.requires_grad_(False)


IDS = torch.arange(3, 17).view(2, 7)
CONFIG = ChainConfig(rank=4, depth=2, alpha=8, init="kaiming", target_modules=["experts"])


def adapted(kind: str, dtype=torch.float64, config: ChainConfig = CONFIG) -> nn.Module:
    """A tiny model whose experts carry chains with B ≠ 0, all in one type."""
    model = tiny(kind, dtype)
    for layer in inject(model, config, seed=3).values():
        layer.to(dtype if dtype == torch.float64 else torch.float32)
        layer.B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def step(model: nn.Module, forward) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of a sum of them for the embedded tokens."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = forward(inputs_embeds=x, use_cache=False).logits
    logits.sin().sum().backward()
    return logits.detach(), x.grad


def reference(model: nn.Module, kind: str):
    """The same of transformers' own loop over experts with W_e + (α/r)·B_e·Wn…W1·A_e, and the gradients of A,
    links and B."""
    plain = tiny(kind)
    if kind != "llama4_text":  # whose loop it has no other than
        plain.set_experts_implementation("eager")
    leaves, weights = {}, {}
    for path, layer in chain_layers(model).items():
        A, links, B = (t.detach().clone().requires_grad_() for t in (layer.A, layer.links, layer.B))
        leaves[path] = [A, links, B]
        each = []
        for e in range(A.shape[0]):
            product = A[e]
            for link in links[e]:
                product = link @ product
            each.append(layer.scaling * B[e] @ product)
        holder, name = plain.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        delta = torch.stack(each)
        weights[path] = getattr(holder, name) + (delta.mT if is_transposed(holder) else delta)
    logits, grad = step(plain, lambda **inputs: functional_call(plain, weights, (), inputs))
    return logits, grad, {path: [leaf.grad for leaf in three] for path, three in leaves.items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_compute_what_the_formula_says_expert_by_expert(kind):
    model = adapted(kind)
    logits, grad, expected = reference(model, kind)
    names = {path.rpartition(".")[2] for path in expected}
    assert names == {"up_proj" if kind == "nemotron_h" else "gate_up_proj", "down_proj"}
    # In Nemotron's blocks a float32 step stands between, which rounds away what its input gained.
    exact = 1e-5 if kind == "nemotron_h" else 1e-9
    for inside in (False, True):
        model.zero_grad()
        if inside:
            with folded(model):
                ours, our_grad = step(model, model)
        else:
            ours, our_grad = step(model, model)
        torch.testing.assert_close(ours, logits, rtol=0, atol=exact)
        torch.testing.assert_close(our_grad, grad, rtol=0, atol=10 * exact)
        for path, layer in chain_layers(model).items():
            for name, wanted in zip(("A", "links", "B"), expected[path], strict=True):
                assert float(wanted.abs().max()) > 1e-6
                torch.testing.assert_close(
                    getattr(layer, name).grad, wanted, rtol=10 * exact, atol=10 * exact
                )
        assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)
    with torch.no_grad():
        without = tiny(kind)
        if kind != "llama4_text":
            without.set_experts_implementation("eager")
            model.set_experts_implementation("eager")
        assert (model(IDS).logits - without(IDS).logits).abs().max() > 1e-2
        with disabled(model):
            assert torch.equal(model(IDS).logits, without(IDS).logits)
        merge(model)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=max(exact, 1e-6))


def test_a_fresh_chain_changes_nothing_and_each_expert_has_links_of_its_own():
    model = tiny("mixtral", torch.float32)
    before = model(IDS).logits
    layers = inject(model, ChainConfig(rank=4, depth=3, target_modules=["experts"]), seed=5)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-6)
    again = inject(
        tiny("mixtral", torch.float32), ChainConfig(rank=4, depth=0, target_modules=["experts"]), 5
    )
    for path, layer in layers.items():
        assert torch.equal(layer.A, again[path].A) and again[path].links.shape == (4, 0, 4, 4)
        assert layer.A.shape[0] == layer.links.shape[0] == layer.B.shape[0] == 4
        assert float(layer.A.detach().abs().max()) <= layer.A.shape[-1] ** -0.5 and not layer.B.any()
        identity = torch.eye(4).expand(4, 3, 4, 4)
        torch.testing.assert_close(layer.links @ layer.links.mT, identity, rtol=0, atol=1e-5)
        assert not torch.allclose(layer.links[0], layer.links[1])
    assert not torch.equal(*[layer.A for path, layer in layers.items() if path.endswith("down_proj")])
    detach(model)
    assert not chain_layers(model) and torch.equal(model(IDS).logits, before)


def test_one_matrix_alone_can_be_adapted():
    model = adapted("gpt_oss", config=ChainConfig(rank=4, depth=2, target_modules=["experts.down_proj"]))
    logits, grad, expected = reference(model, "gpt_oss")
    ours, our_grad = step(model, model)
    assert {path.rpartition(".")[2] for path in expected} == {"down_proj"}
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(our_grad, grad, rtol=0, atol=1e-9)


def test_an_adapter_of_experts_is_written_read_and_collapsed(tmp_path):
    model = adapted("qwen3_moe", torch.float32)
    logits = model(IDS).logits
    adapter = adapter_of(model, CONFIG)
    save_adapter(adapter, tmp_path)
    read = load_adapter(tmp_path)
    for path, chain in adapter.tensors.items():
        assert all(torch.equal(*pair) for pair in zip(chain, read.tensors[path], strict=True))
    assert set(read.tensors) == {
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    for depth in (2, 4, 1, 0):
        other = tiny("qwen3_moe", torch.float32)
        attach(other, with_depth(read, depth))
        assert {layer.depth for layer in chain_layers(other).values()} == {depth}
        torch.testing.assert_close(other(IDS).logits, logits, rtol=0, atol=0 if depth == 2 else 1e-4)
    with pytest.raises(InputError, match="32 → 96 of 4 experts.*has no such module"):
        attach(tiny("llama4_text", torch.float32), adapter_of(adapted("mixtral", torch.float32), CONFIG))
    with pytest.raises(InputError, match="has 32 → 32 of 4 experts there"):
        attach(tiny("qwen3_moe", torch.float32), adapter_of(adapted("mixtral", torch.float32), CONFIG))


def test_products_of_all_experts_at_once_are_those_one_by_one(monkeypatch):
    """torch's grouped product, as a GPU takes it, at a rank that it would not take as it is."""
    results = []
    for at_once in (False, True):
        monkeypatch.setattr(experts_room, "multiplies_groups", lambda x, at_once=at_once: at_once)
        model = adapted("gpt_oss", torch.float32, ChainConfig(rank=3, depth=2, target_modules=["experts"]))
        logits, grad = step(model, model)
        grads = [p.grad for layer in chain_layers(model).values() for p in (layer.A, layer.links, layer.B)]
        results.append([logits, grad, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_without_a_token_have_a_gradient_of_zero():
    model = adapted("mixtral", torch.float32)
    experts = next(module for module in model.modules() if isinstance(module, ChainExperts))
    index = torch.tensor([[0, 2], [2, 0], [0, 2]])
    experts(torch.randn(3, 32), index, torch.full((3, 2), 0.5)).square().sum().backward()
    for chain in experts.chains.values():
        for parameter in (chain.A, chain.links, chain.B):
            used = parameter.grad.flatten(1).abs().amax(1) > 0
            assert used.tolist() == [True, False, True, False]


class LeavesGaps(torch.autograd.Function):
    """torch's grouped product where it does not write the gradients of matrices without rows."""

    @staticmethod
    def forward(ctx, x, matrices, offs):
        ctx.save_for_backward(x, matrices, offs)
        return grouped_mm(x, matrices, offs=offs)

    @staticmethod
    def backward(ctx, grad):
        x, matrices, offs = ctx.saved_tensors
        ends = [0, *offs.tolist()]
        grad_x, grad_matrices = torch.zeros_like(x), torch.full_like(matrices, torch.nan)
        for expert, (a, b) in enumerate(itertools.pairwise(ends)):
            if b > a:
                grad_x[a:b] = grad[a:b] @ matrices[expert].T
                grad_matrices[expert] = x[a:b].T @ grad[a:b]
        return grad_x, grad_matrices, None


grouped_mm = F.grouped_mm


def test_a_kernel_that_leaves_gaps_gives_experts_without_a_token_a_gradient_of_zero(monkeypatch):
    monkeypatch.setattr(experts_room, "multiplies_groups", lambda x: True)
    index = torch.tensor([[0, 2], [2, 0], [0, 2]])
    found = []
    for product in (grouped_mm, lambda x, matrices, offs: LeavesGaps.apply(x, matrices, offs)):
        monkeypatch.setattr(F, "grouped_mm", product)
        model = adapted("mixtral", torch.float32)
        experts = next(module for module in model.modules() if isinstance(module, ChainExperts))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        experts(x, index, torch.full((3, 2), 0.5)).square().sum().backward()
        found.append([p.grad for each in experts.chains.values() for p in (each.A, each.links, each.B)])
    for whole, with_gaps in zip(*found, strict=True):
        torch.testing.assert_close(with_gaps, whole)


def test_dropout_and_recomputation():
    model = adapted(
        "qwen3_moe", torch.float32, ChainConfig(rank=4, depth=2, dropout=0.5, target_modules=["experts"])
    )
    still = step(model, model)[0]
    model.train()

    def run(recompute: bool) -> list[torch.Tensor]:
        set_up_blocks(model, recompute=recompute, compiled=False)
        model.zero_grad()
        torch.manual_seed(7)
        with folded(model):
            results = step(model, model)
        return [*results, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    once, twice = run(False), run(True)
    assert not torch.allclose(once[0], still)
    assert all(torch.equal(*pair) for pair in zip(once, twice, strict=True))


def test_in_bfloat16_a_small_term_is_part_of_the_one_rounding():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32), torch.randn(2, 48, 32)
    term = 1e-2 * torch.randn(64, 48)
    groups = experts_room.Groups(torch.tensor([30, 64], dtype=torch.int32), (30, 64))
    x, weight, term = (tensor.bfloat16() for tensor in (x, weight, term))
    exact = torch.cat([x[:30].double() @ weight[0].double().T, x[30:].double() @ weight[1].double().T])
    ours = experts_room.AddExperts.apply(term.clone(), x, weight, groups).double()
    after = (exact.bfloat16() + term).double()
    wanted = exact + term.double()
    assert (ours - wanted).norm() < 0.9 * (after - wanted).norm()


def test_what_is_no_float_carries_no_chain():
    model = tiny("mixtral", torch.float32)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert set(expert_matrices(experts)) == {"gate_up_proj", "down_proj"}
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert not expert_matrices(experts) and not expert_matrices(None) and not expert_matrices(nn.Linear(2, 2))


class AnyConfig:
    """Answers whatever a class of experts asks of its configuration, with small numbers."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        for part, value in {"eps": 1e-6, "limit": 7.0, "alpha": 1.7, "act": "silu", "bias": False}.items():
            if part in name:
                return value
        if "expert" in name and name.startswith(("num", "n_")):
            return 4
        return 32 if "hidden_size" in name else 16


@pytest.mark.skipif(
    "LINCHAIN_TEST_SLOW" not in os.environ, reason="imports 60 models; LINCHAIN_TEST_SLOW=1 runs it"
)
def test_all_experts_of_the_interface_compute_what_their_own_loop_does():
    root, found = Path(transformers.__file__).parent / "models", 0
    for file in sorted(root.glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)", file.read_text()):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            torch.manual_seed(0)
            base = getattr(module, name)(AnyConfig()).double().requires_grad_(False)
            for parameter in base.parameters():
                parameter.data.normal_(std=0.2)
            plain, ours = copy.deepcopy(base), ChainExperts(base)
            d_in = next(iter(expert_matrices(base).values()))[0]
            for matrix in expert_matrices(base):
                chain = ours.adapt(matrix, rank=3, depth=2, alpha=6.0).double()
                for parameter in chain.parameters():
                    parameter.data.normal_(std=0.3)
                delta = chain.delta_weight(torch.float64)
                getattr(plain, matrix).data += delta.mT if is_transposed(base) else delta
            index = torch.stack([torch.randperm(base.num_experts)[:2] for _ in range(10)])
            inputs = torch.randn(10, d_in, dtype=torch.float64), index, torch.rand(10, 2, dtype=torch.float64)
            # Three of them have a step in float32 between.
            torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=0, atol=1e-5, msg=name)
            assert float((plain(*inputs) - base(*inputs)).abs().max()) > 1e-3
            found += 1
    assert found >= 60
