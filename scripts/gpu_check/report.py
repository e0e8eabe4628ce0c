"""What was found, written after every part: JSON, and Markdown like the tables of docs/benchmarks.md."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from linchain_cli import __version__
from scripts.gpu_check.exact import Failed
from scripts.gpu_check.plan import REFERENCES, Measured

PACKAGES = ("transformers", "accelerate", "peft", "trl", "bitsandbytes", "triton")
# How far a loss may be from its reference in float32, and what rounding to bfloat16 may add to it.
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 2e-3, 5e-2


class Report:
    """Collects results; `failed` says whether a check did not come out as it must."""

    def __init__(self, out: Path, *, tiny: bool, minutes: float):
        self.machine = _machine(tiny)
        self._tiny, self._minutes = tiny, minutes
        self._checks: list[dict[str, Any]] = []
        self._arms: list[Measured] = []
        self._left_out: list[dict[str, str]] = []
        card = re.sub(r"[^A-Za-z0-9]+", "-", self.machine["device"]).strip("-")
        stem = f"gpu-check-{card}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.json_path, self.markdown_path = out / f"{stem}.json", out / f"{stem}.md"
        self.logs_path = out / f"{stem}-logs.zip"
        self._seconds: float | None = None

    @property
    def memory_gib(self) -> float:
        """The GPU's memory; that of a large one where there is none."""
        return self.machine["memory_gib"] or 80.0

    @property
    def failed(self) -> bool:
        return not all(check["passed"] for check in self._checks) or not self._arms

    @property
    def has_failures(self) -> bool:
        """Whether a check, or an arm that had time and memory, did not come to its end as it must."""
        return self.failed or any(each["why"].startswith("failed") for each in self._left_out)

    def keep_logs(self, scratch: Path) -> None:
        """Packs what all processes printed into a file beside the results, for whoever looks for a fault."""
        with zipfile.ZipFile(self.logs_path, "w", zipfile.ZIP_DEFLATED) as packed:
            for log in sorted(scratch.rglob("*.log")):
                packed.write(log, log.relative_to(scratch))
        self._told(f"logs: {self.logs_path}")

    def check(self, name: str, run: Callable[[], str]) -> None:
        """Notes what `run` found, or why it failed."""
        try:
            found, passed = run(), True
        except Failed as error:
            found, passed = str(error), False
        self._add_check(name, passed, found)

    def _add_check(self, name: str, passed: bool, found: str) -> None:
        self._checks.append({"name": name, "passed": passed, "found": found})
        self._told(f"{name}: {'passed' if passed else 'FAILED'} ({found})")

    def measured(self, arm: Measured) -> None:
        """Adds a row to the table."""
        self._arms.append(arm)
        self._told(f"{arm}: {arm.tokens_per_second:.0f} tokens/s, {arm.peak_memory_mb:.0f} MB")

    def left_out(self, what: str, why: str) -> None:
        """Notes what was not measured."""
        self._left_out.append({"what": what, "why": why})
        self._told(f"{what}: left out ({why})")

    def compare_losses(self, shape: str) -> None:
        """linchain's first losses beside those of others that compute the same, all on one model."""
        exact = [arm for arm in self._arms if arm.shape == shape and arm.quantization == "none"]
        found = {(arm.dtype, arm.arm): arm for arm in exact}
        for ours, theirs in REFERENCES.items():
            reference = found.get(("float32", theirs))
            for dtype, tolerance in (("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)):
                arm = found.get((dtype, ours))
                if arm is None or reference is None:
                    self.left_out(f"losses of {ours} in {dtype}", "an arm that they need is left out")
                    continue
                pairs = zip(arm.first_losses, reference.first_losses, strict=True)
                furthest = max(abs(a - b) for a, b in pairs)
                self._add_check(
                    f"losses of {ours} in {dtype}",
                    furthest <= tolerance,
                    f"within {furthest:.1e} of {theirs} in float32 over {len(arm.first_losses)} steps",
                )

    def write(self, seconds: float | None = None) -> None:
        """Writes both files, with how long it took when it is over."""
        self._seconds = seconds
        document = {
            "machine": self.machine,
            "minutes": self._minutes,
            "seconds": seconds,
            "checks": self._checks,
            "arms": [asdict(arm) for arm in self._arms],
            "left_out": self._left_out,
        }
        self.json_path.write_text(json.dumps(document, indent=2) + "\n")
        self.markdown_path.write_text(self.markdown())

    def markdown(self) -> str:
        """The results as a page."""
        machine = self.machine
        versions = ", ".join(f"{name} {found or 'absent'}" for name, found in machine["versions"].items())
        memory = f", {machine['memory_gib']:.0f} GiB" if machine["memory_gib"] else ""
        lines = [f"# linchain on {machine['device']}{memory}", "", f"{versions}; {machine['date']}."]
        if self._tiny:
            lines.append("A tiny model on a CPU: it shows that the check works, and nothing about speed.")
        lines += [f"It took {self._seconds:.0f} s." if self._seconds else "It was not over yet.", ""]
        lines += ["| check | | found |", "| --- | --- | --- |"]
        for check in self._checks:
            how = "passed" if check["passed"] else "**failed**"
            lines.append(f"| {check['name']} | {how} | {check['found']} |")
        for shape, precision in dict.fromkeys((arm.shape, arm.precision) for arm in self._arms):
            lines += ["", f"## {shape}, {precision}", "", *self._table(shape, precision)]
        if self._left_out:
            lines += ["", "## Left out", ""]
            lines += [f"- {each['what']}: {each['why']}" for each in self._left_out]
        return "\n".join(lines) + "\n"

    def _table(self, shape: str, precision: str) -> list[str]:
        arms = [arm for arm in self._arms if (arm.shape, arm.precision) == (shape, precision)]
        peft = next((arm for arm in arms if arm.arm == "peft"), None)
        lines = [
            "| arm | unpadded tokens per second | to peft | peak MB | loss of step 1 | of the last shown |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for arm in arms:
            ratio = f"{arm.tokens_per_second / peft.tokens_per_second:.2f}" if peft else ""
            losses = [f"{loss:.4f}" if loss is not None else "" for loss in arm.first_losses]
            speed = f"{arm.tokens_per_second:.0f} ({arm.lowest:.0f} to {arm.highest:.0f})"
            lines.append(
                f"| {arm.arm} | {speed} | {ratio} | {arm.peak_memory_mb:.0f} | {losses[0]} | {losses[-1]} |"
            )
        return lines

    def _told(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self.write()


def _machine(tiny: bool) -> dict[str, Any]:
    device, memory = platform.processor() or platform.machine(), None
    if not tiny:
        device = torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    versions = {"linchain": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": "CPU" if tiny else device,
        "memory_gib": memory,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }
