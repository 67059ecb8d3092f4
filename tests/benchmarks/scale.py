"""Measure how start-up, memory and evaluation grow with the number of images, and print a table and its slopes.

    .venv/bin/python tests/benchmarks/scale.py [images ...]

Uses hard links of few small images (64 pixels) and stops the trainer where its first epoch would begin. Without
numbers: 10,000, 50,000 and 200,000 images, about 12 minutes on two cores, 3 GB of disk for the cache. Then compares one
process of two threads with two processes of one thread under torchrun.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

from conftest import EVALUATOR, TRAINER, copy_script  # noqa: E402
from speed import measure_memory_mb  # noqa: E402

from models import detector  # noqa: E402

COUNTS = (10_000, 50_000, 200_000)
SOURCES = 500  # different images; the others are links to them


def make_links(folder: Path, count: int) -> None:
    """Make folders of so many images for both classes together, and a CSV that lists them all."""
    demo = {kind: sorted((ROOT / "data" / kind / "combined").glob("*.png")) for kind in ("deepfake", "original")}
    (folder / "sources").mkdir(parents=True)
    for number in range(SOURCES):
        images = demo[("deepfake", "original")[number % 2]]
        with Image.open(images[number // 2 % len(images)]) as image:
            small = image.convert("RGB").resize((64, 64))
        small.save(folder / "sources" / f"{number}.png")
    rows = [["img_path", "actual_output"]]
    for number in range(count):
        kind = ("deepfake", "original")[number % 2]
        name = f"{kind}/part{number // 20_000}/r{number}__clean.png"
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "sources" / f"{number % SOURCES}.png", path)
        rows.append([name, kind])
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def watch(command: list[str], until: str) -> tuple[dict[str, float], float]:
    """Run a command up to a line that begins with `until`: seconds at which each line came, and the peak MB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, moments, started = [0.0], {}, time.perf_counter()

    def look() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], measure_memory_mb(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=look)
    watcher.start()
    for line in process.stdout:
        moments[line] = time.perf_counter() - started
        if line.startswith(until):
            process.kill()
            break
    process.wait()
    watcher.join()
    return moments, peak[0]


def find_moment(moments: dict[str, float], beginning: str) -> float:
    """Return when the first line that begins so came."""
    return next(moment for line, moment in moments.items() if line.startswith(beginning))


def measure(folder: Path, count: int) -> list[float]:
    """Measure one size: seconds of index, reading and split, MB of memory and cache, seconds and MB of evaluation."""
    make_links(folder, count)
    common = {"IMAGE_SIZE": 64, "PRETRAINED": None, "HOLDOUT_CSVS": [], "EPOCHS": 1}
    script = copy_script(folder, TRAINER, **common)
    moments, memory = watch([sys.executable, "-u", str(script)], "Start:")
    device, images = find_moment(moments, "Device:"), find_moment(moments, "Images below")
    read, start = find_moment(moments, "Read "), find_moment(moments, "Start:")
    cache = sum(path.stat().st_size for path in (folder / "models/cache").iterdir()) / 1e6
    facts = {**detector.BARE_FACTS, "image_size": 64, "format": detector.CHECKPOINT_FORMAT}
    torch.save({**facts, "state_dict": resnet18(num_classes=2).state_dict()}, folder / "model.pth")
    settings = {"MODEL_PATH": "model.pth", "CSV_FILES": ["list.csv"]}
    script = copy_script(folder, EVALUATOR, **settings)
    moments, judging_memory = watch([sys.executable, "-u", str(script)], "Predictions written")
    judged = find_moment(moments, "Judged") - find_moment(moments, "list.csv")
    written = find_moment(moments, "Predictions written") - find_moment(moments, "Judged")
    return [images - device, read - images, start - read, memory, cache, judged, written, judging_memory]


def compare_processes(folder: Path, rounds: int = 3) -> None:
    """Print how much longer an epoch takes two processes of one thread each than one of two threads, in turn."""
    make_links(folder, 480)
    common = {"PRETRAINED": None, "HOLDOUT_CSVS": [], "EPOCHS": 3}
    script = copy_script(folder, TRAINER, **common)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ratios = []
    for _ in range(rounds):
        seconds = []
        for command, threads in (([sys.executable], "2"), (launch, "1")):
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, check=True)
            epochs = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("epoch")]
            seconds.append(statistics.median(epochs[1:]))
        ratios.append(seconds[1] / seconds[0])
    text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"\nAn epoch of two processes with one thread each, against one process with two threads: {text}")


def main() -> None:
    """Measure all sizes and print the table."""
    counts = [int(argument) for argument in sys.argv[1:]] or COUNTS
    print(
        "| images | index, s | reading, s | split, checks, s | peak MB | cache MB | judging, s | report, s | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(Path(folder), count))
        print(f"| {count:,} | " + " | ".join(f"{value:.1f}" for value in results[-1]) + " |", flush=True)
    if len(counts) > 1:
        slopes = [(last - first) / (counts[-1] - counts[0]) * 1e6 for first, last in zip(results[0], results[-1])]
        print("| slope for each million | " + " | ".join(f"{slope:,.0f}" for slope in slopes) + " |")
    with tempfile.TemporaryDirectory() as folder:
        compare_processes(Path(folder))


if __name__ == "__main__":
    main()
