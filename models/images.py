"""An image: its pixels, its fingerprint, what of its recording it shows, how it was rendered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # pytorch.org/vision/stable/models.html, ResNet18_Weights
IMAGENET_STD = (0.229, 0.224, 0.225)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff", ".webm", ".aac", ".wma", ".amr")
STATISTICS = ("deviation over time", "change from row to row", "change from column to column")
CHANNELS = ("red", "green", "blue")
BANDS = ("highest", "upper", "lower", "lowest")  # quarters of the rows, from the top
SHADES = 6  # values of a channel in the joint distribution of the three
RENDERING_SAMPLE = 2000  # images whose rendering statistics are learnt
MIRRORED = {"upside down": 2, "backwards": 3}  # by the axis of (batch, channels, rows, columns) that is turned
NEARER = 1  # so much nearer to the training images, as a distance of means, they lie the other way round


def take_fingerprint(content: bytes) -> int:
    """Hash bytes, or an array of decoded pixels, to a signed integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def read_image(path: str, size: int) -> torch.Tensor:
    """Decode an image of any mode and resize it: uint8, shape (3, size, size), RGB.

    Sixteen-bit grey is scaled to eight bits; what is transparent is seen on white and what EXIF calls turned is turned,
    as viewers show it.
    torch resizes in a tenth of Pillow's time, to pixels that differ by at most 1. Pillow raises many kinds of errors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    if path.lower().endswith(AUDIO_SUFFIXES):
        raise ValueError("it is audio: make images of it with data/make_spectrograms.py")
    with open(path, "rb") as file, Image.open(file) as image:  # of a path, Pillow 13 garbles a TIFF that is turned
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: save it with 8 or 16 bits")
        image.load()
        if any(word in str(key) for key in image.info for word in ("exif", "xmp")):  # to look into them takes long
            with suppress(Exception):  # what cannot be parsed turns nothing
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            grey = np.round(np.asarray(image, dtype=np.float64) / 257)
            image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("RGB", "RGBA"):
            image = image.convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] != (size, size):
        pixels = nn.functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels[:3].contiguous()


def read_again(path: str, size: int, fingerprint: int) -> torch.Tensor:
    """Read an image that this run has read before; ValueError names it if it is gone, unreadable, or was changed."""
    try:
        pixels = read_image(path, size)
    except Exception as error:
        raise ValueError(f"{path} can no longer be read: {error}".splitlines()[0]) from None
    if take_fingerprint(pixels.numpy()) != fingerprint:
        raise ValueError(f"{path} was changed during the run: start again")
    return pixels


def read_span(path: str) -> Optional[tuple[float, float]]:
    """Read from when to when, in s, an image shows its recording; None: it does not say."""
    try:
        with Image.open(path) as image:
            notes = json.loads(image.text["spectrogram"])
        return notes["start_s"], notes["start_s"] + (notes.get("seconds") or notes["settings"]["seconds_per_image"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def count_seconds(spans: list[Optional[tuple[float, float]]]) -> Optional[float]:
    """Count the seconds of a recording that its images show, by what `read_span` gave; None where one does not say."""
    if None in spans:
        return None
    total, end = 0.0, 0.0
    for start_s, stop_s in sorted(spans):
        total, end = total + max(0.0, stop_s - max(start_s, end)), max(end, stop_s)
    return round(total, 2)


def to_input(
    images: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, white: int = 1
) -> torch.Tensor:
    """Normalise RGB from 0 to `white`, float32, shape (batch, 3, height, width); mean and deviation are of 0 to 1."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) * white for values in (mean, std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_brightness(images: torch.Tensor) -> torch.Tensor:
    """Weigh RGB, shape (batch, 3, height, width), to brightness, (batch, height, width), as ITU-R BT.601 does."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


# ---- Rendering statistics: they differ where images were made with other software or settings


def count_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Count how often each combination of the channels' values occurs.

    Args:
        pixels: uint8, shape (batch, 3, height, width).

    Returns:
        float32, shape (batch, SHADES ** 3): fractions of the pixels of each image.
    """
    shades = pixels.flatten(2).long() * SHADES // 256
    joint = (shades[:, 0] * SHADES + shades[:, 1]) * SHADES + shades[:, 2]
    counts = torch.zeros(len(pixels), SHADES**3).scatter_add_(1, joint, torch.ones(joint.shape))
    return counts / joint.shape[1]


def describe_rendering(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Describe how images were rendered, by statistics that depend little on voice, loudness and length.

    Each row's own mean is removed first: it depends on what else the recording holds.

    Args:
        pixels: uint8, shape (batch, 3, height, width).
        colours: mean of `count_colours` over training images, shape (SHADES ** 3,).

    Returns:
        float32, shape (batch, 40): logarithms of each of STATISTICS for each of CHANNELS in each of BANDS and of the
        Hellinger distance of the image's colours from `colours`; for each channel how much steeper its rises are than
        its falls, -1 to 1, which tells images that run backwards.
    """
    images = pixels.float() / 255
    images = images - images.mean(3, keepdim=True)
    maps = (images.std(3), images.diff(dim=2).abs().mean(3), images.diff(dim=3).abs().mean(3))
    bands = [nn.functional.adaptive_avg_pool1d(rows, len(BANDS)).flatten(1) for rows in maps]
    overlap = (count_colours(pixels) * colours).sqrt().sum(1, keepdim=True)
    distance = (1 - overlap).clamp_min(0).sqrt()
    steps = images.mean(2).diff(dim=2)
    steepness = (steps**3).mean(2) / (steps.abs() ** 3).mean(2).clamp_min(1e-12)
    return torch.cat([torch.log(torch.cat([*bands, distance], dim=1) + 1e-3), steepness], dim=1)


def learn_rendering(train: Dataset, val: Dataset) -> dict:
    """Learn the rendering statistics of the training images.

    Returns:
        colours; mean, deviation and precision (inverse of the covariance, shrunk by a tenth to its diagonal) of the
        training images' statistics; limit, the Mahalanobis distance within which 99 % of the validation images lie.
    """

    def sample(images: Dataset) -> Iterator[torch.Tensor]:
        for index in np.linspace(0, len(images) - 1, min(RENDERING_SAMPLE, len(images))).astype(int).tolist():
            yield images[index][0][None]

    colours = torch.cat([count_colours(pixels) for pixels in sample(train)]).mean(0)
    seen, other = (
        torch.cat([describe_rendering(pixels, colours) for pixels in sample(images)]).double()
        for images in (train, val)
    )
    covariance = torch.cov(seen.T).view(seen.shape[1], -1).nan_to_num()
    variance = covariance.diag() + 1e-4
    precision = torch.linalg.inv(0.9 * covariance + 0.1 * variance.diag() + 1e-4 * torch.eye(len(variance)))
    off = other - seen.mean(0)
    distances = torch.einsum("ni,ij,nj->n", off, precision, off).sqrt()
    limit = distances.quantile(0.99, interpolation="higher").item()
    learnt = {"colours": colours, "mean": seen.mean(0), "deviation": variance.sqrt(), "precision": precision}
    return {**learnt, "limit": limit}


class Rendering(NamedTuple):
    """How images compare with the training images in how they were rendered."""

    distances: np.ndarray  # Mahalanobis distance of each image, in units of what 99 % of the validation images keep
    shift: float  # Mahalanobis distance of their mean, less what chance adds; 0 for a single image
    differences: dict[str, float]  # by statistic, in standard deviations, the largest first
    mirrored: str  # "upside down" or "backwards" where several images would fit better so, else ""


def compare_rendering(pixels: torch.Tensor, rendering: dict) -> Optional[Rendering]:
    """Compare images with the training images by their rendering statistics.

    Args:
        pixels: uint8, shape (images, 3, size, size).
        rendering: as `learn_rendering` returns it; of an older version: the result is None.
    """
    if rendering["colours"].shape != (SHADES**3,):
        return None
    squares, mean, shift = measure_shift(pixels, rendering)
    mirrored = [
        word for word, axis in MIRRORED.items() if measure_shift(pixels.flip(axis), rendering)[2] < shift - NEARER
    ]
    names = [f"{what} of {colour}, {band} quarter" for what in STATISTICS for colour in CHANNELS for band in BANDS]
    names += ["distance of the colours", *(f"steepness of rises of {colour}" for colour in CHANNELS)]
    differences = zip(names, (mean / rendering["deviation"]).tolist())
    largest = dict(sorted(differences, key=lambda pair: -abs(pair[1])))
    return Rendering((squares.sqrt() / rendering["limit"]).numpy(), shift, largest, " and ".join(mirrored))


def measure_shift(pixels: torch.Tensor, rendering: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Measure how far images lie from the training images: squared distances, mean difference, distance of the mean.

    The mean lies far off even where no single image does, as when all are upside down. What chance adds is taken off.
    """
    off = describe_rendering(pixels, rendering["colours"]).double() - rendering["mean"]
    squares, mean = torch.einsum("ni,ij,nj->n", off, rendering["precision"], off), off.mean(0)
    shift = mean @ rendering["precision"] @ mean - squares.mean() / len(off)
    return squares, mean, shift.clamp(0).sqrt().item()
