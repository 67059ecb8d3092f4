"""Laundering: recordings are altered as speech is on its way to a listener, or to hide that it is fake.

Each function takes samples (float64, shape (samples,), peak 1) and the draw that they are made with, and returns as
many samples with words for what was done.
"""

from __future__ import annotations

import io
from typing import Callable, NamedTuple

import numpy as np
import scipy  # its parts load when they are first used
from resynthesis import RESYNTHESES

CODECS = {  # soundfile's (format, subtype)
    "mu-law": ("WAV", "ULAW"),
    "A-law": ("WAV", "ALAW"),
    "ADPCM": ("WAV", "IMA_ADPCM"),
    "GSM": ("WAV", "GSM610"),
    "Vorbis": ("OGG", "VORBIS"),
    "Opus": ("OGG", "OPUS"),
    "MP3": ("MP3", "MPEG_LAYER_III"),
}


class Laundering(NamedTuple):
    """The settings that shape laundered copies, under the names by which they are stored in images; see the maker."""

    snr_range_db: tuple[float, float]
    rt60_range_s: tuple[float, float]
    seed: int


class Draw(NamedTuple):
    """What a laundering depends on."""

    rate: int  # Hz
    rng: np.random.Generator
    settings: Laundering
    others: list[str]  # recordings that babble may be made of
    read: Callable[[str], np.ndarray]  # reads one of them


def add_noise(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Add white noise, pink noise or the babble of four other recordings, at an SNR in SNR_RANGE_DB."""
    rng, others = draw.rng, draw.others
    kind = rng.choice(["white", "pink", "babble"] if len(others) >= 4 else ["white", "pink"])
    if kind == "babble":
        noise = np.zeros(len(samples))
        for number in rng.choice(len(others), 4, replace=False):
            voice = draw.read(others[number])
            noise += np.resize(np.roll(voice, rng.integers(len(voice))), len(samples)) / voice.std()
    else:
        spectrum = np.fft.rfft(rng.normal(size=len(samples)))
        slope = np.sqrt(np.maximum(np.arange(len(spectrum)), 1)) if kind == "pink" else 1
        noise = np.fft.irfft(spectrum / slope, len(samples))
    snr_db = rng.uniform(*draw.settings.snr_range_db)
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return samples + noise, f"{kind} noise, SNR {snr_db:.1f} dB"


def add_reverb(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Convolve with a synthetic room response: the direct sound, then noise that falls by 60 dB in RT60_RANGE_S."""
    rt60_s, direct_db = draw.rng.uniform(*draw.settings.rt60_range_s), draw.rng.uniform(-3, 6)
    time_s = np.arange(int(rt60_s * draw.rate)) / draw.rate
    response = draw.rng.normal(size=len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    response[0] = np.sqrt(np.sum(response[1:] ** 2)) * 10 ** (direct_db / 20)
    words = f"reverberation, RT60 {rt60_s:.2f} s, direct sound {direct_db:.1f} dB"
    return scipy.signal.fftconvolve(samples, response)[: len(samples)], words


def resample(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Resample to a lower rate and back."""
    lower = int(draw.rate * draw.rng.choice([0.3, 0.375, 0.5, 0.6875]))
    narrow = scipy.signal.resample_poly(samples, lower, draw.rate)
    there_and_back = scipy.signal.resample_poly(narrow, draw.rate, lower)
    return np.resize(there_and_back, len(samples)), f"resampled to {lower} Hz and back"


def limit_band(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Keep a band: Butterworth, order 8, forwards and backwards."""
    low, high = draw.rng.uniform(100, 400), draw.rng.uniform(0.125, 0.22) * draw.rate
    sections = scipy.signal.butter(8, (low, high), "bandpass", fs=draw.rate, output="sos")
    filtered = scipy.signal.sosfiltfilt(sections, samples)
    return filtered, f"band {low:.0f} to {high:.0f} Hz"


def lower_gain(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Lower the level before rounding to 16 bits."""
    gain_db = draw.rng.uniform(-70, -40)
    return np.round(samples * 10 ** (gain_db / 20) * 32767), f"16 bits at {gain_db:.1f} dB"


def clip(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Clip the peaks."""
    level = draw.rng.uniform(0.1, 0.5)
    return np.clip(samples, -level, level), f"clipped at {level:.2f} of the peak"


def encode(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Encode and decode with a codec of CODECS; telephone codecs at 8 kHz."""
    import soundfile

    usable = [name for name, (container, kind) in CODECS.items() if kind in soundfile.available_subtypes(container)]
    name = str(draw.rng.choice(usable))
    code_rate = 16000 if name in ("Vorbis", "Opus", "MP3") else 8000
    coded = scipy.signal.resample_poly(samples, code_rate, draw.rate) * 0.9
    buffer, (container, kind) = io.BytesIO(), CODECS[name]
    quality = {} if container == "WAV" else {"compression_level": draw.rng.uniform(0.5, 1)}
    soundfile.write(buffer, coded, code_rate, kind, format=container, **quality)
    buffer.seek(0)
    coded, _ = soundfile.read(buffer)
    return np.resize(scipy.signal.resample_poly(coded, draw.rate, code_rate), len(samples)), f"{name} at {code_rate} Hz"


ANY = ("noise", "reverb", "resample", "codec", "bandlimit")


def launder_anyhow(samples: np.ndarray, draw: Draw) -> tuple[np.ndarray, str]:
    """Launder in one of the ways of ANY, drawn for each recording."""
    return LAUNDERING[str(draw.rng.choice(ANY))](samples, draw)


LAUNDERING = {
    "any": launder_anyhow,
    "noise": add_noise,
    "reverb": add_reverb,
    "resample": resample,
    "codec": encode,
    "bandlimit": limit_band,
    "gain": lower_gain,
    "clip": clip,
}


def launder(samples: np.ndarray, condition: str, draw: Draw) -> tuple[np.ndarray, str]:
    """Launder or resynthesise a recording as a condition says; its peak becomes 1."""
    words = []
    for step in condition.split("+"):
        if step == "clean":
            continue
        length = len(samples)
        if step in RESYNTHESES:  # their windows are longer than the shortest recordings
            samples, done = RESYNTHESES[step](np.resize(samples, max(length, 2048)), draw.rate, draw.rng)
        else:
            samples, done = LAUNDERING[step](samples, draw)
        samples = samples[:length] / np.abs(samples[:length]).max()
        words.append(done)
    return samples, "; ".join(words)
