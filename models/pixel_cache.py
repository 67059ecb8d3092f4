"""Decoded images on disk, so that the trainer decodes a file once and not in every epoch."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.images import read_again, read_image, take_fingerprint, to_brightness

CACHE_FORMAT = 4  # changes when read_image comes to give other pixels
DISK_RESERVE = 1e9  # bytes of the disk that the cache leaves free, for checkpoints
IMAGES_AT_ONCE = 64
LOOKS = ("original width", "original height", "mean brightness", "share of black columns")


class Entry(NamedTuple):
    """What is known of a decoded image."""

    fingerprint: int  # of its pixels
    looks: tuple[float, ...]  # as LOOKS names them
    offset: Optional[int]  # byte in the file of pixels; None: its pixels are not kept


class PixelCache:
    """Decoded images: one file of pixels and one index, a line per image, for each image size.

    Both files only ever grow at their end, and each line of the index ends with its checksum. Pixels are compared with
    their fingerprint whenever they are read; where anything does not match, the image file is decoded again. So killed
    and concurrent runs do no harm. (Plain reads, no memory map: a mapped file that shrinks kills the process.)

    Attributes:
        entries: {path: Entry} of the readable images.
        reasons: {path: why it cannot be read}.
        limit: why pixels are not kept; "": they are.
    """

    def __init__(self, folder: Path, size: int, budget: float) -> None:
        """Open the cache in a folder that may hold `budget` bytes in all; 0: keep nothing."""
        self.pixel_file, self.index_file = folder / f"{size}px.pixels", folder / f"{size}px.index"
        self.folder, self.size, self.budget = folder, size, budget
        self.bytes_per_image = 3 * size * size
        self.entries: dict[str, Entry] = {}
        self.reasons: dict[str, str] = {}
        self.limit = "" if budget else "CACHE_GB = 0"

    def read_index(self) -> dict[int, Entry]:
        """Read the index, {key: Entry}, past lines that are damaged or whose pixels are gone."""
        known = {}
        with suppress(OSError):
            end = self.pixel_file.stat().st_size - self.bytes_per_image
            for line in self.index_file.read_bytes().splitlines():
                text, _, checksum = line.rpartition(b" ")
                if checksum != b"%08x" % zlib.crc32(text):
                    continue
                key, fingerprint, offset, *looks = text.split()
                if int(offset) <= end:
                    known[int(key)] = Entry(int(fingerprint), tuple(map(float, looks)), int(offset))
        return known

    def take_key(self, path: str) -> Optional[int]:
        """Hash what tells this state of a file, in this format of pixels, from all others; None: there is no file."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)  # archives set times alike
        return take_fingerprint(os.fsencode(f"{CACHE_FORMAT} {state} {path}"))

    def make_room(self, images: int) -> int:
        """Return how many more images fit; where not all do, and old ones take the room, delete all that is kept."""
        kept = [path for path in self.folder.glob("*px.*") if path.suffix in (".pixels", ".index")]
        used, wanted = sum(path.stat().st_size for path in kept), images * self.bytes_per_image
        budget = min(self.budget, used + shutil.disk_usage(self.folder).free - DISK_RESERVE)
        in_use = len(self.entries) * self.bytes_per_image
        if used + wanted > budget and used > 1.1 * in_use:
            for path in kept:
                path.unlink(missing_ok=True)
            self.entries.clear()
            return self.make_room(images + in_use // self.bytes_per_image)
        return max(0, min(images, int((budget - used) / self.bytes_per_image)))

    def read_all(self, paths: list[str], workers: int) -> None:
        """Decode each image that the cache does not know; print how many."""
        started = time.perf_counter()
        known = self.read_index() if self.budget else {}
        keys = {path: self.take_key(path) for path in paths}
        self.entries = {path: known[key] for path, key in keys.items() if key in known}
        room, missing = 0, [path for path in paths if path not in self.entries]
        if self.budget:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                room = self.make_room(len(missing))
                missing = [path for path in paths if path not in self.entries]
            except OSError as error:
                self.limit = str(error)
        dataset = ReadingPass(missing, self.size)
        loader = DataLoader(dataset, IMAGES_AT_ONCE, num_workers=min(workers, len(missing) // 64), collate_fn=list)
        with tqdm(total=len(missing), desc="Reading images", unit=" images", disable=None) as progress:
            for start, batch in zip(range(0, len(missing), IMAGES_AT_ONCE), loader):
                batch_paths = missing[start : start + len(batch)]
                self.keep(batch_paths, [keys[path] for path in batch_paths], batch, room - start)
                progress.update(len(batch))
        kept = sum(entry.offset is not None for entry in self.entries.values())
        seconds = time.perf_counter() - started
        print(f"Read {len(missing):,} images in {seconds:.1f} s; {kept:,} of {len(self.entries):,} are in the cache")
        if kept < len(self.entries):
            reason = self.limit or "CACHE_GB allows no more"
            print(f"The other {len(self.entries) - kept:,} are decoded again in every epoch: {reason}")

    def keep(self, paths: list[str], keys: list[Optional[int]], batch: list[tuple], room: int) -> None:
        """Note what was read of some images, and append the pixels of the first `room` of them to the file."""
        for number, (path, key, (entry, pixels, reason)) in enumerate(zip(paths, keys, batch)):
            if entry is None:
                self.reasons[path] = reason
                continue
            if key is not None and number < room and not self.limit:
                try:
                    offset = append(self.pixel_file, pixels)
                    looks = " ".join(map(repr, entry.looks))
                    line = f"{key} {entry.fingerprint} {offset} {looks}".encode()
                    append(self.index_file, b"%s %08x\n" % (line, zlib.crc32(line)))
                    entry = entry._replace(offset=offset)
                except OSError as error:  # the disk is full, or the folder may not be written
                    self.limit = str(error)
            self.entries[path] = entry

    def read(self, path: str) -> torch.Tensor:
        """Return an image's pixels: uint8, shape (3, size, size).

        Raises:
            ValueError: the image file is gone, or was changed since it was first read.
        """
        entry = self.entries[path]
        if entry.offset is not None:
            with suppress(OSError):
                pixels = np.fromfile(self.pixel_file, np.uint8, self.bytes_per_image, offset=entry.offset)
                if take_fingerprint(pixels) == entry.fingerprint:
                    return torch.from_numpy(pixels).view(3, self.size, self.size)
        return read_again(path, self.size, entry.fingerprint)


def append(path: Path, content: bytes) -> int:
    """Append to a file in one write, unbuffered. Returns where the content begins, in bytes."""
    with open(path, "ab", buffering=0) as file:
        if file.write(content) < len(content):
            raise OSError(f"{path}: the disk is full")
        return file.tell() - len(content)


class ReadingPass(Dataset):
    """Decodes each path once; item i is (Entry, pixels, ""), or (None, none, the reason why not)."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Optional[Entry], bytes, str]:
        try:
            pixels = read_image(self.paths[index], self.size)
            with Image.open(self.paths[index]) as image:
                width, height = image.size
        except Exception as error:  # the decoders raise many kinds; every one is reported by name
            return None, b"", f"{type(error).__name__}: {error}".splitlines()[0]
        columns = to_brightness(pixels[None].float() / 255)[0].mean(dim=0)
        looks = (float(width), float(height), columns.mean().item(), (columns < 0.02).float().mean().item())
        return Entry(take_fingerprint(pixels.numpy()), looks, None), pixels.numpy().tobytes(), ""
