"""Small runs: a tiny model and a few dozen rows, in this process or in processes forked from one that has
imported all.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from linchain_cli.run import RunDirectory, read_jsonl

WORKER = Path(__file__).with_name("worker.py")

# Imports cost a process five seconds, of which it trains for one.
PRELOADED = [
    "linchain_cli.commands.train",
    "linchain_cli.training.runner",
    "linchain_cli.report.plots",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]

DEFAULTS = {
    "name": "run",
    "model.dtype": "float32",
    "adapter.rank": 4,
    "adapter.depth": 2,
    "adapter.alpha": 8,
    "adapter.target_modules": ["q_proj", "v_proj", "down_proj"],
    "data.validation": 6,
    "data.max_length": 192,
    "training.max_steps": 6,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 2,
    "training.learning_rate": 0.01,
    "training.warmup_steps": 2,
    "training.log_every": 1,
    "training.eval_every": 3,
    "training.save_every": 2,
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINCHAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory, commonsense_rows) -> Path:
    """46 rows: 40 to train on when 6 are held out."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(commonsense_rows(46)))
    return path


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_llama_dir: Path, rows_file: Path) -> Callable[..., Any]:
    """recipe_of({"training.max_steps": 3}): a recipe of a tiny run below the test's directory."""
    from linchain_cli.recipe import Recipe

    def build(changes: Mapping[str, Any] | None = None):
        places = {
            "output_dir": str(tmp_path / "runs"),
            "model.path": str(tiny_llama_dir),
            "data.train": str(rows_file),
        }
        return Recipe.from_flat({**DEFAULTS, **places, **(changes or {})})

    return build


@pytest.fixture(scope="session")
def tiny_base(tiny_llama_dir: Path):
    """The tiny Llama, loaded once; tests take their chains out again."""
    from linchain_cli.model.hashing import base_hash
    from linchain_cli.model.loading import load_model
    from linchain_cli.model.tokenizer import load_tokenizer
    from linchain_cli.training.base import Base, suit_to_training

    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    suit_to_training(model)
    return Base(tiny_llama_dir, model, load_tokenizer(tiny_llama_dir), base_hash(tiny_llama_dir))


@pytest.fixture
def base(tiny_base) -> Iterator[Any]:
    """`tiny_base` without chains, before and after the test."""
    from linchain_cli.chain import detach

    yield tiny_base
    detach(tiny_base.model)


@pytest.fixture
def run_tiny(recipe_of, base):
    """run_tiny(changes, resume=False, fresh=False) trains in this process, and returns the job."""
    from linchain_cli.chain import detach
    from linchain_cli.training.runner import run_training

    def run(changes: Mapping[str, Any] | None = None, **options: Any):
        detach(base.model)
        return run_training(recipe_of(changes), base=base, **options)

    return run


@pytest.fixture
def job_of(recipe_of, base):
    """job_of(changes): a job that is ready to take steps, of which nothing is written."""
    from linchain_cli.chain import detach
    from linchain_cli.training.job import prepare
    from linchain_cli.training.processes import connect

    def build(changes: Mapping[str, Any] | None = None):
        detach(base.model)
        recipe = recipe_of(changes)
        job = prepare(recipe, RunDirectory(recipe.run_path), connect(), base)
        job.state.micro_batch_size = recipe.training.rows_at_once("cpu")
        return job

    return build


@dataclass
class Process:
    """A forked process that runs `linchain ARGUMENTS`; `log` is what it prints."""

    handle: Any
    log_path: Path

    @property
    def pid(self) -> int:
        return self.handle.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Until the condition holds, which the process brings about."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.handle.is_alive() and time.monotonic() < deadline, f"no {what}: {self.log}"
            time.sleep(0.01)

    def wait_for_step(self, run: RunDirectory, step: int) -> None:
        """Until the run has recorded the step."""
        self.wait_until(lambda: len(read_jsonl(run.rows_path)) >= step, f"step {step}")

    def wait(self, timeout: float = 180) -> int:
        """The exit code, negative for a signal that killed it."""
        self.handle.join(timeout)
        if self.handle.exitcode is None:
            self.handle.kill()
            self.handle.join()
            pytest.fail(f"still running after {timeout} s; it printed:\n{self.log}")
        return self.handle.exitcode


@dataclass
class Starter:
    """Starts processes by forking one that has imported everything and computed nothing."""

    directory: Path
    context: Any
    started: list[Process] = field(default_factory=list)

    def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None, hook: str = "", **values: Any
    ) -> Process:
        """`linchain ARGUMENTS`. `hook` names a function of worker.py that is called first, with `values`."""
        log = self.directory / f"process-{len(self.started)}.log"
        setting = {
            "ARGUMENTS": [str(argument) for argument in arguments],
            "LOG": str(log),
            "HOOK": hook,
            "VALUES": values,
            "ENVIRONMENT": {**os.environ, **(environment or {})},
        }
        handle = self.context.Process(target=runpy.run_path, args=(str(WORKER), setting, "__main__"))
        handle.start()
        self.started.append(Process(handle, log))
        return self.started[-1]

    def ranks(
        self, world: int, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> list[Process]:
        """`world` processes of one run, as a launcher would start them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return [
            self.start(
                *arguments,
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})},
                **options,
            )
            for rank in range(world)
        ]


@pytest.fixture(scope="session")
def _warm_context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def starter(tmp_path: Path, _warm_context) -> Iterator[Starter]:
    (tmp_path / "processes").mkdir()
    starter = Starter(tmp_path / "processes", _warm_context)
    yield starter
    for process in starter.started:
        if process.handle.is_alive():
            process.handle.kill()
        process.handle.join()


@pytest.fixture
def recipe_file(tmp_path: Path, recipe_of) -> Callable[..., Path]:
    """recipe_file(changes): the recipe as a file."""

    def write(changes: Mapping[str, Any] | None = None) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe_of(changes).to_yaml())
        return path

    return write


@pytest.fixture
def dies_after(monkeypatch):
    """`with dies_after(step):` what trains in the block dies when it begins the step behind that one."""
    from linchain_cli.errors import LinchainError
    from linchain_cli.training import loop

    original = loop.optimizer_step

    @contextlib.contextmanager
    def dying(step: int) -> Iterator[None]:
        def step_or_die(job, *args):
            if job.state.step == step:
                raise LinchainError("pulled the plug")
            return original(job, *args)

        with monkeypatch.context() as patch, pytest.raises(LinchainError, match="pulled the plug"):
            patch.setattr(loop, "optimizer_step", step_or_die)
            yield

    return dying
