"""GGUF files as checkpoints: nothing lost, converted once, and a clear word on what cannot be read."""

from __future__ import annotations

import json
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linchain_cli.errors import InputError
from linchain_cli.model.files import locate
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer


def write_gguf(source: Path, path: Path, **header) -> Path:
    """A Llama checkpoint with its byte-level BPE tokenizer as llama.cpp would store it, in 32-bit floats."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(path, header.get("architecture", "llama"))
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(bpe["vocab"]))])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for kind, count in heads.items():
            if kind in name:  # llama.cpp interleaves the two halves that rotary embeddings turn
                tensor = (
                    tensor.reshape(count, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
                )
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tiny_llama_dir) -> Path:
    return write_gguf(tiny_llama_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_becomes_the_same_model(gguf_file, cache, tiny_llama_dir, caplog):
    with caplog.at_level("INFO", logger="linchain_cli"):
        directory = locate(str(gguf_file))
    assert directory.is_relative_to(cache) and "once" in caplog.text
    converted, original = load_model(directory, dtype="float32"), load_model(tiny_llama_dir, dtype="float32")
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, converted.get_parameter(name)), name
    tokens = torch.arange(3, 19)[None]
    assert torch.equal(converted(tokens).logits, original(tokens).logits)
    assert not hasattr(converted.config, "quantization_config")
    ours, theirs = load_tokenizer(directory), load_tokenizer(tiny_llama_dir)
    text = "the ladder was painted in the harbour 42"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    assert converted.generation_config.eos_token_id == 2


def test_a_converted_model_is_readable_by_others_and_reused(gguf_file, cache, monkeypatch):
    directory = locate(str(gguf_file))
    for file in directory.iterdir():
        assert file.stat().st_mode & stat.S_IRGRP, file.name
    monkeypatch.setattr("linchain_cli.model.gguf.convert_gguf", lambda *args: pytest.fail("converted twice"))
    assert locate(str(gguf_file)) == directory
    monkeypatch.setattr("linchain_cli.cache.SETTLED_AFTER", -1.0)
    assert locate(str(gguf_file)) == directory
    with monkeypatch.context() as patch:
        patch.setattr("linchain_cli.cache.sha256_file", lambda path: pytest.fail("hashed once more"))
        assert locate(str(gguf_file)) == directory
    moved = Path(shutil.copy(gguf_file, cache / "tiny.gguf"))
    assert locate(str(moved)) == directory


def test_a_converted_model_is_read_alike_by_older_readers(gguf_file, cache):
    directory = locate(str(gguf_file))
    config = json.loads((directory / "config.json").read_bytes())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None and config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((directory / "tokenizer_config.json").read_bytes())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not tokenizer.keys() & {"backend", "is_local", "local_files_only"}


def test_two_processes_convert_once(gguf_file, cache, monkeypatch):
    from linchain_cli.model import gguf as gguf_files

    calls = []
    convert = gguf_files.convert_gguf

    def counted(path, target):
        calls.append(path)
        convert(path, target)

    monkeypatch.setattr(gguf_files, "convert_gguf", counted)
    threads = [threading.Thread(target=locate, args=(str(gguf_file),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_what_is_no_gguf_file_is_refused(tmp_path, cache):
    (tmp_path / "model.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="is not a GGUF file"):
        locate(str(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match="no model at.*modle.gguf.*Did you mean '.*model.gguf'"):
        locate(str(tmp_path / "modle.gguf"))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(tmp_path, cache, gguf_file, share):
    data = gguf_file.read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="tiny.gguf cannot be read as GGUF"):
        locate(str(tmp_path / "tiny.gguf"))
    assert not any(path.is_dir() for path in (cache / "gguf").iterdir())


def test_an_unknown_gguf_architecture_is_refused(tmp_path, cache, tiny_llama_dir):
    path = write_gguf(tiny_llama_dir, tmp_path / "odd.gguf", architecture="clip")
    with pytest.raises(InputError, match="odd.gguf cannot be read as GGUF.*clip"):
        locate(str(path))


def test_a_split_gguf_file_says_how_to_join_it(tmp_path, gguf_file):
    part = Path(shutil.copy(gguf_file, tmp_path / "big-00001-of-00003.gguf"))
    with pytest.raises(InputError, match="llama-gguf-split --merge big-00001-of-00003.gguf big.gguf"):
        locate(str(part))
