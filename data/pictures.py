"""Pictures of a recording: levels over time and frequency, cut into parts, as PNG with its settings."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Optional

import numpy as np
import scipy  # its parts load when they are first used
from PIL import Image, PngImagePlugin
from resynthesis import space_frequencies

TEXT_KEY = "spectrogram"  # PNG text chunk that holds the settings
FRAMES_AT_ONCE = 8192  # the spectra of an hour of audio at once would take 11 GB
DYNAMIC_RANGE_DB = 80  # what lies further below a recording's peak counts as silence


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


def compute_levels(samples: np.ndarray, settings: dict) -> np.ndarray:
    """Compute the levels of a recording's spectrogram, each frequency's mean over time removed.

    Args:
        samples: float64, shape (samples,), at SAMPLE_RATE.

    Returns:
        float64 in dB, shape (IMAGE_SIZE, windows), row 0 the lowest frequency.
    """
    rate = settings["SAMPLE_RATE"]
    window_length, hop = round(settings["WINDOW_S"] * rate), round(settings["HOP_S"] * rate)
    fft_length = 2 ** int(np.ceil(np.log2(2 * window_length)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window_length)[::hop]
    window = scipy.signal.get_window("hann", window_length)
    range_hz, size, scale = tuple(settings["FREQUENCY_RANGE_HZ"]), settings["IMAGE_SIZE"], settings["FREQUENCY_SCALE"]
    weights = weigh_bins(range_hz, size, scale, fft_length, rate)
    blocks = np.array_split(frames, -(-len(frames) // FRAMES_AT_ONCE))
    power = np.concatenate([np.abs(np.fft.rfft(block * window, fft_length)) ** 2 @ weights for block in blocks])
    level_db = 10 * np.log10(np.maximum(power, power.max() * 10 ** (-DYNAMIC_RANGE_DB / 10)))
    return (level_db - level_db.mean(axis=0)).T


def place_parts(length: int, settings: dict) -> tuple[int, list[int]]:
    """Place pictures of equal duration evenly from a recording's start to its end.

    Neighbours overlap where the length is not a multiple, but a rest under a quarter of a picture is left out.

    Args:
        length: samples of the recording.

    Returns:
        The samples of one picture, and where each begins, in windows.
    """
    rate, hop = settings["SAMPLE_RATE"], round(settings["HOP_S"] * settings["SAMPLE_RATE"])
    width = round(settings["SECONDS_PER_IMAGE"] / settings["HOP_S"])
    duration = round(settings["WINDOW_S"] * rate) + (width - 1) * hop
    windows = (max(length, duration) - duration) // hop + width
    count = max(1, int(np.ceil(windows / width - 0.25)))
    return duration, np.linspace(0, windows - width, count).astype(int).tolist()


def draw_parts(samples: np.ndarray, starts: list[int], settings: dict) -> list[np.ndarray]:
    """Draw pictures of a recording.

    Args:
        samples: float64, at least as long as one picture; starts: in windows, as `place_parts` returns them.

    Returns:
        uint8 arrays, shape (IMAGE_SIZE, IMAGE_SIZE), values below GREY_LEVELS, highest frequency on top.
    """
    size, width = settings["IMAGE_SIZE"], round(settings["SECONDS_PER_IMAGE"] / settings["HOP_S"])
    darkest, brightest = settings["DB_RANGE"]
    shades = np.clip((compute_levels(samples, settings) - darkest) / (brightest - darkest), 0, 1)
    parts = []
    for start in starts:
        part = shades[::-1, start : start + width]
        if width != size:
            part = np.asarray(Image.fromarray(part.astype(np.float32)).resize((size, size), Image.BILINEAR))
        parts.append(np.round(part * (settings["GREY_LEVELS"] - 1)).astype(np.uint8))
    return parts


def encode_png(part: np.ndarray, settings: dict, notes: dict) -> bytes:
    """Encode one picture as a palette PNG that carries its settings, and notes of how it was made."""
    from matplotlib import colormaps

    image = Image.frombytes("P", part.shape[::-1], part.tobytes())
    palette = colormaps["magma"](np.linspace(0, 1, settings["GREY_LEVELS"]), bytes=True)[:, :3]
    image.putpalette(palette.tobytes())
    info = PngImagePlugin.PngInfo()
    stored = {name.lower(): value for name, value in settings.items()}
    info.add_text(TEXT_KEY, json.dumps({"settings": stored, **notes}))
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
