"""Judge spectrogram images with a trained checkpoint: Original or Deepfake, for each row of a CSV.

    python evaluate_deepfake_model.py

In:  MODEL_PATH, and CSVs with a column img_path (relative to IMG_BASE_PATH) and, where the truth is
     known, actual_output (Original or Deepfake). The images must be made as the training images were.
Out: the columns predicted_output and deepfake_score (0 to 1; from 0.5 on Deepfake) in the same CSV;
     <name>_scores.tsv (log-likelihood ratios in the form of ASVspoof 5); where there are labels,
     <name>_report.txt, <name>.png (confusion matrix), further tables and pictures that the report
     belongs to, and, beside the first CSV, aggregate_test_reports.json.

Needs no other file of this project: what it must know about the model stands in the checkpoint.
About 160 images of 224 pixels a second on two cores, 30 figures of 2325x1155.
"""

from __future__ import annotations

import copy
import csv
import ctypes
import datetime
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Optional

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

if TYPE_CHECKING:
    import pandas

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
# Paths
MODEL_PATH = Path("models/experiments/best_laundered_processed.pth")
IMG_BASE_PATH = Path("data")  # img_path is relative to this folder
CSV_FILES = ["test_data/test.csv"]
CSV_ENCODING = "utf-8"  # of the CSVs, with or without a byte order mark; "cp1252", "utf-16", ...
REPORT_BY = ("source", "condition")  # columns of the CSV by whose values the report is broken down, where they exist
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
HOST = re.sub(r"\W", "_", platform.node())[:20]  # in the names of temporary files: whose are they?
SPOOF_PRIOR, COST_MISS, COST_FALSE_ALARM = 0.05, 1, 10  # ASVspoof 5's costs of detection: Wang et al., 2024, section 3
COLOURS = {"Original": "#0072B2", "Deepfake": "#D55E00"}  # told apart by the colour-blind: Okabe and Ito, 2008
SHORTCUT_AUC = 0.75  # above it the report doubts the training images
FEW_ROWS = 20  # fewer are marked in the report
OUTPUTS = (  # <name>_<output> beside <name>.csv
    *("scores.tsv", "key.tsv", "recordings.csv", "report.txt"),
    *("curves.png", "conditions.png", "mistakes.png"),
)
FORMAT_SAMPLE = 200  # images of a CSV that the format check looks at
UNLIKE_SHARE = 0.2  # of them may look unlike the training images before it warns
UNLIKE_SHIFT = 4  # Mahalanobis distance of their mean; the demo test set has 1, upside down 6, single sources up to 3
BAND_FEATURES = ("brightness", "deviation over time", "change from row to row", "change from column to column")
BARE_FACTS = {  # stand in where a file holds weights only
    "classes": list(CLASSES),
    "image_size": 224,
    "mean": [0.485, 0.456, 0.406],  # ImageNet's: pytorch.org/vision/stable/models.html, ResNet18_Weights
    "std": [0.229, 0.224, 0.225],
    "calibration": {"scale": 1.0, "offset": 0.0},
    "recording_pattern": r"^(.+?)__",
}


class Compute(NamedTuple):
    """Where the network computes, and in which number format."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Team(NamedTuple):
    """The processes that torchrun started to work together; a single one without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1

    def share(self, value: object) -> object:
        """Return rank 0's value on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join_team() -> Team:
    """Join the processes of a torchrun; all but rank 0 print nothing but errors."""
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


class Job(NamedTuple):
    """One CSV to judge."""

    path: Path
    before: bytes  # what the file held when it was read
    rows: list[list[str]]  # as they stand in it, header first
    delimiter: str
    images: dict[int, str]  # row number -> absolute path of its image; rows that are blank lines are missing
    labels: Optional[dict[int, str]]  # row number -> class; rows with a blank label are missing; None: no such column


class Judged(NamedTuple):
    """What was found out about each image, by its path."""

    margins: dict[str, float]  # logit Deepfake - logit Original
    llr: dict[str, float]  # calibrated log-likelihood ratio, higher = more bona fide
    fingerprints: dict[str, int]
    unreadable: dict[str, str]  # the reasons why


# ---- CSV


def parse_table(content: bytes, path: Path) -> tuple[list[list[str]], str]:
    """Parse a CSV as text: its rows, header first, and its delimiter (comma, semicolon or tab).

    Raises:
        ValueError: it is not in CSV_ENCODING, or has no column img_path.
    """
    try:
        text = content.decode(CSV_ENCODING).removeprefix("\ufeff")
    except UnicodeError as error:
        place = getattr(error, "start", 0)
        raise ValueError(f"{path} is not {CSV_ENCODING} (byte {place}): set CSV_ENCODING, or save it anew") from None
    csv.field_size_limit(2**31 - 1)
    for delimiter in ",;\t":
        try:
            if "img_path" in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), ()):
                # strict: a quote that is never closed would swallow the rows after it
                return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)), delimiter
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV: {error} (quotes that do not match?)") from None
    first_line = text[:100].splitlines()[:1]
    raise ValueError(f"{path} has no column img_path; its first line: {first_line}")


def format_table(rows: list[list[str]], delimiter: str, before: bytes) -> bytes:
    """Write rows as CSV with the BOM, line endings and end of file that the file had before."""
    text = before.decode(CSV_ENCODING)
    line_end = text.find("\n")
    newline = "\r\n" if text[line_end - 1 : line_end] == "\r" else "\n"
    if line_end < 0 and "\r" in text:
        newline = "\r"
    lines = []  # before Python 3.13 a lone line break in a cell is quoted only where the terminator holds it
    csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    after = "".join(line.removesuffix("\r\n") + newline for line in lines)
    if not text.endswith(("\n", "\r")):
        after = after[: -len(newline)]
    return ((text[:1] if text.startswith("\ufeff") else "") + after).encode(CSV_ENCODING)


def resolve_image(base: Path, cell: str) -> str:
    """Resolve an img_path: slashes of either kind, relative to base; an absolute path stays."""
    return os.path.normpath(os.path.join(base, cell.strip().replace("\\", "/")))


def parse_label(cell: str) -> Optional[str]:
    """Return the class that a label cell names, None for an unknown word."""
    word = " ".join(cell.lower().split())
    return next((name for name, words in LABELS.items() if word in words), None)


def check_writable(path: Path) -> None:
    """Raise ValueError if a file, or the folder that it lies in, is read-only: better now than after hours."""
    path = Path(os.path.realpath(path))
    for place in (path, path.parent):
        bits_tell = os.name != "nt" or place.is_file()  # on Windows a folder's read-only bit means something else
        if not os.access(place, os.W_OK) or (bits_tell and not place.stat().st_mode & 0o222):
            raise ValueError(f"{place} is read-only, so that predictions cannot be written")


def read_job(path: Path, base: Path) -> Job:
    """Read one CSV and check all of it before any image is read.

    Raises:
        ValueError: the file is missing, or no CSV with a column img_path; a row has more cells than
            the header; a label is unknown; the file may not be written.
    """
    if not path.is_file():
        raise ValueError(f"CSV not found: {path}")
    check_writable(path)
    before = path.read_bytes()
    rows, delimiter = parse_table(before, path)
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
    return Job(path, before, rows, delimiter, images, None if label_column is None else labels)


def read_jobs(paths: list[Path], base: Path) -> tuple[list[Job], int]:
    """Read all CSVs; name those that cannot be used. Returns the usable ones and the number of others.

    Raises:
        ValueError: none can be used, two would write the same report, or a report would overwrite an input.
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
    inputs = {os.path.realpath(path) for job in jobs for path in (job.path, *job.images.values())}
    for job in jobs:
        for output in [".predicted.csv", *(f"_{name}" for name in OUTPUTS), ".png"]:
            path = str(job.path.with_suffix("")) + output
            if os.path.realpath(path) in inputs:
                raise ValueError(f"the report on {job.path} would overwrite {path}, which is to be read: rename one")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return jobs, len(reasons)


# ---- Model


def load_content(path: Path) -> dict:
    """Load what torch.save wrote, weights and plain types only, without running any code that a file may hold.

    torch checks no checksums, so that a flipped bit would pass as a weight: the zip's own are checked here.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"<"):
            raise ValueError("it is a web page")
        if content.startswith(b"PK") and (damaged := zipfile.ZipFile(io.BytesIO(content)).testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, no ResNet-18")
        return loaded
    except Exception as error:  # zipfile and torch raise many kinds on damaged or foreign files
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if "Weights only load failed" in reason:  # what follows it is advice to run the code
            name = re.search(r"(?i)unsupported global:? (?:GLOBAL )?(\S+)", str(error))
            reason = f"it holds {name[1] if name else 'more than weights'}, which is not loaded"
        raise ValueError(f"{path} is no checkpoint of weights, or is damaged ({reason})") from None


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
        facts = load_content(path)
    except ValueError as error:
        raise ValueError(f"MODEL_PATH: {error}") from None
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


def take_fingerprint(content: bytes) -> int:
    """Hash bytes, or an array of decoded pixels, to a signed integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def name_recording(path: str, pattern: str) -> str:
    """Name the recording that an image belongs to, by the image's file name."""
    stem = os.path.splitext(os.path.basename(path))[0]
    match = re.search(pattern, stem)
    return (match and match.group(1)) or stem


def to_brightness(images: torch.Tensor) -> torch.Tensor:
    """Weigh RGB, shape (batch, 3, height, width), to brightness, (batch, height, width), as ITU-R BT.601 does."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def describe_images(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Describe what images look like, by 33 numbers that depend on their make more than on what is spoken.

    Args:
        pixels: uint8, shape (batch, 3, height, width).
        colours: float32, shape (256, 3): the colour, RGB in 0 to 1, that stands for each brightness.

    Returns:
        float32, shape (batch, 33), logarithms: in eight bands from top to bottom brightness, deviation over time,
        change from row to row and from column to column; distance of the colours from `colours`.
    """
    images = pixels.float() / 255
    brightness = to_brightness(images)
    painted = nn.functional.embedding((brightness * 255).round().int(), colours).permute(0, 3, 1, 2)
    maps = (
        brightness.mean(2),
        brightness.std(2),
        brightness.diff(dim=1).abs().mean(2),
        brightness.diff(dim=2).abs().mean(2),
    )
    bands = [nn.functional.adaptive_avg_pool1d(rows, 8) for rows in maps]
    distance = (images - painted).abs().mean((1, 2, 3))
    return torch.log(torch.cat([*bands, distance[:, None]], dim=1) + 1e-3)


def to_input(pixels: torch.Tensor, facts: dict) -> torch.Tensor:
    """Normalise pixels, uint8, shape (batch, 3, size, size), as the checkpoint's facts say: float32."""
    mean, std = (torch.tensor(facts[name], device=pixels.device).view(3, 1, 1) * 255 for name in ("mean", "std"))
    return pixels.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


class Images(Dataset):
    """Item i is (pixels, fingerprint, ""), or (zeros, 0, the reason why path i cannot be read)."""

    def __init__(self, paths: list[str], size: int, threads: int) -> None:
        self.paths, self.size = paths, size
        self.map = ThreadPoolExecutor(threads).map if threads > 1 else map

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        try:
            pixels = read_image(self.paths[index], self.size)
            return pixels, take_fingerprint(pixels.numpy()), ""
        except Exception as error:  # Pillow's decoders raise many kinds; every one is reported by name
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, reason

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int, str]]:
        return list(self.map(self.__getitem__, indices))


def count_workers(setting: Optional[int], sharing: int = 1) -> int:
    """Count the processes that decode images: WORKERS, or this process's part of the cores, up to 8.

    Args:
        sharing: processes on this machine that share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // sharing), 8) if setting is None else setting


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that the memory ran out; on a CPU torch raises it as a RuntimeError."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@torch.inference_mode()
def score_images(paths: list[str], model: nn.Module, facts: dict, compute: Compute, team: Team) -> Judged:
    """Judge each image once, the ranks of a team each their part. Returns all results on all ranks.

    For a GPU, worker processes read ahead. On a CPU they would fight with the network for the cores (measured:
    150 images a second with two workers, 166 without): there, threads read a batch on all cores, then the
    network takes all cores.
    """
    started, total = time.perf_counter(), len(paths)
    paths = paths[team.rank :: team.size]
    model = fuse_norms(copy.deepcopy(model)).to(compute.device, memory_format=torch.channels_last)
    head, model.fc = model.fc, nn.Identity()  # in float32: bfloat16 logits would tie
    fake = facts["classes"].index("Deepfake")
    on_gpu = compute.device.type == "cuda"
    workers = count_workers(WORKERS, team.local_size) if on_gpu or WORKERS else 0
    images = Images(paths, facts["image_size"], threads=1 if workers else count_workers(None, team.local_size))
    loader = DataLoader(images, BATCH_SIZE, num_workers=workers, pin_memory=on_gpu)
    # Filled in place: small tensors kept between large ones that come and go would let memory grow
    margins = torch.empty(len(paths), device=compute.device)
    fingerprints, reasons = torch.empty(len(paths), dtype=torch.int64), {}
    done = 0  # a silent tqdm does not count
    with tqdm(total=len(paths), desc="Judging images", unit=" images", disable=None) as progress:
        for pixels, batch_fingerprints, batch_reasons in loader:
            inputs = to_input(pixels.to(compute.device, non_blocking=True), facts)
            with compute.autocast():
                features = model(inputs)
            logits = head(features.float())
            place = slice(done, done + len(pixels))
            torch.sub(logits[:, fake], logits[:, 1 - fake], out=margins[place])
            fingerprints[place] = batch_fingerprints
            reasons.update((done + row, reason) for row, reason in enumerate(batch_reasons) if reason)
            done += len(pixels)
            progress.update(len(pixels))
    values = margins.tolist()
    reasons.update((i, "the network's output is not finite") for i in np.flatnonzero(~np.isfinite(values)).tolist())
    judged = {path: values[i] for i, path in enumerate(paths) if i not in reasons}
    scale, offset = facts["calibration"]["scale"], facts["calibration"]["offset"]
    mine = Judged(
        judged,
        {path: -(scale * margin + offset) for path, margin in judged.items()},
        dict(zip(paths, fingerprints.tolist())),
        {paths[i]: reason for i, reason in reasons.items()},
    )
    everything = Judged(*(dict(chain.from_iterable(map(dict.items, parts))) for parts in zip(*team.gather(mine))))
    print(f"Judged {total:,} images in {time.perf_counter() - started:.2f} s")
    return everything


# ---- Outputs


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: after a crash at any moment the old content or the new one is there."""
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = path.with_name(f".{path.name[:200]}.{HOST}-{os.getpid()}.tmp")
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


def remove_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary files of killed runs in a folder, for files of this name (or glob pattern)."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        if not is_running(leftover.name.split(".")[-2]):
            leftover.unlink(missing_ok=True)


def is_running(process: str) -> bool:
    """Tell whether there may be a process of this host and number, as `write_file` notes it: HOST-number."""
    host, _, number = process.rpartition("-")
    if os.name == "nt" or host != HOST or not number.isdigit():
        return True  # nothing tells (on Windows every signal kills)
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def write_predictions(job: Job, llr: dict[str, float]) -> tuple[Path, bytes]:
    """Write predicted_output and deepfake_score back into the CSV; every other cell keeps its text.

    A CSV that was changed since it was read is left alone, and <name>.predicted.csv written instead.

    Args:
        llr: {path: log-likelihood ratio}; rows of other paths stay blank.

    Returns:
        The file that was written, and its content.
    """
    values = np.array(list(llr.values()))
    cells = {path: pair for path, *pair in zip(llr, name_verdicts(values), to_scores(values).tolist())}
    header = list(job.rows[0])
    header += [name for name in ("predicted_output", "deepfake_score") if name not in header]
    verdict_column, score_column = header.index("predicted_output"), header.index("deepfake_score")
    rows = [header]
    for number, row in enumerate(job.rows[1:], 2):
        if row:
            row = row + [""] * (len(header) - len(row))
            verdict, score = cells.get(job.images[number], ("", None))
            row[verdict_column] = verdict
            row[score_column] = "" if score is None else f"{score:.6f}"
        rows.append(row)
    content, path = format_table(rows, job.delimiter, job.before), job.path
    if not path.is_file() or path.read_bytes() != job.before:
        path = path.with_suffix(".predicted.csv")
        print(f"{job.path} was changed since this run read it, and is left so: see {path}", file=sys.stderr)
    try:
        write_file(path, content)
    except PermissionError as error:  # on Windows: it is open in another program
        path = job.path.with_suffix(".predicted.csv")
        print(f"{job.path} cannot be written ({error.strerror}), and is left as it is: see {path}", file=sys.stderr)
        write_file(path, content)
    return path, content


def to_probability(llr: np.ndarray) -> np.ndarray:
    """Turn log-likelihood ratios, higher = more bona fide, into probabilities of a fake."""
    return 1 / (1 + np.exp(np.clip(llr, -700, 700)))


def to_scores(llr: np.ndarray) -> np.ndarray:
    """Turn log-likelihood ratios, higher = more bona fide, into deepfake_scores: 0 to 1, six decimals."""
    return np.round(to_probability(llr), 6)


def decide(llr: np.ndarray) -> np.ndarray:
    """Decide by log-likelihood ratios, higher = more bona fide: True where the verdict is Deepfake."""
    return to_scores(llr) >= 0.5


def name_verdicts(llr: np.ndarray) -> list[str]:
    """Name the verdicts of log-likelihood ratios."""
    return np.where(decide(llr), "Deepfake", "Original").tolist()


# ---- Measures. In the field's terms: bona fide = Original = target, higher score = more bona fide.


def walk_errors(llr: np.ndarray, is_fake: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walk a threshold from below all scores to the highest; equal scores are passed together.

    Args:
        llr: float, shape (rows,), log-likelihood ratios, higher = more bona fide; is_fake: bool, same shape, both
            values present.
        weights: float, shape (draws, rows): how often each row counts.

    Returns:
        Rates of misses (bona fide rejected, rising) and of false alarms (fakes accepted, falling), both float,
        shape (draws, thresholds), as ASVspoof 5's evaluation package computes them on scores without ties.
    """
    order = np.argsort(llr, kind="stable")
    ends = np.flatnonzero(np.append(llr[order][1:] != llr[order][:-1], True))
    counts = []
    for chosen in (~is_fake, is_fake):
        passed = np.cumsum((weights * chosen)[:, order], axis=1)[:, ends]
        counts.append(np.concatenate([np.zeros((len(weights), 1)), passed], axis=1))
    rejected, found = counts
    return rejected / rejected[:, -1:], (found[:, -1:] - found) / found[:, -1:]


def compute_eer(misses: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """Compute the equal error rate, the mean of both rates where they are nearest: float, shape (draws,)."""
    nearest = np.abs(misses - false_alarms).argmin(axis=1)[:, None]
    return (np.take_along_axis(misses, nearest, 1) + np.take_along_axis(false_alarms, nearest, 1))[:, 0] / 2


def compute_cllr(llr: np.ndarray, is_fake: np.ndarray) -> float:
    """Compute the cost of log-likelihood ratios in bits (Brummer and du Preez, 2006); 1: no better than no score."""
    return float(np.logaddexp(0, -llr[~is_fake]).mean() + np.logaddexp(0, llr[is_fake]).mean()) / 2 / math.log(2)


def compute_ece(llr: np.ndarray, is_fake: np.ndarray, bins: int = 10) -> float:
    """Compute the expected calibration error of the probability of a fake, both classes weighing the same."""
    probability = to_probability(llr)
    weights = np.where(is_fake, 0.5 / is_fake.sum(), 0.5 / (~is_fake).sum())
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, weights * (probability - is_fake), bins)).sum())


def measure(llr: np.ndarray, is_fake: np.ndarray) -> dict[str, Optional[float]]:
    """Measure scores against labels; what cannot be computed is None.

    Args:
        llr: float, shape (rows,), calibrated, higher = more bona fide.
        is_fake: bool, same shape.
    """
    called_fake = decide(llr)
    measures = {"accuracy": float((called_fake == is_fake).mean())}
    names = ("balanced_accuracy", "roc_auc", "eer", "min_dcf", "act_dcf", "cllr", "ece")
    measures |= dict.fromkeys((*names, "misses", "false_alarms", "half_total_error"))
    if not is_fake.all():
        measures["misses"] = float(called_fake[~is_fake].mean())
    if is_fake.any():
        measures["false_alarms"] = float((~called_fake)[is_fake].mean())
    if not is_fake.any() or is_fake.all():
        return measures
    misses, false_alarms = walk_errors(llr, is_fake, np.ones((1, len(llr))))
    cost_miss, cost_alarm = COST_MISS * (1 - SPOOF_PRIOR), COST_FALSE_ALARM * SPOOF_PRIOR
    rejected = llr < -math.log(cost_miss / cost_alarm)
    act_cost = cost_miss * rejected[~is_fake].mean() + cost_alarm * (~rejected)[is_fake].mean()
    measures["half_total_error"] = (measures["misses"] + measures["false_alarms"]) / 2
    measures["balanced_accuracy"] = 1 - measures["half_total_error"]
    measures["roc_auc"] = float(compute_auc(misses, false_alarms)[0])
    measures["eer"] = float(compute_eer(misses, false_alarms)[0])
    measures["min_dcf"] = float((cost_miss * misses + cost_alarm * false_alarms).min()) / min(cost_miss, cost_alarm)
    measures["act_dcf"] = float(act_cost) / min(cost_miss, cost_alarm)
    measures["cllr"] = cllr if math.isfinite(cllr := compute_cllr(llr, is_fake)) else None
    measures["ece"] = compute_ece(llr, is_fake)
    return measures


def compute_auc(misses: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """Compute the area under the ROC curve: float, shape (draws,)."""
    mean_hits = 1 - (misses[:, 1:] + misses[:, :-1]) / 2
    return (mean_hits * -np.diff(false_alarms)).sum(axis=1)


def estimate_intervals(
    llr: np.ndarray, is_fake: np.ndarray, recordings: list[str], draws: int = 1000
) -> dict[str, list[float]]:
    """Estimate 95 % intervals by bootstrap: recordings are drawn anew within each class, with all their images.

    Returns:
        {name of a measure: [low, high]}; empty where a class has fewer than two recordings.
    """
    numbers = {}
    owner = np.array(
        [numbers.setdefault((fake, name), len(numbers)) for fake, name in zip(is_fake.tolist(), recordings)]
    )
    of_fakes = np.array([fake for fake, _ in numbers])
    if of_fakes.sum() < 2 or (~of_fakes).sum() < 2:
        return {}
    random = np.random.default_rng(0)
    right = decide(llr) == is_fake
    chunk, draws = max(1, min(50, 2_000_000 // len(llr))), max(100, min(draws, 200_000_000 // len(llr)))
    values = {"accuracy": [], "half_total_error": [], "roc_auc": [], "eer": []}
    for start in range(0, draws, chunk):
        counts = np.zeros((min(chunk, draws - start), len(numbers)))
        for members in (np.flatnonzero(of_fakes), np.flatnonzero(~of_fakes)):
            counts[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), len(counts))
        weights = counts[:, owner]
        misses, false_alarms = walk_errors(llr, is_fake, weights)
        errors = [((weights * part) @ ~right) / (weights @ part) for part in (is_fake, ~is_fake)]
        values["accuracy"].append(weights @ right / weights.sum(axis=1))
        values["half_total_error"].append(sum(errors) / 2)
        values["roc_auc"].append(compute_auc(misses, false_alarms))
        values["eer"].append(compute_eer(misses, false_alarms))
    return {name: np.quantile(np.concatenate(parts), (0.025, 0.975)).tolist() for name, parts in values.items()}


def start_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple:
    """Start a figure, inches, without a screen. Returns the figure and its axes, shape (rows, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def write_figure(path: Path, figure: object) -> None:
    """Write a figure as PNG, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


def draw_confusion(path: Path, counts: np.ndarray) -> None:
    """Draw a confusion matrix with counts and row percentages. C[i, j]: true i, predicted j, in REPORT_ORDER."""
    figure, ((axes,),) = start_figure(5.2, 4.4)
    import seaborn

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{count:,}\n{share:.1%}" for count, share in zip(*row)] for row in zip(counts, shares)]
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
    axes.set(xlabel="predicted_output", ylabel="actual_output", title=f"{shorten(path.stem)}: {counts.sum():,} images")
    write_figure(path, figure)


def shorten(text: str, length: int = 40) -> str:
    """Cut a long name in its middle."""
    cut = text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    return cut.replace("$", r"\$")  # which begins a formula in a picture


def draw_curves(path: Path, name: str, table: pandas.DataFrame) -> None:
    """Draw the DET curve with its operating points, and the scores of both classes with the threshold."""
    from scipy.stats import norm

    llr, is_fake = table["llr"].to_numpy(float), table["is_fake"].to_numpy(bool)
    figure, ((left, right),) = start_figure(11, 4.8, 1, 2)
    misses, false_alarms = walk_errors(llr, is_fake, np.ones((1, len(llr))))
    ticks = np.array([0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
    edge = norm.ppf(np.array([0.0005, 0.995]))

    def place(rate: np.ndarray) -> np.ndarray:
        return np.clip(norm.ppf(np.clip(rate, 1e-9, 1 - 1e-9)), *edge)

    left.plot(place(false_alarms[0]), place(misses[0]), color=COLOURS["Original"], label="DET curve")
    called_fake = decide(llr)
    own = (np.array((~called_fake)[is_fake].mean()), np.array(called_fake[~is_fake].mean()))
    rate = compute_eer(misses, false_alarms)[0]
    left.plot(*map(place, own), "s", color=COLOURS["Deepfake"], label=f"own threshold: {own[1]:.1%} and {own[0]:.1%}")
    left.plot(place(rate), place(rate), "ok", label=f"equal error rate: {rate:.1%}")
    left.plot(edge, edge, ":", color="grey")
    left.set(xlabel="fakes called Original", ylabel="originals called Deepfake", title=f"DET, {shorten(name)}")
    left.set(xlim=edge, ylim=edge)
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(norm.ppf(ticks), [f"{100 * tick:g} %" for tick in ticks])
    left.legend(loc="lower left")
    left.grid(alpha=0.3)
    limits = np.quantile(llr, (0.002, 0.998)) + (-0.1, 0.1)
    bins = np.linspace(min(limits[0], -0.5), max(limits[1], 0.5), 41)
    for label in REPORT_ORDER:
        values = np.clip(llr[is_fake == (label == "Deepfake")], bins[0], bins[-1])
        shares = np.full(len(values), 100 / len(values))
        right.hist(values, bins, weights=shares, alpha=0.55, color=COLOURS[label], label=f"{label}, {len(values):,}")
    right.axvline(0, color="black", linestyle="--", label="threshold: deepfake_score 0.5")
    right.set(xlabel="log-likelihood ratio (nats): fake  ←  → original", ylabel="% of the class", title="Scores")
    right.margins(y=0.4)  # room for the legend
    right.legend()
    write_figure(path, figure)


def draw_conditions(path: Path, parts: list[dict], total: Optional[float]) -> None:
    """Draw the EER with its interval for each value of the REPORT_BY columns, the worst on top; 40 at most a column."""
    columns = list(dict.fromkeys(part["column"] for part in parts))
    chosen = {name: [p for p in parts if p["column"] == name and p["eer"] is not None][:40] for name in columns}
    height = 1.6 + 0.32 * max(len(group) for group in chosen.values())
    figure, axes = start_figure(1.5 + 5.5 * len(columns), height, 1, len(columns))
    for axis, (name, group) in zip(axes[0], chosen.items()):
        for place, part in enumerate(reversed(group)):
            low, high = part["eer_interval_95"] or (part["eer"], part["eer"])
            axis.plot([100 * low, 100 * high], [place, place], color=COLOURS["Original"], alpha=0.5, linewidth=3)
            mark = "o" if part["rows"] >= FEW_ROWS else "x"
            axis.plot(100 * part["eer"], place, mark, color=COLOURS["Deepfake"])
        labels = [f"{shorten(part['value'], 30)} ({part['rows']:,})" for part in reversed(group)]
        axis.set_yticks(range(len(group)), labels)
        if total is not None:
            axis.axvline(100 * total, color="black", linestyle=":", label=f"all: {total:.1%}")
            axis.legend(loc="lower right")
        axis.set(xlabel=f"EER, % (95 % interval; x: under {FEW_ROWS} rows)", title=f"By {name} (rows)", xlim=(0, 100))
        axis.grid(axis="x", alpha=0.3)
    write_figure(path, figure)


@torch.inference_mode()
def map_activations(model: nn.Module, pixels: torch.Tensor, facts: dict) -> torch.Tensor:
    """Map where in an image the evidence for the deciding class lies: Zhou et al., 2016, section 2.

    Args:
        model: as `load_detector` returns it; pixels: uint8, shape (3, size, size).

    Returns:
        float32, shape (size, size), 0 to 1.
    """
    kept = []
    hook = model.layer4.register_forward_hook(lambda *results: kept.append(results[-1]))
    decided = model(to_input(pixels[None], facts)).argmax()
    hook.remove()
    evidence = torch.einsum("c,chw->hw", model.fc.weight[decided], kept[0][0])[None, None]
    evidence = nn.functional.interpolate(evidence, pixels.shape[1:], mode="bilinear")[0, 0].clamp_min(0)
    return evidence / evidence.max().clamp_min(1e-9)


def draw_mistakes(path: Path, table: pandas.DataFrame, model: nn.Module, facts: dict) -> None:
    """Draw the most confident mistakes of each kind above the most confident right verdicts, with activation maps."""
    wrong = decide(table["llr"].to_numpy(float)) != table["is_fake"].to_numpy(bool)
    kinds = [(mistake, label) for mistake in (True, False) for label in REPORT_ORDER]
    figure, axes = start_figure(12, 13, 4, 4)
    for row, (mistake, label) in zip(axes, kinds):
        group = table[(wrong == mistake) & (table["label"] == label)]
        group = group.reindex(group["llr"].abs().sort_values(ascending=False).index)
        row[0].set_ylabel(f"{label}\n" + ("called " + REPORT_ORDER[label == "Original"] if mistake else "rightly"))
        for axis, path_llr in zip_longest(row, zip(group["path"][:4], group["llr"][:4])):
            axis.set(xticks=[], yticks=[])
            if path_llr is None:
                axis.set_title("none", fontsize=8)
                continue
            pixels = read_image(path_llr[0], facts["image_size"])
            axis.imshow(pixels.permute(1, 2, 0).numpy(), aspect="auto")
            axis.contour(map_activations(model, pixels, facts).numpy(), levels=[0.5], colors="cyan", linewidths=1)
            name = os.path.splitext(os.path.basename(path_llr[0]))[0]
            axis.set_title(f"score {to_scores(np.array(path_llr[1])).item():.3f}\n{shorten(name, 36)}", fontsize=8)
    figure.suptitle("The most confident verdicts; cyan: where the evidence for the verdict is strongest")
    write_figure(path, figure)


def choose_rows(job: Job, judged: Judged, facts: dict) -> pandas.DataFrame:
    """Choose the rows with a score, as a table: what is measured is measured on those with a label.

    Returns:
        Columns path, recording, label ("": none), is_fake, llr, margin, and those of REPORT_BY that the CSV has.
    """
    import pandas

    header, pattern = job.rows[0], facts["recording_pattern"]
    columns = {name: header.index(name) for name in REPORT_BY if name in header}
    table = []
    for number, path in job.images.items():
        if path in judged.llr:
            row = job.rows[number - 1]
            cells = {name: row[column] if column < len(row) else "" for name, column in columns.items()}
            label = (job.labels or {}).get(number, "")
            about = {"path": path, "recording": name_recording(path, pattern), "label": label}
            table.append({**cells, **about, "llr": judged.llr[path], "margin": judged.margins[path]})
    table = pandas.DataFrame(table, columns=[*columns, "path", "recording", "label", "llr", "margin"])
    table["is_fake"] = table["label"] == "Deepfake"
    return table


def measure_table(table: pandas.DataFrame) -> dict:
    """Measure rows: numbers, intervals, and how many rows and recordings are behind them."""
    llr, is_fake = table["llr"].to_numpy(float), table["is_fake"].to_numpy(bool)
    measures = {"rows_measured": len(table), "recordings": int(table["recording"].nunique()), **measure(llr, is_fake)}
    measures["intervals_95"] = estimate_intervals(llr, is_fake, table["recording"].tolist())
    reasons = []
    if is_fake.all() or not is_fake.any():
        reasons.append(f"measures that need both classes: all labels are {table['label'].iloc[0]}")
    elif not measures["intervals_95"]:
        reasons.append("intervals need two recordings of each class")
    if measures["cllr"] is None and not reasons:
        reasons.append("Cllr: a score is infinite")
    return {**measures, "not_computed": reasons}


def measure_conditions(table: pandas.DataFrame) -> list[dict]:
    """Measure by each value of the REPORT_BY columns, the worst first; one class alone against all of the other."""
    import pandas

    parts = []
    for column in REPORT_BY:
        if column not in table or table[column].nunique() < 2:
            continue
        for value, part in table.groupby(column):
            measured = part
            if part["is_fake"].nunique() == 1:
                others = table[table["is_fake"] != part["is_fake"].iloc[0]]
                measured = pandas.concat([part, others])
            measures = measure_table(measured)
            parts.append(
                {
                    "column": column,
                    "value": value,
                    "rows": len(part),
                    "recordings": int(part["recording"].nunique()),
                    "classes": " and ".join(name for name in REPORT_ORDER if (part["label"] == name).any()),
                    "eer": measures["eer"],
                    "eer_interval_95": measures["intervals_95"].get("eer"),
                    "accuracy": float((decide(part["llr"].to_numpy(float)) == part["is_fake"].to_numpy(bool)).mean()),
                }
            )
    return sorted(parts, key=lambda part: (REPORT_BY.index(part["column"]), -(part["eer"] or 0)))


def merge_recordings(table: pandas.DataFrame) -> pandas.DataFrame:
    """Merge the images of each recording and label (and value of REPORT_BY): mean of their log-likelihood ratios."""
    keys = ["recording", *(column for column in REPORT_BY if column in table), "label", "is_fake"]
    merged = table.groupby(keys, sort=False, as_index=False).agg(parts=("llr", "size"), llr=("llr", "mean"))
    merged["verdict"] = name_verdicts(merged["llr"].to_numpy(float))
    return merged


def check_seen(table: pandas.DataFrame, facts: dict, fingerprints: dict[str, int]) -> Optional[dict]:
    """Count the rows that were trained or validated on, as image or as another image of a recording; measure the rest.

    Returns:
        None where the checkpoint does not say what it has seen.
    """
    if "seen_images" not in facts:
        return None
    images, recordings = (set(facts[name].tolist()) for name in ("seen_images", "seen_recordings"))
    as_image = np.array([fingerprints[path] in images for path in table["path"]])
    as_recording = np.array([take_fingerprint(os.fsencode(name)) in recordings for name in table["recording"]])
    rest = table[~(as_image | as_recording)]
    return {
        "rows_as_image": int(as_image.sum()),
        "rows_as_recording": int((as_recording & ~as_image).sum()),
        "without_them": measure_table(rest) if 0 < len(rest) < len(table) else None,
    }


def check_format(paths: list[str], facts: dict) -> Optional[dict]:
    """Check, on a sample of readable images, whether they look as the training images did.

    Returns:
        The share that lies further from the training images than 99 % of the validation images do, how far their mean
        does, what differs most, in standard deviations, and a warning or ""; None where the checkpoint does not say
        what the training images looked like.
    """
    look = facts.get("appearance")
    if look is None:
        return None
    chosen = [paths[index] for index in np.linspace(0, len(paths) - 1, min(FORMAT_SAMPLE, len(paths))).astype(int)]
    seen = torch.cat([describe_images(read_image(path, facts["image_size"])[None], look["colours"]) for path in chosen])
    off = seen.double() - look["mean"]
    squares = torch.einsum("ni,ij,nj->n", off, look["precision"], off)
    share = (squares.sqrt() > look["limit"]).double().mean().item()
    mean = off.mean(0)  # far off even where no single image is, as when all are upside down; chance's part taken off
    shift = (mean @ look["precision"] @ mean - squares.mean() / len(off)).clamp(0).sqrt().item()
    shifts = (mean / look["deviation"]).tolist()
    bands = [f"{what} in eighth {band} from the top" for what in BAND_FEATURES for band in range(1, 9)]
    largest = sorted(
        zip([*bands, "distance from the training images' colours"], shifts), key=lambda pair: -abs(pair[1])
    )
    warning = ""
    if share > UNLIKE_SHARE or shift > UNLIKE_SHIFT:
        telling = "; ".join(f"{name} {shift:+.1f}" for name, shift in largest[:3])
        warning = (
            f"{share:.0%} of the images look unlike the training images (validation: 1%), and their mean lies "
            f"{shift:.1f} from theirs (usual: below {UNLIKE_SHIFT}): were they made otherwise? Most different, in "
            f"standard deviations: {telling}"
        )
    return {
        "images": len(chosen),
        "share_unlike": share,
        "shift": shift,
        "largest_shifts": dict(largest[:3]),
        "warning": warning,
    }


def format_rate(value: Optional[float], interval: Optional[list[float]] = None) -> str:
    """Write a rate in per cent, with its interval."""
    if value is None:
        return "not computed"
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def write_verdict(name: str, entry: dict) -> list[str]:
    """Say in three plain sentences how good the detector was, on what, and what to doubt."""
    good = f"{format_rate(entry['accuracy'], entry['intervals_95'].get('accuracy'))} of the verdicts are right."
    if entry["eer"] is not None:
        good = (
            f"Where it accuses as many originals as it misses fakes, it errs in {format_rate(entry['eer'])}; with its "
            f"own threshold it accuses {format_rate(entry['misses'])} of the originals and misses "
            f"{format_rate(entry['false_alarms'])} of the fakes."
        )
    counts = [f"{entry['labels'][label]:,} {label}" for label in REPORT_ORDER]
    what = f"This is measured on {' and '.join(counts)} images of {entry['recordings']:,} recordings in {name}"
    parts = [part for part in entry["by_condition"] if part["eer"] is not None]
    if parts:
        worst = max(parts, key=lambda part: part["eer"])
        what += f", where {worst['column']} {worst['value']} is worst ({format_rate(worst['eer'])})"
    doubts = []
    if entry["seen"] is None:
        doubts.append("nobody checked whether the checkpoint has seen these images in training")
    elif entry["seen"]["rows_as_image"] + entry["seen"]["rows_as_recording"]:
        doubts.append("some of these images or their recordings were seen in training, which flatters")
    if entry["format"] and entry["format"]["warning"]:
        doubts.append("the images look unlike those trained on (see the format check)")
    interval = entry["intervals_95"].get("eer")
    if interval and interval[1] - interval[0] > 0.05:
        doubts.append(
            f"recordings are few: drawn anew, they would give an error from {interval[0]:.1%} to {interval[1]:.1%} "
            "in 95 of 100 draws"
        )
    if entry["eer"] is not None and entry["half_total_error"] - entry["eer"] > 0.05:
        doubts.append("the threshold fits validation better than this set")
    if max((entry["shortcuts"] or {"": 0}).values()) > SHORTCUT_AUC:
        doubts.append("the training images' classes differ in what is not the voice (see the shortcut check)")
    doubts.append("voices, generators and channels other than these may do worse")
    return [good, what + ".", "To be doubted: " + "; ".join(doubts) + "."]


def format_report(name: str, entry: dict) -> str:
    """Write the report that people read, 100 columns wide at most."""
    lines = [line for sentence in write_verdict(name, entry) for line in textwrap.wrap(sentence, 98)]
    lines += ["", entry["classification_report_text"], ""]
    words = {
        "eer": "equal error rate (EER)",
        "accuracy": "accuracy",
        "half_total_error": "half total error, own threshold",
        "misses": "  originals called Deepfake",
        "false_alarms": "  fakes called Original",
    }
    for key, text in words.items():
        lines.append(f"{text:<34}{format_rate(entry[key], entry['intervals_95'].get(key))}")
    for key, text in {
        "roc_auc": "area under the ROC curve",
        "min_dcf": "minDCF (costs of ASVspoof 5)",
        "act_dcf": "actDCF",
        "cllr": "Cllr, bits",
        "ece": "expected calibration error",
    }.items():
        value = "not computed" if entry[key] is None else f"{entry[key]:.4f}"
        before = entry["before_calibration"].get(key)
        lines.append(f"{text:<34}{value}" + (f"   before calibration {before:.4f}" if before is not None else ""))
    if entry["eer_by_recording"] is not None:
        lines.append(f"{'EER by recording':<34}{format_rate(entry['eer_by_recording'])}")
    lines += [f"Not computed: {reason}" for reason in entry["not_computed"]]
    if entry["seen"]:
        seen = entry["seen"]
        lines += [
            "",
            f"Seen in training or validation: {seen['rows_as_image']:,} rows as image, "
            f"{seen['rows_as_recording']:,} more by another image of their recording",
        ]
        if rest := seen["without_them"]:
            rates = f"EER {format_rate(rest['eer'])}, accuracy {format_rate(rest['accuracy'])}"
            lines.append(f"Without them: {rates}, {rest['rows_measured']:,} rows")
    if entry["format"]:
        share = f"{entry['format']['share_unlike']:.0%} of {entry['format']['images']:,} images"
        lines += ["", f"Format check: {share} look unlike the training images (1 % of validation's do)"]
        lines += textwrap.wrap(entry["format"]["warning"], 98)
    unchecked = {"seen": "leak", "shortcuts": "shortcut", "format": "format"}
    if names := [name for key, name in unchecked.items() if entry[key] is None]:
        lines += ["", f"The checkpoint holds nothing for these checks: {', '.join(names)}"]
    if entry["shortcuts"]:
        lines += ["", "Shortcut check: the classes of the training images told by what is not the voice (AUC)"]
        lines += [f"  {name:<32}{auc:.3f}" for name, auc in entry["shortcuts"].items()]
    for column in dict.fromkeys(part["column"] for part in entry["by_condition"]):
        lines += ["", f"{'By ' + column:<36}{'rows':>7}  {'EER, 95 % interval':<26}{'accuracy':>9}"]
        for part in entry["by_condition"]:
            if part["column"] == column:
                rate = format_rate(part["eer"], part["eer_interval_95"])
                mark = "  few rows" if part["rows"] < FEW_ROWS else ""
                lines.append(f"  {part['value'][:33]:<34}{part['rows']:>7,}  {rate:<26}{part['accuracy']:>9.1%}{mark}")
    return "\n".join(lines) + "\n"


def write_tables(stem: Path, job: Job, table: pandas.DataFrame, llr: dict[str, float]) -> None:
    """Write the score file and the key in ASVspoof 5's form, and the verdicts by recording, with labels or without."""
    column = job.rows[0].index("img_path")
    names = {}  # path -> its first spelling
    for number, path in job.images.items():
        if path in llr:
            names.setdefault(path, job.rows[number - 1][column])
    truth = {path: label == "Deepfake" for path, label in zip(table["path"], table["label"]) if label}
    scores = [["filename", "cm-score"]] + [[name, repr(llr[path])] for path, name in names.items()]
    key = [["filename", "cm-label"]]
    key += [[name, "spoof" if truth[path] else "bonafide"] for path, name in names.items() if path in truth]
    for what, rows in (("scores", scores), ("key", key)):
        if len(rows) > 1:
            buffer = io.StringIO(newline="")
            csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(rows)
            write_file(stem.with_name(f"{stem.name}_{what}.tsv"), buffer.getvalue().encode())
    merged = merge_recordings(table)
    if len(merged) < len(table):
        merged = merged.drop(columns="is_fake").rename(
            columns={"label": "actual_output", "verdict": "predicted_output"}
        )
        write_file(stem.with_name(f"{stem.name}_recordings.csv"), merged.to_csv(index=False).encode())


def report(job: Job, judged: Judged, model: nn.Module, facts: dict) -> Optional[dict]:
    """Write all that belongs to one CSV. Returns its entry for the summary, None where nothing can be measured."""
    from sklearn.metrics import classification_report, confusion_matrix

    rows = choose_rows(job, judged, facts)
    table = rows[rows["label"] != ""]
    stem = job.path.with_suffix("")
    write_tables(stem, job, rows, judged.llr)
    readable = [path for path in dict.fromkeys(job.images.values()) if path in judged.llr]
    look = check_format(readable, facts) if readable else None
    if look and look["warning"]:
        print(f"WARNING: {job.path.name}: {look['warning']}")
    if not len(table):
        why = "it has no column actual_output" if job.labels is None else "no row has both a label and a verdict"
        print(f"{job.path.name}: no report, since {why}")
        return None
    merged = merge_recordings(table)
    verdicts = name_verdicts(table["llr"].to_numpy(float))
    names = {"labels": list(REPORT_ORDER), "zero_division": 0}
    counts = confusion_matrix(table["label"], verdicts, labels=list(REPORT_ORDER))
    is_fake = table["is_fake"].to_numpy(bool)
    raw = measure(-table["margin"].to_numpy(float), is_fake)
    entry = {
        "rows": len(job.images),
        "labels": {name: int((table["label"] == name).sum()) for name in REPORT_ORDER},
        **measure_table(table),
        "eer_by_recording": measure(merged["llr"].to_numpy(float), merged["is_fake"].to_numpy(bool))["eer"],
        "before_calibration": {name: raw[name] for name in ("act_dcf", "cllr", "ece")},
        "confusion_matrix": {"order": list(REPORT_ORDER), "counts": counts.tolist()},
        "classification_report": classification_report(table["label"], verdicts, output_dict=True, **names),
        "classification_report_text": classification_report(table["label"], verdicts, digits=4, **names).rstrip(),
        "by_condition": measure_conditions(table),
        "shortcuts": facts.get("shortcuts"),
        "seen": check_seen(table, facts, judged.fingerprints),
        "format": look,
    }
    text = format_report(job.path.name, entry)
    del entry["classification_report_text"]
    write_file(stem.with_name(stem.name + "_report.txt"), text.encode())
    draw_confusion(stem.with_name(stem.name + ".png"), counts)
    draw_mistakes(stem.with_name(stem.name + "_mistakes.png"), table, model, facts)
    if entry["eer"] is not None:
        draw_curves(stem.with_name(stem.name + "_curves.png"), stem.name, table)
    if entry["by_condition"]:
        draw_conditions(stem.with_name(stem.name + "_conditions.png"), entry["by_condition"], entry["eer"])
    print(f"\n{text}")
    return {"file": job.path.name, "report": text, **entry}


# ---- Main


def check_settings() -> None:
    """Raise ValueError that names every setting which cannot be used, its value and what is allowed."""

    def is_whole(value: object, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    def is_encoding(value: object) -> bool:
        with suppress(LookupError, TypeError):
            return "".encode(value) is not None
        return False

    own = ("path", "recording", "label", "is_fake", "llr", "margin")
    is_list = isinstance(REPORT_BY, (list, tuple)) and all(isinstance(name, str) for name in REPORT_BY)
    rules = {
        "REPORT_BY": (is_list and not set(own) & set(REPORT_BY), f"a list of columns other than {', '.join(own)}"),
        "CSV_FILES": (isinstance(CSV_FILES, (list, tuple)), "a list of paths"),
        "BATCH_SIZE": (is_whole(BATCH_SIZE, 1), "a whole number of at least 1"),
        "WORKERS": (WORKERS is None or is_whole(WORKERS, 0), "a whole number of at least 0, or None"),
        "CSV_ENCODING": (is_encoding(CSV_ENCODING), "a name of an encoding that Python knows"),
        "PRECISION": (PRECISION in ("auto", "float32"), "'auto' or 'float32'"),
    }
    wrong = [f"{name} = {globals()[name]!r} (allowed: {legal})" for name, (ok, legal) in rules.items() if not ok]
    if wrong:
        raise ValueError("; ".join(wrong))


def main() -> int:
    """Judge every CSV. Returns the exit status: 0, or 1 if a row or a CSV had to be left out."""
    here = Path(__file__).resolve().parent
    check_settings()
    team = join_team()
    csv_paths = [Path(os.path.normpath(here / path)) for path in CSV_FILES]
    jobs, broken = read_jobs(csv_paths, here / IMG_BASE_PATH) if team.rank == 0 else ([], 0)
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
    judged = score_images(team.share(paths), model, facts, compute, team)
    if team.size > 1:
        dist.destroy_process_group()
    if team.rank:
        return 0
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
    summary, left_out, written = [], 0, []
    for job in jobs:
        for name in (glob.escape(job.path.stem) + "*", "aggregate_test_reports.json"):
            remove_leftovers(job.path.parent, name)
        path, content = write_predictions(job, judged.llr)
        written.append(path)
        bad = [(number, path) for number, path in job.images.items() if path in judged.unreadable]
        for number, path in bad:
            print(f"no verdict: {job.path.name}, row {number}: {path}: {judged.unreadable[path]}", file=sys.stderr)
        left_out += len(bad)
        entry = report(job, judged, model, facts)
        if entry is not None:
            unreadable_rows = [{"row": number, "reason": judged.unreadable[path]} for number, path in bad]
            csv_hash = hashlib.sha256(content).hexdigest()
            summary.append({**entry, "unreadable_rows": unreadable_rows, "csv_sha256": csv_hash, **origin})
    print("Predictions written into " + ", ".join(map(str, written)))
    broken += sum(path != job.path for path, job in zip(written, jobs))
    if summary:
        summary_path = jobs[0].path.with_name("aggregate_test_reports.json")
        write_file(summary_path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        print(f"Summary written to {summary_path}")
    if left_out or broken:
        print(f"Left out: {left_out} rows without a verdict, {broken} CSVs left as they were", file=sys.stderr)
    return 1 if left_out or broken else 0


def run_script() -> int:
    """Run main() as a command: its status, or one line on standard error and the status that fits."""
    if len(sys.argv) > 1:
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__)
            return 0
        print("error: no arguments are taken: edit the settings at the top of the script", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, stop)
    try:
        return main()
    except (ValueError, OSError) as error:  # one out of a worker process brings its traceback along
        print(f"error: {(str(error).strip() or type(error).__name__).splitlines()[-1]}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        name, status = ("SIGTERM", 143) if interrupt.args else ("Ctrl-C", 130)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one is enough to say so
            print(
                f"stopped by {name}; CSVs not yet written are as they were; run it again to judge them", file=sys.stderr
            )
        return status
    except Exception as error:
        if is_out_of_memory(error):
            print(f"error: out of memory: halve BATCH_SIZE (now {BATCH_SIZE})", file=sys.stderr)
        else:  # a fault of this script: the whole story, and not the status of a finished run
            traceback.print_exc()
    return 2


def stop(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(run_script())
