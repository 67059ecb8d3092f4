"""Kill trainer and evaluator at random moments, fill the disk, damage checkpoints: is anything ever lost?

    .venv/bin/python tests/benchmarks/chaos.py [rounds]

Each round interrupts a small training run up to three times, lets it finish, and compares checkpoints and history with
those of a run that nothing interrupted; then it interrupts an evaluation. An interruption is a SIGKILL at a random
time or just before or after an fsync or os.replace, a disk that is full or refuses to rename files from some moment
on, or a share that refuses chmod and fsync, and some renames for a moment. 50 rounds (the default) take about 10
minutes. Exit status: 0, or 1 and a line for each fault.
"""

from __future__ import annotations

import csv
import errno
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Optional

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import EVALUATOR, QUICK, TRAINER, copy_script, make_project  # noqa: E402

from models import detector, runtime  # noqa: E402

BEST, FINAL = "best_laundered_processed.pth", "final_laundered_processed.pth"
TRAINING = {**QUICK, "EPOCHS": 3}
JUDGING = {"WORKERS": 0}


# ---- One run


def interrupt_at(event: int, kind: str, count_file: Path) -> None:
    """Let the event-th fsync or os.replace of this process kill it (before, after) or meet a full disk (full).

    refused: from it on all renames are; share: chmod and fsync are refused, and every event-th rename once.
    """
    calls, fsync, replace = [0], os.fsync, os.replace
    runtime.RENAME_WAITS_S = (0.01, 0.01)

    def watch(function):
        def call(*arguments):
            calls[0] += 1
            count_file.write_text(str(calls[0]))
            if kind == "full" and calls[0] >= event and function is fsync:
                raise OSError(errno.ENOSPC, "No space left on device")
            if kind == "refused" and calls[0] >= event and function is replace:
                raise PermissionError(errno.EACCES, "Permission denied")
            if kind == "share" and (function is fsync or calls[0] % (event + 1) == 0):
                raise OSError(errno.EINVAL if function is fsync else errno.EBUSY, "refused")
            if kind == "before" and calls[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if kind == "after" and calls[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    os.fsync, os.replace, os.chmod = watch(fsync), watch(replace), refuse if kind == "share" else os.chmod


def run_child(folder: Path, script: str, constants: dict, plan: Optional[tuple[str, float]]) -> int:
    """Run an edited copy of a script in a child of this process, interrupted as planned. Returns its exit status."""
    target = copy_script(folder, script, **constants)
    child = os.fork()  # importing torch anew would take most of the time
    if child == 0:
        with open(folder / "out.txt", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        kind, moment = plan or ("never", 0)
        interrupt_at(int(moment), kind, folder / "events.txt")
        sys.argv = [str(target)]
        try:
            runpy.run_path(str(target), run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)
    if plan and plan[0] == "time":
        time.sleep(plan[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def draw_plan(draw: random.Random, events: int, seconds: float) -> tuple[str, float]:
    """Draw when and how to interrupt a run that would make so many events and take so long."""
    kind = draw.choice(["time", "before", "after", "full", "refused", "share"])
    return kind, draw.uniform(0, seconds) if kind == "time" else draw.randint(1, events)


# ---- What must hold


def read_results(folder: Path) -> tuple:
    """Read what training made: weights of both checkpoints, history without its time column."""
    models = folder / "models/experiments"
    states = [detector.load_content(models / name) for name in (BEST, FINAL)]
    with open(models / "history.csv", newline="") as file:
        history = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    return [state["state_dict"] for state in states], [state["calibration"] for state in states], history


def are_equal(one: tuple, other: tuple) -> bool:
    """Tell whether two results are the same to the last bit."""
    pairs = zip(one[0], other[0])
    return one[1:] == other[1:] and all(
        a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values())) for a, b in pairs
    )


def list_temporary(folder: Path) -> list[str]:
    """List temporary files that runs left."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp"))


def age_temporary(folder: Path) -> None:
    """Make the temporary files of killed runs two days old: the next run has to remove them."""
    for path in list_temporary(folder):
        os.utime(folder / path, (time.time() - 2 * 24 * 3600,) * 2)


def train_through(folder: Path, plans: list, expected: tuple) -> list[str]:
    """Interrupt a training run as planned, then let it finish. Returns what was wrong."""
    faults = []
    for plan in plans:
        status = run_child(folder, TRAINER, TRAINING, plan)
        if status not in ((0,) if plan[0] == "share" else (0, 1, 2, -signal.SIGKILL)):
            faults.append(f"training, {plan}: exit status {status}")
        for path in (folder / "models/experiments").glob("*.pth"):
            try:
                detector.load_content(path)
            except ValueError as error:
                faults.append(f"training, {plan}: {error}")
        age_temporary(folder)
        if status == 0:  # it finished before the interruption came
            break
    else:
        status = run_child(folder, TRAINER, TRAINING, None)
    text = (folder / "out.txt").read_text()
    if status != 0:
        return [*faults, f"training, {plans}: the last start ended with {status}: {text[-300:]}"]
    if not are_equal(read_results(folder), expected):
        faults.append(f"training, {plans}: results differ from those of a run without interruption")
    if left := list_temporary(folder):
        faults.append(f"training, {plans}: left {left}")
    return faults


def judge_through(folder: Path, plan: tuple, old: bytes, new: bytes) -> list[str]:
    """Interrupt an evaluation, look at its CSV, then let it finish. Returns what was wrong."""
    table, faults = folder / "test_data/test.csv", []
    run_child(folder, EVALUATOR, JUDGING, plan)
    if table.read_bytes() not in (old, new):
        faults.append(f"evaluation, {plan}: the CSV is neither the old nor the new one")
    age_temporary(folder)
    status = run_child(folder, EVALUATOR, JUDGING, None)
    if status != 0 or table.read_bytes() != new:
        faults.append(
            f"evaluation, {plan}: afterwards exit status {status}, CSV as expected: {table.read_bytes() == new}"
        )
    if left := list_temporary(folder):
        faults.append(f"evaluation, {plan}: left {left}")
    return faults


def damage_checkpoint(path: Path, truncations: int, flips: int, draw: random.Random) -> tuple[Counter, list[str]]:
    """Load damaged copies of a checkpoint. Returns how many were refused and how many right, and what was wrong."""
    content = path.read_bytes()
    expected = detector.load_content(path)["state_dict"]
    copy, counts, faults = path.with_name("damaged.pth"), Counter(), []
    for number in range(truncations + flips):
        if number < truncations:
            place = draw.randrange(len(content))
            damaged, what = content[:place], f"cut at {place}"
        else:  # half of them anywhere, half where names, lengths and the pickle lie
            place = draw.randrange(len(content)) if number % 2 else draw.choice((1, -1)) * draw.randrange(1, 30_000)
            bit = 1 << draw.randrange(8)
            damaged = bytearray(content)
            damaged[place] ^= bit
            what = f"bit {bit} of byte {place} flipped"
        copy.write_bytes(damaged)
        try:
            state = detector.load_content(copy)["state_dict"]
            right = state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
            counts["right"] += right
            if not right:
                faults.append(f"{what}: loaded, but not the right weights")
        except ValueError as error:
            counts["refused"] += 1
            if len(str(error).splitlines()) != 1:
                faults.append(f"{what}: more than one line: {error}")
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}")
    copy.unlink()
    return counts, faults


# ---- Main


def main() -> int:
    """Run all rounds. Returns the exit status."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    draw, faults, interruptions = random.Random(rounds), [], Counter()
    with tempfile.TemporaryDirectory() as scratch:
        reference = make_project(Path(scratch) / "reference", recordings=8)
        started = time.perf_counter()
        if run_child(reference, TRAINER, TRAINING, None) != 0:
            print((reference / "out.txt").read_text())
            return 1
        seconds, events = time.perf_counter() - started, int((reference / "events.txt").read_text())
        expected = read_results(reference)
        old = (reference / "test_data/test.csv").read_bytes()
        started = time.perf_counter()
        if run_child(reference, EVALUATOR, JUDGING, None) != 0:
            print((reference / "out.txt").read_text())
            return 1
        judging_seconds, judging_events = time.perf_counter() - started, int((reference / "events.txt").read_text())
        new = (reference / "test_data/test.csv").read_bytes()
        for number in range(rounds):
            folder = make_project(Path(scratch) / f"round{number}", recordings=8)
            plans = [draw_plan(draw, events, seconds) for _ in range(draw.randint(1, 3))]
            faults += train_through(folder, plans, expected)
            plan = draw_plan(draw, judging_events, judging_seconds)
            faults += judge_through(folder, plan, old, new)
            interruptions.update(kind for kind, _ in (*plans, plan))
            shutil.rmtree(folder)
        counts, wrong = damage_checkpoint(reference / "models/experiments" / BEST, 4 * rounds, 10 * rounds, draw)
    for fault in faults + wrong:
        print(f"FAULT: {fault}")
    print(f"{sum(interruptions.values())} interruptions ({dict(interruptions)}), {len(faults)} faults")
    print(f"{14 * rounds} damaged checkpoints: {dict(counts)}, {len(wrong)} faults")
    return 1 if faults or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
