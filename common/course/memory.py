"""How much memory there is: the GPU's, capped where a small one is to be imitated, and the machine's."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

GIB = 2**30
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # `mallopt` and `malloc_trim` are glibc's alone
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_peak_before_reset = 0


def card_memory() -> int:
    """Bytes of the first GPU, no more of them than COURSE_GPU_MEMORY gibibytes allow."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = float(os.environ.get("COURSE_GPU_MEMORY") or 0) * GIB
    return int(min(total, limit or total))


def cap_gpu_memory() -> None:
    """Limit PyTorch's allocator to COURSE_GPU_MEMORY gibibytes, to prove on a large card what a small one can do."""
    if torch.cuda.is_available() and os.environ.get("COURSE_GPU_MEMORY"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(card_memory() / total)


def keep_freed_memory() -> None:
    """Without a GPU: let glibc keep up to 2 GiB that tensors have freed, in place of handing it back at once.

    What it gets anew from the system has to be cleared page by page: with activations of 100 MB that took longer than
    the arithmetic. `hand_back_freed_memory` undoes it. With a GPU, main memory only stores, and nothing is kept.
    """
    if hasattr(LIBC, "mallopt") and not torch.cuda.is_available():
        LIBC.mallopt(M_MMAP_THRESHOLD, GIB)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2 * GIB - 1)


def hand_back_freed_memory() -> None:
    """Give the system what glibc keeps of freed memory."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, under the cap and with what PyTorch's allocator keeps for later."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return min(torch.cuda.mem_get_info(device)[0] + reserved - allocated, card_memory() - allocated)


def require_memory(needed: int, what: str, device: torch.device) -> None:
    """Raise MemoryError when `device` has less than `needed` bytes free, saying how much is needed and what to do."""
    if (free := free_memory(device)) < needed:
        raise MemoryError(
            f"{what} needs about {needed / GIB:.1f} GiB on the {device.type} and {free / GIB:.1f} GiB are free. "
            "Close other notebooks (Kernel → Shut Down), or choose a smaller model."
        )


def fits(needed: int, what: str, device: torch.device) -> bool:
    """Whether `device` has `needed` bytes free; says what is left out where it has not."""
    try:
        require_memory(needed, what, device)
    except MemoryError as error:
        print(f"⚠️ Left out: {error}")
        return False
    return True


def reset_gpu_peak() -> None:
    """Begin a new measurement of peak GPU memory without losing the notebook's own peak."""
    global _peak_before_reset
    _peak_before_reset = gpu_peak()
    torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> int:
    """Peak of PyTorch's allocator in this process, in bytes; 0 without a GPU."""
    return max(_peak_before_reset, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def host_peak() -> int:
    """The most bytes of main memory that this process ever held.

    Linux hands `ru_maxrss` on to what a process starts: a kernel would report the peak of the program that runs it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
