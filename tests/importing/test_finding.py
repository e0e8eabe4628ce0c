"""Adapters on the hub: found by the same code as models, fetched without what is not read."""

from __future__ import annotations

import pytest

from linchain_cli.errors import InputError
from linchain_cli.importing.finding import find_checkpoint


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub: the files of a repository on the hub, by name; beside them what was asked for."""
    import huggingface_hub
    from huggingface_hub import constants

    files, asked = {}, []
    place = tmp_path / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)

    def snapshot_download(repo, *, revision, allow_patterns, **options):
        asked.append((repo, revision, tuple(allow_patterns)))
        for name, content in files.items():
            if name in allow_patterns or name.endswith(".json") and "*.json" in allow_patterns:
                (place / name).write_text(content)
        return str(place)

    info = type("Info", (), {"sha": "0" * 40})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: info)
    return files, asked


def test_an_adapter_of_the_hub_is_fetched_at_one_commit(hub):
    files, asked = hub
    files |= {"adapter_config.json": "{}", "adapter_model.bin": "old", "optimizer.pt": "large"}
    directory = find_checkpoint("org/adapter", "v2")
    assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.bin"}
    assert {(repo, revision) for repo, revision, _ in asked} == {("org/adapter", "0" * 40)}
    files["adapter_model.safetensors"] = "new"
    asked.clear()
    find_checkpoint("org/adapter")
    assert [patterns for _, _, patterns in asked] == [("*.json",), ("adapter_model.safetensors",)]


def test_what_is_no_adapter_is_refused_before_its_weights(hub):
    files, asked = hub
    files |= {"config.json": "{}", "model.safetensors": "large"}
    with pytest.raises(InputError, match="org/model on the hub is no adapter"):
        find_checkpoint("org/model")
    assert len(asked) == 1


def test_a_path_is_never_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    assert find_checkpoint("adapters/mine").name == "mine"
    with pytest.raises(InputError, match="no adapter at 'adapters/mien'.*Did you mean 'adapters/mine'"):
        find_checkpoint("adapters/mien")
    with pytest.raises(InputError, match="--revision is for adapters on the hub"):
        find_checkpoint("adapters/mine", "v1")
    assert hub[1] == []
