"""Pictures of a recording: levels over time and frequency, cut into parts, as PNG with its settings."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import scipy  # its parts load when they are first used
from PIL import Image, PngImagePlugin
from resynthesis import space_frequencies

TEXT_KEY = "spectrogram"  # PNG text chunk that holds the settings
FRAMES_AT_ONCE = 8192  # the spectra of an hour of audio at once would take 11 GB
DYNAMIC_RANGE_DB = 80  # what lies further below a recording's peak counts as silence


class Format(NamedTuple):
    """The settings that shape every picture, under the names by which they are stored in it; see the maker."""

    sample_rate: int
    window_s: float
    hop_s: float
    frequency_range_hz: tuple[float, float]
    frequency_scale: str
    db_range: tuple[float, float]
    seconds_per_image: float
    image_size: int
    grey_levels: int

    @property
    def window(self) -> int:  # samples
        return round(self.window_s * self.sample_rate)

    @property
    def hop(self) -> int:  # samples
        return round(self.hop_s * self.sample_rate)

    @property
    def width(self) -> int:  # windows of a picture
        return round(self.seconds_per_image / self.hop_s)

    @property
    def duration(self) -> int:  # samples of a picture
        return self.window + (self.width - 1) * self.hop


def fill_up(samples: np.ndarray, length: int) -> np.ndarray:
    """Repeat a short recording, from a starting point of its own, until it is `length` samples long.

    Silence or a constant would show how long the recording was, and so would a seam that stands at
    the same place in every picture: the starting point is drawn from the number of samples.
    """
    if len(samples) >= length:
        return samples
    start = np.random.default_rng(len(samples)).integers(len(samples))
    return np.resize(np.roll(samples, -start), length)


@cache
def weigh_bins(range_hz: tuple[float, float], rows: int, scale: str, fft_length: int, rate: int) -> np.ndarray:
    """Weigh the bins of a spectrum for each row of a picture: float64, shape (fft_length // 2 + 1, rows)."""
    rows_bin = space_frequencies(*range_hz, rows, scale) * fft_length / rate
    reach = np.maximum(np.gradient(rows_bin), 1)  # a triangle up to the next rows, or else between two bins
    weights = np.maximum(0, 1 - np.abs(np.arange(fft_length // 2 + 1)[:, None] - rows_bin) / reach)
    return weights / weights.sum(axis=0)


def compute_levels(samples: np.ndarray, form: Format) -> np.ndarray:
    """Compute the levels of a recording's spectrogram, each frequency's mean over time removed.

    Returns:
        float64 in dB, shape (image_size, windows), row 0 the lowest frequency.
    """
    fft_length = 2 ** int(np.ceil(np.log2(2 * form.window)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, form.window)[:: form.hop]
    window = scipy.signal.get_window("hann", form.window)
    rows = (tuple(form.frequency_range_hz), form.image_size, form.frequency_scale)
    weights = weigh_bins(*rows, fft_length, form.sample_rate)
    blocks = np.array_split(frames, -(-len(frames) // FRAMES_AT_ONCE))
    power = np.concatenate([np.abs(np.fft.rfft(block * window, fft_length)) ** 2 @ weights for block in blocks])
    level_db = 10 * np.log10(np.maximum(power, power.max() * 10 ** (-DYNAMIC_RANGE_DB / 10)))
    return (level_db - level_db.mean(axis=0)).T


def place_parts(length: int, form: Format) -> list[int]:
    """Place pictures evenly from the start of a recording of so many samples to its end: their starts, in windows.

    Neighbours overlap where the length is not a multiple, but a rest under a quarter of a picture is left out.
    """
    windows = (max(length, form.duration) - form.duration) // form.hop + form.width
    count = max(1, int(np.ceil(windows / form.width - 0.25)))
    return np.linspace(0, windows - form.width, count).astype(int).tolist()


def draw_parts(samples: np.ndarray, starts: list[int], form: Format) -> list[np.ndarray]:
    """Draw pictures of a recording that is at least as long as one, from these windows on.

    Returns:
        uint8 arrays, shape (image_size, image_size), values below grey_levels, highest frequency on top.
    """
    darkest, brightest = form.db_range
    shades = np.clip((compute_levels(samples, form) - darkest) / (brightest - darkest), 0, 1)
    parts = []
    for start in starts:
        part = shades[::-1, start : start + form.width]
        if form.width != form.image_size:
            size = (form.image_size, form.image_size)
            part = np.asarray(Image.fromarray(part.astype(np.float32)).resize(size, Image.BILINEAR))
        parts.append(np.round(part * (form.grey_levels - 1)).astype(np.uint8))
    return parts


def encode_png(part: np.ndarray, grey_levels: int, notes: dict) -> bytes:
    """Encode one picture as a palette PNG that carries notes of how it was made: its settings, and others."""
    from matplotlib import colormaps

    image = Image.frombytes("P", part.shape[::-1], part.tobytes())
    image.putpalette(colormaps["magma"](np.linspace(0, 1, grey_levels), bytes=True)[:, :3].tobytes())
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, json.dumps(notes))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def read_notes(path: Path) -> Optional[dict]:
    """Read what `encode_png` stored in an image; None: it is another's."""
    try:
        with Image.open(path) as image:
            notes = json.loads(image.text[TEXT_KEY])
        return notes if {"settings", "parts"} <= notes.keys() else None
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None
