"""A recording: mono samples out of any audio file."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import scipy  # its parts load when they are first used

AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd"),
    *(".caf", ".w64", ".rf64"),
)
FOREIGN_SUFFIXES = (  # audio that cannot be read here
    *(".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp", ".mka", ".mkv", ".mov", ".ac3", ".ra"),
)
SILENCE = 2.5 / 32768  # peak, of full scale: digital silence, or the dither of 16 bits


def has_soundfile() -> bool:
    """Tell whether the package soundfile is installed, which reads more than plain WAV."""
    return importlib.util.find_spec("soundfile") is not None


def is_audio(path: str) -> bool:
    """Tell by a file's content whether it is audio that can be read."""
    if not has_soundfile():
        return False
    import soundfile

    try:
        return soundfile.info(os.fsencode(path)).frames > 0
    except (soundfile.LibsndfileError, OSError):
        return False


def count_voices(path: str) -> int:
    return 1


def read_audio(path: str, sample_rate: int, channel: int = 0) -> tuple[np.ndarray, float]:
    """Read one recording as mono samples at `sample_rate`, its mean removed.

    Returns:
        float64, shape (samples,), with a peak of 1 before resampling; the peak that it had, 1 being full scale.

    Raises:
        ValueError: the file holds no sound, or cannot be decoded.
    """
    samples, file_rate = decode_audio(path)
    if file_rate <= 0:
        raise ValueError("its header gives a sample rate of 0")
    if not len(samples):
        raise ValueError("it holds no samples (or its header promises none)")
    if not np.isfinite(samples).all():
        raise ValueError("it holds samples that are not finite")
    mono = mix_channels(samples)
    mono -= mono.mean()
    peak = np.abs(mono).max()
    if peak <= SILENCE:
        raise ValueError("it holds nothing but silence")
    if file_rate != sample_rate:
        mono = scipy.signal.resample_poly(mono, sample_rate, file_rate)
    return mono / peak, peak


def decode_audio(path: str) -> tuple[np.ndarray, int]:
    """Decode a file by its content: float64, shape (samples, channels), full scale 1; Hz."""
    if has_soundfile():
        import soundfile

        try:
            return soundfile.read(os.fsencode(path), always_2d=True)
        except soundfile.LibsndfileError as error:
            if "SF_INFO" in str(error):
                raise ValueError("its header is invalid (a sample rate of 0?)") from None
            raise ValueError(f"it cannot be decoded ({error.error_string.rstrip('.')})") from None
    with open(path, "rb") as file:
        if file.read(4) not in (b"RIFF", b"RIFX"):
            raise ValueError("it needs the package soundfile")
    try:
        rate, samples = scipy.io.wavfile.read(path)
    except Exception as error:  # scipy raises many kinds on damaged or compressed files
        raise ValueError(f"scipy cannot decode it ({error}); the package soundfile may") from None
    samples = samples.reshape(len(samples), -1)
    if samples.dtype == np.uint8:
        return (samples - 128.0) / 128, rate
    return samples / (1.0 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)), rate


def mix_channels(samples: np.ndarray) -> np.ndarray:
    """Mix channels, shape (samples, channels), to mono: their mean, or the loudest where they cancel each other."""
    power = np.mean(np.square(samples - samples.mean(axis=0)), axis=0)
    mono = samples[:, power >= power.max() / 1e4].mean(axis=1)
    return samples[:, power.argmax()].copy() if np.var(mono) < power.max() / 10 else mono
