"""A recording: mono samples out of any audio file, read, mixed and resampled block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Callable, Optional

import numpy as np
import scipy  # its parts load when they are first used
from containers import BLOCK, check_soundfile, open_pieces, open_sound

AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd"),
    *(".caf", ".w64", ".rf64"),
)
FOREIGN_SUFFIXES = (  # audio that cannot be read here
    *(".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp", ".mka", ".mkv", ".mov", ".ac3", ".ra"),
)
SILENCE = 2.5 / 32768  # peak, of full scale: digital silence, or the dither of 16 bits
KEPT = 2**24  # values of a decoded file that are kept for the next pass; longer files are decoded for each
VOICE_WINDOW_S = 0.064
VOICES_ALIKE = 0.55  # how alike the spectra of two channels are at least when both hold the same voices
STEADY = 0.88  # of the mean level, the median: hiss and hum have more, speech and its pauses less


def is_audio(path: str) -> bool:
    """Tell by a file's content whether it is audio that can be read."""
    if check_soundfile():
        return False
    try:
        with open_sound(path) as sound:
            return sound.frames > 0
    except (ValueError, OSError):
        return False


class Decoded:
    """The samples of a file as blocks, as often as they are asked for; those of short files are kept."""

    def __init__(self, path: str) -> None:
        self.pieces = open_pieces(path)
        self.rate, self.channels = self.pieces[0].rate, self.pieces[0].channels
        self.kept: Optional[list[np.ndarray]] = []

    def read(self) -> Iterator[np.ndarray]:
        """Yield float64 blocks, shape (samples, channels), full scale 1."""
        if self.kept:
            yield from self.kept
            return
        kept, size = [], 0
        for block in chain.from_iterable(piece.decode() for piece in self.pieces):
            if not np.isfinite(block).all():
                raise ValueError("it holds samples that are not finite")
            size += block.size
            kept = [*kept, block] if size <= KEPT else []
            yield block
        self.kept = kept


def open_decoded(path: str) -> Decoded:
    """Open a file; the last one is kept, so that looking for voices and reading it decode a short file once."""
    return keep_decoded(path, os.stat(path).st_mtime_ns)


@lru_cache(1)
def keep_decoded(path: str, changed_ns: int) -> Decoded:
    """Open a file anew only where it is another, or was changed."""
    return Decoded(path)


class Stream:
    """Samples taken in any number out of blocks of any size."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self.blocks, self.rest = iter(blocks), np.empty(0)

    def take(self, count: int) -> np.ndarray:
        """Take the next samples, fewer only at the end."""
        parts, size = [self.rest], len(self.rest)
        while size < count and (block := next(self.blocks, None)) is not None:
            parts.append(block)
            size += len(block)
        whole = np.concatenate(parts)
        self.rest = whole[count:]
        return whole[:count]


def read_audio(path: str, sample_rate: int, channel: Optional[int] = None) -> tuple[np.ndarray, float]:
    """Read one recording as mono samples at `sample_rate`, its mean removed.

    Args:
        channel: the only one to read; None: all are mixed.

    Returns:
        float64, shape (samples,), with a peak of 1 before resampling; the peak that it had, 1 being full scale.

    Raises:
        ValueError: the file holds no sound, cannot be decoded, or holds more or less than its header promises.
    """
    decoded = open_decoded(path)
    count, covariance = measure_channels(decoded.read())
    chosen = choose_channels(covariance) if channel is None else [channel]

    def mix(mean: float) -> Stream:
        return Stream(block[:, chosen].mean(axis=1) - mean for block in decoded.read())

    total, lowest, highest = measure_samples(mix(0.0).take, count)
    mean = total / count
    peak = max(abs(lowest - mean), abs(highest - mean))
    if peak <= SILENCE:
        raise ValueError("it holds nothing but silence")
    samples = resample(mix(mean), count, decoded.rate, sample_rate)
    samples /= peak
    return samples, peak


def measure_channels(blocks: Iterable[np.ndarray]) -> tuple[int, np.ndarray]:
    """Count the samples of a channel and compute the covariance of all channels, shape (channels, channels)."""
    count, shift, total, products = 0, None, 0.0, 0.0
    for block in blocks:
        shift = block.mean(axis=0) if shift is None else shift
        count, centred = count + len(block), block - shift
        total, products = total + centred.sum(axis=0), products + centred.T @ centred
    if not count:
        raise ValueError("it holds no samples (or its header promises none)")
    return count, products / count - np.outer(total, total) / count**2


def choose_channels(covariance: np.ndarray) -> np.ndarray:
    """Choose the channels to average: all that are not silent, or the loudest where they cancel each other."""
    power = np.diag(covariance)
    audible = np.flatnonzero(power >= power.max() / 1e4)
    is_cancelled = covariance[np.ix_(audible, audible)].mean() < power.max() / 10
    return audible[[power[audible].argmax()]] if is_cancelled else audible


def measure_samples(take: Callable[[int], np.ndarray], count: int) -> tuple[float, float, float]:
    """Measure sum, lowest and highest of samples; halved as numpy halves, the sum is the same in blocks of any size."""
    if count <= BLOCK:
        samples = take(count)
        return samples.sum(), samples.min(), samples.max()
    half = count // 2 - count // 2 % 8
    first, second = measure_samples(take, half), measure_samples(take, count - half)
    return first[0] + second[0], min(first[1], second[1]), max(first[2], second[2])


def resample(stream: Stream, count: int, rate: int, sample_rate: int) -> np.ndarray:
    """Resample `count` samples in blocks that overlap by more than the filter's length."""
    up, down = sample_rate // math.gcd(rate, sample_rate), rate // math.gcd(rate, sample_rate)
    margin, step = 12 * down, max(BLOCK // down, 12) * down
    out = np.empty(-(-count * up // down))
    before, window = 0, stream.take(step + margin)  # samples of the window before those that are due now
    for start in range(0, count, step):
        due = out[start * up // down :][: step // down * up]
        due[:] = scipy.signal.resample_poly(window, up, down)[before // down * up :][: len(due)]
        window = np.concatenate([window[before + step - margin :], stream.take(step)])
        before = margin
    return out


def find_voices(path: str) -> list[Optional[int]]:
    """Find the channels that hold different voices, as those of a call do, one person on each.

    What counts is how alike their spectra are in each moment: the cosine between magnitudes, over all windows and
    frequencies. It does not mind levels, polarity, echoes or some ms between two microphones.

    Returns:
        What to pass to `read_audio` as channel for each voice; [None] where the channels belong together.
    """
    decoded = open_decoded(path)
    if decoded.channels == 1:
        return [None]
    length, products, levels = round(VOICE_WINDOW_S * decoded.rate), 0.0, []
    window = scipy.signal.get_window("hann", length)[:, None]
    for block in decoded.read():
        windows = block[: len(block) // length * length].reshape(-1, length, decoded.channels) * window
        spectra = np.abs(scipy.fft.rfft(windows, axis=1))[:, 1:]
        products = products + np.einsum("wfc,wfd->cd", spectra, spectra)
        levels.append(np.square(spectra).sum(axis=1))
    power, levels = np.diag(products), np.concatenate(levels or [[]])
    if not len(levels):
        return [None]
    is_voice = (power > power.max() / 1e3) & (np.median(levels, axis=0) < STEADY * levels.mean(axis=0))
    voices = np.flatnonzero(is_voice)
    alike = products / np.sqrt(np.outer(power, power) + 1e-30) - np.eye(len(power))
    differ = len(voices) > 1 and alike[np.ix_(voices, voices)].max() < VOICES_ALIKE
    return voices.tolist() if differ else [None]
