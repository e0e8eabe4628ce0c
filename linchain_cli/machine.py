"""What a process may take of the machine: CPUs and memory, within the limits of its container."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def cpu_limit() -> int:
    """CPUs this process may keep busy: those it may run on, within its control group's quota (rounded up)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _cpu_quotas()]
    return max(1, min([allowed, *quotas]))


def limit_threads() -> None:
    """Keeps torch's thread count within `cpu_limit`, which its default does not know; OMP_NUM_THREADS
    overrules it.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), cpu_limit()))


def cpu_vendor() -> str:
    """The processor's maker as it names itself: GenuineIntel, AuthenticAMD; empty where that is not told."""
    with contextlib.suppress(OSError, StopIteration):
        lines = (PROC / "cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("vendor_id")).partition(":")[2].strip()
    return ""


def available_memory() -> int:
    """Bytes of main memory that this process can still take, within its control group's limit."""
    free = [*_memory_left()]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (PROC / "meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    if not free:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def release_memory() -> None:
    """Gives the system back what this process has freed and its C library keeps; only glibc's can be told to.

    Tensors of many sizes leave gaps between each other, which new ones do not fit, so without this a process
    that trains on rows of many lengths grows and grows.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
