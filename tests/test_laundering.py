"""Laundered copies: each kind is measured on what comes out."""

import json
import re

import laundering
import numpy as np
import pytest
import recordings
import resynthesis
from conftest import MAKER, assert_refused, run
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly, welch

RATE = 16000
SETTINGS = laundering.Laundering((5, 30), (0.2, 0.8), 0)
SEEDS = range(8)


def draw(seed, others=()):
    rng = np.random.default_rng(seed)
    return laundering.Draw(RATE, rng, SETTINGS, others, lambda path: recordings.read_audio(path, RATE)[0])


def make_voice(seed=0, seconds=2.0):
    """Bursts of noise with a voice-like slope: float64, peak 1."""
    draw = np.random.default_rng(seed)
    samples = np.convolve(draw.normal(size=int(seconds * RATE)), np.exp(-np.arange(40) / 8), mode="same")
    samples *= 0.1 + (np.sin(np.arange(len(samples)) / RATE * 2 * np.pi * 3) > 0)
    return samples / np.abs(samples).max()


def write_voices(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        wavfile.write(folder / f"{name}.wav", RATE, (make_voice(number) * 32000).astype(np.int16))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_has_the_ratio_that_is_noted(seed, tmp_path):
    voice, others = make_voice(), write_voices(tmp_path / "others", "abcdef")
    noisy, words = laundering.add_noise(voice, draw(seed, others))
    noted = float(re.search(r"SNR ([\d.]+) dB", words)[1])
    assert 10 * np.log10(np.mean(voice**2) / np.mean((noisy - voice) ** 2)) == pytest.approx(noted, abs=0.06)
    assert 5 <= noted <= 30


def test_noise_is_white_pink_or_babble(tmp_path):
    voice, others = make_voice(), write_voices(tmp_path / "others", "abcdef")
    slopes, kinds = {}, set()
    for seed in range(30):
        noisy, words = laundering.add_noise(voice, draw(seed, others))
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
    response, words = laundering.add_reverb(impulse, draw(seed))
    noted_s = float(re.search(r"RT60 ([\d.]+) s", words)[1])
    assert measure_rt60(response) == pytest.approx(noted_s, rel=0.1)
    assert 0.2 <= noted_s <= 0.8
    direct_db = 10 * np.log10(response[0] ** 2 / np.sum(response[1:] ** 2))
    assert direct_db == pytest.approx(float(re.search(r"direct sound (-?[\d.]+) dB", words)[1]), abs=0.06)


def measure_response_db(change, seed):
    """Power of white noise after a change over that before: frequencies in Hz, dB."""
    noise = np.random.default_rng(99).normal(size=20 * RATE)
    after, words = change(noise, draw(seed))
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


def snr_db(clean, changed):
    gain = np.dot(clean, changed) / np.dot(clean, clean)
    return 10 * np.log10(np.sum((gain * clean) ** 2) / np.sum((changed - gain * clean) ** 2))


def test_every_codec_is_drawn_and_keeps_length_time_and_voice():
    voice, seen = make_voice(), {}
    narrow = resample_poly(resample_poly(voice, 7000, RATE), RATE, 7000)
    for seed in range(60):
        coded, words = laundering.encode(voice, draw(seed))
        assert len(coded) == len(voice)
        lags = np.correlate(coded, narrow[1000:-1000], mode="valid")
        assert abs(np.argmax(lags) - 1000) <= 20, words
        seen[words.split()[0]] = lags.max() / np.linalg.norm(coded) / np.linalg.norm(narrow)
    assert set(seen) == set(laundering.CODECS)
    assert min(seen.values()) > 0.6


def test_gain_leaves_few_steps_and_clipping_cuts_the_peaks():
    voice = make_voice()
    for seed in SEEDS:
        quiet, words = laundering.lower_gain(voice, draw(seed))
        gain_db = float(re.search(r"(-[\d.]+) dB", words)[1])
        assert np.abs(quiet).max() == pytest.approx(32767 * 10 ** (gain_db / 20), rel=0.01, abs=1)
        clipped, words = laundering.clip(voice, draw(seed))
        assert np.abs(clipped).max() == pytest.approx(float(words.split()[2]), abs=0.006)


def test_script_makes_every_copy_the_same_in_each_run_and_class(tmp_path):
    conditions = ["clean", *laundering.LAUNDERING, "reverb+noise"]
    content = {}
    for name in ("one", "two"):
        for kind in ("original", "deepfake"):
            write_voices(tmp_path / name / "data/audio" / kind, ["a__x", "b"])
        outcome = run(tmp_path / name, MAKER, CONDITIONS=conditions)
        assert outcome.status == 0, outcome.err
        for kind in ("original", "deepfake"):
            folder = tmp_path / name / f"data/{kind}/combined"
            content[name, kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert content["one", "original"] == content["two", "original"] == content["one", "deepfake"]
    expected = {f"a__{name}-x.png" for name in conditions} | {f"b__{name}.png" for name in conditions}
    assert set(content["one", "original"]) == expected
    words = {}
    for name in expected:
        with Image.open(tmp_path / "one/data/original/combined" / name) as image:
            words[name] = json.loads(image.text["spectrogram"]).get("laundering")
    assert words["b__clean.png"] is None
    assert "RT60" in words["b__reverb+noise.png"] and "SNR" in words["b__reverb+noise.png"]
    assert len({content["one", "original"][f"b__{name}.png"] for name in conditions}) == len(conditions)


def test_clean_images_do_not_mind_the_settings_of_laundering(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["a"])
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    assert run(tmp_path, MAKER, CONDITIONS=("clean",), SEED=1).status == 0
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise"), SEED=1)
    assert_refused(outcome, "a__noise.png was made with SEED = 0, now it is 1")


def test_unknown_condition_is_refused(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["a"])
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise+echo"))
    assert_refused(outcome, "CONDITIONS = ('clean', 'noise+echo') (allowed: some of clean, noise, reverb")


def test_codec_copies_without_soundfile_are_left_out_and_said(tmp_path, monkeypatch):
    write_voices(tmp_path / "data/audio/original", ["a"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "codec"))
    assert outcome.status == 1
    assert "condition codec: codecs need soundfile: pip install soundfile" in outcome.err
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["a__clean.png"]


# ---- Resynthesis


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
    made, words = laundering.launder(voice, kind, draw(seed))
    assert (made.shape, np.abs(made).max()) == (voice.shape, 1)
    assert np.isfinite(made).all()
    assert words
    frames = np.sqrt((voice.reshape(-1, 800) ** 2).mean(1)), np.sqrt((made.reshape(-1, 800) ** 2).mean(1))
    assert np.corrcoef(*frames)[0, 1] > 0.8
    spectra = [measure_bands(samples).mean(0) for samples in (voice, made)]
    assert np.corrcoef(*spectra)[0, 1] > 0.85
    assert abs(np.corrcoef(voice, made)[0, 1]) < 0.9
    again, _ = laundering.launder(voice, kind, draw(seed))
    assert np.array_equal(made, again)


@pytest.mark.parametrize("kind", resynthesis.RESYNTHESES)
def test_resynthesis_keeps_the_level_of_the_background(kind):
    for floor_db in (-60, -35):
        voice = make_vowel(seconds=3.0)
        voice[16000:24000] = 0
        voice = voice / voice.std() + 10 ** (floor_db / 20) * np.random.default_rng(1).normal(size=len(voice))
        made, _ = laundering.launder(voice / np.abs(voice).max(), kind, draw(0))
        measured_db = 20 * np.log10(made[18000:22000].std() / made.std())
        assert abs(measured_db - floor_db) < 5


@pytest.mark.parametrize("kind", resynthesis.RESYNTHESES)
@pytest.mark.parametrize("length", [400, 1000, 5003])
def test_resynthesis_takes_short_and_silent_recordings(kind, length):
    for voice in (make_vowel()[:length], np.r_[np.zeros(length - 1), 1.0], np.ones(length)):
        made, _ = laundering.launder(voice, kind, draw(0))
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


def test_fakes_of_genuine_recordings_lie_in_the_other_class(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["one"])
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean",), FAKES=("lpc", "harmonic+codec"))
    assert outcome.status == 0, outcome.err
    names = sorted(path.name for path in (tmp_path / "data/deepfake/combined").iterdir())
    assert names == ["one__harmonic+codec.png", "one__lpc.png"]
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["one__clean.png"]


def test_recordings_whose_parts_would_share_a_name_are_refused(tmp_path):
    write_voices(tmp_path / "data/audio/original", ["talk__anna", "talk__anna_1"])
    assert_refused(run(tmp_path, MAKER), "talk__anna.wav and ", "talk__anna_1.wav", "have the same name")
