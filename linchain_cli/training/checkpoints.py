"""Checkpoints: directories that are complete or not there.

    checkpoints/step-000200/
        chain.safetensors, chain.json     the adapter after step 200
        optimizer.safetensors             its optimizer state
        best.safetensors                  the best adapter so far, when it is another one
        state.json                        step, tokens, best loss, fingerprints
        manifest.json                     size and SHA-256 of all of them, written last

A checkpoint is staged in a sibling directory, fsynced and renamed (directories.staged_directory), so a kill
at any instant leaves the earlier ones as they were. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from linchain_cli import directories, storage
from linchain_cli.errors import InputError
from linchain_cli.run.finding import CHECKPOINT_NAME

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run, of which the last `keep` stay."""

    def __init__(self, directory: Path, keep: int):
        self.directory = Path(directory)
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (
            CHECKPOINT_NAME.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir()
        )
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, files: Mapping[str, bytes]) -> Path:
        """Writes a checkpoint as one step, then removes the oldest beyond `keep`."""
        target = self.path(step)
        with directories.staged_directory(target) as staging:
            for name, data in files.items():
                storage.write_durable(staging / name, data)
            listing = {
                name: {"bytes": len(data), "sha256": storage.sha256_bytes(data)}
                for name, data in files.items()
            }
            storage.write_durable(staging / MANIFEST, storage.json_bytes({"step": step, "files": listing}))
        for old in self.steps()[: -self.keep]:
            directories.remove_directory(self.path(old))
        return target

    def read(self, step: int) -> dict[str, bytes]:
        """The files of one checkpoint, verified.

        Raises:
            InputError: a file is missing, truncated or altered; the message names it.
        """
        directory = self.path(step)
        files = {}
        for name, size, sha256 in self._listing(step):
            path = directory / name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror})") from error
            if len(data) != size:
                raise InputError(f"{path} is truncated: {len(data)} of {size} bytes")
            if storage.sha256_bytes(data) != sha256:
                raise InputError(f"{path} is damaged: its SHA-256 is not the manifest's")
            files[name] = data
        return files

    def _listing(self, step: int) -> list[tuple[str, int, str]]:
        path = self.path(step) / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            listing = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
            if manifest["step"] != step or any("/" in name for name, *_ in listing):
                raise ValueError("it is another checkpoint's")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is missing or damaged ({error})") from error
        return listing

    def read_latest(self, note: Callable[[str], None]) -> tuple[int, dict[str, bytes]] | None:
        """The newest checkpoint that verifies, None when there is none at all.

        A damaged one is passed over, and `note` is told which and why.

        Raises:
            InputError: there are checkpoints, but every one of them is damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                files = self.read(step)
            except InputError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                note(f"{problem}: falling back to the checkpoint before")
            return step, files
        if problems:
            raise InputError(
                f"no checkpoint below {self.directory} can be used: {'; '.join(problems)}."
                " Start over with --fresh."
            )
        return None

    def drop_after(self, step: int) -> None:
        """Sets aside checkpoints later than `step` (damaged ones that a resume fell back from)."""
        for later in self.steps():
            if later > step:
                aside = self.directory / f"damaged-step-{later:06d}"
                if aside.exists():
                    directories.remove_directory(aside)
                self.path(later).rename(aside)
