"""Laundered copies: each kind is measured on what comes out."""

import re

import laundering
import numpy as np
import pytest
from conftest import RATE, make_draw, make_voice, write_voices
from scipy.signal import resample_poly, welch

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_has_the_ratio_that_is_noted(seed, tmp_path):
    voice, others = make_voice(), write_voices(tmp_path / "others", "abcdef")
    noisy, words = laundering.add_noise(voice, make_draw(seed, others))
    noted = float(re.search(r"SNR ([\d.]+) dB", words)[1])
    assert 10 * np.log10(np.mean(voice**2) / np.mean((noisy - voice) ** 2)) == pytest.approx(noted, abs=0.06)
    assert 5 <= noted <= 30


def test_noise_is_white_pink_or_babble(tmp_path):
    voice, others = make_voice(), write_voices(tmp_path / "others", "abcdef")
    slopes, kinds = {}, set()
    for seed in range(30):
        noisy, words = laundering.add_noise(voice, make_draw(seed, others))
        kinds.add(words.split()[0])
        frequency, power = welch(noisy - voice, RATE, nperseg=512)
        part = (frequency > 100) & (frequency < 7000)
        slopes[words.split()[0]] = np.polyfit(np.log2(frequency[part]), 10 * np.log10(power[part]), 1)[0]
    assert kinds == {"white", "pink", "babble"}
    assert slopes["white"] == pytest.approx(0, abs=0.5)  # dB an octave
    assert slopes["pink"] == pytest.approx(-3, abs=0.5)


def measure_rt60(response):
    """By Schroeder's backward integration, from 5 to 25 dB below the start of the tail."""
    energy = np.cumsum(response[::-1] ** 2)[::-1]
    level_db = 10 * np.log10(energy / energy[1] + 1e-12)
    time_s = np.arange(len(response)) / RATE
    part = (level_db < -5) & (level_db > -25)
    return -60 / np.polyfit(time_s[part], level_db[part], 1)[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_reverberation_falls_in_the_time_that_is_noted(seed):
    impulse = np.zeros(2 * RATE)
    impulse[0] = 1
    response, words = laundering.add_reverb(impulse, make_draw(seed))
    noted_s = float(re.search(r"RT60 ([\d.]+) s", words)[1])
    assert measure_rt60(response) == pytest.approx(noted_s, rel=0.1)
    assert 0.2 <= noted_s <= 0.8
    direct_db = 10 * np.log10(response[0] ** 2 / np.sum(response[1:] ** 2))
    assert direct_db == pytest.approx(float(re.search(r"direct sound (-?[\d.]+) dB", words)[1]), abs=0.06)


def measure_response_db(change, seed):
    """Power of white noise after a change over that before: frequencies in Hz, dB."""
    noise = np.random.default_rng(99).normal(size=20 * RATE)
    after, words = change(noise, make_draw(seed))
    assert len(after) == len(noise)
    frequency, before = welch(noise, RATE, nperseg=2048)
    return frequency, 10 * np.log10(welch(after, RATE, nperseg=2048)[1] / before + 1e-12), words


@pytest.mark.parametrize("seed", SEEDS)
def test_band_ends_where_it_is_noted(seed):
    frequency, response_db, words = measure_response_db(laundering.limit_band, seed)
    low, high = map(int, re.findall(r"\d+", words))
    passed = frequency[response_db > -6]
    assert abs(passed[0] - low) < 20 and abs(passed[-1] - high) < 40
    assert response_db[(frequency > 1.3 * high)].max() < -30


@pytest.mark.parametrize("seed", SEEDS)
def test_resampling_cuts_at_half_the_lower_rate(seed):
    frequency, response_db, words = measure_response_db(laundering.resample, seed)
    lower = int(re.search(r"(\d+) Hz", words)[1])
    assert response_db[frequency > 0.62 * lower].max() < -35
    assert np.abs(response_db[(frequency > 50) & (frequency < 0.4 * lower)]).max() < 1


def test_every_codec_is_drawn_and_keeps_length_time_and_voice():
    voice, seen = make_voice(), {}
    narrow = resample_poly(resample_poly(voice, 7000, RATE), RATE, 7000)
    for seed in range(60):
        coded, words = laundering.encode(voice, make_draw(seed))
        assert len(coded) == len(voice)
        lags = np.correlate(coded, narrow[1000:-1000], mode="valid")
        assert abs(np.argmax(lags) - 1000) <= 20, words
        seen[words.split()[0]] = lags.max() / np.linalg.norm(coded) / np.linalg.norm(narrow)
    assert set(seen) == set(laundering.CODECS)
    assert min(seen.values()) > 0.6


def test_gain_leaves_few_steps_and_clipping_cuts_the_peaks():
    voice = make_voice()
    for seed in SEEDS:
        quiet, words = laundering.lower_gain(voice, make_draw(seed))
        gain_db = float(re.search(r"(-[\d.]+) dB", words)[1])
        assert np.abs(quiet).max() == pytest.approx(32767 * 10 ** (gain_db / 20), rel=0.01, abs=1)
        clipped, words = laundering.clip(voice, make_draw(seed))
        assert np.abs(clipped).max() == pytest.approx(float(words.split()[2]), abs=0.006)
