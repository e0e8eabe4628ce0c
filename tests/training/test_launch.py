"""Launchers: linchain's own, torchrun on two machines (as scripts/slurm_train.sh starts it), accelerate
launch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training import launch
from linchain_cli.training.launch import free_port
from linchain_cli.training.processes import connect

REPOSITORY = Path(__file__).resolve().parents[2]
CHANGES = {"training.global_batch_size": 6, "training.max_steps": 4}
# See test_processes.py.
ADAPTER_TOLERANCE = 2e-3


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def close(run: RunDirectory, other: RunDirectory) -> None:
    assert run.rows_path.read_bytes() == other.rows_path.read_bytes()
    ours, theirs = (load_file(directory.adapter_dir / "chain.safetensors") for directory in (run, other))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= ADAPTER_TOLERANCE * tensor.abs().max()


@pytest.fixture
def alone(run_tiny) -> RunDirectory:
    return run_tiny({**CHANGES, "name": "alone"}).run


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_two_machines_under_slurm(tmp_path, recipe_file, recipe_of, alone, environment):
    """The script with a stand-in for srun that starts its command twice, as two machines would: two torchrun
    agents.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    executable(
        commands / "scontrol",
        '#!/bin/sh\ntest "$*" = "show hostnames machine[1-2]" && printf "127.0.0.1\\nmachine2\\n"\n',
    )
    executable(
        commands / "srun",
        f'#!/bin/sh\necho "$* $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {tmp_path}/srun\n'
        'while case "$1" in --*) true;; *) false;; esac; do shift; done\n'
        '"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second\n',
    )
    executable(
        commands / "torchrun",
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run --local-addr 127.0.0.1 "$@"\n',
    )
    slurm = {
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_ON_NODE": "12",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [REPOSITORY / "scripts" / "slurm_train.sh", recipe_file(CHANGES), "name=two"],
        env={**environment, **slurm},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "has no checkpoint yet: starting at step 0" in done.stderr
    assert done.stdout.count("finished: ") == 1
    asked = (tmp_path / "srun").read_text().split()
    assert "--cpus-per-task=12" in asked and asked[-1] == "105"
    run = RunDirectory(recipe_of({"name": "two"}).run_path)
    assert run.read_status().machine.processes == 2
    close(run, alone)


def test_the_slurm_script_tells_how_to_use_it():
    done = subprocess.run([REPOSITORY / "scripts" / "slurm_train.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch --nodes 2" in done.stderr


@pytest.mark.skipif(
    "LINCHAIN_TEST_SLOW" not in os.environ, reason="starts five interpreters; LINCHAIN_TEST_SLOW=1 runs it"
)
def test_accelerate_launch(tmp_path, recipe_file, recipe_of, alone, environment):
    """Its launcher for several processes is called --multi_gpu, and starts CPU processes where there is no
    GPU. Its --cpu wants MPI, and without it starts a single process."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [*launcher, *options, "--module", "linchain_cli", "train", recipe_file(CHANGES), "name=two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(recipe_of({"name": "two"}).run_path)
    assert run.read_status().machine.processes == 2
    close(run, alone)


def test_nproc_and_a_signal_to_the_launcher(recipe_file, recipe_of, environment):
    run = RunDirectory(recipe_of().run_path)
    recipe = recipe_file(
        {"training.max_steps": 100_000, "training.save_every": 100_000, "training.eval_every": 100_000}
    )
    command = [sys.executable, "-m", "linchain_cli", "train", recipe, "--nproc", "2"]
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(read_jsonl(run.rows_path)) < 3:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, printed = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    status = run.read_status()
    assert status.status == "stopped" and status.machine.processes == 2 and status.machine.threads == 1
    assert printed.count("continue with --resume") == 1 and "Traceback" not in printed
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"step-{status.step:06d}"]


def child_processes(pid: int) -> dict[str, int]:
    """The processes that the launcher started, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {value.decode()[5:]: int(child) for value in variables if value.startswith(b"RANK=")}
    return found


def test_a_killed_process_is_named_and_the_run_has_failed(recipe_file, recipe_of, environment):
    """The first process, which would have written it, is the one that is killed: the launcher does."""
    run = RunDirectory(recipe_of().run_path)
    recipe = recipe_file({"training.max_steps": 100_000, "training.eval_every": 100_000})
    command = [sys.executable, "-m", "linchain_cli", "train", recipe, "--nproc", "2"]
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(read_jsonl(run.rows_path)) < 3:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child_processes(launcher.pid)["0"], signal.SIGKILL)
    _, printed = launcher.communicate(timeout=60)
    assert launcher.returncode == 137
    assert "process 0 was killed from outside" in printed and "Traceback" not in printed
    status = run.read_status()
    assert (status.status, status.reason) == ("failed", "process 0 was ended by SIGKILL")


def children(monkeypatch, script: str) -> None:
    """Lets the launcher start this instead of linchain."""
    monkeypatch.setattr(
        launch, "COMMAND", [sys.executable, "-S", "-c", "import os, sys, time, signal\n" + script]
    )


def test_ranks_and_arguments_reach_the_children(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "cpu_limit", lambda: 7)
    children(
        monkeypatch,
        "e = os.environ\nopen(sys.argv[-1] + '/' + e['RANK'], 'w').write(' '.join([e['LOCAL_RANK'],"
        " e['WORLD_SIZE'], e['LOCAL_WORLD_SIZE'], e['OMP_NUM_THREADS'], e['MASTER_ADDR'], *sys.argv[1:-1]]))",
    )
    assert launch.run_processes(["train", "recipe.yaml", str(tmp_path)], 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} 3 3 2 127.0.0.1 train recipe.yaml" for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(2)", 2),
        ("sys.exit(143)", 143),
        ("if os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)", 3),
        ("if os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)", 137),
        ("if os.environ['RANK'] == '1': os.kill(os.getpid(), 15)\ntime.sleep(60)", 143),
    ],
)
def test_the_first_failure_decides_and_nobody_is_waited_for_long(monkeypatch, capfd, script, code):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1.5)
    children(monkeypatch, script)
    began, reasons = time.monotonic(), []
    assert launch.run_processes([], 2, reasons.append) == code
    assert time.monotonic() - began < 20
    assert ("process 1 was killed from outside" in capfd.readouterr().err) == (code == 137)
    assert reasons == {
        0: [],
        2: ["process 0 ended with exit code 2"],
        3: ["process 1 ended with exit code 3"],
        137: ["process 1 was ended by SIGKILL"],
    }.get(code, reasons)
    assert len(reasons) == (code > 0)


LAUNCHER = """
import sys
sys.path.insert(0, {repository!r})
from linchain_cli.training import launch
launch.COMMAND = [sys.executable, "-S", "-c", {child!r}]
sys.exit(launch.run_processes([], 2))
"""
CHILD = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from linchain_cli.training.launch import end_with_launcher
def note(number, frame):
    open({directory!r} + "/ended-" + os.environ["RANK"], "w").write(str(number))
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
end_with_launcher()
open({directory!r} + "/started-" + os.environ["RANK"], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "passed_on"), [(signal.SIGINT, 2), (signal.SIGTERM, 15), (signal.SIGKILL, 15)]
)
def test_signals_are_passed_on_and_a_dead_launcher_leaves_no_process_behind(tmp_path, number, passed_on):
    child = CHILD.format(repository=str(REPOSITORY), directory=str(tmp_path))
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(repository=str(REPOSITORY), child=child)]
    )
    wait_for(lambda: len(list(tmp_path.glob("started-*"))) == 2)
    launcher.send_signal(number)
    wait_for(lambda: [path.read_text() for path in tmp_path.glob("ended-*")] == [str(passed_on)] * 2)
    assert launcher.wait(20) == (-9 if number == signal.SIGKILL else 128 + number)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_by_gpus_and_by_wish(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [launch.wanted_processes(wish) for wish in (None, 1, 5)] == [1, 1, 5]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # their driver is too old
    assert [launch.wanted_processes(wish) for wish in (None, 1, 5)] == [1, 1, 5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [launch.wanted_processes(wish) for wish in (None, 1, 2)] == [2, 1, 2]
    with pytest.raises(InputError, match="--nproc 3: each process needs a GPU, and 2 are visible"):
        launch.wanted_processes(3)


def test_a_launchers_environment_is_recognised(monkeypatch):
    assert not launch.launched()
    monkeypatch.setenv("WORLD_SIZE", "2")  # some clusters set it everywhere
    assert not launch.launched()
    assert launch.world_size() == 1 and is_first_process()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="WORLD_SIZE=2 say that .* MASTER_ADDR and MASTER_PORT are not set"):
        launch.launched()
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch.launched() and launch.world_size() == 2 and not is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE='two', which a launcher sets, is no number"):
        launch.launched()


def test_several_processes_of_mpi_are_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    assert not launch.launched()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE=4: MPI or srun started several .* torchrun"):
        launch.launched()


@pytest.mark.parametrize("left_behind", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, {"RANK": "3"}])
def test_what_clusters_set_makes_one_process_no_part_of_several(monkeypatch, left_behind):
    """Accelerate would look for the others, and console would leave the first one to speak."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name, value in left_behind.items():
        monkeypatch.setenv(name, value)
    kept = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    for state, _ in kept:
        state._shared_state.clear()
    try:
        assert connect().num_processes == 1 and is_first_process()
        assert left_behind.items() <= os.environ.items()
    finally:
        for state, shared in kept:
            state._shared_state.clear()
            state._shared_state.update(shared)
