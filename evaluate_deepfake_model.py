"""Judge spectrogram images with a trained checkpoint: Original or Deepfake, for each row of a CSV.

    python evaluate_deepfake_model.py

In:  MODEL_PATH, and CSVs with a column img_path (relative to IMG_BASE_PATH) and, where the truth is
     known, actual_output (Original or Deepfake). The images must be made as the training images were.
Out: the columns predicted_output and deepfake_score (0 to 1; from 0.5 on Deepfake) in the same CSV;
     where there are labels, <name>_report.txt, <name>.png (confusion matrix) and, beside the first
     CSV, aggregate_test_reports.json.

Needs no other file of this project: what it must know about the model stands in the checkpoint.
About 100 images a second on two cores.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
# Paths
MODEL_PATH = Path("models/experiments/best_laundered_processed.pth")
IMG_BASE_PATH = Path("data")  # img_path is relative to this folder
CSV_FILES = ["test_data/test.csv"]
# System
BATCH_SIZE = 32  # images; larger is slower on a CPU
WORKERS = None  # processes that read images; 0: the main process; None: what fits the machine and the job
PRECISION = "auto"  # "auto": bfloat16 or float16 where the hardware gains by it; "float32"
# ------------------------------------------------------------------------------------------------

CLASSES = ("Deepfake", "Original")  # logit order
LABELS = {  # what actual_output may say, without regard to case and surrounding blanks
    "Deepfake": ("deepfake", "spoof", "fake"),
    "Original": ("original", "bonafide", "bona fide", "bona-fide", "real", "genuine"),
}
REPORT_ORDER = ("Original", "Deepfake")
CHECKPOINT_FORMAT = 1
BARE_FACTS = {  # stand in where a file holds weights only
    "classes": list(CLASSES),
    "image_size": 224,
    "mean": [0.485, 0.456, 0.406],  # ImageNet's: pytorch.org/vision/stable/models.html, ResNet18_Weights
    "std": [0.229, 0.224, 0.225],
    "calibration": {"scale": 1.0, "offset": 0.0},
}


class Compute(NamedTuple):
    """Where the network computes, and in which number format."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Job(NamedTuple):
    """One CSV to judge."""

    path: Path
    rows: list[list[str]]  # as they stand in the file, header first
    delimiter: str
    images: dict[int, str]  # row number -> absolute path of its image; rows that are blank lines are missing
    labels: Optional[dict[int, str]]  # row number -> class; rows with a blank label are missing; None: no such column


# ---- CSV


def parse_table(content: bytes, path: Path) -> tuple[list[list[str]], str]:
    """Parse a CSV as text: its rows, header first, and its delimiter (comma, semicolon or tab).

    Raises:
        ValueError: it is not UTF-8, or has no column img_path.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    csv.field_size_limit(2**31 - 1)
    for delimiter in ",;\t":
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV: {error}") from None
        if rows and "img_path" in rows[0]:
            return rows, delimiter
    first_line = text[:100].splitlines()[:1]
    raise ValueError(f"{path} has no column img_path; its first line: {first_line}")


def format_table(rows: list[list[str]], delimiter: str, before: bytes) -> bytes:
    """Write rows as CSV with the BOM, line endings and end of file that the file had before."""
    text = before.decode("utf-8")
    line_end = text.find("\n")
    newline = "\r\n" if text[line_end - 1 : line_end] == "\r" else "\n"
    if line_end < 0 and "\r" in text:
        newline = "\r"
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=newline).writerows(rows)
    after = buffer.getvalue()
    if not text.endswith(("\n", "\r")):
        after = after[: -len(newline)]
    return (text[:1] if text.startswith("\ufeff") else "").encode() + after.encode()


def resolve_image(base: Path, cell: str) -> str:
    """Resolve an img_path: slashes of either kind, relative to base; an absolute path stays."""
    return os.path.normpath(os.path.join(base, cell.strip().replace("\\", "/")))


def parse_label(cell: str) -> Optional[str]:
    """Return the class that a label cell names, None for an unknown word."""
    word = " ".join(cell.lower().split())
    return next((name for name, words in LABELS.items() if word in words), None)


def read_job(path: Path, base: Path) -> Job:
    """Read one CSV and check all of it before any image is read.

    Raises:
        ValueError: the file is missing, or no CSV with a column img_path; a row has more cells than
            the header; a label is unknown.
    """
    if not path.is_file():
        raise ValueError(f"CSV not found: {path}")
    rows, delimiter = parse_table(path.read_bytes(), path)
    header = rows[0]
    for name in ("img_path", "actual_output", "predicted_output", "deepfake_score"):
        if header.count(name) > 1:
            raise ValueError(f"{path} has {header.count(name)} columns named {name}")
    label_column = header.index("actual_output") if "actual_output" in header else None
    images, labels = {}, {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) > len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells, but the header has {len(header)}")
        cells = row + [""] * (len(header) - len(row))
        images[number] = resolve_image(base, cells[header.index("img_path")])
        if label_column is not None and cells[label_column].strip():
            labels[number] = parse_label(cells[label_column])
            if labels[number] is None:
                allowed = ", ".join(word for words in LABELS.values() for word in words)
                raise ValueError(
                    f"{path}, row {number}: unknown actual_output {cells[label_column]!r} "
                    f"(allowed: {allowed}, or blank)"
                )
    return Job(path, rows, delimiter, images, None if label_column is None else labels)


def read_jobs(paths: list[Path], base: Path) -> tuple[list[Job], int]:
    """Read all CSVs; name those that cannot be used. Returns the usable ones and the number of others.

    Raises:
        ValueError: none can be used, or two would write the same report.
    """
    jobs, reasons = [], []
    for path in dict.fromkeys(paths):
        try:
            jobs.append(read_job(path, base))
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    outputs = {}
    for job in jobs:
        other = outputs.setdefault(job.path.with_suffix(""), job.path)
        if other != job.path:
            raise ValueError(f"{other} and {job.path} would write the same report: rename one")
    if not jobs:
        raise ValueError("; ".join(reasons) or "CSV_FILES is empty")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return jobs, len(reasons)


# ---- Model


def load_detector(path: Path) -> tuple[nn.Module, dict]:
    """Rebuild a detector from a checkpoint, or from a bare state_dict, without running any code in it.

    Returns:
        The network in evaluation mode, on the CPU, and the checkpoint's facts.

    Raises:
        ValueError: the file is missing, damaged, or no two-class ResNet-18.
    """
    if not path.is_file():
        raise ValueError(f"MODEL_PATH: file not found: {path} (train_deepfake_detector.py makes it)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on damaged or foreign files
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"MODEL_PATH: {path} is no checkpoint of weights, or is damaged ({reason})") from None
    facts = content if isinstance(content, dict) else {}
    state = facts.get("state_dict", facts)
    if "format" not in facts:
        print(
            f"Warning: {path.name} holds weights only; assumed: classes {', '.join(CLASSES)}, image size "
            f"{BARE_FACTS['image_size']}, ImageNet's mean and deviation, no calibration"
        )
        facts = {**BARE_FACTS, "format": CHECKPOINT_FORMAT}
    if facts["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"MODEL_PATH: {path} has format {facts['format']}; this script reads {CHECKPOINT_FORMAT}")
    missing = [name for name in BARE_FACTS if name not in facts]
    if missing or sorted(facts["classes"]) != sorted(CLASSES):
        raise ValueError(f"MODEL_PATH: {path} lacks {', '.join(missing) or 'the classes ' + str(CLASSES)}")
    return build_model(state, path), facts


def build_model(state: dict, path: Path) -> nn.Module:
    """Build a two-class ResNet-18 from a state_dict, whose head may follow a dropout or a `module.` prefix.

    Raises:
        ValueError: it is none, or a weight is not finite.
    """
    state = {str(name).removeprefix("module.").replace("fc.1.", "fc."): value for name, value in state.items()}
    head = state.get("fc.weight")
    if not isinstance(head, torch.Tensor) or head.ndim != 2:
        raise ValueError(f"MODEL_PATH: {path} holds no ResNet-18 (no fc.weight)")
    if len(head) != len(CLASSES):
        raise ValueError(f"MODEL_PATH: {path} knows {len(head)} classes; needed: {', '.join(CLASSES)}")
    model = resnet18(num_classes=len(CLASSES))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise ValueError(f"MODEL_PATH: {path} holds no ResNet-18: {reason}") from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"MODEL_PATH: {path} holds weights that are not finite: train again")
    return model.eval()


def fuse_norms(model: nn.Module) -> nn.Module:
    """Fold each batch norm of a ResNet-18 into the convolution before it: the same outputs, a seventh faster."""
    for block in (model, *(part for part in model.modules() if isinstance(part, BasicBlock))):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        if getattr(block, "downsample", None):
            block.downsample = fuse_conv_bn_eval(*block.downsample)
    return model


def choose_compute(precision: str) -> Compute:
    """Choose CUDA if it works, else the CPU, and the fastest number format that the hardware has."""
    device, notes = torch.device("cpu"), "CUDA not available"
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda").add_(1).item()
            device, notes = torch.device("cuda"), torch.cuda.get_device_name()
        except RuntimeError as error:
            notes = "CUDA is there but fails: " + str(error).splitlines()[0]
    dtype = torch.float32
    if precision == "auto" and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif precision == "auto" and has_bfloat16_instructions():
        dtype = torch.bfloat16
    print(f"Device: {device.type} ({notes}), {str(dtype).removeprefix('torch.')}")
    return Compute(device, dtype)


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a network frees and wants again at once.

    By default they go back to the system, and come as fresh pages that it must zero: a quarter of the time of
    judging on a CPU (measured), and 5 % of training. Other C libraries have no such switch.
    """
    with suppress(AttributeError, OSError, TypeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        c_library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def has_bfloat16_instructions() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware: elsewhere it would be slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: nothing tells, and float32 is always right
    return "avx512_bf16" in flags or "amx_bf16" in flags


# ---- Prediction


def read_image(path: str, size: int) -> torch.Tensor:
    """Decode an image of any mode and resize it: uint8, shape (3, size, size), RGB.

    Sixteen-bit grey is scaled to eight bits; an alpha channel is dropped, as torchvision's loader does.
    torch resizes in a tenth of Pillow's time, to pixels that differ by 1 at most.

    Raises:
        OSError, ValueError, SyntaxError and others of Pillow's: the file is no whole image.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            grey = np.round(np.asarray(image, dtype=np.float64) / 257)
            image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
        if image.mode not in ("RGB", "RGBA"):
            image = image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        pixels = nn.functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels[:3].contiguous()


class Images(Dataset):
    """Item i is (pixels, ""), or (zeros, the reason why path i cannot be read); batches are read by threads."""

    def __init__(self, paths: list[str], size: int, threads: int) -> None:
        self.paths, self.size, self.threads = paths, size, threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        try:
            return read_image(self.paths[index], self.size), ""
        except Exception as error:  # Pillow's decoders raise many kinds; every one is reported by name
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), reason

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, str]]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.__getitem__, indices))


def count_workers(setting: Optional[int]) -> int:
    """Count the processes that decode images: WORKERS, or as many as this process has cores, up to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) if setting is None else setting


@torch.inference_mode()
def score_images(
    paths: list[str], model: nn.Module, facts: dict, compute: Compute
) -> tuple[dict[str, float], dict[str, str]]:
    """Score each image once.

    For a GPU, worker processes read ahead. On a CPU they would fight with the network for the cores (measured:
    150 images a second with two workers, 166 without): there, threads read a batch on all cores, then the
    network takes all cores.

    Returns:
        {path: deepfake_score}, 0 to 1 with six decimals, and {unreadable path: reason}.
    """
    started = time.perf_counter()
    model = fuse_norms(model).to(compute.device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(facts[name], device=compute.device).view(3, 1, 1) * 255 for name in ("mean", "std"))
    fake = facts["classes"].index("Deepfake")
    scale, offset = facts["calibration"]["scale"], facts["calibration"]["offset"]
    on_gpu = compute.device.type == "cuda"
    workers = count_workers(WORKERS) if on_gpu or WORKERS else 0
    images = Images(paths, facts["image_size"], threads=1 if workers else count_workers(None))
    loader = DataLoader(images, BATCH_SIZE, num_workers=workers, pin_memory=on_gpu)
    scores, reasons = [], {}
    with tqdm(total=len(paths), desc="Judging images", unit=" images", disable=None) as progress:
        for pixels, batch_reasons in loader:
            inputs = pixels.to(compute.device, non_blocking=True).float().sub_(mean).div_(std)
            with compute.autocast():
                logits = model(inputs.contiguous(memory_format=torch.channels_last)).float()
            scores.append(torch.sigmoid(scale * (logits[:, fake] - logits[:, 1 - fake]) + offset))
            reasons.update((progress.n + row, reason) for row, reason in enumerate(batch_reasons) if reason)
            progress.update(len(batch_reasons))
    values = torch.cat(scores).tolist()
    print(f"Judged {len(paths):,} images in {time.perf_counter() - started:.2f} s")
    judged = {path: round(values[i], 6) for i, path in enumerate(paths) if i not in reasons}
    return judged, {paths[i]: reason for i, reason in reasons.items()}


# ---- Outputs


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: after a crash at any moment the old content or the new one is there."""
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
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


def write_predictions(job: Job, scores: dict[str, float]) -> bytes:
    """Write predicted_output and deepfake_score back into the CSV; every other cell keeps its text.

    Returns:
        The file's new content.
    """
    header = list(job.rows[0])
    header += [name for name in ("predicted_output", "deepfake_score") if name not in header]
    verdict_column, score_column = header.index("predicted_output"), header.index("deepfake_score")
    rows = [header]
    for number, row in enumerate(job.rows[1:], 2):
        if row:
            row = row + [""] * (len(header) - len(row))
            score = scores.get(job.images[number])
            row[verdict_column] = "" if score is None else decide(score)
            row[score_column] = "" if score is None else f"{score:.6f}"
        rows.append(row)
    content = format_table(rows, job.delimiter, job.path.read_bytes())
    write_file(job.path, content)
    return content


def decide(score: float) -> str:
    """Return the verdict for a deepfake_score."""
    return "Deepfake" if score >= 0.5 else "Original"


def compute_eer(is_fake: np.ndarray, scores: np.ndarray) -> float:
    """Compute the equal error rate: where as many fakes are missed as originals are accused.

    Args:
        is_fake: bool, shape (rows,), both values present; scores: float, same shape, higher = more likely fake.

    Returns:
        The mean of the two error rates where they are nearest, 0 to 1.
    """
    from sklearn.metrics import roc_curve

    accused, found, _ = roc_curve(is_fake, scores, drop_intermediate=False)
    nearest = np.argmin(np.abs(accused - (1 - found)))
    return float(accused[nearest] + 1 - found[nearest]) / 2


def measure(truth: list[str], scores: list[float]) -> dict:
    """Measure verdicts against labels; what cannot be computed is None, with its reason beside it."""
    from sklearn.metrics import (
        accuracy_score,
        balanced_accuracy_score,
        classification_report,
        confusion_matrix,
        roc_auc_score,
    )

    verdicts = [decide(score) for score in scores]
    is_fake = np.array([name == "Deepfake" for name in truth])
    names = list(REPORT_ORDER)
    measures = {
        "classification_report": classification_report(
            truth, verdicts, labels=names, output_dict=True, zero_division=0
        ),
        "confusion_matrix": {"order": names, "counts": confusion_matrix(truth, verdicts, labels=names).tolist()},
        "accuracy": float(accuracy_score(truth, verdicts)),
        "balanced_accuracy": None,
        "roc_auc": None,
        "eer": None,
    }
    if is_fake.any() and not is_fake.all():
        measures["balanced_accuracy"] = float(balanced_accuracy_score(truth, verdicts))
        measures["roc_auc"] = float(roc_auc_score(is_fake, scores))
        measures["eer"] = compute_eer(is_fake, np.array(scores))
    else:
        measures["reason"] = f"balanced accuracy, AUC and EER need both classes; all labels are {truth[0]}"
    return measures


def format_report(job: Job, truth: list[str], scores: list[float], measures: dict) -> str:
    """Write the report that people read."""
    from sklearn.metrics import classification_report

    verdicts = [decide(score) for score in scores]
    lines = [
        f"{job.path.name}: {len(job.images):,} rows, {len(truth):,} of them with a label and a verdict",
        "",
        classification_report(truth, verdicts, labels=list(REPORT_ORDER), digits=4, zero_division=0).rstrip(),
        "",
    ]
    for name, words in (("roc_auc", "Area under the ROC curve"), ("eer", "Equal error rate")):
        lines.append(f"{words:<26}" + ("not computed" if measures[name] is None else f"{measures[name]:.4f}"))
    if "reason" in measures:
        lines.append(measures["reason"])
    return "\n".join(lines) + "\n"


def draw_confusion(path: Path, counts: np.ndarray) -> None:
    """Draw a confusion matrix with counts and row percentages. C[i, j]: true i, predicted j, in REPORT_ORDER."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{count:,}\n{share:.1%}" for count, share in zip(*row)] for row in zip(counts, shares)]
    figure, axes = pyplot.subplots(figsize=(5.2, 4.4), layout="constrained")
    seaborn.heatmap(
        shares,
        annot=np.array(texts),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        xticklabels=REPORT_ORDER,
        yticklabels=REPORT_ORDER,
        annot_kws={"size": 14},
        cbar_kws={"label": "share of the true class"},
        ax=axes,
    )
    axes.set(xlabel="predicted_output", ylabel="actual_output", title=f"{path.stem}: {counts.sum():,} images")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


def report(job: Job, scores: dict[str, float]) -> Optional[dict]:
    """Write report and picture of one CSV. Returns its entry for the summary, None where nothing can be measured."""
    if job.labels is None:
        print(f"{job.path.name}: no report, since it has no column actual_output")
        return None
    numbers = [number for number in job.labels if job.images[number] in scores]
    if not numbers:
        print(f"{job.path.name}: no report, since no row has both a label and a verdict")
        return None
    truth = [job.labels[number] for number in numbers]
    values = [scores[job.images[number]] for number in numbers]
    measures = measure(truth, values)
    text = format_report(job, truth, values, measures)
    stem = job.path.with_suffix("")
    write_file(stem.with_name(stem.name + "_report.txt"), text.encode())
    draw_confusion(stem.with_name(stem.name + ".png"), np.array(measures["confusion_matrix"]["counts"]))
    print(f"\n{text}")
    return {"file": job.path.name, "report": text, "rows": len(job.images), "rows_measured": len(numbers), **measures}


# ---- Main


def check_settings() -> None:
    """Raise ValueError that names every setting which cannot be used, its value and what is allowed."""

    def is_whole(value: object, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    rules = {
        "CSV_FILES": (isinstance(CSV_FILES, (list, tuple)), "a list of paths"),
        "BATCH_SIZE": (is_whole(BATCH_SIZE, 1), "a whole number of at least 1"),
        "WORKERS": (WORKERS is None or is_whole(WORKERS, 0), "a whole number of at least 0, or None"),
        "PRECISION": (PRECISION in ("auto", "float32"), "'auto' or 'float32'"),
    }
    wrong = [f"{name} = {globals()[name]!r} (allowed: {legal})" for name, (ok, legal) in rules.items() if not ok]
    if wrong:
        raise ValueError("; ".join(wrong))


def main() -> int:
    """Judge every CSV. Returns the exit status: 0, or 1 if a row or a CSV had to be left out."""
    here = Path(__file__).resolve().parent
    check_settings()
    csv_paths = [Path(os.path.normpath(here / path)) for path in CSV_FILES]
    jobs, broken = read_jobs(csv_paths, here / IMG_BASE_PATH)
    model_path = here / MODEL_PATH
    model, facts = load_detector(model_path)
    print(f"Model: {MODEL_PATH}, epoch {facts.get('epoch', '?')}, started from {facts.get('initial_weights', '?')}")
    keep_freed_memory()
    compute = choose_compute(PRECISION)
    for job in jobs:
        labels = job.labels or {}
        counts = ", ".join(f"{list(labels.values()).count(name):,} {name}" for name in REPORT_ORDER)
        print(f"{job.path.name}: {len(job.images):,} rows; labels: {counts if labels else 'none'}")

    paths = list(dict.fromkeys(path for job in jobs for path in job.images.values()))
    scores, unreadable = score_images(paths, model, facts, compute)
    origin = {
        "model": str(MODEL_PATH),
        "model_sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
        "device": str(compute.device),
        "precision": str(compute.dtype).removeprefix("torch."),
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    summary, left_out = [], 0
    for job in jobs:
        content = write_predictions(job, scores)
        bad = [(number, path) for number, path in job.images.items() if path in unreadable]
        for number, path in bad:
            print(f"no verdict: {job.path.name}, row {number}: {path}: {unreadable[path]}", file=sys.stderr)
        left_out += len(bad)
        entry = report(job, scores)
        if entry is not None:
            unreadable_rows = [{"row": number, "reason": unreadable[path]} for number, path in bad]
            csv_hash = hashlib.sha256(content).hexdigest()
            summary.append({**entry, "unreadable_rows": unreadable_rows, "csv_sha256": csv_hash, **origin})
    print("Predictions written into " + ", ".join(str(job.path) for job in jobs))
    if summary:
        summary_path = jobs[0].path.with_name("aggregate_test_reports.json")
        write_file(summary_path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        print(f"Summary written to {summary_path}")
    if left_out or broken:
        print(f"Left out: {left_out} rows without a verdict, {broken} CSVs", file=sys.stderr)
    return 1 if left_out or broken else 0


def run_script() -> int:
    """Run main() as a command: its status, or one line on standard error and the status that fits."""
    if len(sys.argv) > 1:
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__)
            return 0
        print("error: no arguments are taken: edit the settings at the top of the script", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"error: out of memory: halve BATCH_SIZE (now {BATCH_SIZE})", file=sys.stderr)
        return 2
    except Exception:  # a fault of this script: the whole story, and not the status of a finished run
        traceback.print_exc()
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run it again to judge all rows", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_script())
