"""How a script starts and ends: arguments, one run at a time in a folder, signals, errors, exit status."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Callable, NoReturn, Optional

from models import runtime

try:
    import fcntl

    HELD = BlockingIOError  # what locking raises where another process has the lock
except ImportError:  # Windows
    import msvcrt

    fcntl, HELD = None, PermissionError

LOCK_NAME = ".training.lock"


# ---- One run at a time


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this one writes there; where the file system has no locks, go on without.

    The operating system frees the lock when the process ends, however it ends; worker processes do not hold it.

    Raises:
        ValueError: another process holds it.
    """
    path = folder / LOCK_NAME
    file = take_lock(path)
    try:
        yield
    finally:
        steps = ((path.unlink, file.close) if fcntl else (file.close, path.unlink)) if file else ()
        for step in steps:  # deleted while it is held; Windows deletes no open file
            with suppress(OSError):
                step()


def take_lock(path: Path) -> Optional[IO]:
    """Open and lock a file, and note in it whose lock it is; None: there are no locks here."""
    for last_try in (False, False, True):
        try:
            with ExitStack() as closed_else:
                file = closed_else.enter_context(open(path, "ab+", buffering=0))
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    file.seek(2**30)  # what is locked cannot be read, the note must be
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                if last_try or (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                    with suppress(OSError):  # the lock counts, not the note
                        file.truncate(0)
                        now, host = time.strftime("%Y-%m-%d %H:%M"), platform.node() or "?"
                        file.write(f"{os.getpid()} {now} {host}".encode())
                    closed_else.pop_all()
                    return file  # else the run that held it has just ended, and deleted the file
        except HELD:
            raise ValueError(
                f"{path.parent}: a training is running there already ({describe_holder(path)}); wait until it ends, or "
                "stop it. To train another model beside it, set BEST_MODEL_PATH and FINAL_MODEL_PATH to another folder"
            ) from None
        except OSError:
            break
    return None


def describe_holder(path: Path) -> str:
    """Say which process holds a lock and since when, as it has noted in the file."""
    with suppress(OSError, ValueError):
        process, day, clock, host = path.read_text(encoding="utf-8").split()
        return f"process {process}{'' if host == platform.node() else f' on {host}'}, since {day} {clock}"
    return "in another process"


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
        name = type(error).__name__
        return (str(error).strip() or name).splitlines()[-1].removeprefix(f"{name}: ")
    if "DataLoader worker" in str(error) or "shared memory" in str(error):
        return "the worker processes ran out of shared memory: set WORKERS = 0 (in Docker: or --shm-size=1g)"
    if "torch" in sys.modules and runtime.is_out_of_memory(error):
        return "out of memory: lower BATCH_SIZE or IMAGE_SIZE"
    return None


def refuse_arguments(main: Callable[[], int], doc: str, setting: str) -> None:
    """End on arguments: with the help, or with a line that names the settings like them, else `setting`."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes no arguments: edit the settings at the top of the script.",
    )
    _, given = parser.parse_known_args()
    if given:
        words = [word.lstrip("-").partition("=")[0].replace("-", "_").upper() for word in given]
        alike = [name for name in main.__globals__["RULES"] if name.startswith(tuple(w for w in words if len(w) > 2))]
        edit = f"edit {', '.join(alike) or setting} at the top of the script"
        raise ValueError(f"{parser.prog} takes no arguments ({' '.join(given)}): {edit}")


def run_script(main: Callable[[], int], doc: str, when_stopped: str, setting: str = "the settings") -> int:
    """Run main() as a command. Returns its exit status, or that of an error, told in one line on standard error."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # Pillow's, on large scans
    runtime.left_out.clear()
    try:
        if "__file__" not in main.__globals__:
            raise ValueError(
                "this code runs without its file, beside which its modules and data lie: run the script itself, in a "
                "notebook with %run and its path"
            )
        refuse_arguments(main, doc, setting)
        signal.signal(signal.SIGTERM, raise_interrupt)
        return main() or int(bool(runtime.left_out))
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
