"""scripts/gpu_check.sh: all of it on a CPU, and what it says of arms that cannot be measured."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from scripts.gpu_check import __main__ as gpu_check  # noqa: E402
from scripts.gpu_check.plan import COMPILED, OURS, PEERS, Planned, missing_for, planned  # noqa: E402
from scripts.gpu_check.report import Report  # noqa: E402


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "scripts" / "gpu_check.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def test_all_of_it_on_a_cpu(tmp_path):
    done = start("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-check-CPU-*.json")
    found = json.loads(path.read_text())
    assert all(check["passed"] for check in found["checks"])
    checks = {check["name"]: check["found"] for check in found["checks"]}
    assert "resumed: the same bits" in checks["killed and resumed, training.deterministic: true"]
    assert "gloo" in checks["one process of a group"]
    assert {
        f"losses of linchain-{depth} in {dtype}" for depth in (0, 3) for dtype in ("float32", "bfloat16")
    } < set(checks)
    plan = planned(["tiny"], "tiny", brief=True)
    measured = {(arm["dtype"], arm["quantization"], arm["arm"]) for arm in found["arms"]}
    assert measured == {(arm.dtype, arm.quantization, arm.arm) for arm in plan if not missing_for(arm)}
    assert [each["what"] for each in found["left_out"]] == [str(arm) for arm in plan if missing_for(arm)]
    assert all(arm["tokens_per_second"] > 0 and arm["peak_memory_mb"] > 0 for arm in found["arms"])
    assert found["machine"]["versions"]["torch"] and found["seconds"] > 0
    page = path.with_suffix(".md").read_text()
    assert done.stdout == page + "\n" and "# linchain on CPU" in page and "| linchain-8 |" in page
    assert "nothing about speed" in page


def test_every_arm_of_both_shapes_is_planned_and_the_compiled_ones_come_last():
    plan = planned(["1b", "8b"], "1b")
    for shape in ("1b", "8b"):
        for quantization in ("none", "nf4"):
            arms = {arm.arm for arm in plan if (arm.shape, arm.quantization) == (shape, quantization)}
            assert {*PEERS, *OURS} <= arms
    assert {"uncollapsed", "peft", "linchain-0", "linchain-3"} == {
        arm.arm for arm in plan if arm.dtype == "float32"
    }
    assert [arm.arm for arm in plan[-2:]] == [COMPILED] * 2 and len(plan) == len(set(plan))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("scripts.gpu_check.plan.find_spec", lambda name: None)
    missing = {
        arm: missing_for(Planned("1b", "bfloat16", "none", arm)) for arm in ("trl-packing", "linchain-3")
    }
    assert missing == {"trl-packing": "peft and trl and datasets are not installed", "linchain-3": None}
    assert missing_for(Planned("1b", "bfloat16", "nf4", "linchain-3")) == "bitsandbytes is not installed"


def test_what_no_time_is_left_for_is_listed(tmp_path):
    options = argparse.Namespace(tiny=True, model=None, micro=None)
    report = Report(tmp_path, tiny=True, minutes=0)
    gpu_check.check(options, report, tmp_path, multiprocessing.get_context("spawn"), deadline=0.0)
    left_out = json.loads(report.json_path.read_text())["left_out"]
    assert len(left_out) >= 2 + len(planned(["tiny"], "tiny", brief=True))
    assert left_out[0]["why"] == "no time: 0 of about 25 s were left" and report.failed


def test_an_arm_that_fails_is_told_and_does_not_end_the_check(tmp_path):
    context = multiprocessing.get_context("fork")
    settings = {"device": "cpu", "rounds": 1, "model": "/nowhere"}
    assert "failed: KeyError" in gpu_check._measure("linchain-3", settings, tmp_path, context, 60.0)
    assert gpu_check._measure("linchain-3", settings, tmp_path, context, 0.0) == "cut when the time was over"


def test_the_logs_of_a_check_that_failed_are_kept(tmp_path):
    report = Report(tmp_path, tiny=True, minutes=0)
    report.left_out("linchain-3", "failed: KeyError")
    scratch = tmp_path / "scratch"
    (scratch / "resume").mkdir(parents=True)
    (scratch / "resume" / "killed.log").write_text("a traceback")
    assert report.has_failures
    report.keep_logs(scratch)
    with zipfile.ZipFile(report.logs_path) as packed:
        assert packed.read("resume/killed.log") == b"a traceback"


@pytest.mark.parametrize(("visible", "used"), [(None, "0"), ("3,5", "3"), ("GPU-8f6e,GPU-2c1d", "GPU-8f6e")])
def test_of_several_gpus_one_is_used(monkeypatch, visible, used):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu_check.parse()
    assert environment["CUDA_VISIBLE_DEVICES"] == used


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nowhere"), "--model: /nowhere holds no checkpoint (config.json)"),
        (("--minutes", "5"), "no GPU is visible to torch; --tiny runs the same on a CPU"),
    ],
)
def test_what_does_not_do_is_told_in_one_message(arguments, message):
    done = start(*arguments)
    assert done.returncode == 2 and done.stderr.endswith(f"gpu_check.sh: error: {message}\n")
