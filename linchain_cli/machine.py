"""What a process may take of the machine: CPUs and memory, within the limits of its container."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import resource
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_M_MMAP_THRESHOLD = -3  # of malloc.h
# Of the messages of torch, of CUDA itself (on a GPU that others fill), and of its libraries. The last is what
# becomes of torch's own where it may not ask the driver who has taken the memory (MIG, some containers).
_LACKING = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|not enough memory|CUDA out of memory"
    r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (\d+ )?'out of memory'"
    r"|NVML_SUCCESS == [^\n]*CUDACachingAllocator"
)


def ensure_home() -> str | None:
    """Gives a process without a home directory a place for caches, or libraries would make one named `~`.

    In containers a user number may have no entry in /etc/passwd, and HOME be unset. What is chosen stays the
    same for the user and is nobody else's. Returns what to tell the user, None where there is a home.
    """
    if os.environ.get("HOME"):
        return None
    with contextlib.suppress(RuntimeError):
        os.environ["HOME"] = str(Path.home())
        return None
    user = os.geteuid()
    try:
        place = Path(tempfile.gettempdir()) / f"linchain-{user}"
    except FileNotFoundError:
        os.environ["HOME"] = "/"
        return (
            f"HOME is not set, user {user} has no home directory, and no directory for temporary files can be"
            " written: set HOME or TMPDIR to one that can."
        )
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
    status = place.lstat() if os.path.lexists(place) else None
    private = status and stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022
    os.environ["HOME"] = str(place) if private else tempfile.mkdtemp(prefix=f"linchain-{user}-")
    return (
        f"HOME is not set, and user {user} has no home directory: caches go to {os.environ['HOME']}."
        " Set HOME, or LINCHAIN_CACHE and HF_HOME, to keep them elsewhere."
    )


def cpu_limit() -> int:
    """CPUs this process may keep busy: those it may run on, within its control group's quota (rounded up)."""
    quotas = [math.ceil(quota) for quota in _cpu_quotas()]
    return max(1, min([len(_allowed_cpus()), *quotas]))


def suit_cuda_to_many_lengths() -> None:
    """Sets torch up for rows of many lengths on a GPU. It reads these when CUDA starts; what the user has set
    stands.

    CUDA's allocator grows its segments, so that tensors of many sizes leave no gaps between them; not under
    Windows (WSL), whose drivers failed at that for others (github.com/pytorch/pytorch/issues/192330).
    And where torch would ask cuDNN for attention first (Hopper and Blackwell), it asks flash attention: cuDNN
    makes a plan for each shape that is new, which takes a second for both passes on a B200 as others measured
    (github.com/modelscope/FunASR/issues/3704), and while an answer is written every token is a new shape.
    """
    # The second name is the older one, which torch still reads, and reads first.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() and not _under_windows():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


def _under_windows() -> bool:
    with contextlib.suppress(OSError):
        return "microsoft" in (PROC / "sys" / "kernel" / "osrelease").read_text().lower()
    return False


def limit_threads() -> None:
    """Keeps torch's thread count within `cpu_limit`, which its default does not know; OMP_NUM_THREADS
    overrules it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), cpu_limit()))


class SharedCpus:
    """How many threads to compute with while other processes use the same CPUs.

    The threads of a parallel loop wait for the slowest one, and they wait by spinning. Where another process
    holds one of the CPUs, that wait lasts as long as a scheduler's time slice, in every loop, and one thread
    for each CPU is slower than a thread fewer. So the count follows what others leave: down at once, up by
    one when there was room for it `_PATIENCE` looks in a row, since two programs that both look would swing.
    OMP_NUM_THREADS overrules it.
    """

    _PATIENCE = 3
    _INTERVAL = 1.0  # seconds between two looks; /proc/stat counts in hundredths

    def __init__(self, limit: int):
        self.limit = limit
        self.begin()

    def begin(self) -> None:
        """Takes all threads, and looks at the load from now on."""
        self.threads, self._roomy = self.limit, 0
        self._before = None if "OMP_NUM_THREADS" in os.environ else _cpu_seconds()

    def look(self) -> int:
        """The number of threads to go on with, 1 to `limit`; where the system does not tell its load, the
        limit."""
        if self._before is None or (now := _cpu_seconds()) is None:
            return self.threads
        if now[0] - self._before[0] < self._INTERVAL:
            return self.threads
        seconds, busy, own = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        left = len(_allowed_cpus()) - (busy - own) / seconds
        fits = max(1, min(self.limit, math.floor(left + 0.45)))
        self._roomy = self._roomy + 1 if fits > self.threads else 0
        if fits < self.threads:
            self.threads = fits
        elif self._roomy >= self._PATIENCE:
            self.threads, self._roomy = self.threads + 1, 0
        return self.threads


def _allowed_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _cpu_seconds() -> tuple[float, float, float] | None:
    """The time, the CPU seconds that all processes took so far on the CPUs this one may use, and those that
    it took itself; None where the system does not tell."""
    names = {f"cpu{number}" for number in _allowed_cpus()}
    # Columns: user, nice, system, idle, iowait, irq, softirq, steal. Who is nice stands back by itself.
    counted = (1, 3, 6, 7, 8) if os.getpriority(os.PRIO_PROCESS, 0) <= 0 else (1, 2, 3, 6, 7, 8)
    try:
        rows = [line.split() for line in (PROC / "stat").read_text().splitlines()]
        ticks = [sum(int(row[column]) for column in counted) for row in rows if row and row[0] in names]
    except (OSError, ValueError, IndexError):
        return None
    if not ticks:
        return None
    own = os.times()
    return time.monotonic(), sum(ticks) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def cpu_info(field: str) -> str:
    """What /proc/cpuinfo says of the first processor: `vendor_id` (GenuineIntel, AuthenticAMD), `model name`.
    Empty where that is not told."""
    with contextlib.suppress(OSError, StopIteration):
        lines = (PROC / "cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(field)).partition(":")[2].strip()
    return ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Of Python, of a GPU (whoever finds it full), or of torch on a CPU, which has no type of its own for it;
    also where another error was raised from that."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if _LACKING.search(str(error)):
            return True
        error = error.__cause__
    return False


def available_memory() -> int:
    """Bytes of main memory that this process can still take, within its control group's limit."""
    free = [*_memory_left()]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (PROC / "meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    if not free:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def resident_bytes() -> int:
    """The memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = int((PROC / "self" / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far, or since it was told to count anew."""
    try:
        # getrusage would count what the process that started this one held.
        lines = (PROC / "self" / "status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    except (OSError, ValueError, IndexError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_memory() -> None:
    """Gives the system back what this process has freed and its C library keeps; only glibc's can be told to.

    Tensors of many sizes leave gaps between each other, which new ones do not fit, so without this a process
    that trains on rows of many lengths grows and grows.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def collect_memory() -> None:
    """Frees what nothing refers to any more, and gives it back to the GPU and to the system.

    Models whose forwards were replaced, and chains with their groups, refer to themselves: without being
    collected they stay where they are, on a GPU too, after the last name for them has gone.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_memory()


def return_large_memory() -> None:
    """Has memory of a mebibyte and more go back to the system as soon as it is freed, from now on (glibc).

    Without it glibc comes to keep what is smaller than 32 MiB, and aligned tensors often do not fit the gaps
    that equal ones left: a process that gathers one block after another holds them all in the end.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _cpu_quotas() -> Iterator[float]:
    """Quotas, in CPUs, of this process's control groups (versions 2 and 1) and of those above them."""
    for group in _groups(""):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _memory_left() -> Iterator[int]:
    for controller, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _groups(controller):
            with contextlib.suppress(OSError, ValueError):
                left = int((group / limit).read_text()) - int((group / used).read_text())
                yield left + _file_cache(group)


def _file_cache(group: Path) -> int:
    """Bytes of a group's use that the kernel gives back when it needs them."""
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))
    return 0


def _groups(controller: str) -> Iterator[Path]:
    """Directories of this process's control group and the ones above it; `controller` is "" for version 2."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller not in controllers.split(","):
                continue
            root = CGROUPS / controllers if controllers else CGROUPS
            group = root / path.lstrip("/")
            # In a container the path may be the host's, which is not there: its own group is the root then.
            while group != root:
                if group.is_dir():
                    yield group
                group = group.parent
            yield root
