"""`linchain push` to a hub on this machine, by the hub's own client: what goes up, and what never does."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import constants

from linchain_cli.chain import load_adapter
from linchain_cli.errors import InputError
from linchain_cli.export.publish import plan_publication

from ..command_line import linchain
from .hub import COMMIT, TOKEN, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as found:
        before = constants.ENDPOINT
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(before, found.url))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def run(make_run, base_of, hub):
    """A run, whose base is on the hub as well."""
    base = base_of("llama")
    hub.create("org/base", files={path.name: path.read_bytes() for path in base.iterdir()})
    return make_run(base)


def files(hub, repo="me/adapter"):
    return hub.repositories[repo]["files"]


def test_a_runs_adapter_goes_up_for_peft_and_comes_back(run, hub, capsys, tmp_path):
    assert linchain("push", run.path, "me/adapter", "--base", "org/base", "--yes") == 0
    out = capsys.readouterr().out
    assert f"{hub.url}/me/adapter (new, PUBLIC), as someone:" in out and "adapter_model.safetensors" in out
    assert f"published: {hub.url}/me/adapter/commit/{COMMIT}" in out
    found = files(hub)
    assert set(found) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
        "linchain_prompt.json",
    }
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = found["README.md"].decode()
    assert "base_model: org/base" in card and 'from_pretrained(base, "me/adapter")' in card
    assert not any(str(tmp_path).encode() in content for content in found.values())
    assert not any(TOKEN.encode() in body for body in hub.bodies)
    assert hub.commits == 1
    # Once more: the weights are there already.
    assert linchain("push", run.path, "me/adapter", "--base", "org/base", "--yes", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["commit"].endswith(COMMIT) and set(said["files"]) == set(found) and not said["private"]
    assert sum(method == "PUT" for method, _ in hub.requests) == 1
    assert linchain("import", "me/adapter", "--out", tmp_path / "back") == 0
    one, two = load_adapter(run.adapter_dir), load_adapter(tmp_path / "back" / "adapter")
    assert one.tensors.keys() == two.tensors.keys() and two.base["path"] == "org/base"


def test_a_merged_checkpoint_goes_up_with_what_merge_wrote_alone(run, hub, capsys):
    assert linchain("push", run.path, "me/model", "--merged", "--yes") == 2
    assert "write it with 'linchain merge" in capsys.readouterr().err
    assert linchain("merge", run.path, "--no-proof") == 0
    (run.path / "merged" / "notes.txt").write_text("for myself")
    hub.create("me/model", private=True, files={"README.md": b"old", "other.txt": b"stays"})
    capsys.readouterr()
    assert linchain("push", run.path, "me/model", "--merged", "--private", "--yes") == 0
    out = capsys.readouterr().out
    assert "(there already, private)" in out and "README.md  (replaces the one there)" in out
    assert "stays here: notes.txt" in out
    found = files(hub, "me/model")
    assert "notes.txt" not in found and found["other.txt"] == b"stays"
    assert found["model.safetensors"] == (run.path / "merged" / "model.safetensors").read_bytes()
    assert b'from_pretrained("me/model")' in found["README.md"]
    assert linchain("push", run.path / "merged", "me/second", "--private", "--yes") == 0
    assert hub.repositories["me/second"]["private"]


def test_nothing_is_sent_before_it_is_shown_and_allowed(run, hub, capsys, monkeypatch):
    import io

    push = ("push", run.path, "me/adapter", "--base", "org/base")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert linchain(*push) == 2
    shown = capsys.readouterr()
    assert "adapter_model.safetensors" in shown.out and "Send it with --yes" in shown.err

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("no\n"))
    assert linchain(*push) == 2
    assert "nothing was sent" in capsys.readouterr().err and "me/adapter" not in hub.repositories
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert linchain(*push, "--private", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["private"] and hub.repositories["me/adapter"]["private"]
    assert "adapter_model.safetensors" in shown.err


@pytest.mark.parametrize(
    ("refuse", "code", "reason"),
    [
        ({("GET", "/whoami"): 401}, 2, "does not accept the token (HTTP 401): log in again"),
        ({("POST", "/create"): 403}, 2, "the token may not write to me/adapter (HTTP 403)"),
        ({("POST", "/create"): 404}, 2, "no user or organisation 'me'"),
        ({("POST", "/commit/"): 403}, 2, "the token may not write to me/adapter (HTTP 403)"),
        ({("POST", "/commit/"): 413}, 1, "the hub refused me/adapter (HTTP 413"),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_remedy(run, hub, capsys, refuse, code, reason):
    hub.refuse = refuse
    assert linchain("push", run.path, "me/adapter", "--base", "org/base", "--yes") == code
    err = capsys.readouterr().err
    assert reason in err and "Traceback" not in err and TOKEN not in err
    assert not hub.commits


def test_without_token_or_network_it_is_told(run, hub, capsys, monkeypatch, tmp_path):
    assert linchain("export", run.path, "--base", "org/base") == 0
    push = ("push", run.path / "peft", "me/adapter", "--yes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    assert linchain(*push) == 1
    assert "the hub (http://127.0.0.1:9) cannot be reached" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert linchain(*push) == 2
    assert "nobody is logged in to the hub: run 'hf auth login'" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert linchain(*push) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_base_of_this_machine_is_not_published(run, hub, capsys):
    assert linchain("push", run.path, "me/adapter", "--yes") == 2
    assert "nobody else can load: name it by its hub id with --base" in capsys.readouterr().err
    assert linchain("export", run.path) == 0
    capsys.readouterr()
    assert linchain("push", run.path / "peft", "me/adapter", "--yes") == 2
    assert "export it again with --base" in capsys.readouterr().err
    assert not any(method == "POST" for method, _ in hub.requests)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export's directory with a card and a receipt, small."""
    directory = tmp_path_factory.mktemp("exported")
    receipt = {
        "format": "linchain export",
        "format_version": 2,
        "kind": "peft",
        "files": {"adapter_config.json": "0", "tokenizer.json": "0"},
        "modules": 1,
        "largest_error": 0.0,
        "largest_error_module": "x",
    }
    (directory / "export.json").write_text(json.dumps(receipt))
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (directory / "tokenizer.json").write_text('{"vocab": {"/home/x/y": 1, "https://a.b/home/x": 2}}')
    (directory / "README.md").write_text("See https://host.org/home/page and /homes/ and ~/models.\n")
    return directory


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("README.md", f"one\ntwo {TOKEN}\n", "README.md, line 2: a token of the hub (hf_xxx…)"),
        ("README.md", "key: sk-proj-" + "a1" * 12, "line 1: an API key"),
        ("README.md", "AKIA" + "A1" * 8, "an AWS key"),
        ("tokenizer.json", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("README.md", "from `/home/somebody/models/x`", "'/home/somebody/models/x' is a path of this"),
        ("README.md", "in C:\\\\Users\\\\somebody\\\\x", "is a path of this machine"),
        ("README.md", "PLACE/model", "is a path of this machine"),
        ("adapter_config.json", '{"base_model_name_or_path": "models/a/b"}', "export it again with --base"),
        ("adapter_config.json", '{"base_model_name_or_path": null}', "names no base model"),
        ("export.json", None, "neither merge.json nor export.json"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
    ],
)
def test_secrets_and_paths_of_this_machine_never_go_up(exported, tmp_path, name, text, reason):
    directory = tmp_path / "copy"
    shutil.copytree(exported, directory)
    assert set(plan_publication(directory, "me/x").files) == {
        "README.md", "adapter_config.json", "export.json", "tokenizer.json"
    }  # fmt: skip
    if text is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(text.replace("PLACE", str(directory)))
    with pytest.raises(InputError) as error:
        plan_publication(directory, "me/x")
    assert reason in str(error.value)
    assert text is None or TOKEN not in str(error.value)


def test_the_metadata_of_weights_are_looked_through(exported, tmp_path):
    import torch
    from safetensors.torch import save_file

    directory = tmp_path / "copy"
    shutil.copytree(exported, directory)
    receipt = json.loads((directory / "export.json").read_text())
    receipt["files"]["x.safetensors"] = "0"
    (directory / "export.json").write_text(json.dumps(receipt))
    for note, fine in (("fine", True), ("/home/somebody/run", False)):
        save_file({"w": torch.zeros(1)}, directory / "x.safetensors", {"note": note})
        if fine:
            plan_publication(directory, "me/x")
        else:
            with pytest.raises(InputError, match="x.safetensors, line 1: '/home/somebody/run'"):
                plan_publication(directory, "me/x")


def test_a_checkpoint_that_failed_its_proof_is_not_published(exported, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(exported, directory)
    receipt = json.loads((directory / "export.json").read_text())
    receipt["not_proven"] = ["FAILED: no finite number"]
    (directory / "export.json").write_text(json.dumps(receipt))
    with pytest.raises(InputError, match="is not published: export.json says FAILED"):
        plan_publication(directory, "me/x")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("a", "b", "c/d"), "expected [RUN|DIR] ORG/NAME"),
        (("name",), "'name' is no repository's name: the repository comes last, as ORG/NAME"),
        (("me/x", "runs"), "'runs' is a directory here: the repository comes last"),
        (("nothing", "me/x"), "nothing is neither a run nor a directory"),
        (("runs", "me/x", "--merged"), "--merged and --base are for runs"),
        (("me/x",), "no finished run below runs/"),
    ],
)
def test_wrong_words_are_told(tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert linchain("push", *words) == 2
    assert reason in capsys.readouterr().err
