"""The wheel, built without a network and installed elsewhere, and what the set-up files promise."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from linchain_cli.shipped import shipped_recipes

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
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["test"] + extras["bench"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned()[normal(requirement.name)]), text


def test_torch_is_pinned_without_a_local_version_and_no_cuda_package_is():
    assert "+" not in pinned()["torch"]
    assert not [name for name in pinned() if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_transformers_is_admitted_up_to_the_tested_minor_version():
    """model/names.py replays what transformers keeps private: each new minor version is tried before it is
    let in."""
    texts = PROJECT["project"]["dependencies"]
    (asked,) = (Requirement(text) for text in texts if normal(Requirement(text).name) == "transformers")
    major, minor = Version(pinned()["transformers"]).release[:2]
    assert asked.specifier.contains(f"{major}.{minor}.99") and asked.specifier.contains("5.17.0")
    assert not asked.specifier.contains(f"{major}.{minor + 1}.0")


def imported_packages(folder: Path) -> set[str]:
    """First words of what the folder's files import, without the standard library and the project's own."""
    own = {"linchain_cli", "scripts", folder.name, *(path.stem for path in folder.rglob("*.py"))}
    own |= {path.name for path in folder.iterdir()}
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names - own - set(sys.stdlib_module_names)


def undeclared(names: set[str], requirements: list[str]) -> set[str]:
    """Those of these packages that no requirement names; one that is not installed has its own name there."""
    declared, distributions = requirement_names(requirements), packages_distributions()
    return {name for name in names if not {normal(one) for one in distributions.get(name, [name])} & declared}


# What scripts run in environments of their own.
ELSEWHERE = {"ctranslate2", "llama_cpp", "mlx", "mlx_lm", "vllm", "xllamacpp"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("linchain_cli", ["harness"]), ("tests", ["test", "harness"]), ("scripts", ["test", "bench"])],
)
def test_what_is_imported_is_declared(folder, extras):
    """What another dependency happens to bring goes when that one no longer needs it."""
    requirements = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        requirements += PROJECT["project"]["optional-dependencies"][extra]
    assert undeclared(imported_packages(ROOT / folder) - ELSEWHERE, requirements) == set()


def test_an_undeclared_import_is_found(tmp_path):
    (tmp_path / "module.py").write_text("def f():\n    import yaml, json\n    from scipy.stats import t\n")
    assert imported_packages(tmp_path) == {"yaml", "scipy"}
    assert undeclared({"yaml", "scipy"}, ["PyYAML>=6"]) == {"scipy"}


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def fake_python(path: Path, modules: int, venv: int) -> Path:
    """A Python whose `import ensurepip, venv` and `-m venv DIR` end with these codes; the latter leaves what
    a real one leaves that fails half-way."""
    path.write_text(
        f"#!/bin/sh\n[ $1 = -c ] && exit {modules}\n"
        f"mkdir -p $3/bin && touch $3/bin/python && echo 'no pip' >&2\nexit {venv}\n"
    )
    path.chmod(0o755)
    return path


def make_install(venv: Path, python: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(ROOT), "install", f"VENV={venv}", f"PYTHON={python}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_make
def test_make_says_which_package_a_python_without_venv_lacks(tmp_path):
    done = make_install(tmp_path / "venv", fake_python(tmp_path / "python3.11", modules=1, venv=1))
    assert done.returncode != 0 and "apt install python3.11-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_make_does_not_go_on_with_half_an_environment(tmp_path):
    python = fake_python(tmp_path / "python3.11", modules=0, venv=1)
    for _ in range(2):
        done = make_install(tmp_path / "venv", python)
        assert done.returncode != 0 and "no pip" in done.stderr


def test_what_must_hold_before_a_change_lands_is_lint_and_tests():
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make lint" in steps and "make test" in steps
