"""Where base models lie: directories, weight files, the hub and its refusals."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.importing.finding import find_checkpoint
from linchain_cli.model import files as model_files
from linchain_cli.model.files import FoundBase, find_base, locate, looks_local, weight_files
from linchain_cli.model.loading import load_model

# Local paths


def test_a_directory_is_taken_as_it_is(tiny_llama_dir):
    assert locate(str(tiny_llama_dir)) == tiny_llama_dir


def test_a_missing_path_names_the_part_that_is_missing_and_the_nearest_name(tmp_path):
    (tmp_path / "models" / "SmolLM2-135M").mkdir(parents=True)
    with pytest.raises(InputError, match="no model at.*SmolLM-135M.*Did you mean '.*/models/SmolLM2-135M'"):
        locate(str(tmp_path / "models" / "SmolLM-135M"))
    with pytest.raises(InputError, match=r"modles does not exist.*Did you mean '.*/models'"):
        locate(str(tmp_path / "modles" / "SmolLM2-135M"))


def test_a_relative_path_below_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "SmolLM2-135M").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="at 'models/SmolLM-135M'.*Did you mean 'models/SmolLM2-135M'"):
        locate("models/SmolLM-135M")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "no config.json. The directory is empty"),
        (["model.safetensors", "notes.txt"], "no config.json. Found: model.safetensors, notes.txt"),
        (["adapter_config.json"], "PEFT adapter"),
        (["run.json", "recipe.yaml"], "is a run or an adapter, not a base model"),
        (["model-Q4.gguf"], "give one of them: .*model-Q4.gguf"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_what_it_is(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=expected):
        locate(str(tmp_path))


@pytest.mark.parametrize("find", [locate, find_checkpoint])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_clone_without_git_lfs_is_told(tmp_path, find, file):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12345\n")
    with pytest.raises(InputError, match=f"{file} is not the file itself .* `git lfs pull`"):
        find(str(tmp_path))


def test_a_file_and_an_empty_name_are_no_models(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        locate(str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="empty"):
        locate(" ")


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 64}'])
def test_a_config_that_is_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        locate(str(tmp_path))


# Weight files


def shard(directory: Path, names: list[str]) -> None:
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_listed_in_name_order(checkpoint):
    shard(checkpoint, ["model-2.safetensors", "model-1.safetensors", "model-2.safetensors"])
    shutil.copy(checkpoint / "model-1.safetensors", checkpoint / "model-2.safetensors")
    assert [file.name for file in weight_files(checkpoint)] == ["model-1.safetensors", "model-2.safetensors"]


def test_a_missing_shard_is_named(checkpoint):
    shard(checkpoint, ["model-1.safetensors", "model-2.safetensors"])
    with pytest.raises(InputError, match="1 of the 2 weight files .* missing, first model-2.safetensors"):
        locate(str(checkpoint))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret", "a/../../secret", "..\\secret", "C:secret"]
)
def test_shard_names_cannot_leave_the_directory(checkpoint, name):
    shard(checkpoint, ["model-1.safetensors", name])
    with pytest.raises(InputError, match="leads out of the model's directory"):
        weight_files(checkpoint)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}']
)
def test_an_index_without_a_weight_map(checkpoint, content):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="index.json: expected a 'weight_map'"):
        weight_files(checkpoint)


def test_a_checkpoint_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights.*Found: chat_template.jinja, config.json"):
        locate(str(checkpoint))
    assert locate(str(checkpoint), weights=False) == checkpoint


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is switched on, with an empty cache; tests replace its answers."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return huggingface_hub


def answer(error_class, status: int):
    """A function that raises what huggingface_hub raises for an HTTP status."""
    from huggingface_hub import errors

    # httpx or httpx2, by version.
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])

    def refuse(*args, **kwargs):
        response = http.Response(
            status, request=http.Request("GET", "https://huggingface.co/api/models/org/model")
        )
        raise error_class(f"{status} Client Error", response=response)

    return refuse


def test_an_unknown_hub_id(hub, monkeypatch, tmp_path):
    from huggingface_hub.errors import RepositoryNotFoundError

    (tmp_path / "hub" / "models--org--small-model" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr(hub.HfApi, "repo_info", answer(RepositoryNotFoundError, 401))
    with pytest.raises(
        InputError, match="no model 'org/smal-model'.*hf auth login.*HF_TOKEN.*mean 'org/small-model'"
    ):
        locate("org/smal-model")


def test_a_gated_model_says_how_to_get_access(hub, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    monkeypatch.setattr(hub.HfApi, "repo_info", lambda *args, **kwargs: type("Info", (), {"sha": "0" * 40}))
    monkeypatch.setattr(hub, "snapshot_download", answer(GatedRepoError, 403))
    with pytest.raises(
        InputError,
        match="gated. Accept its terms at https://huggingface.co/org/model.*hf auth login.*HF_TOKEN",
    ):
        locate("org/model")


def test_an_unknown_revision(hub, monkeypatch):
    from huggingface_hub.errors import RevisionNotFoundError

    monkeypatch.setattr(hub.HfApi, "repo_info", answer(RevisionNotFoundError, 404))
    with pytest.raises(InputError, match="no revision 'v9'.*model.revision"):
        locate("org/model", revision="v9")


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, "HTTP 403.*hf auth login"), (429, "HTTP 429.*later"), (503, "cannot be reached")],
)
def test_other_refusals(hub, monkeypatch, status, expected):
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(hub.HfApi, "repo_info", answer(HfHubHTTPError, status))
    with pytest.raises(InputError, match=expected):
        locate("org/model")


@pytest.mark.parametrize("name", ["org/model--x", "a" * 97, "org/model."])
def test_an_invalid_hub_id(hub, name):
    with pytest.raises(InputError, match="neither a directory here nor a valid hub id"):
        locate(name)


def test_offline_mode_is_named_as_the_reason(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="'org/model' is not on this machine, and HF_HUB_OFFLINE is set"):
        locate("org/model")


def test_no_network(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match=r"and the hub \(http://127.0.0.1:9\) cannot be reached"):
        locate("org/model")


def test_a_silent_hub_does_not_keep_anybody_waiting(hub, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(model_files, "HUB_TIMEOUT", 0.3)
        started = time.monotonic()
        with pytest.raises(InputError, match="cannot be reached"):
            locate("org/model")
    assert time.monotonic() - started < 5


@pytest.fixture
def fake_download(hub, monkeypatch, tmp_path, tiny_llama_dir):
    """A hub with one model, `org/model`; returns the list of what was asked for."""
    import fnmatch

    asked: list[str] = []
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "0123"

    def download(repo, *, revision, local_files_only, allow_patterns, ignore_patterns, etag_timeout):
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in Path(tiny_llama_dir).iterdir():
            if not local_files_only and any(
                fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns
            ):
                asked.append(file.name)
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(hub.HfApi, "repo_info", lambda *args, **kwargs: type("Info", (), {"sha": "0123"}))
    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def test_a_hub_model_is_downloaded_small_files_first(fake_download):
    directory = locate("org/model", weights=False)
    assert "config.json" in fake_download and "model.safetensors" not in fake_download
    assert locate("org/model") == directory
    assert fake_download[-1] == "model.safetensors"
    assert load_model(directory).config.model_type == "llama"


def test_an_earlier_download_serves_when_the_hub_is_away(fake_download, hub, monkeypatch, caplog):
    directory = locate("org/model")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "repo_info", unreachable)
    assert locate("org/model") == directory
    assert "using the earlier download" in caplog.text


# The base of a run, from wherever one looks


@dataclass(frozen=True)
class Known:
    path: str
    revision: str | None = None
    commit: str | None = None
    source: str | None = None
    directory: str | None = None


@pytest.fixture
def no_hub(monkeypatch):
    """Fails the test that asks the hub."""
    monkeypatch.setattr(model_files, "_hub_directory", lambda *_: pytest.fail("the hub was asked"))


def test_a_runs_base_is_found_from_another_directory(tmp_path, tiny_llama_dir, monkeypatch, no_hub):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    base = Path(shutil.copytree(tiny_llama_dir, project / "models" / "tiny"))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    known = Known("models/tiny", source=str(base), directory=str(base))
    assert find_base(known) == FoundBase(base, source=str(base))
    # Another base of the same relative path is not the run's.
    other = Path(shutil.copytree(tiny_llama_dir, elsewhere / "models" / "tiny"))
    assert find_base(known).directory == base
    assert find_base(known, named="models/tiny").source == str(other)


def test_a_runs_base_is_found_after_both_were_moved(tmp_path, tiny_llama_dir, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    gone = str(tmp_path / "before" / "models" / "tiny")
    known = Known("models/tiny", source=gone, directory=gone)
    with pytest.raises(InputError, match=f"it was at {gone}, where nothing is now"):
        find_base(known, near=tmp_path / "now" / "runs" / "a")
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "now" / "models" / "tiny"))
    assert find_base(known, near=tmp_path / "now" / "runs" / "a").directory == base
    monkeypatch.chdir(tmp_path / "now")
    assert find_base(known).directory == base


def test_a_runs_base_from_the_hub_is_taken_at_its_commit(tmp_path, tiny_llama_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(model_files, "_hub_directory", lambda *words: asked.append(words) or tiny_llama_dir)
    snapshot = Path(shutil.copytree(tiny_llama_dir, tmp_path / "snapshots" / "0123abc"))
    known = Known("org/tiny", revision="main", commit="0123abc", directory=str(snapshot))
    assert find_base(known) == FoundBase(snapshot, commit="0123abc") and not asked
    shutil.rmtree(snapshot)
    find_base(known)
    assert asked == [("org/tiny", "0123abc", True)]


@pytest.mark.parametrize(
    "name", ["models/tiny", "runs/a", "./tiny", "../tiny", "tiny.gguf", "~/tiny", "a/b/c"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    assert looks_local(name)
    with pytest.raises(InputError, match="it looks like a path, so the hub was not asked"):
        locate(name)


@pytest.mark.parametrize("name", ["disk", "disk/tiny", "loop"])
def test_a_link_that_leads_nowhere_is_a_path(name, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    Path("disk").symlink_to("/nowhere/mounted")
    Path("loop").symlink_to("loop")
    target = "loop" if name == "loop" else "/nowhere/mounted"
    with pytest.raises(InputError, match=rf"\({name[:4]} is a link to {target}, where nothing is\)") as error:
        locate(name)
    assert "Did you mean" not in str(error.value)


def test_a_hub_id_is_no_path():
    assert not looks_local("gpt2") and not looks_local("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_an_unknown_home_directory_is_named():
    with pytest.raises(InputError, match="~nobody-knows/tiny: that user's home directory is not known"):
        locate("~nobody-knows/tiny")
