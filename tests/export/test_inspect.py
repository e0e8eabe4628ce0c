"""`linchain inspect` on finished runs of tiny models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from linchain_cli.chain import delta_weight, load_adapter

from ..command_line import linchain


def test_inspect_shows_and_writes_the_spectra(make_run, base_of, capsys):
    run = make_run(base_of("llama"), depth=2)
    assert linchain("inspect", run.path) == 0
    out = capsys.readouterr().out
    assert "rank 4 at most, whatever the depth" in out
    content = json.loads((run.path / "inspect.json").read_bytes())
    assert content["largest_possible_rank"] == 4 and len(content["modules"]) == 14
    adapter = load_adapter(run.adapter_dir)
    path = "model.layers.1.mlp.up_proj"
    module, chain = content["modules"][path], adapter.tensors[path]

    delta = delta_weight(*chain, 2.0, torch.float64)
    assert module["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
    assert len(module["singular_values"]) == 4 and len(module["link_condition_numbers"]) == 2
    assert module["relative_norm"] == pytest.approx(module["norm"] / module["base_norm"])
    assert (run.path / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_a_narrow_terminal_cuts_no_number(make_run, base_of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert linchain("inspect", make_run(base_of("llama"), depth=2).path) == 0
    table = capsys.readouterr().out.partition("14 modules")[0]
    assert "…" not in table.replace("model.layers.…", "") and "0.self_attn.q_proj" in table


def test_inspect_without_the_base_leaves_its_norms_out(make_run, base_of, capsys, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(base_of("llama"), home)
    run = make_run(home, depth=0)
    shutil.rmtree(home)
    assert linchain("inspect", run.path) == 0
    assert "‖W0‖ is left out" in capsys.readouterr().err
    assert linchain("inspect", run.path, "--base", home) == 2
