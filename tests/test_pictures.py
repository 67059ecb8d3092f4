"""Pictures of recordings: one format, a fixed scale in time, nothing of length or channel shows."""

import json
import zlib

import numpy as np
import pictures
import pytest
import resynthesis
from conftest import CLEAN, FORMAT, MAKER, cut, find_row, make_tone, run, write_wav
from PIL import Image


def test_tone_between_two_rows_is_seen_like_one_in_a_row():
    rows = resynthesis.space_frequencies(60, 7900, 224, "linear")
    brightest = []
    for frequency in (rows[210], (rows[210] + rows[211]) / 2):
        (part,) = cut(make_tone(frequency, 1.9))
        brightest.append(part[:30].max())
    assert brightest[1] >= brightest[0] - 7  # of 63 levels; 7 are 8 dB


def test_images_are_palette_pngs_that_carry_their_settings(tmp_path):
    write_wav(tmp_path / "data/audio/original/voice1.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 0, outcome.err
    (path,) = (tmp_path / "data/original/combined").iterdir()
    assert path.name == "voice1__clean.png"
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (224, 224))
        stored = json.loads(image.text["spectrogram"])
    checksum = zlib.crc32((tmp_path / "data/audio/original/voice1.wav").read_bytes())
    assert stored == {"settings": FORMAT._asdict(), "parts": 1, "recording_crc32": checksum, "start_s": 0}


@pytest.mark.parametrize("scale", ["mel", "linear"])
@pytest.mark.parametrize("frequency", [500, 2000, 6000])
def test_tone_appears_in_its_row_and_at_its_time(frequency, scale):
    (part,) = cut(make_tone(frequency, 1.9), FORMAT._replace(frequency_scale=scale))
    expected = find_row(frequency, scale)
    assert abs(part[:, :50].astype(int).sum(axis=1).argmax() - expected) <= 2
    on = part[int(round(expected))].astype(int)
    edge = np.abs(np.diff(on)).argmax()
    assert min(abs((edge + 1) * 0.008 - time) for time in (0.5, 1.0, 1.5)) < 0.03


def test_seconds_per_pixel_do_not_depend_on_length():
    parts = [cut(make_tone(1000, seconds))[0] for seconds in (1.9, 3.0, 6.0)]
    row = int(223 * (1 - (1000 - 60) / (7900 - 60)))
    edges = [int(np.flatnonzero(np.diff((part[row] > 40).astype(int)) < 0)[0]) for part in parts]
    assert max(edges) - min(edges) <= 1


@pytest.mark.parametrize(("seconds", "count"), [(0.3, 1), (1.9, 1), (2.2, 1), (3.0, 2), (6.0, 4)])
def test_long_recordings_make_several_images_short_ones_one(seconds, count):
    parts = cut(make_tone(1000, seconds, gap=0.1))
    assert len(parts) == count
    assert {part.shape for part in parts} == {(224, 224)}


def test_short_recordings_are_filled_with_themselves():
    """Half as long a recording must look alike: no dark or flat stretch tells its length."""
    noise = np.random.default_rng(1).normal(size=16000)
    short, full = (cut(np.resize(noise[:length], length))[0] for length in (8000, 16000))
    levels = [part.astype(float).mean(axis=0) for part in (short, full)]
    assert abs(levels[0].mean() - levels[1].mean()) < 1
    assert levels[0].std() < 2 * levels[1].std()


def test_a_channel_that_colours_the_sound_leaves_the_picture_alike():
    voice = make_tone(1000, 1.9) + 0.3 * np.random.default_rng(2).normal(size=int(1.9 * 16000))
    coloured = np.convolve(voice, [1, 0.6], mode="same")
    plain, changed = (cut(samples / np.abs(samples).max())[0] for samples in (voice, coloured))
    assert np.abs(plain.astype(int) - changed.astype(int)).mean() < 1.5  # of 64 levels


def test_long_recordings_in_blocks_give_the_same_picture(monkeypatch):
    samples = make_tone(1000, 8.0)
    whole = np.stack(cut(samples))
    monkeypatch.setattr(pictures, "FRAMES_AT_ONCE", 100)
    assert (np.stack(cut(samples)) != whole).mean() < 1e-4
