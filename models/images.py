"""An image: its pixels, its fingerprint, what of its recording it shows, how it was rendered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # pytorch.org/vision/stable/models.html, ResNet18_Weights
IMAGENET_STD = (0.229, 0.224, 0.225)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff", ".webm", ".aac", ".wma", ".amr")
BAND_STATISTICS = ("deviation over time", "change from row to row", "change from column to column")
RENDERING_SAMPLE = 2000  # images whose rendering statistics are learnt


def take_fingerprint(content: bytes) -> int:
    """Hash bytes, or an array of decoded pixels, to a signed integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def read_image(path: str, size: int) -> torch.Tensor:
    """Decode an image of any mode and resize it: uint8, shape (3, size, size), RGB.

    Sixteen-bit grey is scaled to eight bits; what is transparent is seen on white, as viewers show it.
    torch resizes in a tenth of Pillow's time, to pixels that differ by at most 1. Pillow raises many kinds of errors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file")
    if path.lower().endswith(AUDIO_SUFFIXES):
        raise ValueError("it is audio: make images of it with data/make_spectrograms.py")
    with Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: save it with 8 or 16 bits")
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


def read_span(path: str) -> Optional[tuple[float, float]]:
    """Read from when to when, in s, an image shows its recording; None: it does not say."""
    try:
        with Image.open(path) as image:
            notes = json.loads(image.text["spectrogram"])
        return notes["start_s"], notes["start_s"] + notes["settings"]["seconds_per_image"]
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def count_seconds(paths: list[str]) -> Optional[float]:
    """Count the seconds of a recording that its images show; None where the images do not say."""
    spans = [read_span(path) for path in paths]
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


def learn_colours(images: Dataset, sample: int = 64) -> torch.Tensor:
    """Learn from a sample of images which colour stands for which brightness.

    For grey images, and for colour maps that rise in brightness (magma, viridis), that is the colour map.

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


def describe_rendering(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Describe how images were rendered, by statistics that depend little on voice, loudness and length.

    Each row's own mean is removed first: it depends on what else the recording holds.

    Args:
        pixels: uint8, shape (batch, 3, height, width).
        colours: float32, shape (256, 3), as `learn_colours` returns them.

    Returns:
        float32, shape (batch, 25), logarithms: BAND_STATISTICS, each in eight bands from top to bottom; distance of
        the colours from `colours`.
    """
    images = pixels.float() / 255
    brightness = to_brightness(images)
    painted = nn.functional.embedding((brightness * 255).round().int(), colours).permute(0, 3, 1, 2)
    distance = (images - painted).abs().mean((1, 2, 3))
    brightness = brightness - brightness.mean(2, keepdim=True)
    maps = (brightness.std(2), brightness.diff(dim=1).abs().mean(2), brightness.diff(dim=2).abs().mean(2))
    bands = [nn.functional.adaptive_avg_pool1d(rows, 8) for rows in maps]
    return torch.log(torch.cat([*bands, distance[:, None]], dim=1) + 1e-3)


def learn_rendering(train: Dataset, val: Dataset) -> dict:
    """Learn the rendering statistics of the training images.

    Returns:
        colours; mean, deviation and precision (inverse of the covariance, shrunk by a tenth to its diagonal) of the
        training images' statistics; limit, the Mahalanobis distance within which 99 % of the validation images lie.
    """

    def describe(images: Dataset) -> torch.Tensor:
        chosen = np.linspace(0, len(images) - 1, min(RENDERING_SAMPLE, len(images))).astype(int).tolist()
        return torch.cat([describe_rendering(images[index][0][None], colours) for index in chosen]).double()

    colours = learn_colours(train)
    seen = describe(train)
    covariance = torch.cov(seen.T).view(seen.shape[1], -1).nan_to_num()
    variance = covariance.diag() + 1e-4
    rendering = {
        "colours": colours,
        "mean": seen.mean(0),
        "deviation": variance.sqrt(),
        "precision": torch.linalg.inv(0.9 * covariance + 0.1 * variance.diag() + 1e-4 * torch.eye(len(variance))),
    }
    off = describe(val) - rendering["mean"]
    distances = torch.einsum("ni,ij,nj->n", off, rendering["precision"], off).sqrt()
    return {**rendering, "limit": distances.quantile(0.99, interpolation="higher").item()}


class Rendering(NamedTuple):
    """How images compare with the training images in how they were rendered."""

    distances: np.ndarray  # Mahalanobis distance of each image, in units of what 99 % of the validation images keep
    shift: float  # Mahalanobis distance of their mean, less what chance adds; 0 for a single image
    differences: dict[str, float]  # by statistic, in standard deviations, the largest first


def compare_rendering(pixels: torch.Tensor, rendering: dict) -> Optional[Rendering]:
    """Compare images with the training images by their rendering statistics.

    Args:
        pixels: uint8, shape (images, 3, size, size).
        rendering: as `learn_rendering` returns it; of an older version: the result is None.
    """
    seen = describe_rendering(pixels, rendering["colours"]).double()
    if seen.shape[1] != len(rendering["mean"]):
        return None
    off = seen - rendering["mean"]
    squares = torch.einsum("ni,ij,nj->n", off, rendering["precision"], off)
    mean = off.mean(0)  # far off even where no single image is, as when all are upside down
    shift = (mean @ rendering["precision"] @ mean - squares.mean() / len(off)).clamp(0).sqrt().item()
    names = [f"{what} in eighth {band} from the top" for what in BAND_STATISTICS for band in range(1, 9)]
    differences = zip([*names, "distance from the training images' colours"], (mean / rendering["deviation"]).tolist())
    largest = dict(sorted(differences, key=lambda pair: -abs(pair[1])))
    return Rendering((squares.sqrt() / rendering["limit"]).numpy(), shift, largest)
