"""Measure speed and memory of both scripts against a plain version of the same job, in turn, in one run.

    .venv/bin/python tests/benchmarks/speed.py

plain: as tutorials write it: each item decoded by Pillow in every epoch, float32, batches of 32, two workers;
       evaluation row by row.
ours:  the scripts themselves, as users run them, with a network from random weights.
bare:  the network alone on random tensors in our format and our batches: the limit.

Prints the tables in Markdown. Takes about 15 minutes on two cores with bfloat16 instructions.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# ------------------------------------------------------------------------------------------------
# Settings
ROUNDS = 3  # all versions in turn, so many times
IMAGES = 500
FULL_SIZE = (2325, 1155)  # pixels, a figure saved with 300 dots per inch
GROWTH = (500, 2000, 8000)  # numbers of small images
VAL_FRACTION = 0.1
# ------------------------------------------------------------------------------------------------

TRANSFORM = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]


def make_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Save demo images as figures of another size (RGBA, as matplotlib saves them), and a CSV that lists them all."""
    sources = {kind: sorted((ROOT / "data" / kind / "combined").glob("*.png")) for kind in ("deepfake", "original")}
    rows = [["img_path", "actual_output"]]
    for number in range(count):
        kind = ("deepfake", "original")[number % 2]
        smooth = Image.NEAREST if number % 4 < 2 else Image.BILINEAR  # 0.3 MB or 2.5 MB at full size
        with Image.open(sources[kind][number // 2 % len(sources[kind])]) as image:
            figure = image.convert("RGBA").resize(size, smooth)
        name = f"{kind}/combined/r{number}__clean.png"
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        figure.save(folder / "data" / name)
        rows.append([name, kind.capitalize()])
    (folder / "test_data").mkdir()
    with open(folder / "test_data/test.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ---- The plain version


def train_plainly(folder: Path) -> dict:
    """Train and validate for one epoch as tutorials do."""
    change = [transforms.Resize((224, 224)), transforms.RandomHorizontalFlip(), transforms.RandomRotation(10)]
    images = ImageFolder(str(folder / "data"), transforms.Compose(change + TRANSFORM))
    split = int(len(images) * VAL_FRACTION)
    order = torch.randperm(len(images)).tolist()
    train = DataLoader(Subset(images, order[split:]), 32, shuffle=True, num_workers=2)
    val = DataLoader(Subset(images, order[:split]), 32, num_workers=2)
    model = resnet18(num_classes=2)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), 1e-3)

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(2):
        step(torch.randn(32, 3, 224, 224), torch.zeros(32, dtype=torch.long))
    started = time.perf_counter()
    model.train()
    for inputs, labels in train:
        step(inputs, labels)
    model.eval()
    with torch.no_grad():
        for inputs, labels in val:
            criterion(model(inputs), labels).item()
    return {"epoch_s": time.perf_counter() - started}


def evaluate_plainly(folder: Path) -> dict:
    """Score every row of the CSV on its own."""
    transform = transforms.Compose([transforms.Resize((224, 224)), *TRANSFORM])
    model = resnet18(num_classes=2).eval()
    with open(folder / "test_data/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    model(torch.randn(1, 3, 224, 224))
    started = time.perf_counter()
    for row in rows:
        image = Image.open(folder / "data" / row["img_path"]).convert("RGB")
        with torch.no_grad():
            row["predicted_output"] = model(transform(image).unsqueeze(0)).argmax(1).item()
    return {"score_s": time.perf_counter() - started}


# ---- The network alone


def run_bare(folder: Path) -> dict:
    """Take an epoch's steps, then score as many images, on random tensors."""
    import train_deepfake_detector as trainer
    from models import detector, runtime

    runtime.keep_freed_memory()
    compute = runtime.choose_compute("auto")
    model = detector.make_network().to(memory_format=torch.channels_last)
    count = len(list((folder / "data").rglob("*.png")))
    in_val = int(count * VAL_FRACTION)
    width = round(trainer.TIME_CROP * 224)
    labels = torch.arange(32) % 2
    inputs = torch.randn(32, 3, 224, width).contiguous(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)

    def step() -> None:
        with compute.autocast():
            logits = model(inputs)
        optimizer.zero_grad()
        loss_fn(logits.float(), labels).backward()
        optimizer.step()

    def score(model: nn.Module, number: int) -> None:
        with torch.inference_mode(), compute.autocast():
            for start in range(0, number, 32):
                model(images[: number - start])

    step()
    score(model.eval(), 32)
    started = time.perf_counter()
    model.train()
    for _ in range((count - in_val) // 32):
        step()
    score(model.eval(), in_val)
    epoch_s = time.perf_counter() - started
    fused = detector.fuse_norms(model).to(memory_format=torch.channels_last)
    score(fused, 32)
    started = time.perf_counter()
    score(fused, count)
    return {"epoch_s": epoch_s, "score_s": time.perf_counter() - started}


# ---- Ours


def run_ours(folder: Path, **constants: object) -> tuple[str, list[float]]:
    """Run a script as its users do. Returns what it printed, and its peak memory in MB beside that of its children."""
    from conftest import copy_script

    script = copy_script(folder, constants.pop("script"), **constants)
    return run_process([sys.executable, str(script)])


def train_ours(folder: Path, epochs: int = 4, **constants: object) -> dict:
    """Train with an empty cache. Returns seconds of the reading pass and of each epoch but the first."""
    common = {"PRETRAINED": None, "HOLDOUT_CSVS": [], "EPOCHS": epochs, "VAL_FRACTION": VAL_FRACTION}
    shutil.rmtree(folder / "models/cache", ignore_errors=True)
    out, memory = run_ours(folder, script="train_deepfake_detector.py", **common, **constants)
    reading = float(re.search(r"Read [\d,]+ images in ([\d.]+) s", out)[1])
    seconds = [float(value) for value in re.findall(r"seconds ([\d.]+)", out)]
    return {"reading_s": reading, "epoch_s": statistics.median(seconds[1:] or seconds), "memory_mb": memory}


def evaluate_ours(folder: Path) -> dict:
    """Score every row of the CSV with the checkpoint that train_ours left."""
    out, memory = run_ours(folder, script="evaluate_deepfake_model.py")
    return {"score_s": float(re.search(r"Judged [\d,]+ images in ([\d.]+) s", out)[1]), "memory_mb": memory}


# ---- Measuring


def measure_memory_mb(pid: int) -> float:
    """Sum the memory of a process and its descendants that is neither page cache nor shared between them."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) / 1000
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(measure_memory_mb(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        pass  # it has just ended, or this is not Linux
    return total


def run_process(command: list[str]) -> tuple[str, float]:
    """Run a command. Returns its output and the peak memory in MB, page cache not counted."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], measure_memory_mb(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return out, peak[0]


def run_part(name: str, folder: Path) -> dict:
    """Run one of this file's functions in a process of its own."""
    out, memory = run_process([sys.executable, __file__, name, str(folder)])
    return {**json.loads(out.splitlines()[-1]), "memory_mb": memory}


def describe(values: list[float], digits: int = 2) -> str:
    """Write a median and the range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(work: Path) -> None:
    """Compare the versions on full-size and on small images, in turn, and print a table."""
    rounds: dict[str, list[dict]] = {}
    for kind, size in (("full-size", FULL_SIZE), ("224-pixel", (224, 224))):
        make_images(work / kind, IMAGES, size)
    for number in range(ROUNDS):
        for kind in ("full-size", "224-pixel"):
            folder = work / kind
            parts = {"train_plainly": {}, "train_ours": {}, "run_bare": {}, "evaluate_plainly": {}, "evaluate_ours": {}}
            for part in parts:
                result = globals()[part](folder) if part.endswith("ours") else run_part(part, folder)
                rounds.setdefault(f"{kind} {part}", []).append(result)
                print(f"round {number + 1}, {kind}, {part}: {result}", file=sys.stderr, flush=True)

    def ratios(kind: str, slow: str, fast: str, key: str) -> list[float]:
        pairs = zip(rounds[f"{kind} {slow}"], rounds[f"{kind} {fast}"])
        return [one[key] / other[key] for one, other in pairs]

    def rate(kind: str, part: str, key: str) -> str:
        return f"{IMAGES / statistics.median(run[key] for run in rounds[f'{kind} {part}']):.0f}"

    def memory(kind: str, part: str) -> str:
        return f"{statistics.median(run['memory_mb'] for run in rounds[f'{kind} {part}']):.0f}"

    print("| images a second | plain | ours | bare | ours / plain | ours / bare | peak MB, plain | ours |")
    print("|---|---|---|---|---|---|---|---|")
    for job, key, part in (("training", "epoch_s", "train"), ("evaluation", "score_s", "evaluate")):
        for kind in ("full-size", "224-pixel"):
            plain, ours = f"{part}_plainly", f"{part}_ours"
            cells = [rate(kind, name, key) for name in (plain, ours, "run_bare")]
            cells += [describe(ratios(kind, plain, ours, key)), describe(ratios(kind, "run_bare", ours, key))]
            print(f"| {job}, {kind} | " + " | ".join([*cells, memory(kind, plain), memory(kind, ours)]) + " |")
    runs = zip(rounds["full-size train_plainly"], rounds["full-size train_ours"])
    five = [5 * plain["epoch_s"] / (ours["reading_s"] + 5 * ours["epoch_s"]) for plain, ours in runs]
    print(f"\nReading pass and five epochs, full-size images, ours / plain: {describe(five)}")
    reading = [run["reading_s"] / IMAGES * 1000 for run in rounds["full-size train_ours"]]
    print(f"Reading pass, full-size images: {describe(reading, 1)} ms an image")


def grow(work: Path) -> None:
    """Measure how time and memory grow with the number of images, and print a table."""
    print("\n| images of 64 pixels | reading pass, s | an epoch, s | evaluation, s | peak MB, training | evaluation |")
    print("|---|---|---|---|---|---|")
    for count in GROWTH:
        folder = work / str(count)
        make_images(folder, count, (64, 64))
        train, judge = train_ours(folder, epochs=1, IMAGE_SIZE=64), evaluate_ours(folder)
        cells = [train["reading_s"], train["epoch_s"], judge["score_s"], train["memory_mb"], judge["memory_mb"]]
        print(f"| {count:,} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


def main() -> None:
    """Measure all, and print the tables."""
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
        return
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if os.path.exists("/proc/cpuinfo")
        else None
    )
    print(f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores; torch {torch.__version__}")
    print(f"{IMAGES} images; median of {ROUNDS} rounds and their range\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        compare(Path(work))
        grow(Path(work))


if __name__ == "__main__":
    main()
