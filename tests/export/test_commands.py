"""`linchain merge` and `export` on finished runs of tiny models."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from linchain_cli import storage
from linchain_cli.chain import delta_weight, load_adapter
from linchain_cli.chain.files import adapter_hash
from linchain_cli.data.fingerprint import tokenizer_hash
from linchain_cli.model.computed import computed_values
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.run import RunBase, RunDirectory

from ..command_line import linchain


def files_of(directory) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def test_merge_writes_beside_the_run_and_shows_the_proof(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    before = files_of(run.path)
    assert linchain("merge", run.path) == 0
    out = capsys.readouterr().out
    assert "14 of 21 tensors changed, the others are the base's" in out
    assert re.search(r"read back: at most 0\.\d+ ulp from W0 \+ ΔW", out)
    assert "top-1 agreement 100.0 %" in out and "of 8 prompts (float32)" in out
    receipt = json.loads((run.path / "merged" / "merge.json").read_bytes())
    assert receipt["logits"]["prompts"] == 8 and receipt["logits"]["largest_difference"] < 1e-5
    after = {name: data for name, data in files_of(run.path).items() if not name.startswith("merged/")}
    assert after == before
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run.path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "merged")
    assert model.generate(**tokenizer("the kettle", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_a_merged_checkpoint_asks_through_the_chat_template_it_was_trained_with(make_run, base_of):
    from transformers import AutoTokenizer

    base = base_of("llama")
    run = make_run(base)
    recipe = yaml.safe_load(run.recipe_path.read_text())
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    recipe["data"] |= {"template": "chat", "chat": {"template": own}}
    run.recipe_path.write_text(yaml.safe_dump(recipe))
    before = AutoTokenizer.from_pretrained(base).chat_template
    assert linchain("merge", run.path, "--no-proof") == 0
    assert AutoTokenizer.from_pretrained(run.path / "merged").chat_template == own
    assert AutoTokenizer.from_pretrained(base).chat_template == before != own


def test_what_other_programs_do_not_ask_with_is_said(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    recipe = yaml.safe_load(run.recipe_path.read_text())
    recipe["data"] |= {"template": "chat", "chat": {"options": {"enable_thinking": False}}}
    run.recipe_path.write_text(yaml.safe_dump(recipe))
    said = 'was trained with chat_template_kwargs {"enable_thinking": false} (data.chat.options). Other'
    for command in (("merge", run.path, "--no-proof"), ("export", run.path, "--format", "peft")):
        assert linchain(*command) == 0
        assert said in capsys.readouterr().err


def test_merge_without_a_name_takes_the_newest_run_and_says_so(
    make_run, base_of, capsys, tmp_path, monkeypatch
):
    run = make_run(base_of("llama"))
    monkeypatch.chdir(tmp_path)
    assert linchain("merge", "--no-proof") == 0
    assert f"run runs/{run.path.name}" in capsys.readouterr().err
    assert json.loads((run.path / "merged" / "merge.json").read_bytes())["logits"] is None


def test_merge_again_needs_overwrite(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    assert linchain("merge", run.path, "--no-proof") == 0
    assert linchain("merge", run.path, "--no-proof") == 2
    assert "Use --overwrite" in capsys.readouterr().err
    assert linchain("merge", run.path, "--no-proof", "--overwrite", "--dtype", "bfloat16") == 0
    config = json.loads((run.path / "merged" / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"


def test_several_runs_are_merged_as_a_weighted_sum(make_run, base_of, capsys, tmp_path):
    from safetensors.torch import load_file

    base = base_of("llama")
    one = make_run(base, "one", targets=["q_proj", "v_proj"], seed=1)
    two = make_run(base, "two", targets=["v_proj"], rank=2, depth=1, seed=2)
    out = tmp_path / "sum"
    assert linchain("merge", one.path, two.path, "--weights", "0.25,-2", "--out", out) == 0
    shown = capsys.readouterr().out
    assert "0.25 × one + -2 × two: every ΔW within" in shown and "read back: at most 0." in shown
    assert "top-1 agreement 100.0 %" in shown
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    parts = [(load_adapter(run.adapter_dir), weight) for run, weight in ((one, 0.25), (two, -2.0))]
    for path in parts[0][0].tensors:
        exact = before[f"{path}.weight"].double()
        for adapter, weight in parts:
            if path in adapter.tensors:
                scaling = adapter.config.scaling
                exact += weight * delta_weight(*adapter.tensors[path], scaling, torch.float64)
        torch.testing.assert_close(after[f"{path}.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    receipt = json.loads((out / "merge.json").read_bytes())
    assert [(part["name"], part["weight"]) for part in receipt["parts"]] == [("one", 0.25), ("two", -2.0)]
    assert receipt["tensors"]["changed"] == 4 and receipt["sum_error"] < 1e-6
    card = (out / "README.md").read_text()
    assert "# one + two" in card and "a weighted sum, 0.25 × `one` + -2 × `two`, on 4 linear modules" in card
    assert linchain("merge", one.path, two.path, "--weights", "1,1", "--out", out) == 2
    again = ("--weights", "1,1", "--out", out, "--no-proof", "--overwrite")
    assert linchain("merge", one.path, two.path, *again) == 0


def test_a_sum_may_be_an_adapter_that_every_command_takes(make_run, base_of, capsys, tmp_path):
    base = base_of("llama")
    one = make_run(base, "one", targets=["q_proj", "v_proj"], seed=1)
    two = make_run(base, "two", targets=["v_proj"], rank=2, depth=1, seed=2)
    runs = ("merge", one.path, two.path, "--weights", "0.5,0.5")
    out = tmp_path / "both"
    assert linchain(*runs, "--as-adapter", "--out", out) == 0
    assert f"{out}: an adapter of rank 6 on 4 modules" in capsys.readouterr().out
    assert linchain(*runs, "--as-adapter", "--out", out, "--overwrite", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == 6 and found["depth"] == 3 and found["sum_error"] < 1e-6
    assert linchain(*runs, "--out", tmp_path / "checkpoint", "--no-proof") == 0
    assert linchain("merge", out) == 0
    merged, direct = out / "merged" / "model.safetensors", tmp_path / "checkpoint" / "model.safetensors"
    assert merged.read_bytes() == direct.read_bytes()
    assert linchain("export", out, "--format", "peft") == 0
    prompts = [(place / "linchain_prompt.json").read_bytes() for place in (out, tmp_path / "checkpoint")]
    assert prompts[0] == prompts[1]
    assert linchain("merge", one.path, "--as-adapter") == 2
    assert "--as-adapter is for a sum of runs" in capsys.readouterr().err


def test_a_sum_says_what_is_missing(make_run, base_of, capsys, tmp_path):
    one, two = make_run(base_of("llama"), "one"), make_run(base_of("qwen2"), "two")
    out = ("--out", tmp_path / "sum")
    for words, reason in (
        ((), "2 runs are summed: say how with --weights, such as 0.5,0.5"),
        (("--weights", "1,1"), "say where it goes with --out DIR"),
        (("--weights", "1,x", *out), "is not a list of numbers"),
        (("--weights", "0,0", *out), "is not a list of numbers"),
        (("--weights", "1,nan", *out), "is not a list of numbers"),
        (("--weights", "1", *out), "1 numbers for 2 runs"),
        (("--weights", "1,1", *out), f"{two.path} was trained on other weights"),
        (("--weights", "1,1", "--out", two.path / "adapter"), "cannot be the output"),
    ):
        assert linchain("merge", one.path, two.path, *words) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-shard-size", "much"], "--max-shard-size: 'much' is not a size"),
        (["--base", "nowhere/at all"], "no model at 'nowhere/at all'"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_options_are_told_and_nothing_is_written(make_run, base_of, capsys, arguments, message):
    run = make_run(base_of("llama"))
    before = files_of(run.path)
    assert linchain("merge", run.path, *arguments) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err and "Traceback" not in err
    assert files_of(run.path) == before


def test_a_stopped_run_gives_its_newest_checkpoint(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    run.update_status(status="stopped")
    shutil.move(run.adapter_dir, run.checkpoints_dir / "step-000200")
    for command in (["merge", "--no-proof"], ["export", "--format", "peft"], ["inspect"]):
        assert linchain(command[0], run.path, *command[1:]) == 0
        assert "was stopped: taking its newest checkpoint, step-000200" in capsys.readouterr().err
    assert (run.path / "merged-step-000200" / "merge.json").is_file()
    assert (run.path / "peft-step-000200" / "adapter_model.safetensors").is_file()
    assert (run.path / "inspect-step-000200.json").is_file() and not (run.path / "merged").exists()


def test_a_run_without_an_adapter_is_refused(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    run.update_status(status="stopped")
    for command in (["merge"], ["export", "--format", "peft"], ["inspect"]):
        assert linchain(command[0], run.path, *command[1:]) == 2
        assert "was stopped and has no checkpoint yet" in capsys.readouterr().err


def test_a_base_that_has_moved_is_named_with_base(make_run, base_of, capsys, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(base_of("llama"), home)
    run = make_run(home)
    home.rename(tmp_path / "elsewhere")
    assert linchain("merge", run.path, "--no-proof") == 2
    assert "--base MODEL" in capsys.readouterr().err
    assert linchain("merge", run.path, "--no-proof", "--base", tmp_path / "elsewhere") == 0


def test_a_tokenizer_that_was_changed_since_is_told(make_run, checkpoint, capsys):
    run = make_run(checkpoint)
    trained_with = tokenizer_hash(load_tokenizer(checkpoint))
    run.update_status(hashes={"tokenizer": trained_with})
    assert linchain("export", run.path) == 0
    assert "tokenizer" not in capsys.readouterr().err
    text = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    changed = text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    assert changed != text
    (checkpoint / "tokenizer.json").write_text(changed, encoding="utf-8")
    for words in (["export", run.path, "--overwrite"], ["merge", run.path, "--no-proof"]):
        assert linchain(*words) == 0
        assert f"warning: {run.path} was trained with another tokenizer" in capsys.readouterr().err
    run.update_status(hashes={"tokenizer": f"tokenizers-0.0.1:{trained_with.partition(':')[2]}"})
    assert linchain("export", run.path, "--overwrite") == 0
    assert "tokenizer" not in capsys.readouterr().err, "another version may write the same one otherwise"


def test_a_configuration_that_was_changed_since_is_told(make_run, checkpoint, capsys):
    run = make_run(checkpoint)
    config = json.loads((checkpoint / "config.json").read_bytes())
    place = run.read_status().base or RunBase(path=str(checkpoint), source=str(checkpoint))
    run.update_status(base=replace(place, config=computed_values(config)))
    (checkpoint / "config.json").write_text(json.dumps(config | {"transformers_version": "4.40.0"}))
    assert linchain("export", run.path) == 0
    assert "config.json" not in capsys.readouterr().err
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    for words in (["export", run.path, "--overwrite"], ["merge", run.path, "--no-proof"]):
        assert linchain(*words) == 0
        told = capsys.readouterr().err
        assert f"warning: {run.path} was trained with another config.json than {checkpoint}" in told
        assert "(rms_norm_eps: 1e-06, now 0.25)" in told


def test_rows_that_are_gone_do_not_stop_a_merge(make_run, base_of, capsys, tmp_path):
    run = make_run(base_of("llama"), data=str(tmp_path / "gone.jsonl"))
    assert linchain("merge", run.path) == 0
    shown = capsys.readouterr()
    assert "rows cannot be read" in shown.err and "plain sentences instead" in shown.err
    assert "top-1 agreement" in shown.out


def test_a_quantised_run_reports_the_gap_to_its_own_base(make_run, base_of, capsys):
    run = make_run(base_of("llama"), quantization="nf4", targets=["q_proj"])
    assert linchain("merge", run.path) == 0
    assert re.search(
        r"merged against the adapter on the rounded base: largest difference 0\.\d+", capsys.readouterr().out
    )


def test_a_loss_by_rounding_is_told(make_run, base_of, capsys):
    base = base_of("llama", torch.bfloat16)
    run = make_run(base, targets=["q_proj"])
    adapter = load_adapter(run.adapter_dir)
    from linchain_cli.chain import save_adapter

    for path, chain in adapter.tensors.items():
        adapter.tensors[path] = chain._replace(B=1e-6 * chain.B)
    save_adapter(adapter, run.adapter_dir)
    assert linchain("merge", run.path) == 0
    assert (
        "WARNING: rounding to the stored type loses most of what the adapter does" in capsys.readouterr().out
    )


def test_export_and_import_are_inverse(make_run, base_of, capsys, tmp_path):
    run = make_run(base_of("llama"), depth=0)
    assert linchain("export", run.path, "--format", "peft") == 0
    assert "a LoRA of rank 4 on 14 modules" in capsys.readouterr().out
    peft = run.path / "peft"
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "export.json",
        "linchain_prompt.json",
    } == set(files_of(peft))
    assert linchain("import", peft, "--out", tmp_path / "back") == 0
    out = capsys.readouterr().out
    assert "a LoRA of rank 4, alpha 8, on 14 modules" in out and "linchain_prompt.json" in out
    back = RunDirectory(tmp_path / "back")
    one, two = run.adapter_dir / "chain.safetensors", back.adapter_dir / "chain.safetensors"
    assert one.read_bytes() == two.read_bytes()
    base = str(base_of("llama").resolve())
    assert (back.read_status().base.source, back.read_status().base.directory) == (base, base)
    assert load_adapter(back.adapter_dir).base["hash"] == load_adapter(run.adapter_dir).base["hash"]


def test_with_json_stdout_holds_what_the_files_say(make_run, base_of, capsys):
    run = make_run(base_of("llama"))
    for command, name in (("merge", "merged/merge.json"), ("export", "peft/export.json")):
        assert linchain(command, run.path, "--json") == 0
        said, written = json.loads(capsys.readouterr().out), json.loads((run.path / name).read_bytes())
        assert said.pop("directory") == str((run.path / name).parent)
        del written["format"], written["format_version"]
        assert said == written
    assert linchain("inspect", run.path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run.path / "inspect.json").read_bytes())


def test_a_diverged_adapter_is_told(make_run, base_of, capsys):
    from linchain_cli.chain import save_adapter

    run = make_run(base_of("llama"))
    adapter = load_adapter(run.adapter_dir)
    path, chain = next(iter(adapter.tensors.items()))
    adapter.tensors[path] = chain._replace(A=torch.full_like(chain.A, torch.nan))
    save_adapter(adapter, run.adapter_dir)
    for command in ("inspect", "merge", "export"):
        assert linchain(command, run.path) == 2
        assert "not finite: its training diverged" in capsys.readouterr().err


def test_the_card_says_what_it_is(make_run, base_of, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = base_of("llama")
    run = make_run(base, data=str(tmp_path / "home" / "me" / "rows.jsonl"))
    run.eval_dir.mkdir()
    task = {"accuracy": 0.5, "stderr": 0.05, "n": 100, "unparsable": 0}
    result = {
        "model": "m",
        "protocol": "likelihood",
        "template": "alpaca",
        "dtype": "float32",
        "adapter_sha256": adapter_hash(run.adapter_dir),
        "tasks": {"boolq": task, "piqa": {"accuracy": 0.25}},
    }
    (run.eval_dir / "likelihood.json").write_text(json.dumps(result))
    (run.eval_dir / "broken.json").write_text("{")
    assert linchain("merge", run.path, "--no-proof") == 0 and linchain("export", run.path) == 0
    for kind in ("merged", "peft"):
        card = (run.path / kind / "README.md").read_text()
        assert card.startswith("---\n")
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == ("peft" if kind == "peft" else "transformers")
        assert "base_model" not in front, "a local directory is no model of the hub"
        assert f"`{base.name}`" in card and "- `rows.jsonl`" in card and "rank 4 at most" in card
        assert "| boolq | 50.00 | 5.00 | 100 |  | likelihood · template alpaca · float32 |" in card
        assert "| piqa | 25.00 | – | – |  |" in card, "a standard error and a count may be missing"
        recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
        assert recipe["model"]["path"] == base.name and recipe["adapter"]["rank"] == 4
        assert "from_pretrained" in card
        for place in (str(tmp_path), str(base.parent)):
            for name in ("README.md", "merge.json", "export.json", "config.json"):
                path = run.path / kind / name
                assert not path.exists() or place not in path.read_text()


def test_a_base_given_anew_is_the_one_that_is_named(make_run, base_of, tmp_path, capsys):
    home, new = tmp_path / "old-home", tmp_path / "new-home"
    shutil.copytree(base_of("llama"), home)
    run = make_run(home)
    home.rename(new)
    assert linchain("export", run.path, "--base", new) == 0
    assert f"names {new} as the base, for this machine" in capsys.readouterr().out
    config = json.loads((run.path / "peft" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(new)
    assert linchain("merge", run.path, "--no-proof", "--base", new) == 0
    for kind in ("peft", "merged"):
        for path in (run.path / kind).glob("*.[jm][sd]*"):
            assert "old-home" not in path.read_text().split("## Recipe")[0], path
    for path in (run.path / "merged" / "merge.json", run.path / "peft" / "export.json"):
        receipt = json.loads(path.read_bytes())
        assert receipt["base"]["name"] == "new-home"
        for name, digest in receipt["adapter"]["hashes"].items():
            assert digest == storage.sha256_file(run.adapter_dir / name), "the adapter as the run has it"


def test_outputs_are_looked_at_before_the_base(make_run, base_of, capsys, tmp_path, monkeypatch):
    from linchain_cli.model import files

    run = make_run(base_of("llama"))
    monkeypatch.setattr(files, "find_base", lambda *_, **__: pytest.fail("looked for the base first"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for command in ("merge", "export"):
        assert linchain(command, run.path, "--out", tmp_path / "full") == 2
        assert "exists and is left as it is" in capsys.readouterr().err
        assert linchain(command, run.path, "--out", tmp_path / "file" / "below") == 2
        assert "cannot be made" in capsys.readouterr().err
