"""Pictures of recordings: what each channel shows, a fixed scale in time, nothing of length or channel."""

import json
import zlib

import numpy as np
import pictures
import pytest
from conftest import CLEAN, FORMAT, MAKER, cut, find_row, make_tone, make_voice, run, write_wav
from PIL import Image

RED, GREEN, BLUE = range(3)


def draw_one(samples):
    """The picture of a recording that fills one: float64, shape (112, 112, 3)."""
    (part,) = cut(samples / np.abs(samples).max())
    return part.astype(float)


def make_partials():
    """Steady partials, one for each 150 Hz."""
    time = np.arange(FORMAT.duration) / FORMAT.sample_rate
    return sum(np.cos(2 * np.pi * hz * time + hz) for hz in range(150, 7900, 150))


def make_noise():
    return np.random.default_rng(0).normal(size=FORMAT.duration)


def make_clicks():
    """A click in each window."""
    return (np.arange(FORMAT.duration) % FORMAT.window == 100).astype(float)


def test_steady_partials_are_bright_in_green_and_clicks_in_blue():
    noise, partials, clicks = (draw_one(make()) for make in (make_noise, make_partials, make_clicks))
    assert partials[..., GREEN].mean() - noise[..., GREEN].mean() > 60
    assert clicks[..., BLUE].mean() - noise[..., BLUE].mean() > 60


def test_channels_follow_their_formulas():
    """A plain version of the formulas in data/README.md, cell by cell."""
    samples = make_voice(1, 2.0)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    windows = (len(samples) - 512) // 128 + 1
    spectrum = np.array([np.fft.rfft(samples[128 * t : 128 * t + 512] * window, 1024) for t in range(windows)]).T
    rows = np.linspace(60, 7900, 112) * 1024 / 16000
    reach = rows[1] - rows[0]
    found = pictures.compute_channels(samples, FORMAT)
    for row, column in ((3, 10), (40, 50), (80, 31), (111, 60)):
        weights = np.maximum(0, 1 - np.abs(np.arange(513) - rows[row]) / reach)
        weights /= weights.sum()
        turns = np.zeros((2, 513, windows), complex)
        for t in (2 * column, 2 * column + 1):
            for k in np.flatnonzero(weights):
                steps = [spectrum[k, t + 1] * spectrum[k, t].conj(), spectrum[k, t] * spectrum[k, t - 1].conj()]
                turns[0, k, t] = steps[0] * steps[1].conj()
                if 0 < k < 512:
                    steps = [spectrum[k + 1, t] * spectrum[k, t].conj(), spectrum[k, t] * spectrum[k - 1, t].conj()]
                    turns[1, k, t] = steps[0] * steps[1].conj()
        turns /= np.sqrt(np.abs(turns)) + 1e-9
        for channel, turn in zip((GREEN, BLUE), turns):
            coherence = np.abs((weights @ turn).sum()) / (weights @ np.abs(turn)).sum()
            assert found[channel, row, column] == pytest.approx(
                np.clip(-np.log10(1.001 - coherence) / 3, 0, 1), abs=1e-4
            )
    power = np.array([(np.abs(spectrum[:, 2 * c : 2 * c + 2]) ** 2).sum(1) for c in range(windows // 2)]).T
    weights = np.maximum(0, 1 - np.abs(np.arange(513) - rows[40]) / reach)
    level = 10 * np.log10(weights @ power)
    assert np.allclose(found[RED, 40], np.clip((level - level.mean() + 30) / 70, 0, 1), atol=1e-4)


def test_tone_between_two_rows_is_seen_like_one_in_a_row():
    rows = np.linspace(60, 7900, 112)
    brightest = []
    for frequency in (rows[100], (rows[100] + rows[101]) / 2):
        (part,) = cut(make_tone(frequency, 1.9))
        brightest.append(part[:20, :, RED].max())
    assert brightest[1] >= brightest[0] - 29.0  # of 255; 8 dB


def test_images_are_rgb_pngs_that_carry_their_settings(tmp_path):
    write_wav(tmp_path / "data/audio/original/voice1.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 0, outcome.err
    (path,) = (tmp_path / "data/original/combined").iterdir()
    assert path.name == "voice1__clean.png"
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("RGB", (112, 112))
        stored = json.loads(image.text["spectrogram"])
        assert max(len(np.unique(channel)) for channel in np.moveaxis(np.asarray(image), 2, 0)) <= FORMAT.levels
    checksum = zlib.crc32((tmp_path / "data/audio/original/voice1.wav").read_bytes())
    settings = json.loads(json.dumps(FORMAT._asdict()))
    about = {"parts": 1, "recording_crc32": checksum, "start_s": 0, "seconds": 1.816}
    about |= {"audio": "audio", "recording": "voice1.wav"}
    assert stored == {"settings": settings, **about}


@pytest.mark.parametrize("frequency", [500, 2000, 6000])
def test_tone_appears_in_its_row_and_at_its_time(frequency):
    (part,) = cut(make_tone(frequency, 1.9))
    expected = find_row(frequency)
    assert abs(part[:, :25, RED].astype(int).sum(axis=1).argmax() - expected) <= 1
    on = part[int(round(expected)), :, RED].astype(int)
    edge = np.abs(np.diff(on)).argmax()
    assert min(abs((edge + 1) * 0.016 - time) for time in (0.5, 1.0, 1.5)) < 0.04


def test_seconds_per_pixel_do_not_depend_on_length():
    parts = [cut(make_tone(1000, seconds))[0] for seconds in (1.9, 3.0, 6.0)]
    row = round(find_row(1000))
    edges = [int(np.flatnonzero(np.diff((part[row, :, RED] > 160).astype(int)) < 0)[0]) for part in parts]
    assert max(edges) - min(edges) <= 1


@pytest.mark.parametrize(("seconds", "count"), [(0.3, 1), (1.9, 1), (2.2, 1), (3.0, 2), (6.0, 4)])
def test_long_recordings_make_several_images_short_ones_one(seconds, count):
    parts = cut(make_tone(1000, seconds, gap=0.1))
    assert len(parts) == count
    assert {part.shape for part in parts} == {(112, 112, 3)}


def test_short_recordings_are_filled_with_themselves():
    """Half as long a recording must look alike: no dark or flat stretch tells its length."""
    noise = np.random.default_rng(1).normal(size=16000)
    short, full = (cut(np.resize(noise[:length], length))[0] for length in (8000, 16000))
    levels = [part[..., RED].astype(float).mean(axis=0) for part in (short, full)]
    assert abs(levels[0].mean() - levels[1].mean()) < 4
    assert levels[0].std() < 2 * levels[1].std()


def test_a_channel_that_colours_the_sound_leaves_the_picture_alike():
    voice = make_tone(1000, 1.9) + 0.3 * np.random.default_rng(2).normal(size=int(1.9 * 16000))
    plain, changed = (draw_one(samples) for samples in (voice, np.convolve(voice, [1, 0.6], mode="same")))
    assert np.abs(plain - changed).mean((0, 1)).max() < 6  # of 255


@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_blocks_of_any_size_give_the_same_picture(monkeypatch, columns):
    samples = make_tone(1000, 4.0)
    whole = cut(samples)
    monkeypatch.setattr(pictures, "COLUMNS_AT_ONCE", columns)
    assert np.array_equal(cut(samples), whole)
