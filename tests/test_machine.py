"""CPU and memory limits, read from made-up control groups of both versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from linchain_cli import machine

GIB = 1 << 30


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A made-up /proc and /sys/fs/cgroup; eight CPUs that the process may run on."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n")
    return write


def test_without_control_groups_the_affinity_decides(box):
    assert machine.cpu_limit() == 8
    assert machine.available_memory() == 32 * GIB


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)],
)
def test_version_two_quota(box, quota, expected):
    box("proc/self/cgroup", "0::/pod/container\n")
    box("cgroup/pod/container/cpu.max", quota)
    assert machine.cpu_limit() == expected


def test_the_tightest_group_above_counts(box):
    box("proc/self/cgroup", "0::/pod/container\n")
    box("cgroup/pod/container/cpu.max", "400000 100000")
    box("cgroup/pod/cpu.max", "300000 100000")
    assert machine.cpu_limit() == 3


def test_a_container_that_sees_the_hosts_path_finds_its_own_group(box):
    box("proc/self/cgroup", "0::/docker/0123456789\n")
    box("cgroup/cpu.max", "100000 100000")
    assert machine.cpu_limit() == 1


@pytest.mark.parametrize(("quota", "expected"), [("250000", 3), ("-1", 8)])
def test_version_one_quota(box, quota, expected):
    box("proc/self/cgroup", "4:memory:/job\n3:cpu,cpuacct:/job\n")
    box("cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", quota)
    box("cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000")
    assert machine.cpu_limit() == expected


def test_memory_of_both_versions(box):
    box("proc/self/cgroup", "0::/job\n")
    box("cgroup/job/memory.max", str(4 * GIB))
    box("cgroup/job/memory.current", str(3 * GIB))
    assert machine.available_memory() == GIB
    box("cgroup/job/memory.stat", f"anon 5\ninactive_file {GIB}\n")  # what is only cached can be had
    assert machine.available_memory() == 2 * GIB
    box("proc/self/cgroup", "4:memory:/job\n")
    box("cgroup/memory/job/memory.limit_in_bytes", str(8 * GIB))
    box("cgroup/memory/job/memory.usage_in_bytes", str(3 * GIB))
    assert machine.available_memory() == 5 * GIB


def test_threads_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch):
    import torch

    set_to = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(machine, "cpu_limit", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    machine.limit_threads()
    assert set_to == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.limit_threads()
    assert set_to == [3]


class Load:
    """A made-up /proc/stat and clock: each `pass_seconds` adds what this process and others took."""

    def __init__(self, box, monkeypatch: pytest.MonkeyPatch, cpus: int):
        self.time, self.own, self.busy, self.nice = 100.0, 5.0, 50.0, 7.0
        self._box, self._cpus = box, cpus
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
        monkeypatch.setattr(os, "getpriority", lambda which, who: 0)  # however nice the tests are
        monkeypatch.setattr(machine.time, "monotonic", lambda: self.time)
        monkeypatch.setattr(os, "times", lambda: os.times_result((self.own, 0.0, 0.0, 0.0, self.time)))
        self.pass_seconds(0, 0, 0)

    def pass_seconds(self, seconds: float, own: float, others: float, nice: float = 0.0) -> None:
        """`own` and `others` are in CPUs."""
        self.time += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds
        self.nice += nice * seconds
        ticks = (round(100 * value / self._cpus) for value in (self.busy, self.nice))
        row = "{} {} 0 1000 10 0 0 0 0 0".format(*ticks)
        rows = "".join(f"cpu{number} {row}\n" for number in range(self._cpus))
        # A CPU that this process may not use, always busy.
        self._box("proc/stat", f"cpu 1 1 1 1\n{rows}cpu{self._cpus} {round(100 * self.time)} 0 0 0\nintr 5\n")


def test_threads_give_way_to_other_processes_at_once_and_come_back_slowly(box, monkeypatch):
    load = Load(box, monkeypatch, cpus=2)
    cpus = machine.SharedCpus(2)
    load.pass_seconds(2, own=2, others=0)
    assert cpus.look() == 2
    load.pass_seconds(2, own=1.33, others=0.67)  # two spinning threads and one other process
    assert cpus.look() == 1
    counts = []
    for _ in range(4):
        load.pass_seconds(2, own=1, others=0)
        counts.append(cpus.look())
    assert counts == [1, 1, 2, 2]


def test_two_programs_that_both_look_share_the_cpus(box, monkeypatch):
    load = Load(box, monkeypatch, cpus=8)
    cpus = machine.SharedCpus(8)
    load.pass_seconds(2, own=4, others=4)
    assert cpus.look() == 4
    load.pass_seconds(2, own=4, others=4)
    assert cpus.look() == 4


def test_a_quota_bounds_what_an_idle_machine_offers(box, monkeypatch):
    load = Load(box, monkeypatch, cpus=8)
    cpus = machine.SharedCpus(3)
    for others, expected in ((4, 3), (6, 2), (9, 1)):
        load.pass_seconds(2, own=1, others=others)
        assert cpus.look() == expected


def test_a_moment_is_too_short_to_tell_and_nice_processes_do_not_count(box, monkeypatch):
    load = Load(box, monkeypatch, cpus=2)
    cpus = machine.SharedCpus(2)
    load.pass_seconds(0.5, own=1, others=1)
    assert cpus.look() == 2
    load.pass_seconds(2, own=2, others=0, nice=1)
    assert cpus.look() == 2
    monkeypatch.setattr(os, "getpriority", lambda which, who: 10)  # nice itself, it competes with them
    cpus = machine.SharedCpus(2)
    load.pass_seconds(2, own=1, others=0, nice=1)
    assert cpus.look() == 1


def test_a_count_of_the_users_own_stays(box, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    load = Load(box, monkeypatch, cpus=2)
    cpus = machine.SharedCpus(2)
    load.pass_seconds(2, own=1, others=1)
    assert cpus.look() == 2


def test_a_system_that_does_not_tell_its_load_keeps_all_threads(box):
    cpus = machine.SharedCpus(2)
    box("proc/stat", "nothing of this kind\n")
    assert cpus.look() == 2


def test_the_real_machine_gives_sane_numbers():
    assert 1 <= machine.cpu_limit() <= (os.cpu_count() or 1)
    assert machine.available_memory() > 1 << 20


def test_the_processors_maker(box):
    assert machine.cpu_info("vendor_id") == ""
    box("proc/cpuinfo", "processor\t: 0\nmodel\t: 1\n")
    assert machine.cpu_info("vendor_id") == ""
    box("proc/cpuinfo", "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 17\n")
    assert machine.cpu_info("vendor_id") == "AuthenticAMD"


_GAPS = """
import sys
from linchain_cli.machine import release_memory, resident_bytes
blocks = [b"x" * 100_000 for _ in range(2000)]
held = resident_bytes()
kept = blocks[::2]
del blocks
left = resident_bytes()
release_memory()
print(held - left, held - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to")
def test_memory_between_blocks_that_live_on_goes_back_to_the_system():
    found = subprocess.run([sys.executable, "-c", _GAPS], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before < 10e6  # 100 MB are free, in gaps of 100 kB
    assert after > 80e6


def test_where_the_c_library_cannot_give_memory_back_nothing_happens(monkeypatch):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())
    machine.release_memory()


# A process without a home


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """HOME unset, and a user number that nobody knows."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(machine.tempfile, "tempdir", str(tmp_path))

    def unknown(*arguments):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(machine.Path, "home", unknown)
    monkeypatch.setenv("HOME", "")  # put back at the end, whatever is set in between
    return tmp_path / f"linchain-{os.geteuid()}"


def test_a_process_with_a_home_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.ensure_home() is None and os.environ["HOME"] == str(tmp_path)


def test_without_a_home_caches_have_a_private_place_that_stays(homeless):
    for _ in range(2):
        os.environ["HOME"] = ""
        remark = machine.ensure_home()
        assert remark.startswith("HOME is not set") and str(homeless) in remark
        assert os.environ["HOME"] == str(homeless) and homeless.stat().st_mode & 0o777 == 0o700


def test_without_a_home_and_without_a_place_for_caches_that_is_told(homeless, monkeypatch):
    def unwritable():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(machine.tempfile, "gettempdir", unwritable)
    assert "set HOME or TMPDIR" in machine.ensure_home() and os.environ["HOME"] == "/"


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_strangers_place_is_not_taken(homeless, kind):
    if kind == "link":
        (homeless.parent / "elsewhere").mkdir()
        homeless.symlink_to(homeless.parent / "elsewhere")
    elif kind == "file":
        homeless.touch()
    else:
        homeless.mkdir()
        homeless.chmod(0o777)
    machine.ensure_home()
    chosen = Path(os.environ["HOME"])
    assert chosen != homeless and chosen.is_dir() and chosen.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without a home")
def test_a_user_number_without_a_home_has_all_commands(tmp_path):
    code = (
        "import os, pwd, stat, tempfile; from linchain_cli.cli import main; os.setresuid(54321, 0, 0);"
        "main(['recipes', 'list'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "HF_HOME")}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"caches go to {tmp_path}/linchain-" in done.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_cudas_allocator_is_asked_for_expandable_segments_unless_it_is_set_up(monkeypatch, name):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    machine.suit_cuda_to_many_lengths()
    found = {key: value for key, value in os.environ.items() if key.startswith("PYTORCH_") and "ALLOC" in key}
    assert found == (
        {name: "max_split_size_mb:64"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_cudas_allocator_is_left_alone_under_windows(monkeypatch, tmp_path):
    kernel = tmp_path / "sys" / "kernel"
    kernel.mkdir(parents=True)
    kernel.joinpath("osrelease").write_text("6.6.87.2-microsoft-standard-WSL2\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(os, "environ", environment := {})
    machine.suit_cuda_to_many_lengths()
    assert environment == {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}


@pytest.mark.parametrize("own", [{}, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}])
def test_cudnn_is_not_asked_for_attention_first_unless_it_is_set_up(monkeypatch, own):
    environment = own | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    monkeypatch.setattr(os, "environ", environment)
    machine.suit_cuda_to_many_lengths()
    assert environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == ("0" if own else "1")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        # On MIG and in some containers torch cannot say more of a GPU that is full.
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165',
        "NVML_SUCCESS == DriverAPI::get()->nvmlDeviceGetHandleByPciBusId_v2_( pci_id, &nvml_device) INTERNAL"
        ' ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":963, please report a bug to PyTorch.',
    ],
)
def test_whoever_finds_the_gpu_full_has_run_out_of_memory(message):
    assert machine.is_out_of_memory(RuntimeError(message))
    assert not machine.is_out_of_memory(RuntimeError("CUDA error: misaligned address"))
