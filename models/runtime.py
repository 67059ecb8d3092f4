"""How a script runs: device and precision, processes of torchrun, whole-file writes, what is left out, settings.

torch is imported where it is needed, so that a script without it starts at once.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

if TYPE_CHECKING:
    import torch

MACHINE_FOLDERS = (  # of network drives, recycle bins and archives, in lower case
    *("@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__macosx"),
)
LEFTOVER_AGE_S = 24 * 3600  # temporary files older than this belong to runs that were killed
RENAME_WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.5)  # before each further try to replace a file that a program holds open
UNSUPPORTED = (  # what buckets and network shares answer to fsync; other errors mean that the data is not on the disk
    *(errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
)
left_out: list[str] = []  # what `leave_out` has named in this run


# ---- Device


class Compute(NamedTuple):
    """Where the network computes, and in which number format."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_compute(precision: str) -> Compute:
    """Choose CUDA if it works, else the CPU, and for precision "auto" the fastest number format of the hardware."""
    import torch

    device, notes = torch.device("cpu"), "CUDA not available"
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda").add_(1).item()
            device, notes = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        except RuntimeError as error:
            notes = "CUDA is there but fails: " + str(error).splitlines()[0]
    dtype = torch.float32
    if precision == "auto" and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif precision == "auto" and has_bfloat16_instructions():
        dtype = torch.bfloat16
    print(f"Device: {device.type} ({notes}), {str(dtype).removeprefix('torch.')}")
    return Compute(device, dtype)


def has_bfloat16_instructions() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware; elsewhere bfloat16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: float32 is always right
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a network frees and needs again at once.

    Otherwise each comes back as fresh pages that the kernel must zero: a quarter of the evaluation time on a CPU
    (measured), and 5 % of training. Other C libraries have no such switch.
    """
    with suppress(AttributeError, OSError, TypeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        c_library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the memory ran out; on a CPU torch raises a plain RuntimeError."""
    import torch

    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


# ---- Processes


class Team(NamedTuple):
    """The processes that torchrun started to work together; without torchrun a single one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1

    def share(self, value: object) -> object:
        """Return rank 0's value on all ranks."""
        return self.gather(value)[0]

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def take_part(self, items: Sequence) -> Sequence:
        """Return this rank's part of a sequence: every size-th item."""
        return items[self.rank :: self.size]

    def wrap_model(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """Wrap a network so that its gradients become the mean over all ranks; alone it needs no wrapping."""
        if self.size == 1:
            return model
        from torch import nn

        on_gpu = device.type == "cuda"
        if on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        kept = "statistics of all processes" if on_gpu else "each process its own statistics; those of rank 0 are kept"
        print(f"{self.size} processes; batch normalisation: {kept}")
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if on_gpu else None,
            broadcast_buffers=False,  # `copy_buffers` does so once an epoch
            gradient_as_bucket_view=True,
        )

    def copy_buffers(self, model: torch.nn.Module) -> None:
        """Copy rank 0's batch-norm statistics to all ranks: what is saved is what is validated."""
        import torch.distributed as dist

        for buffer in model.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, src=0)

    def leave(self) -> None:
        """Close the connection to the other processes."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def join_team() -> Team:
    """Join the processes of a torchrun; all but rank 0 print nothing but errors."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Team()
    team = Team(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if torch.cuda.is_available():
        torch.cuda.set_device(team.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # torchrun watches over lost ranks
    if team.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return team


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(setting: Optional[int], sharing: int = 1) -> int:
    """Choose the number of processes that decode images: WORKERS, or this process's part of the cores, up to 8."""
    return min(max(1, count_cores() // sharing), 8) if setting is None else setting


def list_versions() -> dict[str, str]:
    """List the versions that a result may depend on."""
    import torch
    import torchvision

    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    return {"python": platform.python_version(), **versions}


# ---- Files


def find_files(root: Path) -> tuple[list[str], list[str]]:
    """Find the files at any depth below a folder; one that links lead to is entered once.

    What is hidden is passed over, and so are MACHINE_FOLDERS, which hold thumbnails and deleted files.

    Returns:
        Their paths, folder by folder in order; a reason for each folder that cannot be read.
    """
    files, problems, entered = [], [], {os.path.realpath(root)}

    def is_new(folder: str) -> bool:
        known = len(entered)
        entered.add(os.path.realpath(folder))
        return len(entered) > known

    for folder, folders, names in os.walk(root, followlinks=True, onerror=lambda error: problems.append(str(error))):
        visible = sorted(name for name in folders if not name.startswith(".") and name.lower() not in MACHINE_FOLDERS)
        folders[:] = [name for name in visible if is_new(os.path.join(folder, name))]
        files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files, problems


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: after a crash at any moment the old content or the new one is there.

    Where a bucket or a share refuses fsync or chmod, it does without.

    Raises:
        OSError: it cannot be written; the text says which file, and why.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f".writing-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        with suppress(OSError):
            shutil.copymode(target, temporary)
        replace_file(temporary, target)
    except OSError as error:
        hint = " (is it open in another program?)" if isinstance(error, PermissionError) else ""
        raise OSError(f"{path} cannot be written: {error.strerror or error}{hint}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file, also onto another. What refuses it, such as a virus scanner, is given some seconds to end."""
    for wait_s in RENAME_WAITS_S:
        with suppress(OSError):
            os.replace(source, target)
            return
        time.sleep(wait_s)
    os.replace(source, target)


def try_write(path: Path, content: bytes) -> bool:
    """Write a file that the run can do without: where that fails, it is named as left out."""
    try:
        write_file(path, content)
        return True
    except OSError as error:
        leave_out(str(error))
        return False


def leave_out(what: str) -> None:
    """Name on standard error what is left out: the run goes on, and ends with status 1."""
    left_out.append(what)
    print(f"left out: {what}", file=sys.stderr)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed runs in a folder."""
    for leftover in folder.glob(".writing-*.tmp"):
        with suppress(OSError):  # another run may delete it at the same time
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                leftover.unlink()


# ---- Settings


class Rule(NamedTuple):
    """What a setting may be: a check, and the words that say it."""

    is_met: Callable[[object], bool]
    allowed: str
    is_path: bool = False  # or several: ~ at its beginning is the home folder


def whole_number(low: int, high: int = 10**9) -> Rule:
    """Allow whole numbers from low to high."""
    return Rule(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low:,} to {high:,}")


def number(low: float, high: float) -> Rule:
    """Allow numbers from low to high."""
    return Rule(
        lambda value: type(value) in (int, float) and low <= value <= high, f"a number from {low:g} to {high:g}"
    )


def one_of(*values: object) -> Rule:
    """Allow these values."""
    return Rule(lambda value: value in values, " or ".join(map(repr, values)))


def or_none(rule: Rule) -> Rule:
    """Allow None as well."""
    return Rule(lambda value: value is None or rule.is_met(value), f"{rule.allowed}, or None", rule.is_path)


PATH = Rule(lambda value: isinstance(value, (str, Path)), "a path", is_path=True)
PATH_LIST = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(path, (str, Path)) for path in value),
    "a list of paths",
    is_path=True,
)
ENCODING = Rule(lambda value: "".encode(value) is not None, "an encoding that Python knows, such as 'utf-8'")


def check_settings(settings: dict[str, object], rules: dict[str, Rule]) -> dict[str, object]:
    """Check all settings at once, and return them with ~ in paths replaced by the home folder.

    Raises:
        ValueError: names every one that cannot be used, its value and what is allowed.
    """

    def is_legal(name: str) -> bool:
        try:
            return rules[name].is_met(settings[name])
        except Exception:  # what a check raises on a value of another type does not matter
            return False

    wrong = [f"{name} = {settings[name]!r} (allowed: {rules[name].allowed})" for name in rules if not is_legal(name)]
    if wrong:
        raise ValueError("; ".join(wrong))
    return {name: expand_home(value) if rules[name].is_path else value for name, value in settings.items()}


def expand_home(value: object) -> object:
    """Replace ~ at the beginning of a path, or of each path of a list, by the home folder; other values stay."""
    if isinstance(value, (list, tuple)):
        return [expand_home(path) for path in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value
