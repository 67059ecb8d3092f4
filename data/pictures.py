"""Pictures of speech: level and phase of a recording's spectrogram, as RGB images that carry their settings.

Red shows the level, green how regular the phase is over time, blue how regular it is over frequency. README.md, beside
this file, explains them.
"""

from __future__ import annotations

import io
import json
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import scipy  # its parts load when they are first used
from PIL import Image, PngImagePlugin

TEXT_KEY = "spectrogram"  # PNG text chunk that holds the settings
COLUMNS_AT_ONCE = 64  # the spectra of an hour of audio at once would take 20 GB
DYNAMIC_RANGE_DB = 80  # what lies further below a recording's peak counts as silence
WINDOWS_PER_COLUMN = 2


class Format(NamedTuple):
    """The settings that shape every picture, under the names by which they are stored in it; see the maker."""

    sample_rate: int
    window_s: float
    hop_s: float
    frequency_range_hz: tuple[float, float]
    db_range: tuple[float, float]
    image_size: int
    levels: int

    @property
    def window(self) -> int:  # samples
        return round(self.window_s * self.sample_rate)

    @property
    def hop(self) -> int:  # samples
        return round(self.hop_s * self.sample_rate)

    @property
    def column(self) -> int:  # samples from one column of a picture to the next
        return WINDOWS_PER_COLUMN * self.hop

    @property
    def duration(self) -> int:  # samples of a picture
        return self.window + self.image_size * self.column - self.hop

    @property
    def fft_length(self) -> int:
        return 2 ** int(np.ceil(np.log2(2 * self.window)))


def fill_up(samples: np.ndarray, length: int) -> np.ndarray:
    """Repeat a short recording, from a starting point of its own, until it is `length` samples long.

    Silence or a constant would show how long the recording was, and so would a seam that stands at
    the same place in every picture: the starting point is drawn from the number of samples.
    """
    if len(samples) >= length:
        return samples
    start = np.random.default_rng(len(samples)).integers(len(samples))
    return np.resize(np.roll(samples, -start), length)


def place_parts(length: int, form: Format) -> list[int]:
    """Place pictures evenly from a recording's start to its end.

    Neighbours overlap where the length is not a multiple, but a rest under a quarter of a picture is left out.

    Args:
        length: samples of the recording.

    Returns:
        Where each begins, in columns.
    """
    windows = (max(length, form.duration) - form.window) // form.hop + 1
    columns, size = windows // WINDOWS_PER_COLUMN, form.image_size
    count = max(1, int(np.ceil(columns / size - 0.25)))
    return np.linspace(0, columns - size, count).astype(int).tolist()


@cache
def weigh_bins(low_hz: float, high_hz: float, rows: int, fft_length: int, rate: int) -> scipy.sparse.csr_matrix:
    """Weigh the bins of a spectrum for each row of a picture, the lowest frequency first: shape (rows, bins)."""
    centres = np.linspace(low_hz, high_hz, rows) * fft_length / rate
    reach = np.maximum(np.gradient(centres), 1)[:, None]  # a triangle up to the next rows, or else between two bins
    weights = np.maximum(0, 1 - np.abs(np.arange(fft_length // 2 + 1) - centres[:, None]) / reach)
    return scipy.sparse.csr_matrix(weights / weights.sum(axis=1, keepdims=True))


def compute_channels(samples: np.ndarray, form: Format) -> np.ndarray:
    """Compute the three channels of a recording.

    Args:
        samples: float64, shape (samples,), at least a picture's duration, with a peak of about 1.

    Returns:
        float32, shape (3, rows, columns), 0 to 1, row 0 the lowest frequency: level, regularity of the phase over
        time and over frequency.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples, form.window)[:: form.hop]
    columns = len(frames) // WINDOWS_PER_COLUMN
    power, channels = np.empty((form.image_size, columns)), np.empty((3, form.image_size, columns), np.float32)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        own = slice(start, min(start + COLUMNS_AT_ONCE, columns))
        power[:, own], channels[1, :, own], channels[2, :, own] = compute_block(frames, own.start, own.stop, form)
    silence = power.max() * 10 ** (-DYNAMIC_RANGE_DB / 10)
    darkest, brightest = form.db_range
    for row, level in zip(power, channels[0]):  # row by row, for an hour of audio fills gigabytes
        level_db = 10 * np.log10(np.maximum(row, silence))
        level[:] = np.clip((level_db - level_db.mean() - darkest) / (brightest - darkest), 0, 1)
    return channels


def compute_block(frames: np.ndarray, start: int, stop: int, form: Format) -> tuple[np.ndarray, ...]:
    """Compute power and both regularities of some columns, each of shape (rows, columns).

    Args:
        frames: all windows of the recording, not yet weighted, shape (windows, samples).
        start, stop: in columns.
    """
    first, last = WINDOWS_PER_COLUMN * start, WINDOWS_PER_COLUMN * stop
    left, right = max(first - 1, 0), min(last + 1, len(frames))  # the phase is compared with the windows beside
    windows = frames[left:right] * scipy.signal.get_window("hann", form.window)
    spectrum = scipy.fft.rfft(windows, form.fft_length).T.copy()
    turns = np.zeros((2, *spectrum.shape), complex)
    turns[0, :, 1:-1] = compare_phase(spectrum[:, :-2], spectrum[:, 1:-1], spectrum[:, 2:])
    turns[1, 1:-1] = compare_phase(spectrum[:-2], spectrum[1:-1], spectrum[2:])
    own = slice(first - left, last - left)
    power = sum_cells(np.square(spectrum[:, own].real) + np.square(spectrum[:, own].imag), form)
    return power, *(measure_regularity(turn[:, own], form) for turn in turns)


def compare_phase(before: np.ndarray, at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Compute how much the step of the phase changes from one neighbour to the next, weighing like power."""
    turn = after * before * np.square(at.conj())  # (after at*) (at before*)*
    turn /= np.sqrt(np.abs(turn)) + 1e-9
    return turn


def measure_regularity(turns: np.ndarray, form: Format) -> np.ndarray:
    """Measure how far the turns of a cell agree, their coherence, on a logarithmic scale: 0 to 1 for 0 to 99.9 %."""
    coherence = np.abs(sum_cells(turns, form)) / (sum_cells(np.abs(turns), form) + 1e-12)
    return np.clip(-np.log10(1.001 - np.minimum(coherence, 1)) / 3, 0, 1).astype(np.float32)


def sum_cells(values: np.ndarray, form: Format) -> np.ndarray:
    """Sum bins into rows by their weights, and average the windows of each column."""
    weights = weigh_bins(*form.frequency_range_hz, form.image_size, form.fft_length, form.sample_rate)
    rows = weights @ values
    return rows.reshape(len(rows), -1, WINDOWS_PER_COLUMN).mean(axis=2)


def draw_parts(samples: np.ndarray, starts: list[int], form: Format) -> list[np.ndarray]:
    """Draw pictures of a recording.

    Args:
        samples: float64, at least as long as one picture; starts: in columns, as `place_parts` returns them.

    Returns:
        uint8 arrays, shape (image_size, image_size, 3), RGB of `levels` values a channel, highest frequency on top.
    """
    channels, parts = compute_channels(samples, form), []
    for start in starts:
        steps = np.round(channels[:, ::-1, start : start + form.image_size] * (form.levels - 1))
        parts.append(np.round(steps * (255 / (form.levels - 1))).astype(np.uint8).transpose(1, 2, 0))
    return parts


def encode_png(part: np.ndarray, notes: dict) -> bytes:
    """Encode one picture as a PNG that carries notes: its settings, and how it was made."""
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, json.dumps(notes))
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, "PNG", pnginfo=info, compress_type=zlib.Z_HUFFMAN_ONLY)
    return buffer.getvalue()


def read_notes(path: Path) -> Optional[dict]:
    """Read what the maker stored in an image; None: it is not the maker's."""
    try:
        with Image.open(path) as image:
            notes = json.loads(image.text[TEXT_KEY])
        return notes if {"settings", "parts"} <= notes.keys() else None
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None
