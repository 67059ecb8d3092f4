"""How a script runs: device and precision, processes of torchrun, whole-file writes, settings, exit status.

torch is imported where it is needed, so that a script without it starts at once.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import platform
import shutil
import signal
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple, NoReturn, Optional

if TYPE_CHECKING:
    import torch

MACHINE_FOLDERS = (  # of network drives, recycle bins and archives, in lower case
    *("@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__macosx"),
)
LEFTOVER_AGE_S = 24 * 3600  # temporary files older than this belong to runs that were killed


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
    """Write a file whole: after a crash at any moment the old content or the new one is there."""
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return Rule(lambda value: value is None or rule.is_met(value), f"{rule.allowed}, or None")


PATH = Rule(lambda value: isinstance(value, (str, Path)), "a path")
PATH_LIST = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(path, (str, Path)) for path in value),
    "a list of paths",
)
ENCODING = Rule(lambda value: "".encode(value) is not None, "an encoding that Python knows, such as 'utf-8'")


def check_settings(settings: dict[str, object], rules: dict[str, Rule]) -> None:
    """Check all settings at once; ValueError names every one that cannot be used, its value and what is allowed."""

    def is_legal(name: str) -> bool:
        try:
            return rules[name].is_met(settings[name])
        except Exception:  # what a check raises on a value of another type does not matter
            return False

    wrong = [f"{name} = {settings[name]!r} (allowed: {rules[name].allowed})" for name in rules if not is_legal(name)]
    if wrong:
        raise ValueError("; ".join(wrong))


# ---- Start and end


class LastingStream:
    """A standard stream that outlives its reader: after `| head` has ended, the work goes on unseen."""

    def __init__(self, stream: object) -> None:
        self.stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115 (pythonw, 2>&-)
        if hasattr(self.stream, "reconfigure"):  # a name that the terminal's encoding lacks must not end the run
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.discard()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self) -> None:
        """Send this and all that follows to nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def explain_error(error: Exception) -> Optional[str]:
    """Explain in one line an error that a user can cause; None: it is a fault of the script."""
    if isinstance(error, (ValueError, OSError)):  # one out of a worker process brings its traceback along
        return (str(error).strip() or type(error).__name__).splitlines()[-1]
    if "DataLoader worker" in str(error) or "shared memory" in str(error):
        return "the worker processes ran out of shared memory: set WORKERS = 0 (in Docker: or --shm-size=1g)"
    if "torch" in sys.modules and is_out_of_memory(error):
        return "out of memory: lower BATCH_SIZE or IMAGE_SIZE"
    return None


def run_script(main: Callable[[], int], doc: str, when_stopped: str) -> int:
    """Run main() as a command. Returns its exit status, or that of an error, told in one line on standard error."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes no arguments: edit the settings at the top of the script.",
    ).parse_args()
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # Pillow's, on large scans
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        return main()
    except KeyboardInterrupt as interrupt:
        name, status = ("SIGTERM", 143) if interrupt.args else ("Ctrl-C", 130)
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes is enough to say so
            print(f"stopped by {name}; {when_stopped}", file=sys.stderr)
        return status
    except Exception as error:
        explanation = explain_error(error)
        print(f"error: {explanation}" if explanation else traceback.format_exc(), file=sys.stderr)
        return 2


def raise_interrupt(signal_number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt(signal_number)
