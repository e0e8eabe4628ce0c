"""The wheel, built without a network and installed elsewhere, and what the set-up files promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from linchain_cli.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what the build needs, so that the source tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("linchain_cli", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("linchain-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_recipes_and_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "linchain_cli").rglob("*.py")}
    assert modules <= names
    assert {f"linchain_cli/configs/{path.name}" for path in (ROOT / "configs").iterdir()} <= names
    strangers = {name for name in names if not name.startswith(("linchain_cli/", "linchain-"))}
    assert not strangers


def test_an_installed_wheel_lists_and_copies_the_recipes(installed, tmp_path):
    def linchain(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = installed / "bin" / "linchain"
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    listed = linchain("recipes", "list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(shipped_recipes())
    assert linchain("recipes", "copy", "llama3-8b-commonsense").returncode == 0
    assert (tmp_path / "llama3-8b-commonsense.yaml").read_bytes() == (
        ROOT / "configs/llama3-8b-commonsense.yaml"
    ).read_bytes()
    code = "import linchain_cli; print(linchain_cli.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(installed)), "the source tree was tested, not the wheel"


def test_the_source_tree_lists_the_very_files_of_configs():
    assert set(shipped_recipes().values()) == set((ROOT / "configs").glob("*.yaml"))
    assert not (ROOT / "linchain_cli" / "configs").exists()


def requirement_names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[A-Za-z0-9._-]+", requirement).group()) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in exact}


def test_constraints_pin_every_dependency_and_their_dependencies():
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    todo = requirement_names(PROJECT["project"]["dependencies"] + extras["test"] + extras["bench"])
    pins, seen = pinned(), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        try:
            inner = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # the benchmarks' packages need not be installed
            continue
        wanted = {
            normal(one.name) for one in inner if one.marker is None or one.marker.evaluate({"extra": ""})
        }
        todo |= {other for other in wanted if not other.startswith(("nvidia-", "cuda-", "triton"))} - seen
    assert seen <= pins.keys(), f"not pinned: {sorted(seen - pins.keys())}"


def test_constraints_admit_what_pyproject_asks_for():
    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["test"] + extras["bench"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned()[normal(requirement.name)]), text


def test_torch_is_pinned_without_a_local_version_and_no_cuda_package_is():
    assert "+" not in pinned()["torch"]
    assert not [name for name in pinned() if name.startswith(("nvidia-", "cuda-", "triton"))]
