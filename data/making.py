"""The images of a recording are made here: by all cores of a machine, and by many machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from copies import Image, Picture, Recording
from laundering import Draw, Laundering, launder
from pictures import Format, draw_parts, encode_png, fill_up, place_parts
from recordings import SILENCE, find_voices, read_audio

from models import runtime

FEW = 48  # recordings that one process makes as fast as several, which take a second to start
AT_ONCE = 8  # recordings that a worker process takes at a time
STATUS = ".making"  # folder in which the processes of many machines report to the first, below data/
BEAT_S = 5  # between two of their reports
SILENT_S = 60  # after so long without one a process counts as dead


class Recipe(NamedTuple):
    """What shapes the images."""

    form: Format
    laundering: Laundering
    babble: list[str]  # recordings that babble may be made of
    root: str  # AUDIO_DIR as it is noted in images, from the folder data/

    def list_settings(self, condition: str) -> dict:
        """List what is stored in an image: the settings of the laundering do not concern a clean one."""
        return {**self.form._asdict(), **(self.laundering._asdict() if condition != "clean" else {})}


class Made(NamedTuple):
    """What was made of a recording."""

    kind: str
    seconds: float = 0  # of audio
    silent: int = 0  # parts without sound
    images: dict[str, list[Image]] = {}  # by the stem of their picture
    failed: tuple[str, ...] = ()  # a line for each copy that was left out
    voices: str = ""  # its path, if its channels are different voices


@dataclass
class Tally:
    """What was made of all recordings."""

    seconds: Counter = field(default_factory=Counter)  # of audio, by kind
    silent: Counter = field(default_factory=Counter)  # parts without sound, by kind
    made: Counter = field(default_factory=Counter)  # images, by kind of the recording
    failed: list[str] = field(default_factory=list)  # a line for each recording or copy that was left out
    voices: list[str] = field(default_factory=list)  # recordings whose channels are different voices

    def add(self, made: Made) -> None:
        """Add what was made of a recording."""
        self.seconds[made.kind] += made.seconds
        self.silent[made.kind] += made.silent
        self.made[made.kind] += sum(map(len, made.images.values()))
        self.failed.extend(made.failed)
        self.voices.extend([made.voices] if made.voices else [])

    def join(self, other: dict) -> None:
        """Add another tally, given by its fields."""
        for name, value in vars(self).items():
            value.update(other[name]) if isinstance(value, Counter) else value.extend(other[name])


# ---- One recording


def make_recording(pictures: list[Picture], recipe: Recipe) -> Made:
    """Make all images of one recording; what fails is told, not raised."""
    recording, form, rate = pictures[0].recording, recipe.form, recipe.form.sample_rate
    images, failed, seconds, silent = defaultdict(list), [], 0.0, 0
    try:
        voices = find_voices(recording.path)
        channels = voices if recording.kind == "unknown" else [None]
    except Exception as error:  # decoders raise many kinds; every one is reported by name
        return Made(recording.kind, failed=(f"{recording.path}: {explain(error)}",))
    for channel in channels:
        try:
            samples, peak = read_audio(recording.path, rate, channel)
            if len(samples) < form.window:
                raise ValueError("it is shorter than WINDOW_S")
            starts, filled = place_parts(len(samples), form), fill_up(samples, form.duration)
            loud = [n for n in starts if np.ptp(filled[n * form.column :][: form.duration]) > 2 * SILENCE / peak]
            if not loud:
                raise ValueError("it holds nothing but silence")
        except Exception as error:
            failed.append(f"{recording.path}: {explain(error)}")
            continue
        seconds, silent = seconds + len(samples) / rate, silent + len(starts) - len(loud)
        notes = {"audio": recipe.root, "recording": recording.place.partition("/")[2]}
        notes["recording_crc32"] = recording.checksum
        if channel is not None:
            notes |= {"channel": channel + 1, "channels": len(channels)}
        for picture in pictures:
            try:
                images[str(picture.stem)] += make_picture(picture, samples, loud, notes, recipe)
            except Exception as error:
                failed.append(f"{recording.path} ({picture.condition}): {explain(error)}")
    return Made(recording.kind, seconds, silent, dict(images), tuple(failed), recording.path if len(voices) > 1 else "")


def explain(error: Exception) -> str:
    """Explain in one line why a recording was left out."""
    return (str(error) or type(error).__name__).splitlines()[0]


def make_picture(picture: Picture, samples: np.ndarray, starts: list[int], notes: dict, recipe: Recipe) -> list[Image]:
    """Make the image, or images, of a recording under one condition; the parts start at these columns."""
    form, channel = recipe.form, notes.get("channel", 0)
    stem, rate = picture.name_channel(channel), form.sample_rate
    others = [path for path in recipe.babble if os.path.basename(path) != os.path.basename(picture.recording.path)]
    rng = np.random.default_rng([recipe.laundering.seed, zlib.crc32(stem.name.encode("utf-8"))])
    draw = Draw(rate, rng, recipe.laundering, others, lambda path: read_audio(path, rate)[0])
    laundered, words = launder(samples, picture.condition, draw)
    notes = {"settings": recipe.list_settings(picture.condition), "parts": len(starts), **notes}
    notes |= {"seconds": round(min(form.duration, len(samples)) / rate, 3), **({"laundering": words} if words else {})}
    if picture.is_fake:
        notes["recording_class"] = picture.recording.kind
    stem.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for number, part in enumerate(draw_parts(fill_up(laundered, form.duration), starts, form)):
        path = stem.with_name(stem.name + (f"_{number + 1}" if len(starts) > 1 else "") + ".png")
        notes["start_s"] = round(starts[number] * form.column / rate, 3)
        runtime.write_file(path, encode_png(part, notes))
        images.append(Image(path, channel, notes["start_s"]))
    return images


# ---- All cores


def make_all(jobs: list[list[Picture]], recipe: Recipe, workers: int) -> Iterator[Made]:
    """Make the images of many recordings, in the order of `jobs`, whatever the number of worker processes.

    Raises:
        ValueError: a worker process died.
    """
    if workers == 1 or len(jobs) < FEW:
        yield from map(partial(make_recording, recipe=recipe), jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the workers: a core each
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield from pool.map(partial(make_recording, recipe=recipe), jobs, chunksize=AT_ONCE)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died, perhaps for lack of memory: run this script again to make the rest (WORKERS = 1 "
            "takes the least memory)"
        ) from None
    except BaseException:  # Ctrl-C ends the work at once
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


# ---- Many machines


class Share(NamedTuple):
    """The part of the work of one of several processes, that torchrun or srun started."""

    rank: int
    size: int
    on_machine: int  # processes on this machine
    folder: Path  # in which they report

    def owner(self, recording: Recording) -> int:
        """Tell which rank has to make a recording's images."""
        return zlib.crc32(os.fsencode(recording.place)) % self.size

    @contextmanager
    def report(self, tally: Tally) -> Iterator[None]:
        """Report to rank 0 every few seconds that this process is alive, and at the end what it made."""
        if not self.rank:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                self.write("working", Tally())

        self.write("working", Tally())
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self.write("done", tally)

    def write(self, state: str, tally: Tally) -> None:
        """Write this process's report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {"state": state, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        runtime.write_file(self.folder / f"{self.rank}.json", json.dumps({**report, **vars(tally)}).encode())

    def read(self, rank: int) -> dict:
        """Read the report of a process; an empty one if there is none."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / f"{rank}.json").read_text())
        return {}

    def is_dead(self, report: dict) -> bool:
        """Tell whether the process of a report has ended without finishing its work, if it runs on this machine."""
        if report.get("state") != "working" or report["host"] != socket.gethostname() or os.name != "posix":
            return False
        try:
            os.kill(report["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def forget_dead(self) -> None:
        """Delete what killed processes of an earlier run have left."""
        for rank in range(1, self.size):
            if self.is_dead(self.read(rank)):
                (self.folder / f"{rank}.json").unlink(missing_ok=True)

    def wait(self, count_missing: Callable[[], Counter], tally: Tally) -> list[str]:
        """Wait for the other processes, and add to the tally what they made; a line for each that died.

        Args:
            count_missing: counts the copies that are not there yet, by the rank that has to make them.
        """
        changed, last, lines = dict.fromkeys(range(1, self.size), time.monotonic()), {}, []
        missing = count_missing()
        while changed:
            for rank, since in list(changed.items()):
                report, now = self.read(rank), time.monotonic()
                if report != last.get(rank):
                    last[rank], changed[rank] = report, now
                    missing = count_missing() if report.get("state") == "done" else missing
                    since = now
                if report.get("state") == "done" and missing[rank] <= len(report["failed"]):
                    tally.join(report)
                elif missing[rank] and (self.is_dead(report) or now - since > SILENT_S):
                    where = f" (process {report['pid']} on {report['host']})" if report else ""
                    missing = count_missing()
                    lines.append(
                        f"{missing[rank]:,} copies: rank {rank} of {self.size}{where} "
                        + ("died" if report else "never started")
                        + ": run this again to make them"
                    )
                elif missing[rank]:
                    continue
                del changed[rank]
            time.sleep(0.1 if changed else 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        return lines


def find_share(data_dir: Path) -> Share:
    """Find out which of how many processes this is, by the environment that torchrun or srun sets."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    ):
        rank, size, local = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and size.isdigit() and int(size) > 1:
            return Share(int(rank), int(size), int(local) if local.isdigit() else 1, data_dir / STATUS)
    return Share(0, 1, 1, data_dir / STATUS)
