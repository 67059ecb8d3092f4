"""Resyntheses keep voice, words and background, but not the samples."""

import laundering
import numpy as np
import pytest
import resynthesis
from conftest import RATE, make_draw
from scipy.signal import welch


def make_vowel(seed=0, seconds=1.5):
    """A voice with falling pitch, two formants and pauses: float64, peak 1."""
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.cos(2 * np.pi * time)) / RATE
    samples = np.zeros(len(time))
    for harmonic in range(1, 25):
        frequency = 140 * harmonic
        level = np.exp(-(((frequency - 600) / 300) ** 2)) + 0.5 * np.exp(-(((frequency - 1800) / 400) ** 2)) + 0.02
        samples += level * np.cos(harmonic * phase + draw.uniform(0, 6))
    samples *= np.sin(2 * np.pi * 1.7 * time) > -0.5
    samples += 0.003 * draw.normal(size=len(time)) * samples.std()
    return samples / np.abs(samples).max()


def measure_bands(samples):
    """Levels in dB of twelve bands up to 3.6 kHz over time, silence left out."""
    _, power = welch(samples.reshape(-1, 800), RATE, nperseg=512)
    bands = power[:, 2:122].reshape(len(power), 12, 10).sum(2)
    return 10 * np.log10(bands[bands.sum(1) > bands.sum(1).max() / 100] + 1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", resynthesis.RESYNTHESES)
def test_resynthesis_keeps_the_sound_but_not_the_samples(kind, seed):
    voice = make_vowel(seed)
    made, words = laundering.launder(voice, kind, make_draw(seed))
    assert (made.shape, np.abs(made).max()) == (voice.shape, 1)
    assert np.isfinite(made).all()
    assert words
    frames = np.sqrt((voice.reshape(-1, 800) ** 2).mean(1)), np.sqrt((made.reshape(-1, 800) ** 2).mean(1))
    assert np.corrcoef(*frames)[0, 1] > 0.8
    spectra = [measure_bands(samples).mean(0) for samples in (voice, made)]
    assert np.corrcoef(*spectra)[0, 1] > 0.85
    assert abs(np.corrcoef(voice, made)[0, 1]) < 0.9
    again, _ = laundering.launder(voice, kind, make_draw(seed))
    assert np.array_equal(made, again)


@pytest.mark.parametrize("kind", resynthesis.RESYNTHESES)
def test_resynthesis_keeps_the_level_of_the_background(kind):
    for floor_db in (-60, -35):
        voice = make_vowel(seconds=3.0)
        voice[16000:24000] = 0
        voice = voice / voice.std() + 10 ** (floor_db / 20) * np.random.default_rng(1).normal(size=len(voice))
        made, _ = laundering.launder(voice / np.abs(voice).max(), kind, make_draw(0))
        measured_db = 20 * np.log10(made[18000:22000].std() / made.std())
        assert abs(measured_db - floor_db) < 5


@pytest.mark.parametrize("kind", resynthesis.RESYNTHESES)
@pytest.mark.parametrize("length", [400, 1000, 5003])
def test_resynthesis_takes_short_and_silent_recordings(kind, length):
    for voice in (make_vowel()[:length], np.r_[np.zeros(length - 1), 1.0], np.ones(length)):
        made, _ = laundering.launder(voice, kind, make_draw(0))
        assert made.shape == (length,)
        assert np.isfinite(made).all()


@pytest.mark.parametrize("frequency", [90, 150, 280])
def test_pitch_is_tracked(frequency):
    time = np.arange(RATE) / RATE
    samples = sum(np.cos(2 * np.pi * frequency * k * time) / k for k in range(1, 10))
    pitch, periodic = resynthesis.track_pitch(samples, RATE, 160)
    assert np.median(pitch) == pytest.approx(frequency, rel=0.02)
    assert np.median(periodic) > 0.9
    _, periodic = resynthesis.track_pitch(np.random.default_rng(0).normal(size=RATE), RATE, 160)
    assert np.median(periodic) < 0.5
