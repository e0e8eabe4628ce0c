"""Recomputed and compiled blocks: the same gradients as without; and quantised bases."""

from __future__ import annotations

import os
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, chain_layers, find_siblings, folded, inject
from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.model.flat_rows import attention_way
from linchain_cli.model.head import decoder_blocks, hidden_states
from linchain_cli.training import blocks, loop, loss
from linchain_cli.training.signals import StopRequest

CPU = torch.device("cpu")


def one_step(job) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer gets in one step."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in chain_layers(job.model).values():
            layer.B.normal_(0.0, 0.1, generator=generator)
    captured: dict[str, torch.Tensor] = {}
    job.optimizer.register_step_pre_hook(
        lambda *_: captured.update(
            {name: parameter.grad.clone() for name, parameter in job.parameters.items()}
        )
    )
    loop.optimizer_step(job, np.arange(4), 0.0, StopRequest())
    return captured


@pytest.mark.parametrize(("dropout", "offload"), [(0.0, False), (0.3, False), (0.3, True)])
def test_recomputed_gradients_are_bitwise_those_of_kept_activations(job_of, dropout, offload):
    plain = one_step(job_of({"adapter.dropout": dropout}))
    recomputing = {"training.gradient_checkpointing": True, "training.offload_activations": offload}
    job = job_of({"adapter.dropout": dropout, **recomputing})
    calls = []
    layer = chain_layers(job.model)["model.layers.0.self_attn.q_proj"]
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    recomputed = one_step(job)
    assert len(calls) == 4, "two micro-batches, each forward twice"
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())
    blocks.set_up_blocks(job.model, recompute=False, compiled=False)


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps from the forward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), folded(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


def test_recomputed_blocks_keep_less(job_of):
    ids = torch.arange(3, 103)[None].repeat(4, 1)
    plain = saved_bytes(job_of().model, ids)
    job = job_of({"training.gradient_checkpointing": True})
    assert saved_bytes(job.model, ids) < plain / 4
    blocks.set_up_blocks(job.model, recompute=False, compiled=False)
    assert saved_bytes(job.model, ids) == plain


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_block_computed_again_is_gone_behind_its_backward_pass(small_model, kind, dropout):
    """Recomputation ends by an exception, in the last product of a block: who noted its input keeps all."""
    model = small_model(kind)
    inject(model, ChainConfig(4, 2, 8.0, dropout, "orthogonal", "all-linear"), seed=1)
    ids, computed = torch.arange(3, 23)[None], []
    find_siblings(model, lambda: hidden_states(model, ids))
    blocks.set_up_blocks(model, recompute=True, compiled=False)
    model.train(dropout > 0)

    def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            computed.append(weakref.ref(output.untyped_storage()))

    for layer in chain_layers(model).values():
        layer.register_forward_hook(note)
    with folded(model):
        hidden = hidden_states(model, ids)
        computed.clear()
        hidden.sum().backward()
        assert computed and all(storage() is None for storage in computed)


def test_offloaded_blocks_leave_nothing_behind_but_their_hidden_states(job_of, monkeypatch):
    offloaded = []

    class Recorded(blocks.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: offloaded.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(blocks, "save_on_cpu", Recorded)
    job = job_of({"training.gradient_checkpointing": True, "training.offload_activations": True})
    ids = torch.arange(3, 103)[None].repeat(4, 1)
    with folded(job.model):
        job.model.base_model(input_ids=ids, use_cache=False)
    kept = [shape for shape in offloaded if shape.numel()]
    assert kept == [(4, 100, 64)] * 2, "the input of each block, and no mask or angle"
    blocks.set_up_blocks(job.model, recompute=False, compiled=False)


def test_blocks_are_as_they_were_after_switching_back(job_of):
    job = job_of({"training.gradient_checkpointing": True})
    assert all("forward" in vars(block) for block in decoder_blocks(job.model))
    job = job_of()
    assert not any("forward" in vars(block) for block in decoder_blocks(job.model))


def test_compiling_leaves_torch_as_it_found_it(job_of):
    from torch._dynamo import config as dynamo
    from torch.fx.experimental import _config as symbolic_shapes

    before = dynamo.recompile_limit, symbolic_shapes.use_duck_shape
    model = job_of().model
    blocks.set_up_blocks(model, recompute=False, compiled=True)
    assert (dynamo.recompile_limit, symbolic_shapes.use_duck_shape) == (64, False) != before
    blocks.set_up_blocks(model, recompute=False, compiled=False)
    assert (dynamo.recompile_limit, symbolic_shapes.use_duck_shape) == before


def test_dropout_of_the_base_stays_off_when_blocks_are_recomputed():
    """OPT's blocks apply dropout whenever they are in training mode, which transformers' own recomputation
    needs.
    """
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        dropout=0.5,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    model = OPTForCausalLM(config).eval().requires_grad_(False)
    inject(model, ChainConfig(rank=2, depth=1, alpha=2, target_modules=["q_proj"]))
    blocks.set_up_blocks(model, recompute=True, compiled=False)
    ids = torch.arange(3, 13)[None]
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert first.requires_grad and torch.equal(first, second)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("dropout", "recompute"), [(0.0, False), (0.3, True)])
def test_compiled_blocks_are_one_graph_and_give_the_same_gradients(
    job_of, monkeypatch, dropout, recompute, quantization
):
    """Traced with autograd, without generated code: that takes a minute, see the slow test."""
    compile = torch.compile
    graphs = []

    def traced(forward, **options):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        return compile(forward, backend=backend, fullgraph=True, **options)

    changes = {
        "adapter.dropout": dropout,
        "training.gradient_checkpointing": recompute,
        "model.quantization": quantization,
    }
    plain = one_step(job_of(changes))
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    job = job_of({**changes, "training.compile": True})
    compiled = one_step(job)
    assert 1 <= len(graphs) <= 2, (
        "the first block's input needs no gradient, the others' does; no other recompilation"
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)
    blocks.set_up_blocks(job.model, recompute=False, compiled=False)


def test_other_lengths_need_no_other_program(job_of, monkeypatch):
    """Nor do other numbers of labels, or of tokens that belong to no row (none, 15, 9 and one)."""
    compile, graphs = torch.compile, []

    def traced(forward, **options):
        return compile(forward, backend=lambda graph, inputs: graphs.append(graph) or graph, **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    job = job_of({"training.compile": True})
    assert attention_way(job.model, 48) is not None
    counts = []
    for lengths, labels in (((24, 24), 2), ((20, 13), 6), ((9, 30), 4), ((22, 25), 4)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = torch.arange(mask.numel()).view_as(mask) % 90 + 3
        supervised = mask & (torch.arange(max(lengths)) > max(lengths) - 1 - labels // 2)
        batch = Batch(ids * mask, mask.long(), ids.where(supervised, IGNORED))
        with folded(job.model):
            loss.add_gradients(job.model, batch, 1.0, CPU)
        counts.append(len(graphs))
    assert counts[0] == counts[-1] > 0
    blocks.set_up_blocks(job.model, recompute=False, compiled=False)


@pytest.mark.skipif(
    "LINCHAIN_TEST_SLOW" not in os.environ, reason="compiles for a minute; LINCHAIN_TEST_SLOW=1 runs it"
)
def test_generated_code_gives_the_same_gradients(job_of):
    plain = one_step(job_of())
    torch._dynamo.reset()
    compiled = one_step(job_of({"training.compile": True}))
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


def test_blocks_that_cannot_be_compiled_are_told_in_a_sentence(run_tiny, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def fails(*args):
        raise BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(loop, "optimizer_step", fails)
    with pytest.raises(
        LinchainError, match="training.compile: torch cannot compile the blocks here .*no C.. compiler.*false"
    ):
        run_tiny({"training.compile": True})


def test_a_signal_while_torch_compiles_stops_the_run(run_tiny, monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    def interrupted(*args):
        try:
            raise Stopped("stopped before the first step", 15)
        except Stopped as stop:
            raise InternalTorchDynamoError(str(stop)) from stop

    monkeypatch.setattr(loop, "optimizer_step", interrupted)
    with pytest.raises(Stopped, match="^stopped before the first step$") as caught:
        run_tiny({"training.compile": True})
    assert caught.value.exit_code == 143


def test_models_without_blocks_are_told_apart():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    model = Flat()
    model.config = type("Config", (), {"get_text_config": lambda self, decoder: self})()
    with pytest.raises(InputError, match="is not made of blocks, which training.gradient_checkpointing"):
        decoder_blocks(model)
