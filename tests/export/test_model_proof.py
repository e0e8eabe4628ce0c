"""The proof of a merged checkpoint as a model: what cannot be shown costs no merge, and is said."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref

import pytest
import torch

from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.export import merge as merging
from linchain_cli.export import model_proof
from linchain_cli.export.card import Origin
from linchain_cli.export.merge import MergeOptions, merge_checkpoint

PROMPTS = [[5, 6, 7, 8, 9, 20, 30], [1, 2, 3]]


@pytest.fixture
def merge(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])

    def run(**options):
        given = MergeOptions(**{"prompts": PROMPTS, **options})
        return merge_checkpoint(base, adapter, tmp_path / "out", given, Origin("x"))

    return run


def receipt_of(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "merge.json").read_bytes())


def test_memory_is_what_this_process_may_take(merge, tmp_path, monkeypatch):
    monkeypatch.setattr(model_proof, "available_memory", lambda: 1000)
    merge()
    receipt = receipt_of(tmp_path)
    assert receipt["logits"] is None
    (reason,) = receipt["not_proven"]
    assert reason == "logits and generation: no model of this size fits into the memory that is free (cpu)"
    assert reason in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9")],
)
@pytest.mark.parametrize("call", [0, 1])
def test_out_of_memory_leaves_the_finished_checkpoint(merge, tmp_path, monkeypatch, error, call):
    load, calls = model_proof.load_model, []

    def loads(*arguments, **options):
        calls.append(arguments)
        if len(calls) > call:
            raise LinchainError("does not fit") from error
        return load(*arguments, **options)

    monkeypatch.setattr(model_proof, "load_model", loads)
    merge()
    assert receipt_of(tmp_path)["not_proven"] == ["logits and generation: out of memory (cpu)"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_one_model_is_in_memory_at_a_time(merge, monkeypatch):
    """Chains refer to themselves, so that the model under them goes when memory is collected."""
    load, weights, left = model_proof.load_model, [], []

    def loads(*arguments, **options):
        left.append(sum(weight() is not None for weight in weights))
        model = load(*arguments, **options)
        weights.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(model_proof, "load_model", loads)
    gc.disable()
    try:
        merge()
    finally:
        gc.enable()
    assert left == [0, 0]


def test_a_gpu_that_is_too_small_leaves_it_to_the_cpu(merge, tmp_path, monkeypatch):
    monkeypatch.setattr(model_proof, "default_device", lambda: torch.device("meta"))
    load, devices = model_proof.load_model, []

    def loads(*arguments, device, **options):
        devices.append(device.type)
        if device.type == "meta":
            raise torch.OutOfMemoryError("too small")
        return load(*arguments, device=device, **options)

    monkeypatch.setattr(model_proof, "load_model", loads)
    merge()
    assert devices == ["meta", "cpu", "cpu"] and receipt_of(tmp_path)["logits"]["top1_agreement"] == 1.0


def test_a_base_that_does_not_run_here_costs_no_merge(merge, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise InputError("a kernel is missing\nhow to install it")

    monkeypatch.setattr(model_proof, "load_model", fail)
    merge()
    (reason,) = receipt_of(tmp_path)["not_proven"]
    assert reason == "logits and generation: the base model does not run here (a kernel is missing)"


def test_a_rounded_base_that_does_not_run_here_costs_no_merge(merge, tmp_path, monkeypatch):
    load = model_proof.load_model

    def loads(*arguments, quantization="none", **options):
        if quantization != "none":
            raise ImportError("no bitsandbytes")
        return load(*arguments, **options)

    monkeypatch.setattr(model_proof, "load_model", loads)
    merge(quantization="nf4")
    receipt = receipt_of(tmp_path)
    assert receipt["logits"] and receipt["quantized"] is None
    assert receipt["not_proven"] == ["logits on the nf4 base: no bitsandbytes"]


def test_a_model_that_fails_is_an_error_and_its_receipt_says_so(merge, tmp_path, monkeypatch):
    def fail(*_):
        raise LinchainError("not finite")

    monkeypatch.setattr(model_proof, "compare_logits", fail)
    with pytest.raises(LinchainError, match="as a model it fails: not finite Do not serve it"):
        merge()
    assert receipt_of(tmp_path)["not_proven"] == ["FAILED: not finite"]
    assert "FAILED: not finite" in (tmp_path / "out" / "README.md").read_text()


def test_generation_that_only_the_base_can_do_is_an_error(merge, monkeypatch):
    generate, calls = model_proof._generate, []

    def generates(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise ValueError("no")
        return generate(*arguments)

    monkeypatch.setattr(model_proof, "_generate", generates)
    with pytest.raises(LinchainError, match="transformers cannot generate with it: no"):
        merge()


def test_generation_that_the_base_cannot_do_either_is_said(merge, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no cache")

    monkeypatch.setattr(model_proof, "_generate", fail)
    merge()
    (reason,) = receipt_of(tmp_path)["not_proven"]
    assert reason == "generation: the base model cannot generate either (no cache)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_proof_keeps_the_checkpoint_and_says_so(merge, tmp_path, monkeypatch, number):
    monkeypatch.setattr(merging, "prove_model", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="out is complete, its tensors are proven, its logits are not") as error:
        merge()
    assert error.value.exit_code == 128 + number
    receipt = receipt_of(tmp_path)
    assert receipt["largest_ulp"] <= 0.5
    assert receipt["not_proven"] == ["logits and generation: the comparison was cut off before its end"]


def test_a_signal_while_writing_leaves_nothing_and_says_so(merge, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "write_companions", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="out was not written"):
        merge()
    assert not list(tmp_path.glob("*out*"))


def test_a_card_that_cannot_be_written_costs_no_merge(merge, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("stderr")

    monkeypatch.setattr(merging, "model_card", fail)
    merge(prompts=())
    receipt = receipt_of(tmp_path)
    assert receipt["not_proven"][-1] == "no model card: KeyError: 'stderr'"
    assert not (tmp_path / "out" / "README.md").exists()
