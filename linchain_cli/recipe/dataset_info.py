"""LLaMA-Factory's dataset_info.json: the data sets that its configurations call by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "dataset_info.json"
STARTED_THERE = "convert where LLaMA-Factory is started"
PAIRS = "pairs of answers, for preference training, which is not here"
DRAWN = "drawn there, from all rows; max_rows takes the first ones"
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "messages",
    "system": "system",
    "tools": "tools",
}
_TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
_USUAL = ("human", "user", "gpt", "assistant", "observation", "tool", "function_call", "system")


@dataclass(frozen=True)
class DatasetInfo:
    """What the file says of data sets, by their names; `directory` is where their files lie."""

    directory: str = "data"
    described: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    readable: bool = False

    @classmethod
    def read(cls, directory: str) -> DatasetInfo:
        """That of a directory; nothing is described where there is none that can be read."""
        try:
            found = json.loads((Path(directory) / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls(directory)
        described = found.items() if isinstance(found, dict) else ()
        return cls(directory, {name: said for name, said in described if isinstance(said, dict)}, True)

    def source(self, name: str) -> dict[str, Any] | None:
        """The data set as an entry of `data.train`; None if nothing is known of it."""
        said = self.described.get(name, {})
        if said.get("hf_hub_url"):
            source = {"path": said["hf_hub_url"]}
        elif said.get("cloud_file_name"):
            source = {"path": said["cloud_file_name"]}
        elif said.get("file_name"):
            source = {"path": str(Path(self.directory) / str(said["file_name"]))}
        else:
            return None
        for theirs, ours in (("subset", "config"), ("split", "split"), ("num_samples", "max_rows")):
            if said.get(theirs):
                source[ours] = said[theirs]
        columns = said.get("columns") if isinstance(said.get("columns"), dict) else {}
        known = {theirs: ours for theirs, ours in _COLUMNS.items() if columns.get(theirs)}
        if list(known) == ["prompt"] and "chosen" not in columns:  # documents
            known = {"prompt": "text"}
        mapped = {ours: columns[theirs] for theirs, ours in known.items() if columns[theirs] != ours}
        if mapped and mapped != {"messages": "conversations"}:
            source["columns"] = mapped
        return source

    def remarks(self, name: str) -> Iterator[str]:
        """What such an entry does not say of the data set."""
        said = self.described.get(name)
        if said is None or self.source(name) is None:
            file = Path(self.directory) / FILE
            where = "does not tell it" if self.readable else f"cannot be read: {STARTED_THERE}"
            yield f"{name}: write its file or hub id; {file} {where}"
            return
        if said.get("ranking"):
            yield f"{name}: {PAIRS}"
        if said.get("num_samples"):
            yield f"{name}: num_samples: {said['num_samples']}  ({DRAWN})"
        if said.get("folder"):
            yield f"{name}: folder: {said['folder']}  (data_files beside the path takes some of its files)"
        columns = said.get("columns") if isinstance(said.get("columns"), dict) else {}
        if {"prompt", "response"} <= columns.keys() and not columns.get("query"):
            yield f"{name}: a column `input` would be read, too, which is not named there"
        if left := [key for key in columns if key not in _COLUMNS and key not in ("chosen", "rejected")]:
            yield f"{name}: nothing reads {', '.join(left)}"
        tags = said.get("tags") if isinstance(said.get("tags"), dict) else {}
        for tag, value in tags.items():
            if value not in _TAGS.get(tag, _USUAL):
                yield f"{name}: {tag}: {value} (turns have role and content, or from and value: rename them)"
