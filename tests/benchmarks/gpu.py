"""Check training and judging on a CUDA device: against the CPU, and against the network alone.

    .venv/bin/python tests/benchmarks/gpu.py

On the demo images, from random weights: trains two epochs of 100 steps in bfloat16 and in float16, once in one go and
once stopped after the first epoch and resumed; the same on the CPU in float32; judges the test images with one
checkpoint on both devices; and times the trainer against bare training steps on random tensors. Prints a line for each,
with the bound that it has to keep; exit status 1 if one does not. Takes 5 minutes. Ends in a line where there is no
CUDA device.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import CHECKPOINT, EVALUATOR, MODELS, TRAINER, copy_script, read_csv, run_process  # noqa: E402

from models import detector  # noqa: E402

STEPS, BATCH_SIZE, IMAGE_SIZE, CROP = 100, 8, 112, 56
RECIPE = {"EPOCHS": 2, "EPOCH_IMAGES": STEPS * BATCH_SIZE, "BATCH_SIZE": BATCH_SIZE, "PRETRAINED": None, "WORKERS": 0}
MOST_LOSS = 0.1  # difference of a mean training loss; crops are drawn anew on each device
MOST_RESUMED = 0.05  # the same between a run in one go and a resumed one; convolutions on a GPU are not repeatable
MOST_LLR = 0.2  # difference of a log-likelihood ratio, in nats
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def make_project(folder: Path) -> Path:
    """Copy the demo images and the test list."""
    for name in ("data/original", "data/deepfake", "test_data"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def force_float16(folder: Path) -> None:
    """Make the copied modules choose float16 on any CUDA device."""
    module = folder / "models/runtime.py"
    text = module.read_text()
    assert "torch.cuda.is_bf16_supported(including_emulation=False)" in text
    module.write_text(text.replace("torch.cuda.is_bf16_supported(including_emulation=False)", "False"))


def train(folder: Path, dtype: str, stop: bool = False, env: dict | None = None) -> list[dict]:
    """Train in a folder, with `stop` ended by SIGTERM after the first epoch and started again. Returns the history."""
    shutil.rmtree(folder / MODELS, ignore_errors=True)
    script = copy_script(folder, TRAINER, **RECIPE)
    if dtype == "float16":
        force_float16(folder)
    command, environment = [sys.executable, str(script)], {**os.environ, **(env or {})}
    if stop:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (folder / MODELS / "resume_state.pth").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dtype in done.stdout, done.stdout
    assert not stop or "Resuming after epoch 1" in done.stdout, done.stdout
    return read_csv(folder / MODELS / "history.csv")


def judge(folder: Path, env: dict | None = None) -> np.ndarray:
    """Judge the test images. Returns their log-likelihood ratios."""
    done = run_process(folder, EVALUATOR, env=env)
    assert done.status == 0, done.err
    lines = (folder / "test_data/test_scores.tsv").read_text().splitlines()[1:]
    return np.array([float(line.split("\t")[1]) for line in lines])


def time_bare_steps(dtype: torch.dtype, steps: int = 200) -> float:
    """Time training steps of the network alone on random tensors, images a second."""
    model = detector.make_network().cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, CROP, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH_SIZE, device="cuda") % 2
    for step in range(steps + 20):
        if step == 20:
            torch.cuda.synchronize()
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.cuda.synchronize()
    return steps * BATCH_SIZE / (time.perf_counter() - started)


def report(what: str, value: float, most: float) -> bool:
    """Print one comparison. Returns whether it keeps its bound."""
    print(f"{what}: {value:.4f} (at most {most})" + ("" if value <= most else "  TOO MUCH"), flush=True)
    return value <= most


def compare_losses(one: list[dict], other: list[dict]) -> float:
    """Return the largest difference of the training loss in an epoch."""
    return max(abs(float(a["train_loss"]) - float(b["train_loss"])) for a, b in zip(one, other))


def main() -> int:
    """Run all comparisons. Returns the exit status."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 0
    print(f"Device: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    kept = []
    with tempfile.TemporaryDirectory() as place:
        folder = make_project(Path(place))
        on_cpu = train(folder, "", env=NO_GPU)
        for dtype in ("bfloat16", "float16"):
            resumed, whole = train(folder, dtype, stop=True), train(folder, dtype)
            kept.append(report(f"{dtype}: loss against the CPU", compare_losses(whole, on_cpu), MOST_LOSS))
            kept.append(report(f"{dtype}: loss of the resumed run", compare_losses(whole, resumed), MOST_RESUMED))
            difference = np.abs(judge(folder) - judge(folder, NO_GPU)).max()
            kept.append(report(f"{dtype}: scores of {CHECKPOINT} against the CPU", difference, MOST_LLR))
            ours = STEPS * BATCH_SIZE / float(whole[-1]["seconds"])
            bare = time_bare_steps(getattr(torch, dtype))
            print(f"{dtype}: {ours:,.0f} images a second with validation, {bare:,.0f} bare: {ours / bare:.2f}")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
