"""Hashes that are remembered, and when they are not."""

from __future__ import annotations

import os
import time

from linchain_cli import cache


def test_file_hashes_are_remembered_only_for_settled_files(tmp_path, monkeypatch):
    path, place = tmp_path / "x.json", tmp_path / "cache"
    path.write_text("abc")
    known = cache.remembered_sha256(path, place)
    assert not (place / "hashes").exists(), "it may change again within the clock's resolution"
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 10)
    assert cache.remembered_sha256(path, place) == known
    monkeypatch.setattr(cache, "sha256_file", None)
    assert cache.remembered_sha256(path, place) == known
    monkeypatch.undo()
    change_source_status = os.stat(path)
    path.write_text("abd")
    os.utime(path, ns=(change_source_status.st_atime_ns, change_source_status.st_mtime_ns))
    assert cache.remembered_sha256(path, place) != known
    note = next((place / "hashes").iterdir())
    note.write_text("{")
    assert cache.remembered_sha256(path, place) != known
