"""The spectrogram maker: one format, a fixed scale in time, nothing mixed, nothing lost."""

import json
import math
import sys
import zlib

import make_spectrograms as maker
import numpy as np
import pytest
from conftest import MAKER, assert_refused, run, run_process
from PIL import Image
from scipy.io import wavfile

SETTINGS = {
    "sample_rate": 16000,
    "window_s": 0.064,
    "hop_s": 0.008,
    "frequency_range_hz": [60, 7600],
    "frequency_scale": "mel",
    "db_range": [-30, 40],
    "seconds_per_image": 1.792,
    "image_size": 224,
    "grey_levels": 64,
}
FOLDERS = {"INPUT_DIR": "audio", "OUTPUT_DIR": "images", "CONDITIONS": ("clean",)}


def make_tone(frequency, seconds, rate=16000, gap=0.5):
    """A tone that comes and goes, in a little noise: float64, shape (samples,)."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=len(time))
    return np.sin(2 * np.pi * frequency * time) * (time % (2 * gap) < gap) + 0.01 * noise


def write_wav(path, samples, rate=16000, kind=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    peak = np.abs(samples).max()
    scale = {np.int16: 32000, np.int32: 2**31 - 1000, np.float32: 1.0, np.uint8: 100}[kind]
    wavfile.write(path, rate, (samples / peak * scale + (128 if kind is np.uint8 else 0)).astype(kind))


def test_tone_between_two_rows_is_seen_like_one_in_a_row():
    rows = maker.space_frequencies(60, 7600, 224, "mel")
    brightest = []
    for frequency in (rows[210], (rows[210] + rows[211]) / 2):
        (part,) = maker.cut_parts(make_tone(frequency, 1.9), SETTINGS)
        brightest.append(part[:30].max())
    assert brightest[1] >= brightest[0] - 7  # of 63 levels; 7 are 8 dB


def test_images_are_palette_pngs_that_carry_their_settings(tmp_path):
    write_wav(tmp_path / "audio/deep/voice1.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert outcome.status == 0, outcome.err
    (path,) = (tmp_path / "images").iterdir()
    assert path.name == "voice1__clean.png"
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("P", (224, 224))
        stored = json.loads(image.text["spectrogram"])
    checksum = zlib.crc32((tmp_path / "audio/deep/voice1.wav").read_bytes())
    assert stored == {"settings": SETTINGS, "parts": 1, "recording_crc32": checksum}


def find_row(frequency, scale="mel"):
    bottom, place, top = (2595 * math.log10(1 + hz / 700) if scale == "mel" else hz for hz in (60, frequency, 7600))
    return 223 * (top - place) / (top - bottom)


@pytest.mark.parametrize("scale", ["mel", "linear"])
@pytest.mark.parametrize("frequency", [500, 2000, 6000])
def test_tone_appears_in_its_row_and_at_its_time(frequency, scale):
    (part,) = maker.cut_parts(make_tone(frequency, 1.9), {**SETTINGS, "frequency_scale": scale})
    expected = find_row(frequency, scale)
    assert abs(part[:, :50].astype(int).sum(axis=1).argmax() - expected) <= 2
    on = part[int(round(expected))].astype(int)
    edge = np.abs(np.diff(on)).argmax()
    assert min(abs((edge + 1) * 0.008 - time) for time in (0.5, 1.0, 1.5)) < 0.03


def test_seconds_per_pixel_do_not_depend_on_length():
    parts = [maker.cut_parts(make_tone(1000, seconds), SETTINGS)[0] for seconds in (1.9, 3.0, 6.0)]
    row = int(223 * (1 - (1000 - 60) / (7600 - 60)))
    edges = [int(np.flatnonzero(np.diff((part[row] > 40).astype(int)) < 0)[0]) for part in parts]
    assert max(edges) - min(edges) <= 1


@pytest.mark.parametrize(("seconds", "count"), [(0.3, 1), (1.9, 1), (2.2, 1), (3.0, 2), (6.0, 4)])
def test_long_recordings_make_several_images_short_ones_one(seconds, count):
    parts = maker.cut_parts(make_tone(1000, seconds, gap=0.1), SETTINGS)
    assert len(parts) == count
    assert {part.shape for part in parts} == {(224, 224)}


def test_short_recordings_are_filled_with_themselves():
    """Half as long a recording must look alike: no dark or flat stretch tells its length."""
    noise = np.random.default_rng(1).normal(size=16000)
    short, full = (maker.cut_parts(np.resize(noise[:length], length), SETTINGS)[0] for length in (8000, 16000))
    levels = [part.astype(float).mean(axis=0) for part in (short, full)]
    assert abs(levels[0].mean() - levels[1].mean()) < 1
    assert levels[0].std() < 2 * levels[1].std()


def test_a_channel_that_colours_the_sound_leaves_the_picture_alike():
    voice = make_tone(1000, 1.9) + 0.3 * np.random.default_rng(2).normal(size=int(1.9 * 16000))
    coloured = np.convolve(voice, [1, 0.6], mode="same")
    plain, changed = (maker.cut_parts(samples / np.abs(samples).max(), SETTINGS)[0] for samples in (voice, coloured))
    assert np.abs(plain.astype(int) - changed.astype(int)).mean() < 1.5  # of 64 levels


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_every_wav_format_gives_the_same_picture(kind, tmp_path):
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9) + make_tone(3000, 1.9), kind=kind)
    write_wav(tmp_path / "b.wav", make_tone(1000, 1.9) + make_tone(3000, 1.9))
    a, b = (maker.cut_parts(maker.read_audio(tmp_path / name, 16000), SETTINGS)[0] for name in ("a.wav", "b.wav"))
    assert np.abs(a.astype(int) - b.astype(int)).mean() < (8 if kind is np.uint8 else 0.5)


def test_other_rates_and_stereo_are_converted(tmp_path):
    tone = make_tone(1000, 1.9, rate=44100)
    wavfile.write(tmp_path / "a.wav", 44100, np.stack([tone, tone], axis=1).astype(np.float32))
    samples = maker.read_audio(tmp_path / "a.wav", 16000)
    assert len(samples) == pytest.approx(1.9 * 16000, abs=2)
    part = maker.cut_parts(samples, SETTINGS)[0]
    assert abs(part[:, :50].astype(int).sum(axis=1).argmax() - find_row(1000)) <= 2


def test_broken_files_are_named_and_passed(tmp_path):
    write_wav(tmp_path / "audio/good.wav", make_tone(1000, 1.9))
    (tmp_path / "audio/broken.wav").write_bytes(b"RIFF nonsense")
    (tmp_path / "audio/empty.wav").write_bytes(b"")
    wavfile.write(tmp_path / "audio/silent.wav", 16000, np.zeros(16000, np.int16))
    write_wav(tmp_path / "audio/click.wav", make_tone(1000, 0.05))
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert outcome.status == 1
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["good__clean.png"]
    for name in ("broken.wav", "empty.wav", "silent.wav", "click.wav"):
        assert sum(name in line for line in outcome.err.splitlines()) == 1
    assert "nothing but silence" in outcome.err
    assert "shorter than WINDOW_S" in outcome.err


def test_long_recordings_in_blocks_give_the_same_picture(monkeypatch):
    samples = make_tone(1000, 8.0)
    whole = np.stack(maker.cut_parts(samples, SETTINGS))
    monkeypatch.setattr(maker, "FRAMES_AT_ONCE", 100)
    assert (np.stack(maker.cut_parts(samples, SETTINGS)) != whole).mean() < 1e-4


def test_what_exists_with_the_same_settings_is_skipped_and_the_rest_made(tmp_path):
    write_wav(tmp_path / "audio/a.wav", make_tone(1000, 4.0))
    write_wav(tmp_path / "audio/b.wav", make_tone(2000, 4.0))
    run(tmp_path, MAKER, **FOLDERS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(before) == 4
    (tmp_path / "images/b__clean_2.png").unlink()  # as an interrupted run would leave it
    outcome = run(tmp_path, MAKER, **FOLDERS)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert "1 had their images already, 2 images made now, 0 recordings or copies left out" in outcome.out
    assert {name for name in after if after[name] == before[name]} == {"a__clean_1.png", "a__clean_2.png"}
    assert set(after) == set(before)


@pytest.mark.parametrize(
    "other, reason",
    [
        ("settings", "HOP_S = 0.004, now it is 0.008"),
        ("settings of another recording", "HOP_S = 0.004, now it is 0.008"),
        ("audio", "a__clean.png was made from another a.wav"),
        ("foreign", "not from this script"),
    ],
)
def test_images_of_another_format_are_never_mixed_in(tmp_path, other, reason):
    write_wav(tmp_path / "audio/a.wav", make_tone(1000, 1.9))
    if other != "foreign":
        run(tmp_path, MAKER, **FOLDERS, HOP_S=0.008 if other == "audio" else 0.004)
        if other == "settings of another recording":
            (tmp_path / "audio/a.wav").rename(tmp_path / "audio/b.wav")
        if other == "audio":
            write_wav(tmp_path / "audio/a.wav", make_tone(2000, 1.9))
    else:
        (tmp_path / "images").mkdir()
        Image.new("L", (224, 224)).save(tmp_path / "images/a__clean.png")
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert_refused(outcome, reason)
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before


def test_copies_of_a_recording_keep_its_name(tmp_path):
    write_wav(tmp_path / "audio/text1__vocoder.wav", make_tone(1000, 4.0))
    run(tmp_path, MAKER, **FOLDERS)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "text1__clean-vocoder_1.png",
        "text1__clean-vocoder_2.png",
    ]


def test_two_files_of_one_name_are_an_error_not_a_loss(tmp_path):
    for folder in ("x", "y"):
        write_wav(tmp_path / f"audio/{folder}/a.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert_refused(outcome, "would make the same image")


def test_flac_without_soundfile_is_a_clear_line(tmp_path, monkeypatch):
    write_wav(tmp_path / "audio/a.wav", make_tone(1000, 1.9))
    (tmp_path / "audio/b.flac").write_bytes(b"fLaC")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert_refused(outcome, "pip install soundfile")


def test_flac_is_read_like_wav(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9))
    rate, samples = wavfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.flac", samples, rate)
    wav, flac = (maker.cut_parts(maker.read_audio(tmp_path / f"a.{s}", 16000), SETTINGS)[0] for s in ("wav", "flac"))
    assert np.array_equal(wav, flac)


@pytest.mark.parametrize(
    "constants",
    [
        {"SAMPLE_RATE": 0, "GREY_LEVELS": 1},
        {"FREQUENCY_RANGE_HZ": (60, 9000)},
        {"DB_RANGE": (10, 10), "IMAGE_SIZE": 2},
        {"WINDOW_S": "long", "FREQUENCY_SCALE": "bark"},
    ],
)
def test_wrong_settings_are_named(tmp_path, constants):
    write_wav(tmp_path / "audio/a.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **{**FOLDERS, **constants})
    assert_refused(outcome)
    for name in constants:
        assert name in outcome.err


def test_folder_without_audio_is_an_error(tmp_path):
    (tmp_path / "audio").mkdir()
    outcome = run(tmp_path, MAKER, **FOLDERS)
    assert_refused(outcome)
    assert "no .wav, .flac, .ogg or .mp3 file below it" in outcome.err


@pytest.mark.slow
def test_script_runs_from_another_folder(tmp_path):
    write_wav(tmp_path / "audio/a.wav", make_tone(1000, 1.9))
    (tmp_path / "elsewhere").mkdir()
    assert run_process(tmp_path, MAKER, cwd=tmp_path / "elsewhere", **FOLDERS).status == 0
    assert (tmp_path / "images/a__clean.png").exists()
