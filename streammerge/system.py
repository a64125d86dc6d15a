"""What only Linux has, each call with a slower way round for other systems.

Nothing else in the package asks which system it runs on.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_LINUX = sys.platform == "linux"
_PAGE = mmap.PAGESIZE
_MIB = 1 << 20
# A fault on a mapped page maps the whole folio of the page cache around it, up to this size and
# aligned to it. Pages of a neighbour's range that are left mapped are never dropped again.
LARGEST_FOLIO = 2 * _MIB
_COPY_CHUNK = 16 * _MIB


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if _LINUX else None


def tune_allocator() -> None:
    """Few malloc arenas, and large blocks returned to the system as soon as they are freed.

    Otherwise each thread grows an arena of its own and freed tiles stay resident, and the
    projection of the peak would have to guess how many. A no-op outside glibc.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "mallopt"):
        return
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1
    libc.mallopt(arena_max, 2)
    libc.mallopt(mmap_threshold, 256 << 10)
    libc.mallopt(trim_threshold, 256 << 10)


def settle_blas() -> None:
    """One thread and one set of kernels, for the bits of products; numpy must not be there yet."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"  # two give other bits, and the pool's threads are the only ones
    if _has_avx512():  # see docs/decisions/0016-one-kernel-set.md
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False  # not Linux
    return "avx512f" in flags.split()


# -------------------------------------------------------------------------------------- memory


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # no /proc: the caller falls back to getrusage
    return None


def peak_resident_bytes() -> int:
    """The largest resident set so far, as `/usr/bin/time -v` reports it."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM:") or (usage if sys.platform == "darwin" else usage << 10)


def resident_bytes() -> int:
    """The resident set now."""
    return _status_bytes("VmRSS:") or peak_resident_bytes()


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text().strip())
    except (OSError, ValueError):
        return None  # not there, or "max": no limit


def _own_cgroups() -> list[tuple[str, str]]:
    """`(controllers, path)` of this process, version 2 first; empty without cgroups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    return [(parts[1], parts[2]) for parts in (line.split(":", 2) for line in lines)]


def _cgroup_ancestors(root: str, path: str) -> list[str]:
    """The folders of a cgroup and all above it: any of them may hold the limit."""
    parts = [part for part in path.split("/") if part]
    return ["/".join([root, *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def cgroup_memory_left() -> int | None:
    """How much the tightest memory cgroup above this process still allows; None: no limit."""
    left: list[int] = []
    for controllers, path in _own_cgroups():
        if controllers == "":
            root, limit_file, usage_file = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for folder in _cgroup_ancestors(root, path):
            limit = _read_int(f"{folder}/{limit_file}")
            if limit is not None and limit < 1 << 60:
                usage = _read_int(f"{folder}/{usage_file}") or 0
                cache = _reclaimable(f"{folder}/memory.stat")
                left.append(max(0, limit - max(0, usage - cache)))
    return min(left, default=None)


def _reclaimable(stat_file: str) -> int:
    """Page cache of a cgroup that the kernel gives up before it kills."""
    try:
        lines = Path(stat_file).read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(fields.get("inactive_file", "0")) + int(fields.get("active_file", "0"))


def memory_available() -> int:
    """What the machine could still give out without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # no /proc: physical memory is the best guess left
    return os.sysconf("SC_PHYS_PAGES") * _PAGE


def scheduler_memory(environ: Mapping[str, str], cpus: int) -> int | None:
    """What SLURM granted to this node's share of the job; None outside of SLURM."""
    per_node = environ.get("SLURM_MEM_PER_NODE", "")
    per_cpu = environ.get("SLURM_MEM_PER_CPU", "")
    if per_node.isdigit() and int(per_node) > 0:
        return int(per_node) * _MIB
    if per_cpu.isdigit() and int(per_cpu) > 0:
        granted = environ.get("SLURM_CPUS_ON_NODE", "")
        return int(per_cpu) * _MIB * (int(granted) if granted.isdigit() else cpus)
    return None


def usable_cpus() -> int:
    """CPUs of the affinity mask, capped by the cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [count or 1]
    for controllers, path in _own_cgroups():
        if controllers == "":
            for folder in _cgroup_ancestors("/sys/fs/cgroup", path):
                quotas += _quota(f"{folder}/cpu.max")
        elif "cpu" in controllers.split(","):
            for folder in _cgroup_ancestors("/sys/fs/cgroup/cpu", path):
                period = _read_int(f"{folder}/cpu.cfs_period_us")
                quota = _read_int(f"{folder}/cpu.cfs_quota_us")
                if period and quota and quota > 0:
                    quotas.append(max(1, quota // period))
    return min(quotas)


def _quota(cpu_max: str) -> list[int]:
    try:
        quota, period = Path(cpu_max).read_text().split()
    except (OSError, ValueError):
        return []
    return [] if quota == "max" else [max(1, int(quota) // int(period))]


# --------------------------------------------------------------------------------------- files


def free_bytes(folder: str) -> int:
    """How much this user may still write to the file system of a folder."""
    found = os.statvfs(folder)
    return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into the buffer, without a copy where the system can; returns how much, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = os.pread(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def drop_mapped(mapping: mmap.mmap, offset: int, length: int) -> None:
    """Unmap the pages of a range again, so that they stop counting as resident."""
    if hasattr(mmap, "MADV_DONTNEED") and len(mapping):
        start = offset // LARGEST_FOLIO * LARGEST_FOLIO
        stop = min(len(mapping), -(-(offset + length) // LARGEST_FOLIO) * LARGEST_FOLIO)
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Let the kernel begin to write a range to disk, so that the last sync is short."""
    libc = _libc()
    if libc is not None and hasattr(libc, "sync_file_range"):
        write = 2  # SYNC_FILE_RANGE_WRITE: starts, does not wait; advice only, so unchecked
        libc.sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(write)
        )


def sync_data(descriptor: int) -> None:
    """Make the file's data durable, with the metadata needed to read it back."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Give the file its size and its blocks, so that a full disk is an error now, not later."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def copy_range(
    source: int, target: int, source_offset: int, target_offset: int, length: int
) -> None:
    """Copy bytes between files inside the kernel; shares blocks where the file system can.

    Falls back to reading and writing across file systems and on old kernels.
    """
    kernel = hasattr(os, "copy_file_range")
    done = 0
    while done < length:
        at = source_offset + done, target_offset + done
        if kernel:
            try:
                count = os.copy_file_range(source, target, min(1 << 30, length - done), *at)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                kernel = False
                continue
        else:
            chunk = os.pread(source, min(_COPY_CHUNK, length - done), at[0])
            count = write_all(target, chunk, at[1])
        if count == 0:
            raise EOFError(f"{length - done} bytes missing at offset {at[0]}")
        done += count


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """`pwrite` until everything is written; returns how many bytes that was."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
