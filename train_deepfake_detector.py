"""Train a ResNet-18 to tell deepfake from original speech by pictures of its spectrogram.

    python train_deepfake_detector.py

In:  images at any depth below DATA_DIR/deepfake/ and DATA_DIR/original/, all made in the same way
     (data/make_spectrograms.py makes them from audio files).
Out: the best checkpoint by validation loss and the final one, and beside the final one
     history.csv (a row per epoch) and learning_curves.png; decoded images in CACHE_DIR.
     An interrupted run goes on by itself when it is started again; a finished one is
     kept aside under names that begin with previous_.

What HOLDOUT_CSVS list is kept out of training and validation, so that evaluate_deepfake_model.py
can judge the result on it. Runs on CUDA where there is one, else on the CPU.
The demo data takes about 6 minutes on two cores with bfloat16 instructions, twice as long without.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import hashlib
import http.client
import io
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn, Optional

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights, resnet18
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
# Paths
DATA_DIR = Path("data")  # holds the folders deepfake/ and original/
HOLDOUT_CSVS = ["test_data/test.csv"]  # their img_path column (relative to DATA_DIR) is never trained on; []: none
CSV_ENCODING = "utf-8"  # of HOLDOUT_CSVS, with or without a byte order mark; "cp1252", "utf-16", ...
BEST_MODEL_PATH = Path("models/experiments/best_laundered_processed.pth")
FINAL_MODEL_PATH = Path("models/experiments/final_laundered_processed.pth")
CACHE_DIR = Path("models/cache")  # keeps decoded images, so that a file is decoded once; may be deleted at any time
# Data
RECORDING_PATTERN = r"^(.+?)__"  # group 1 of it in a file's stem names the recording; no match: the whole stem
IMAGE_SIZE = 224  # pixels, width and height that the network sees; 32 or more
VAL_FRACTION = 0.12  # share of the images that validates; between 0 and 1
MAX_UNREADABLE = 0.01  # share of the images that may be unreadable before the run stops; 0 to 1
# Model
PRETRAINED = "IMAGENET1K_V1"  # torchvision's ImageNet weights, the path of a .pth, or None: random weights
# Training
EPOCHS = 20
TIME_CROP = 0.5  # share of an image's width, from a random place, that a training step sees; 0.01 to 1
BATCH_SIZE = 32  # images
LEARNING_RATE = None  # peak of the schedule; None: 1e-3 from random weights, 3e-4 from pretrained ones
WEIGHT_DECAY = 0.05  # AdamW
LABEL_SMOOTHING = 0.05  # 0 to below 1
PATIENCE = 10  # epochs without a lower validation loss after which training stops
SEED = 0
# System
WORKERS = None  # processes that read images; 0: the main process; None: what fits the machine and the job
CACHE_GB = 20  # gigabytes that CACHE_DIR may hold; images beyond are decoded again in every epoch; 0: all are
PRECISION = "auto"  # "auto": bfloat16 or float16 where the hardware gains by it; "float32"
RESUME = True  # go on with an interrupted run; False: begin afresh
# ------------------------------------------------------------------------------------------------
SETTINGS = [name for name in dir() if name.isupper()]  # the block above, and nothing of what follows

CLASSES = ("Deepfake", "Original")  # logit order; the folders bear these names in lower case
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # pytorch.org/vision/stable/models.html, ResNet18_Weights
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DOWNLOAD_TIMEOUT_S = 30  # without a single byte; torch.hub itself would wait for ever
CHECKPOINT_FORMAT = 1
HOST = re.sub(r"\W", "_", platform.node())[:20]  # in the names of temporary files: whose are they?
NOT_SHAPING = (  # settings that may change between an interrupted run and the one that goes on with it
    *("DATA_DIR", "HOLDOUT_CSVS", "CSV_ENCODING", "BEST_MODEL_PATH", "FINAL_MODEL_PATH", "CACHE_DIR"),
    *("MAX_UNREADABLE", "WORKERS", "CACHE_GB", "RESUME"),
)
BRIGHTNESS_PER_DB = 1 / 70  # for augmentation: the demo images' scale, from -30 to +40 dB
SHORTEST_CROP = 48  # pixels; at 32 and less oneDNN (torch 2.14, 2.15) gave wrong bfloat16 gradients for layer4.0.conv1
SHORTCUT_AUC = 0.75  # above it the class can be told from what is not the voice
LOOKS = ("original width", "original height", "mean brightness", "share of black columns")
CACHE_FORMAT = 2  # changes when read_image comes to give other pixels
CACHE_ENTRY = np.dtype([("key", "<i8"), ("fingerprint", "<i8"), ("looks", "<f4", (len(LOOKS),))])
IMAGES_PER_SHARD = 64
SHARD_HEAD = 8 + IMAGES_PER_SHARD * CACHE_ENTRY.itemsize  # bytes before the first pixel
DISK_RESERVE = 1e9  # bytes of the disk that the cache leaves free, for checkpoints
METRICS = ("train_loss", "val_loss", "val_balanced_accuracy", "val_auc")


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


class Outputs(NamedTuple):
    """The files that a run writes."""

    best: Path
    final: Path
    history: Path
    curves: Path
    state: Path  # what an interrupted run goes on from


class Optimisation(NamedTuple):
    """What turns a loss into a step; built together, once."""

    loss: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


# ---- Images


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


def is_visible_image(path: str, root: str) -> bool:
    """Tell whether a path below root has an image's suffix and neither it nor a folder above is hidden."""
    parts = os.path.relpath(path, root).split(os.sep)
    return path.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in parts)


class PixelCache:
    """Decoded images on disk, so that a file is decoded once and not in every epoch.

    A shard is a checksum of its entries, CACHE_ENTRY for each of up to IMAGES_PER_SHARD images, and the pixels of
    all or none. It is written whole and never changed, so killed and concurrent runs do no harm. Pixels are
    compared with their fingerprint whenever they are read; where they differ, or the shard is gone, the
    image file is decoded again. (Plain reads, no memory map: a mapped file that shrinks kills the process.)

    Attributes:
        fingerprints: int64, shape (images,), of the decoded pixels; 0: not read yet, or unreadable.
        looks: float32, shape (images, 4), as LOOKS names them.
        places: int32, shape (images, 2): number of the shard, and row in it; -1: no pixels kept.
    """

    def __init__(self, folder: Optional[Path], paths: list[str], size: int) -> None:
        """Look the images up in a folder of shards (None: keep nothing)."""
        self.folder, self.paths, self.size = folder, paths, size
        self.bytes_per_image = 3 * size * size
        self.keys = np.array([self.take_key(path) for path in paths])
        self.fingerprints = np.zeros(len(paths), np.int64)
        self.looks = np.zeros((len(paths), len(LOOKS)), np.float32)
        self.places = np.full((len(paths), 2), -1, np.int32)
        self.shards: list[Path] = []
        order = np.argsort(self.keys)
        for shard in sorted(folder.glob(f"{size}px-*.shard")) if folder else []:
            entries, has_pixels = self.read_entries(shard)
            ranks = np.searchsorted(self.keys, entries["key"], sorter=order)
            numbers = order[np.minimum(ranks, len(order) - 1)]
            found = (self.keys[numbers] == entries["key"]) & (entries["key"] != 0)
            self.register(shard, np.where(found, numbers, -1), entries, has_pixels)

    def take_key(self, path: str) -> int:
        """Hash what tells this state of a file, in this format of pixels, from all others; 0: there is no file."""
        try:
            status = os.stat(path)
        except OSError:
            return 0
        text = f"{CACHE_FORMAT} {self.size} {status.st_size} {status.st_mtime_ns} {path}"
        return take_fingerprint(os.fsencode(text))

    def read_entries(self, shard: Path) -> tuple[np.ndarray, bool]:
        """Read a shard's entries, none where they are damaged, and whether the pixels of all are there."""
        try:
            checksum = np.fromfile(shard, "<i8", 1)
            entries = np.fromfile(shard, CACHE_ENTRY, IMAGES_PER_SHARD, offset=8)
            size = shard.stat().st_size
        except OSError:
            return np.empty(0, CACHE_ENTRY), False
        if checksum.tolist() != [take_fingerprint(entries)]:
            return entries[:0], False
        return entries, size == SHARD_HEAD + np.count_nonzero(entries["key"]) * self.bytes_per_image

    def register(self, shard: Optional[Path], numbers: np.ndarray, entries: np.ndarray, has_pixels: bool) -> None:
        """Note what was read of images, and where: row by row the image's number (-1: none of this run's) and entry."""
        (rows,) = np.nonzero((numbers >= 0) & (self.places[numbers, 0] < 0))
        self.fingerprints[numbers[rows]] = entries["fingerprint"][rows]
        self.looks[numbers[rows]] = entries["looks"][rows]
        if has_pixels and len(rows):
            self.places[numbers[rows]] = np.stack([np.full(len(rows), len(self.shards)), rows], axis=1)
            self.shards.append(shard)

    def make_room(self, images: int, budget: float) -> int:
        """Delete shards of other images, as far as the budget in bytes demands; return how many images fit."""
        sizes = {path: path.stat().st_size for path in sorted(self.folder.glob("*.shard"))}
        used, wanted = sum(sizes.values()), images * self.bytes_per_image
        budget = min(budget, used + shutil.disk_usage(self.folder).free - DISK_RESERVE)
        for path in set(sizes) - set(self.shards):
            if used + wanted > budget:
                path.unlink(missing_ok=True)
                used -= sizes[path]
        return max(0, min(images, int((budget - used) / self.bytes_per_image)))

    def write_shard(self, numbers: np.ndarray, entries: np.ndarray, pixels: list[np.ndarray]) -> None:
        """Keep what was read of some images: their entries, and the pixels of all or none."""
        head = np.zeros(IMAGES_PER_SHARD, CACHE_ENTRY)
        head[: len(entries)] = entries
        shard = self.folder / f"{self.size}px-{uuid.uuid4().hex}.shard"
        checksum = take_fingerprint(head).to_bytes(8, "little", signed=True)
        write_file(shard, checksum + head.tobytes() + b"".join(pixels))
        self.register(shard, numbers, entries, len(pixels) > 0)

    def read(self, number: int) -> torch.Tensor:
        """Return an image's pixels: uint8, shape (3, size, size).

        Raises:
            ValueError: the image file was changed since it was first read; others as `read_image` does.
        """
        shard, row = self.places[number].tolist()
        if shard >= 0:
            with suppress(OSError):
                start = SHARD_HEAD + row * self.bytes_per_image
                pixels = np.fromfile(self.shards[shard], np.uint8, self.bytes_per_image, offset=start)
                if take_fingerprint(pixels) == self.fingerprints[number]:
                    return torch.from_numpy(pixels).view(3, self.size, self.size)
        pixels = read_image(self.paths[number], self.size)
        if take_fingerprint(pixels.numpy()) != self.fingerprints[number]:
            raise ValueError(f"{self.paths[number]} was changed while the run worked: start again")
        return pixels


class SpectrogramFolder(ImageFolder):
    """An ImageFolder of the classes in CLASSES, whatever else lies beside them; its pixels come out of a cache."""

    cache: PixelCache  # numbers the images as `samples` does

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name.lower() for name in CLASSES]
        return names, {name: index for index, name in enumerate(names)}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.cache.read(index), self.targets[index]


def count_workers(setting: Optional[int], sharing: int = 1) -> int:
    """Count the processes that decode images: WORKERS, or this process's part of the cores, up to 8.

    Args:
        sharing: processes on this machine that share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // sharing), 8) if setting is None else setting


class ReadingPass(Dataset):
    """Reads each path once; item i is (entry, pixels or none, ""), or (None, none, the reason why not)."""

    def __init__(self, paths: list[str], size: int, keep: int) -> None:
        """Hand out the pixels of the first `keep` images, of the others none."""
        self.paths, self.size, self.keep = paths, size, keep

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Optional[tuple], np.ndarray, str]:
        nothing = np.empty(0, np.uint8)
        try:
            pixels = read_image(self.paths[index], self.size)
            with Image.open(self.paths[index]) as image:
                width, height = image.size
        except Exception as error:  # the decoders raise many kinds; every one is reported by name
            return None, nothing, f"{type(error).__name__}: {error}".splitlines()[0]
        columns = to_brightness(pixels[None].float() / 255)[0].mean(dim=0)
        looks = (width, height, columns.mean().item(), (columns < 0.02).float().mean().item())
        entry = (0, take_fingerprint(pixels.numpy()), looks)
        return entry, pixels.numpy().ravel() if index < self.keep else nothing, ""


def find_images(data_dir: Path) -> SpectrogramFolder:
    """Index the images below the class folders, and print how many each folder holds.

    Raises:
        ValueError: a class folder is missing, or holds fewer than two images.
    """
    for class_dir in (data_dir / name.lower() for name in CLASSES):
        if not class_dir.is_dir():
            raise ValueError(f"folder not found: {class_dir} (DATA_DIR must hold a folder for each class)")
    is_image = partial(is_visible_image, root=str(data_dir))
    folder = SpectrogramFolder(str(data_dir), is_valid_file=is_image, allow_empty=True)
    for index, name in enumerate(folder.classes):
        count = folder.targets.count(index)
        if count < 2:
            found = "one image only" if count else "no image"
            raise ValueError(f"{found} below {data_dir / name}: two are needed ({' '.join(SUFFIXES)})")
    others = {entry.name for entry in data_dir.iterdir() if entry.is_dir()} - set(folder.classes)
    others = sorted(name for name in others if not name.startswith((".", "__")))
    if others:
        print(f"Warning: folders below {data_dir} that are no class are passed over: {', '.join(others)}")
    print(f"Images below {data_dir}:")
    counts = Counter(os.path.relpath(os.path.dirname(path), data_dir) for path, _ in folder.samples)
    for name, count in sorted(counts.items()):
        print(f"  {name:<38} {count:>9,}")
    return folder


def read_all_images(cache: PixelCache, budget: float, workers: int) -> dict[str, str]:
    """Decode each image that the cache does not know: which are damaged, and which show the same?

    Args:
        budget: bytes that the cache's folder may hold.

    Returns:
        {unreadable path: reason}.
    """
    started = time.perf_counter()
    lacking = np.flatnonzero(cache.places[:, 0] < 0)
    room, reasons, limit = 0, {}, "CACHE_GB allows no more"
    try:
        if cache.folder:
            cache.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(cache.folder, "*.shard")
            room = cache.make_room(len(lacking), budget)
    except OSError as error:
        cache.folder, limit = None, str(error)
    unread = lacking if room == len(lacking) else np.flatnonzero(cache.fingerprints == 0)
    dataset = ReadingPass([cache.paths[number] for number in unread], cache.size, room)
    loader = DataLoader(dataset, IMAGES_PER_SHARD, num_workers=min(workers, len(unread) // 64), collate_fn=list)
    with tqdm(total=len(unread), desc="Reading images", unit=" images", disable=None) as progress:
        for start, batch in zip(range(0, len(unread), IMAGES_PER_SHARD), loader):
            numbers = unread[start : start + len(batch)]
            progress.update(len(batch))
            reasons.update({cache.paths[number]: why for number, (*_, why) in zip(numbers, batch) if why})
            readable = [row for row, (entry, *_) in enumerate(batch) if entry]
            entries = np.array([batch[row][0] for row in readable], CACHE_ENTRY)
            numbers = numbers[readable]
            entries["key"] = cache.keys[numbers]
            cache.register(None, numbers, entries, has_pixels=False)
            try:
                if cache.folder and readable:
                    pixels = [batch[row][1] for row in readable if start + len(batch) <= room]
                    cache.write_shard(numbers, entries, pixels)
            except OSError as error:  # the disk is full, or the folder may not be written
                cache.folder, limit = None, str(error)
    kept, known = np.count_nonzero(cache.places[:, 0] >= 0), np.count_nonzero(cache.fingerprints)
    seconds = time.perf_counter() - started
    print(f"Read {len(unread):,} images now, in {seconds:.1f} s; {kept:,} of {known:,} lie decoded in the cache")
    if kept < known:
        print(f"The {known - kept:,} others are decoded again in every epoch: {limit}")
    return reasons


# ---- Hold-out and split


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


def resolve_image(base: Path, cell: str) -> str:
    """Resolve an img_path: slashes of either kind, relative to base; an absolute path stays."""
    return os.path.normpath(os.path.join(base, cell.strip().replace("\\", "/")))


def list_holdout(csv_paths: list[Path], data_dir: Path) -> list[str]:
    """List the images, as absolute paths, that the hold-out CSVs name.

    Raises:
        ValueError: a list is missing or unusable.
    """
    listed = []
    for path in csv_paths:
        if not path.is_file():
            raise ValueError(
                f"hold-out list not found: {path}; correct HOLDOUT_CSVS, or set HOLDOUT_CSVS = [] "
                "to train on every image"
            )
        (header, *rows), _ = parse_table(path.read_bytes(), path)
        column = header.index("img_path")
        cells = (row[column] for row in rows if len(row) > column)
        listed += [resolve_image(data_dir, cell) for cell in cells if cell.strip()]
    return listed


def leave_out_holdout(images: dict[str, int], held: dict[str, int], pattern: str) -> list[str]:
    """Leave out what is listed for testing, copies of it under other names, and its recordings.

    Args:
        images: {path: fingerprint} of all images.
        held: {path: fingerprint} of the listed ones (0: not there, or unreadable).
        pattern: RECORDING_PATTERN.

    Returns:
        The paths of the images that may be used.
    """
    held_pixels = set(held.values()) - {0}
    held_recordings = {name_recording(path, pattern) for path in held}
    kept, counts = [], Counter()
    for path, fingerprint in images.items():
        if path in held:
            counts["listed"] += 1
        elif fingerprint in held_pixels:
            counts["copies"] += 1
        elif name_recording(path, pattern) in held_recordings:
            counts["relatives"] += 1
        else:
            kept.append(path)
    if held:
        print(
            f"Held out: {counts['listed']:,} of {len(held):,} listed images, {counts['copies']:,} copies of listed "
            f"ones under other names, {counts['relatives']:,} other images of their recordings"
        )
    unseen = sum(not fingerprint for fingerprint in held.values())
    if unseen:
        print(f"Warning: {unseen:,} listed images are missing or unreadable: copies of them cannot be recognised")
    return kept


def choose_images(
    folder: SpectrogramFolder, listed: list[str], cache_dir: Path, settings: dict, team: Team
) -> tuple[dict[str, int], int]:
    """Read every image once on each machine, and choose those that are readable and not held out.

    Returns:
        {path: fingerprint} of the chosen ones, and the number of unreadable ones.

    Raises:
        ValueError: more than MAX_UNREADABLE of the images cannot be read.
    """
    paths = dict(folder.samples)
    elsewhere = [path for path in listed if path not in paths and os.path.isfile(path)]
    budget = settings["CACHE_GB"] * 1e9
    make_cache = partial(PixelCache, cache_dir if budget else None, [*paths, *elsewhere], settings["IMAGE_SIZE"])
    found = None
    if team.local_rank == 0:
        folder.cache = make_cache()
        reasons = read_all_images(folder.cache, budget, count_workers(settings["WORKERS"]))
        found = folder.cache.fingerprints, folder.cache.looks, reasons
    team.gather(None)  # every machine has read its images
    if team.local_rank:
        folder.cache = make_cache()
    folder.cache.fingerprints, folder.cache.looks, reasons = team.share(found)
    pixels = dict(zip(folder.cache.paths, folder.cache.fingerprints.tolist()))
    held = {path: pixels.get(path, 0) for path in listed}
    kept = leave_out_holdout({path: pixels[path] for path in paths}, held, settings["RECORDING_PATTERN"])

    unreadable = [path for path in kept if path in reasons]
    for path in unreadable if team.rank == 0 else []:
        print(f"left out, unreadable: {path}: {reasons[path]}", file=sys.stderr)
    if len(unreadable) > settings["MAX_UNREADABLE"] * len(kept):
        raise ValueError(
            f"{len(unreadable)} of {len(kept)} images are unreadable, more than MAX_UNREADABLE = "
            f"{settings['MAX_UNREADABLE']}; the first: {unreadable[0]}: {reasons[unreadable[0]]}"
        )
    return {path: pixels[path] for path in kept if path not in reasons}, len(unreadable)


def group_images(recordings: list[str], fingerprints: list[int]) -> np.ndarray:
    """Number the groups of images that must not be torn apart: one recording, or identical pixels.

    Returns:
        int array, shape (images,): the group of each image, from 0.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    recording_ids = {name: number for number, name in enumerate(dict.fromkeys(recordings))}
    pixel_ids = {pixels: len(recording_ids) + n for n, pixels in enumerate(dict.fromkeys(fingerprints))}
    nodes = [recording_ids[name] for name in recordings]
    edges = (nodes, [pixel_ids[fingerprint] for fingerprint in fingerprints])
    size = len(recording_ids) + len(pixel_ids)
    graph = coo_matrix((np.ones(len(nodes), np.int8), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1][nodes]


def split_by_recording(groups: np.ndarray, labels: np.ndarray, val_fraction: float, seed: int) -> np.ndarray:
    """Draw whole groups for validation until each class has its share there.

    Args:
        groups: int, shape (images,), as `group_images` returns them; labels: class indices, same order.

    Returns:
        bool array, shape (images,): True for validation.

    Raises:
        ValueError: a class has no image on one of the sides.
    """
    counts = np.zeros((groups.max() + 1, len(CLASSES)), int)
    np.add.at(counts, (groups, labels), 1)
    missing = np.maximum(1, val_fraction * counts.sum(axis=0)).tolist()
    in_val = np.zeros(len(counts), bool)
    order = np.random.default_rng(seed).permutation(len(counts))
    for group, sizes in zip(order.tolist(), counts[order].tolist()):
        rest = [wanted - size for wanted, size in zip(missing, sizes)]
        if sum(map(abs, rest)) < sum(map(abs, missing)):
            in_val[group], missing = True, rest
    for index in range(len(CLASSES)):  # few, large recordings: the smallest one has to do
        if not counts[in_val, index].any():
            candidates = np.flatnonzero(counts[:, index])
            in_val[candidates[counts[candidates].sum(axis=1).argmin()]] = True
    if not (counts[in_val].any(axis=0) & counts[~in_val].any(axis=0)).all():
        raise ValueError(
            "too few recordings to split: each class needs at least two (what stands before '__' in a "
            "file's name is its recording; see RECORDING_PATTERN)"
        )
    return in_val[groups]


def split_images(
    folder: SpectrogramFolder, chosen: dict[str, int], settings: dict
) -> tuple[Subset, Subset, Optional[dict[str, float]]]:
    """Split the chosen images into training and validation, print what each side holds, and check for shortcuts.

    Raises:
        ValueError: a class has too few recordings.
    """
    indices = np.array([i for i, (path, _) in enumerate(folder.samples) if path in chosen])
    labels = np.array([folder.targets[i] for i in indices])
    recordings = [name_recording(path, settings["RECORDING_PATTERN"]) for path in chosen]
    names = sorted(set(recordings))
    print(f"Recordings are named like: {', '.join(names[:: max(1, len(names) // 3)][:3])}")
    distinct = len(set(chosen.values()))
    if distinct < len(chosen):
        in_both = len(set(zip(chosen.values(), labels.tolist()))) - distinct
        print(
            f"Identical images: {len(chosen) - distinct:,} repeat another one and stay on its side of the split"
            + (f"; {in_both:,} lie in both classes" if in_both else "")
        )
    groups = group_images(recordings, list(chosen.values()))
    in_val = split_by_recording(groups, labels, settings["VAL_FRACTION"], settings["SEED"])
    for side, mask in (("Training", ~in_val), ("Validation", in_val)):
        counts = []
        for index, name in enumerate(CLASSES):
            members = np.flatnonzero(mask & (labels == index))
            counts.append(f"{len(members):,} {name} images ({len({recordings[i] for i in members}):,} recordings)")
        print(f"{side}: {', '.join(counts)}")
    shortcuts = check_shortcuts(folder.cache.looks[indices], labels, groups)
    return Subset(folder, indices[~in_val].tolist()), Subset(folder, indices[in_val].tolist()), shortcuts


def check_shortcuts(looks: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Optional[dict[str, float]]:
    """Check whether the class can be told from what is not the voice, and warn if so.

    Args:
        looks: float32, shape (images, 4), as LOOKS names them; labels: class indices; groups: as `group_images`.

    Returns:
        {feature, or "all together": area under the ROC curve of a logistic regression, cross-validated by group, 0.5 to
        1}; None where there are too few groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(5, *(len(np.unique(groups[labels == label])) for label in range(len(CLASSES))))
    if folds < 2:
        return None
    judge = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    results = {}
    for name, columns in (*((name, [place]) for place, name in enumerate(LOOKS)), ("all together", slice(None))):
        judged = cross_val_predict(
            judge, looks[:, columns], labels, groups=groups, cv=split, method="decision_function"
        )
        results[name] = max(0.5, float(roc_auc_score(labels, judged)))
    worst = max(results, key=results.get)
    if results[worst] > SHORTCUT_AUC:
        telling = ", ".join(f"{name} {auc:.2f}" for name, auc in results.items() if auc > SHORTCUT_AUC)
        print(f"WARNING: the classes differ in what is not the voice (AUC: {telling}): the network may learn that")
    return results


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


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a state_dict, or the one inside a checkpoint.

    Raises:
        ValueError: the file holds none.
    """
    content = load_content(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no weights")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Let every new connection fail after so many seconds without a byte."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch_weights(url: str, timeout_s: float) -> dict[str, torch.Tensor]:
    """Load torchvision's weights from its cache, or download them into it.

    torch.hub checks the hash in a file's name only while downloading; here a cached file is checked too.

    Raises:
        OSError, RuntimeError, http.client.HTTPException: the download failed or arrived damaged.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    expected = cached.stem.rpartition("-")[2]
    if cached.is_file():
        if hashlib.sha256(cached.read_bytes()).hexdigest().startswith(expected):
            return load_weights(cached)
        print(f"Warning: {cached} is damaged; it is downloaded again")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with socket_timeout(timeout_s):
        torch.hub.download_url_to_file(url, str(cached), expected, progress=sys.stderr.isatty())
    return load_weights(cached)


def get_initial_weights(pretrained: Optional[str], here: Path) -> tuple[Optional[dict], str]:
    """Get the weights to start from, and the words that describe them in the checkpoint.

    Raises:
        ValueError: `pretrained` is a path, and no ResNet-18 can be loaded from it.
    """
    if pretrained is None:
        return None, "random (PRETRAINED = None)"
    if pretrained not in ResNet18_Weights.__members__:
        path = here / pretrained
        if not path.is_file():
            names = ", ".join(ResNet18_Weights.__members__)
            raise ValueError(f"PRETRAINED: no file {path} (allowed: {names}, the path of a .pth, or None)")
        return load_weights(path), f"file {path.name}"
    try:
        return fetch_weights(ResNet18_Weights[pretrained].url, DOWNLOAD_TIMEOUT_S), pretrained
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"WARNING: NO PRETRAINED WEIGHTS. {pretrained} could not be had ({reason}).")
        print("WARNING: Training starts from RANDOM weights: expect more errors than with ImageNet's.")
        return None, f"random ({pretrained} could not be had: {reason})"


def build_model(initial: Optional[dict], compute: Compute) -> nn.Module:
    """Build a ResNet-18 with a new two-class head.

    Raises:
        ValueError: the initial weights are not those of a ResNet-18.
    """
    model = resnet18(num_classes=len(CLASSES))
    if initial is not None:
        body = {name: tensor for name, tensor in initial.items() if not name.startswith("fc.")}
        try:
            missing, unexpected = model.load_state_dict(body, strict=False)
        except RuntimeError as error:
            missing, unexpected = [str(error).splitlines()[-1].strip()], []
        if unexpected or set(missing) - {"fc.weight", "fc.bias"}:
            raise ValueError(f"PRETRAINED: not a ResNet-18 ({(unexpected or missing)[0]})")
    return model.to(compute.device, memory_format=torch.channels_last)


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


def scale_rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: warm-up over a fifth, then cosine decay to 0."""
    warm_up = max(1, steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2 if step < steps else 0.0


def build_optimisation(model: nn.Module, loader: DataLoader, compute: Compute, settings: dict) -> Optimisation:
    """Build loss, optimizer and schedule: classes weighted equally; warm-up, then cosine decay, step by step."""
    labels = torch.tensor([loader.dataset.dataset.targets[i] for i in loader.dataset.indices])
    counts = torch.bincount(labels, minlength=len(CLASSES))
    weights = (len(labels) / (len(CLASSES) * counts)).to(compute.device)
    loss = nn.CrossEntropyLoss(weights, label_smoothing=settings["LABEL_SMOOTHING"], reduction="sum")
    rate, steps = settings["LEARNING_RATE"], len(loader) * settings["EPOCHS"]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=settings["WEIGHT_DECAY"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(scale_rate, steps=steps))
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
    return Optimisation(loss, optimizer, schedule, scaler)


# ---- One epoch


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Normalise RGB in 0 to 1, shape (batch, 3, height, width), as ImageNet's were."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


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


def learn_colours(images: Dataset, sample: int = 64) -> torch.Tensor:
    """Learn from a sample of images which colour stands for which brightness.

    For grey images, and for colour maps that rise in brightness (magma, viridis), it is the colour map.

    Returns:
        float32, shape (256, 3), RGB in 0 to 1 for brightness 0 to 255.
    """
    chosen = np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int)
    pixels = torch.stack([images[index][0] for index in chosen]).float() / 255
    bins = (to_brightness(pixels) * 255).round().long().flatten()
    colours = pixels.permute(0, 2, 3, 1).reshape(-1, 3)
    count = torch.bincount(bins, minlength=256)
    total = torch.zeros(256, 3).index_add_(0, bins, colours)
    seen = torch.nonzero(count).flatten().numpy()
    mean = (total[seen] / count[seen, None]).numpy()
    return torch.tensor(np.stack([np.interp(np.arange(256), seen, band) for band in mean.T], axis=1)).float()


def learn_appearance(train: Subset, val: Subset, colours: torch.Tensor, sample: int = 2000) -> dict:
    """Learn what images look like, so that images of another make are recognised when it comes to judging.

    Returns:
        colours; mean, deviation and precision (inverse of the covariance, shrunk by a tenth to its diagonal) of the
        training images' descriptions; limit, the Mahalanobis distance that 99 % of the validation images keep.
    """

    def describe(images: Subset) -> torch.Tensor:
        chosen = np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int).tolist()
        return torch.cat([describe_images(images[index][0][None], colours) for index in chosen]).double()

    seen = describe(train)
    covariance = torch.cov(seen.T).view(seen.shape[1], -1).nan_to_num()
    variance = covariance.diag() + 1e-4
    appearance = {
        "colours": colours,
        "mean": seen.mean(0),
        "deviation": variance.sqrt(),
        "precision": torch.linalg.inv(0.9 * covariance + 0.1 * variance.diag() + 1e-4 * torch.eye(len(variance))),
    }
    off = describe(val) - appearance["mean"]
    distances = torch.einsum("ni,ij,nj->n", off, appearance["precision"], off).sqrt()
    return {**appearance, "limit": distances.quantile(0.99, interpolation="higher").item()}


def draw_curves_over_rows(shape: tuple[int, int], knots: int, draw: torch.Generator) -> torch.Tensor:
    """Draw a smooth random curve over the rows of each image: shape (batch, rows, 1), deviation about 1."""
    batch, rows = shape
    values = torch.randn(batch, 1, knots, generator=draw, device=draw.device)
    return nn.functional.interpolate(values, rows, mode="linear", align_corners=True)[:, 0, :, None]


def augment(images: torch.Tensor, colours: torch.Tensor, crop: float, draw: torch.Generator) -> torch.Tensor:
    """Change spectrograms as other rooms, channels and moments would: shift, noise floor, equaliser, masks.

    The changes are made to the brightness, which stands for decibels, and carried over to the colours
    by the images' own colour map. Nothing is turned over or rotated: the axes have a meaning.

    Args:
        images: float32, shape (batch, 3, height, width), RGB in 0 to 1.
        colours: as `learn_colours` returns them, on the same device.
        crop: TIME_CROP.

    Returns:
        The same shape, but for a width of crop * width (at least SHORTEST_CROP where the image has as much).
    """
    batch, _, height, full_width = images.shape
    width = max(min(full_width, SHORTEST_CROP), round(crop * full_width))
    rand = partial(torch.rand, generator=draw, device=images.device)
    curve = partial(draw_curves_over_rows, (batch, height), draw=draw)

    # A part that begins anywhere in time, and goes round at the end
    columns = (torch.arange(width, device=images.device) + (rand(batch, 1) * full_width).long()) % full_width
    images = torch.gather(images, 3, columns[:, None, None].expand(-1, 3, height, -1))
    before = to_brightness(images)

    # A floor of noise of random level and colour in a quarter of the images (any: their order is random); each row
    # keeps its mean, as after removal of the channel. Powers of Gaussian noise are exponentially distributed.
    quiet = before[: batch // 4]
    noise = torch.empty_like(quiet).exponential_(generator=draw).clamp_min_(1e-6)
    noise *= 10 ** ((0.5 * rand(batch, 1, 1) - 0.05 + 0.06 * curve(4)) / BRIGHTNESS_PER_DB / 10)[: batch // 4]
    noisy = 10 * BRIGHTNESS_PER_DB * torch.log10(10 ** (quiet / BRIGHTNESS_PER_DB / 10) + noise)
    noisy += quiet.mean(2, keepdim=True) - noisy.mean(2, keepdim=True)
    after = torch.cat([noisy, before[batch // 4 :]])

    # An equaliser and a tilt in half of them, a gain in all
    equalised = after + 0.06 * curve(6) + 0.05 * curve(2)
    after = torch.where(rand(batch, 1, 1) < 0.5, equalised, after) + 0.05 * curve(1)

    # Two bands in time and two in frequency hidden behind the image's mean
    mean = after.mean((1, 2), keepdim=True)
    for axis, length in ((1, height), (2, width), (1, height), (2, width)):
        size = 0.15 * length * rand(batch, 1)
        start = rand(batch, 1) * (length - size)
        place = torch.arange(length, device=images.device)
        hidden = (place >= start) & (place < start + size) & (rand(batch, 1) < 0.7)
        after = torch.where(hidden.unsqueeze(3 - axis), mean, after)

    def paint(brightness: torch.Tensor) -> torch.Tensor:
        levels = brightness.clamp(0, 1).mul_(255).round_().int()
        return nn.functional.embedding(levels, colours).permute(0, 3, 1, 2)

    return images.add_(paint(after).sub_(paint(before))).clamp_(0, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that the memory ran out; on a CPU torch raises it as a RuntimeError."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class MicroBatches:
    """Lets batches be computed in as many parts as the memory demands.

    Attributes:
        parts: 1 until the memory ran out.
    """

    def __init__(self) -> None:
        self.parts = 1

    def run(self, work: Callable[[int], torch.Tensor], images: int) -> torch.Tensor:
        """Return work(size of a part) for a batch of images; where the memory runs out, again with half the size.

        Raises:
            torch.OutOfMemoryError: a single image is too much.
        """
        while True:
            size = math.ceil(images / self.parts)
            try:
                return work(size)
            except RuntimeError as error:
                alone = not dist.is_initialized() or dist.get_world_size() == 1  # others wait for all gradients
                if size == 1 or not alone or not is_out_of_memory(error):
                    raise
            if self.parts == 1:
                print(
                    "\nOut of memory: from here on batches are computed in parts; a step still takes BATCH_SIZE "
                    "images, but batch normalisation sees fewer at a time",
                    flush=True,
                )
            self.parts *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def add_gradients(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    optimisation: Optimisation,
    compute: Compute,
    size: int,
) -> torch.Tensor:
    """Compute a batch's gradients in parts of `size` images. Returns the batch's loss, a scalar."""
    loss_fn, optimizer, _, scaler = optimisation
    optimizer.zero_grad(set_to_none=True)
    total, weight = torch.zeros((), device=compute.device), loss_fn.weight[labels].sum()
    if isinstance(model, nn.parallel.DistributedDataParallel):  # which averages over the ranks
        dist.all_reduce(weight)
        weight /= dist.get_world_size()
    for part_inputs, part_labels in zip(inputs.split(size), labels.split(size)):
        with compute.autocast():
            logits = model(part_inputs)
        loss = loss_fn(logits.float(), part_labels) / weight
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimisation: Optimisation,
    compute: Compute,
    change: Callable,
    micro: MicroBatches,
) -> float:
    """Take one optimizer step per batch of images changed by `change`. Returns the mean loss.

    Raises:
        ValueError: a loss is not finite.
    """
    model.train()
    losses = []
    for images, labels in tqdm(loader, "Training", leave=False, unit=" batches", disable=None):
        images = images.to(compute.device, non_blocking=True).float().div_(255)
        labels = labels.to(compute.device, non_blocking=True)
        inputs = to_input(change(images))
        losses.append(micro.run(partial(add_gradients, model, inputs, labels, optimisation, compute), len(inputs)))
        if len(losses) % 50 == 0 or len(losses) == len(loader):  # seldom: the GPU has to be waited for
            check_losses(losses[-50:], len(losses))
        optimisation.scaler.step(optimisation.optimizer)
        optimisation.scaler.update()
        optimisation.schedule.step()
    return torch.stack(losses).mean().item()


def check_losses(losses: list[torch.Tensor], steps: int) -> None:
    """Raise ValueError if one of the last losses, up to this number of steps in the epoch, is not finite."""
    wrong = torch.nonzero(~torch.isfinite(torch.stack(losses))).flatten().tolist()
    if wrong:
        raise ValueError(
            f"training went astray: the loss of step {steps - len(losses) + wrong[0] + 1} of this epoch is not finite; "
            "lower LEARNING_RATE, or set PRECISION = 'float32' (the best checkpoint so far is intact)"
        )


def compute_logits(model: nn.Module, inputs: torch.Tensor, compute: Compute, size: int) -> torch.Tensor:
    """Compute a batch's logits in parts of `size` images: float32 (images, classes)."""
    with compute.autocast():
        return torch.cat([model(part) for part in inputs.split(size)]).float()


@torch.inference_mode()
def predict_logits(
    model: nn.Module, loader: DataLoader, compute: Compute, micro: MicroBatches
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of every image: float32 (images, classes), and the labels (images,), on the CPU."""
    model.eval()
    logits, labels = [], []
    for images, batch_labels in loader:
        inputs = to_input(images.to(compute.device, non_blocking=True).float().div_(255))
        logits.append(micro.run(partial(compute_logits, model, inputs, compute), len(inputs)))
        labels.append(batch_labels)
    if not labels:  # fewer images than ranks
        return torch.empty(0, len(CLASSES)), torch.empty(0, dtype=torch.int64)
    return torch.cat(logits).cpu(), torch.cat(labels)


def join_parts(parts: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Join the parts of the ranks, of which each holds every size-th image, in the order of one process."""
    joined = []
    for tensors in zip(*parts):
        whole = tensors[0].new_empty((sum(map(len, tensors)), *tensors[0].shape[1:]))
        for rank, part in enumerate(tensors):
            whole[rank :: len(tensors)] = part
        joined.append(whole)
    return joined


def measure(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Measure validation: loss with classes weighted equally, balanced accuracy, area under the ROC curve.

    Raises:
        ValueError: a logit is not finite: training has gone astray.
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    if not torch.isfinite(logits).all():
        raise ValueError("training went astray: outputs not finite; lower LEARNING_RATE, or PRECISION = 'float32'")
    weights = 1 / torch.bincount(labels, minlength=len(CLASSES))
    loss = nn.functional.cross_entropy(logits, labels, weights.float())
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    return {
        "val_loss": loss.item(),
        "val_balanced_accuracy": float(balanced_accuracy_score(labels, margin > 0)),
        "val_auc": float(roc_auc_score(labels, margin)),
    }


def fit_calibration(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Fit scale and offset that make a margin, logit Deepfake - logit Original, a log-likelihood ratio for a fake.

    Logistic regression with both classes weighing the same, and targets a little off 0 and 1, so that it is sound
    for few or perfectly separated scores too: Platt, 1999, section 2.2.

    Returns:
        scale and offset; 1 and 0 where a higher margin does not mean a likelier fake.
    """
    from sklearn.linear_model import LogisticRegression

    margins, is_fake = (logits[:, 0] - logits[:, 1]).double().numpy(), (labels == 0).numpy()
    spread = margins.std() or 1.0
    counts = np.where(is_fake, is_fake.sum(), (~is_fake).sum())
    weights = [(counts + 1) / (counts + 2) / counts, 1 / (counts + 2) / counts]  # of the true class, of the other
    regression = LogisticRegression(C=1e6, max_iter=1000).fit(
        np.tile(margins / spread, 2)[:, None], np.concatenate([is_fake, ~is_fake]), np.concatenate(weights)
    )
    scale, offset = float(regression.coef_.item() / spread), float(regression.intercept_.item())
    return {"scale": scale, "offset": offset} if scale > 0 else {"scale": 1.0, "offset": 0.0}


# ---- Outputs


def name_outputs(best: Path, final: Path) -> Outputs:
    """Name the files that a run writes: but for the best checkpoint they lie beside the final one."""
    return Outputs(best, final, *map(final.with_name, ("history.csv", "learning_curves.png", "resume_state.pth")))


def check_outputs(outputs: Outputs) -> None:
    """Make the folders of the checkpoints, and delete what killed runs left there.

    Raises:
        ValueError: a checkpoint cannot be written.
    """
    for path in (outputs.best, outputs.final):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise ValueError(f"{path} cannot be written: its folder is read-only, or it is a folder itself")
        remove_leftovers(path.parent, "*")


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


def save_checkpoint(path: Path, model: nn.Module, facts: dict) -> None:
    """Save the weights and every fact that judging an image needs; plain types and tensors only."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, **facts}, buffer)
    write_file(path, buffer.getvalue())


def name_previous(path: Path) -> Path:
    """Name the place where the file before this one is kept."""
    return path.with_name("previous_" + path.name)


def find_best(history: list[dict]) -> Optional[dict]:
    """Find the row of the best epoch, the first of equals; None in an empty history."""
    return min(history, key=lambda row: row["val_loss"], default=None)


def save_state(path: Path, state: dict) -> None:
    """Save what the next run needs to go on, and keep the state before it: one of them is whole at any moment."""
    if path.exists():
        os.replace(path, name_previous(path))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_state(path: Path) -> Optional[dict]:
    """Load the state that an interrupted run left, or where it is damaged the one before it; None: there is none.

    Raises:
        ValueError: all that is there is damaged.
    """
    reasons = []
    for candidate in (path, name_previous(path)):
        if candidate.exists():
            try:
                state = load_content(candidate)
                break
            except ValueError as error:
                reasons.append(str(error))
    else:
        if reasons:
            raise ValueError(f"{'; '.join(reasons)}: nothing to go on with; RESUME = False begins afresh")
        return None
    for reason in reasons:
        print(f"Warning: {reason}; the state before it is used")
        path.unlink()  # or it would take that one's place when the next is saved
    return state


def compare_runs(before: dict, now: dict) -> None:
    """Raise ValueError that names what shapes the result and differs from the interrupted run."""
    differing = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
    if differing:
        raise ValueError(
            f"the interrupted run cannot go on: {'; '.join(differing)} (set these back, or RESUME = False: afresh)"
        )


def check_best(path: Path, history: list[dict]) -> None:
    """Raise ValueError if the best checkpoint is not the one that an interrupted run's history tells of, or newer."""
    best = find_best(history)
    found = load_content(path).get("epoch", 0) if path.exists() else 0
    if found < best["epoch"]:
        raise ValueError(f"{path} is not of epoch {best['epoch']}: put it back, or RESUME = False to begin afresh")


def begin_afresh(outputs: Outputs) -> None:
    """Keep the files of the run before under names that begin with previous_, one generation; delete its state.

    A finished run is never given up for an unfinished one.
    """
    if outputs.final.exists() or not name_previous(outputs.final).exists():
        for path in filter(Path.exists, (outputs.best, outputs.final, outputs.history, outputs.curves)):
            os.replace(path, name_previous(path))
            print(f"Kept from the run before: {name_previous(path).name}")
    delete_state(outputs.state)


def delete_state(path: Path) -> None:
    """Delete both generations of a state: what is finished or given up is not gone on with."""
    for generation in (path, name_previous(path)):
        generation.unlink(missing_ok=True)


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


def write_history(path: Path, history: list[dict]) -> None:
    """Write a CSV with one row per epoch."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, history[0])
    writer.writeheader()
    writer.writerows(history)
    write_file(path, buffer.getvalue().encode())


def draw_curves(path: Path, history: list[dict]) -> None:
    """Draw losses and validation measures over the epochs, the best epoch marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    best = find_best(history)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in history], ".-", label="training (smoothed labels, augmented)")
    left.plot(epochs, [row["val_loss"] for row in history], ".-", label="validation")
    right.plot(epochs, [row["val_balanced_accuracy"] for row in history], ".-", label="balanced accuracy")
    right.plot(epochs, [row["val_auc"] for row in history], ".-", label="area under the ROC curve")
    left.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(title="Validation", ylabel="share", ylim=(None, 1.01))
    for axes in (left, right):
        axes.axvline(best["epoch"], color="grey", linestyle=":", label=f"best checkpoint (epoch {best['epoch']})")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


# ---- Main


def check_settings(settings: dict) -> None:
    """Check all settings at once, before anything slow.

    Raises:
        ValueError: names every setting that cannot be used, its value and what is allowed.
    """
    lowest = {"IMAGE_SIZE": 32, "EPOCHS": 1, "BATCH_SIZE": 2, "PATIENCE": 1, "SEED": 0, "WORKERS": 0}
    ranges = {
        "VAL_FRACTION": (0.001, 0.999),
        "MAX_UNREADABLE": (0, 1),
        "TIME_CROP": (0.01, 1),
        "LEARNING_RATE": (1e-12, 10),
        "WEIGHT_DECAY": (0, 10),
        "LABEL_SMOOTHING": (0, 0.999),
        "CACHE_GB": (0, 1e9),
    }
    wrong = []
    for name, value in settings.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        or_none = ", or None" if name in ("LEARNING_RATE", "WORKERS") else ""
        if or_none and value is None:
            continue
        if name in lowest and not (is_number and isinstance(value, int) and lowest[name] <= value < 10**9):
            wrong.append((name, f"a whole number of at least {lowest[name]}, below 10**9{or_none}"))
        elif name in ranges and not (is_number and ranges[name][0] <= value <= ranges[name][1]):
            wrong.append((name, "a number from {} to {}".format(*ranges[name]) + or_none))
    if not isinstance(settings["HOLDOUT_CSVS"], (list, tuple)):
        wrong.append(("HOLDOUT_CSVS", "a list of paths"))
    if not isinstance(settings["PRETRAINED"], (str, Path, type(None))):
        wrong.append(("PRETRAINED", "'IMAGENET1K_V1', a path, or None"))
    try:
        "".encode(settings["CSV_ENCODING"])
    except (LookupError, TypeError):
        wrong.append(("CSV_ENCODING", "a name of an encoding that Python knows"))
    if not isinstance(settings["RESUME"], bool):
        wrong.append(("RESUME", "True or False"))
    if settings["PRECISION"] not in ("auto", "float32"):
        wrong.append(("PRECISION", "'auto' or 'float32'"))
    try:
        has_group = re.compile(settings["RECORDING_PATTERN"]).groups >= 1
    except (re.error, TypeError):
        has_group = False
    if not has_group:
        wrong.append(("RECORDING_PATTERN", "a regular expression with a group in parentheses"))
    if wrong:
        raise ValueError("; ".join(f"{name} = {settings[name]!r} (allowed: {legal})" for name, legal in wrong))


class Batches:
    """The batches of one epoch after the other, of each this rank's part, as lists of indices.

    All ranks draw the same order, so that together they take the batches that a single process would take.
    """

    def __init__(self, images: int, batch_size: int, team: Team) -> None:
        self.images, self.batch_size, self.team = images, min(batch_size, images), team
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return self.images // self.batch_size  # a last batch of one image would upset batch normalisation

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.images, generator=self.generator)[: len(self) * self.batch_size]
        for batch in order.split(self.batch_size):
            yield batch[self.team.rank :: self.team.size].tolist()


def build_loaders(
    train: Subset, val: Subset, compute: Compute, settings: dict, team: Team
) -> tuple[DataLoader, DataLoader]:
    """Build the training loader, shuffled anew in each epoch, and the validation loader, of this rank's part each.

    Where nothing is left to decode, workers would only take the network's cores: a cached image costs 0.2 ms.
    """
    batch_size, workers = settings["BATCH_SIZE"], count_workers(settings["WORKERS"], team.local_size)
    cache, on_gpu = train.dataset.cache, compute.device.type == "cuda"
    used = cache.places[[*train.indices, *val.indices], 0]
    if settings["WORKERS"] is None and not on_gpu and (used >= 0).all():
        workers = 0
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": on_gpu}
    part = Subset(val.dataset, val.indices[team.rank :: team.size])
    return (
        DataLoader(train, batch_sampler=Batches(len(train), batch_size, team), **common),
        DataLoader(part, max(1, 2 * batch_size // team.size), **common),
    )


def describe_run(train: Subset, val: Subset, chosen: dict[str, int], settings: dict, data_dir: Path) -> dict:
    """Describe what shapes the result: a run can only go on where none of it has changed."""
    paths = list(chosen)
    names = [os.path.relpath(path, data_dir) for path in paths]
    listing = repr([(name, chosen[path]) for name, path in zip(names, paths)] + [train.indices, val.indices])
    return {
        **{name: value for name, value in settings.items() if name not in NOT_SHAPING},
        "the list of images": f"{len(paths)} images, digest {take_fingerprint(listing.encode()):x}",
    }


def share_gradients(model: nn.Module, compute: Compute, team: Team) -> nn.Module:
    """Wrap a network so that each rank's gradients become the mean of all; a single process needs nothing."""
    if team.size == 1:
        return model
    on_gpu = compute.device.type == "cuda"
    if on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, but for a model that is a batch norm itself
    kept = "statistics of all" if on_gpu else "each its own statistics, those of rank 0 are kept"
    print(f"{team.size} processes; batch normalisation: {kept}")
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[compute.device.index] if on_gpu else None,
        broadcast_buffers=False,  # `fit` does so once an epoch
        gradient_as_bucket_view=True,
    )


def restore(parts: dict, state: dict, compute: Compute) -> list[dict]:
    """Load what an interrupted run left into network, optimizer, schedule and scaler. Returns its history."""
    for name, part in parts.items():
        if state[name]:  # a scaler's is empty where the run began without float16
            part.load_state_dict(state[name])
    if state["precision"] != str(compute.dtype):
        print(f"Warning: the run began in {state['precision']}, and goes on in {compute.dtype}")
    return state["history"]


def save_epoch(outputs: Outputs, history: list[dict], parts: dict, facts: dict, about: dict) -> None:
    """Save what an epoch brought: its checkpoint, if it is the best so far, the history, and the state.

    Args:
        facts: what the checkpoint holds beside the weights.
        about: what the state holds beside the history and what `parts` hold.
    """
    if len(history) == 1:
        begin_afresh(outputs)
    if find_best(history) is history[-1]:
        save_checkpoint(outputs.best, parts["model"], facts)
    write_history(outputs.history, history)
    save_state(
        outputs.state, {**{name: part.state_dict() for name, part in parts.items()}, "history": history, **about}
    )


def fit(
    model: nn.Module,
    loaders: tuple[DataLoader, DataLoader],
    compute: Compute,
    facts: dict,
    run: dict,
    state: Optional[dict],
    team: Team,
    outputs: Outputs,
) -> dict:
    """Train, validate and print a line per epoch; keep history, best checkpoint and state up to date.

    Args:
        facts: what every checkpoint holds beside weights, epoch and metrics.
        run: as `describe_run` returns it.
        state: what an interrupted run left; None: begin afresh.

    Returns:
        The best epoch's row of the history.
    """
    train_loader, val_loader = loaders
    settings, rank_0 = facts["settings"], team.rank == 0
    colours = facts["appearance"]["colours"].to(compute.device)
    draw = torch.Generator(compute.device)
    change = partial(augment, colours=colours, crop=settings["TIME_CROP"], draw=draw)
    optimisation = build_optimisation(model, train_loader, compute, settings)
    parts = {"model": model, **{name: getattr(optimisation, name) for name in ("optimizer", "schedule", "scaler")}}
    history, of_epoch = (restore(parts, state, compute), state["of_epoch"]) if state else ([], {})
    trained, micro = share_gradients(model, compute, team), MicroBatches()
    while len(history) < settings["EPOCHS"]:
        if history and len(history) - find_best(history)["epoch"] >= settings["PATIENCE"]:
            print(f"Stopped early: no lower validation loss in {settings['PATIENCE']} epochs")
            break
        started, epoch = time.perf_counter(), len(history) + 1
        train_loader.batch_sampler.generator.manual_seed(settings["SEED"] * 1_000_003 + epoch)
        draw.manual_seed((settings["SEED"] * 1_000_003 + epoch) * team.size + team.rank)
        row = {"epoch": epoch, "learning_rate": optimisation.schedule.get_last_lr()[0]}
        losses = train_one_epoch(trained, train_loader, optimisation, compute, change, micro)
        row["train_loss"] = float(np.sum(team.gather(losses))) / team.size
        for buffer in model.buffers() if team.size > 1 else []:  # what is saved is what is validated
            dist.broadcast(buffer, src=0)
        logits, labels = join_parts(team.gather(predict_logits(model, val_loader, compute, micro)))
        row.update(team.share(measure(logits, labels)))
        row["seconds"] = time.perf_counter() - started
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        history.append(row)
        metrics = {name: row[name] for name in METRICS}
        of_epoch = {"epoch": epoch, "metrics": metrics, "calibration": fit_calibration(logits, labels)}
        about = {"of_epoch": of_epoch, "run": run, "start": facts["initial_weights"], "precision": str(compute.dtype)}
        if rank_0:
            save_epoch(outputs, history, parts, {**facts, **of_epoch}, about)
    if rank_0:
        save_checkpoint(outputs.final, model, {**facts, **of_epoch})
        draw_curves(outputs.curves, history)
        delete_state(outputs.state)
    return find_best(history)


def collect_facts(train: Subset, val: Subset, chosen: dict[str, int], start: str, checks: dict, settings: dict) -> dict:
    """Collect what every checkpoint holds beside weights, epoch and metrics: all that judging an image needs.

    Args:
        chosen: {path: fingerprint} of the images.
        start: what the weights began as.
        checks: results of checks, by name.
    """
    recordings = {name_recording(path, settings["RECORDING_PATTERN"]) for path in chosen}
    return {
        "format": CHECKPOINT_FORMAT,
        "classes": list(CLASSES),
        "image_size": settings["IMAGE_SIZE"],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "seen_images": torch.tensor(list(chosen.values())),
        "seen_recordings": torch.tensor(sorted({take_fingerprint(os.fsencode(name)) for name in recordings})),
        "initial_weights": start,
        "recording_pattern": settings["RECORDING_PATTERN"],
        **checks,
        "appearance": learn_appearance(train, val, learn_colours(train)),
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
    }


def main() -> int:
    """Train on the images below DATA_DIR. Returns the exit status: 0, or 1 if an image was left out."""
    here = Path(__file__).resolve().parent
    settings = {name: globals()[name] for name in SETTINGS}
    check_settings(settings)
    settings["HOLDOUT_CSVS"] = [str(path) for path in HOLDOUT_CSVS]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    data_dir = Path(os.path.normpath(here / DATA_DIR))
    outputs = name_outputs(here / BEST_MODEL_PATH, here / FINAL_MODEL_PATH)
    check_outputs(outputs)
    keep_freed_memory()
    team = join_team()
    if settings["BATCH_SIZE"] < 2 * team.size:
        raise ValueError(f"BATCH_SIZE = {BATCH_SIZE} (allowed: at least 2 for each of {team.size} processes)")
    compute = choose_compute(PRECISION)
    listed = list_holdout([here / path for path in HOLDOUT_CSVS], data_dir)
    folder = find_images(data_dir)
    state = team.share(load_state(outputs.state) if RESUME and team.rank == 0 else None)
    if state:
        initial, start = None, state["start"]
    else:
        initial, start = team.share(get_initial_weights(PRETRAINED, here) if team.rank == 0 else None)
    from_random = start.startswith("random")
    run_settings = settings
    settings = {**settings, "LEARNING_RATE": LEARNING_RATE or (1e-3 if from_random else 3e-4)}
    torch.manual_seed(SEED)
    model = build_model(initial, compute)

    chosen, unreadable = choose_images(folder, listed, here / CACHE_DIR, settings, team)
    train, val, shortcuts = split_images(folder, chosen, settings)
    run = describe_run(train, val, chosen, run_settings, data_dir)
    if state:
        compare_runs(state["run"], run)
        if team.rank == 0:
            check_best(outputs.best, state["history"])
        print(f"Going on after epoch {len(state['history'])} of a run that was interrupted (RESUME = False: afresh)")
    loaders = build_loaders(train, val, compute, settings, team)
    checks = {"unreadable_images": unreadable, "shortcuts": shortcuts}
    facts = collect_facts(train, val, chosen, start, checks, settings)
    print(f"Start: {start}; learning rate {settings['LEARNING_RATE']:g}, at most {EPOCHS} epochs")
    best = fit(model, loaders, compute, facts, run, state, team, outputs)
    if from_random and PRETRAINED is not None:
        print(f"WARNING: this model started from random weights: {start}")
    print(f"Best epoch {best['epoch']}: validation loss {best['val_loss']:.4f}, AUC {best['val_auc']:.4f}")
    print(f"Best checkpoint   {BEST_MODEL_PATH}")
    print(f"Final checkpoint  {FINAL_MODEL_PATH}")
    print("And beside it     history.csv, learning_curves.png")
    if team.size > 1:
        dist.destroy_process_group()
    return 1 if unreadable else 0


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
        way_on = "run it again" if RESUME else "set RESUME = True and run it again"
        name, status = ("SIGTERM", 143) if interrupt.args else ("Ctrl-C", 130)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one is enough to say so
            print(f"stopped by {name}; {way_on}, and it goes on after the last finished epoch", file=sys.stderr)
        return status
    except Exception as error:
        if is_out_of_memory(error):
            print(
                f"error: out of memory, with batches in the smallest parts: lower IMAGE_SIZE (now {IMAGE_SIZE}) or "
                f"BATCH_SIZE (now {BATCH_SIZE})",
                file=sys.stderr,
            )
        else:  # a fault of this script: the whole story, and not the status of a finished run
            traceback.print_exc()
    return 2


def stop(number: int, frame: object) -> NoReturn:
    """End on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(run_script())
