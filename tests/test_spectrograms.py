"""The spectrogram maker: one format, a fixed scale in time, nothing mixed, nothing lost."""

import json
import math
import os
import shutil
import zlib
from functools import partial

import numpy as np
import pictures
import pytest
import recordings
import resynthesis
import soundfile
from conftest import MAKER, assert_refused, read_csv, run, run_process, write_csv
from PIL import Image
from scipy.io import wavfile

FORMAT = pictures.Format(16000, 0.032, 0.008, [60, 7900], "linear", [-30, 40], 1.792, 224, 64)
CLEAN = {"CONDITIONS": ("clean",)}


def cut(samples, form=FORMAT):
    """The pictures of a recording."""
    return pictures.draw_parts(pictures.fill_up(samples, form.duration), pictures.place_parts(len(samples), form), form)


def read_mono(path):
    return recordings.read_audio(path, 16000)[0]


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


def find_row(frequency, scale="linear"):
    bottom, place, top = (2595 * math.log10(1 + hz / 700) if scale == "mel" else hz for hz in (60, frequency, 7900))
    return 223 * (top - place) / (top - bottom)


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


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_every_wav_format_gives_the_same_picture(kind, tmp_path):
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9) + make_tone(3000, 1.9), kind=kind)
    write_wav(tmp_path / "b.wav", make_tone(1000, 1.9) + make_tone(3000, 1.9))
    a, b = (cut(read_mono(tmp_path / name))[0] for name in ("a.wav", "b.wav"))
    assert np.abs(a.astype(int) - b.astype(int)).mean() < (8 if kind is np.uint8 else 0.5)


def test_other_rates_and_stereo_are_converted(tmp_path):
    tone = make_tone(1000, 1.9, rate=44100)
    wavfile.write(tmp_path / "a.wav", 44100, np.stack([tone, tone], axis=1).astype(np.float32))
    samples = read_mono(tmp_path / "a.wav")
    assert len(samples) == pytest.approx(1.9 * 16000, abs=2)
    part = cut(samples)[0]
    assert abs(part[:, :50].astype(int).sum(axis=1).argmax() - find_row(1000)) <= 2


def test_broken_files_are_named_and_passed(tmp_path):
    write_wav(tmp_path / "data/audio/original/good.wav", make_tone(1000, 1.9))
    (tmp_path / "data/audio/original/broken.wav").write_bytes(b"RIFF nonsense")
    (tmp_path / "data/audio/original/empty.wav").write_bytes(b"")
    wavfile.write(tmp_path / "data/audio/original/silent.wav", 16000, np.zeros(16000, np.int16))
    write_wav(tmp_path / "data/audio/original/click.wav", make_tone(1000, 0.02))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 1
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["good__clean.png"]
    for name in ("broken.wav", "empty.wav", "silent.wav", "click.wav"):
        assert sum(name in line for line in outcome.err.splitlines()) == 1
    assert "nothing but silence" in outcome.err
    assert "shorter than WINDOW_S" in outcome.err


def test_long_recordings_in_blocks_give_the_same_picture(monkeypatch):
    samples = make_tone(1000, 8.0)
    whole = np.stack(cut(samples))
    monkeypatch.setattr(pictures, "FRAMES_AT_ONCE", 100)
    assert (np.stack(cut(samples)) != whole).mean() < 1e-4


def test_what_exists_with_the_same_settings_is_skipped_and_the_rest_made(tmp_path):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 4.0))
    write_wav(tmp_path / "data/audio/original/b.wav", make_tone(2000, 4.0))
    run(tmp_path, MAKER, **CLEAN)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data/original/combined").iterdir()}
    assert len(before) == 4
    (tmp_path / "data/original/combined/b__clean_2.png").unlink()  # as an interrupted run would leave it
    outcome = run(tmp_path, MAKER, **CLEAN)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data/original/combined").iterdir()}
    assert "2 images made now; 1 of 2 copies were there already" in outcome.out
    assert {name for name in after if after[name] == before[name]} == {"a__clean_1.png", "a__clean_2.png"}
    assert set(after) == set(before)


@pytest.mark.parametrize(
    "other, reason",
    [
        ("settings", "HOP_S = 0.004, now it is 0.008"),
        ("settings of another recording", "HOP_S = 0.004, now it is 0.008"),
        ("audio", "a__clean.png was made from another a.wav"),
        ("foreign", "was not made by this script"),
    ],
)
def test_images_of_another_format_are_never_mixed_in(tmp_path, other, reason):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    if other != "foreign":
        run(tmp_path, MAKER, **CLEAN, HOP_S=0.008 if other == "audio" else 0.004)
        if other == "settings of another recording":
            (tmp_path / "data/audio/original/a.wav").rename(tmp_path / "data/audio/original/b.wav")
        if other == "audio":
            write_wav(tmp_path / "data/audio/original/a.wav", make_tone(2000, 1.9))
    else:
        (tmp_path / "data/original/combined").mkdir(parents=True)
        Image.new("L", (224, 224)).save(tmp_path / "data/original/combined/a__clean.png")
    before = {path: path.read_bytes() for path in (tmp_path / "data/original/combined").iterdir()}
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome, reason)
    assert {path: path.read_bytes() for path in (tmp_path / "data/original/combined").iterdir()} == before


def test_copies_of_a_recording_keep_its_name(tmp_path):
    write_wav(tmp_path / "data/audio/original/text1__vocoder.wav", make_tone(1000, 4.0))
    run(tmp_path, MAKER, **CLEAN)
    assert sorted(path.name for path in (tmp_path / "data/original/combined").iterdir()) == [
        "text1__clean-vocoder_1.png",
        "text1__clean-vocoder_2.png",
    ]


def test_all_clashes_of_names_are_named_at_once(tmp_path):
    for name in ("x/a.wav", "x-a.wav", "y/b.wav", "y-b.wav", "c.wav"):
        write_wav(tmp_path / "data/audio/original" / name, make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome, "x-a.wav and ", "x/a.wav", "y-b.wav and ", "y/b.wav")
    assert "c.wav" not in outcome.err


def test_files_that_need_soundfile_are_counted_and_named_without_it(tmp_path, monkeypatch):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    (tmp_path / "data/audio/original/b.flac").write_bytes(b"fLaC")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 1
    assert "soundfile is not installed (pip install soundfile): 1 files that are not WAV need it" in outcome.out
    assert "b.flac: it needs the package soundfile" in outcome.err
    assert [path.name for path in (tmp_path / "data/original/combined").iterdir()] == ["a__clean.png"]


def test_flac_is_read_like_wav(tmp_path):
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9))
    rate, samples = wavfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.flac", samples, rate)
    wav, flac = (cut(read_mono(tmp_path / f"a.{s}"))[0] for s in ("wav", "flac"))
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
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    outcome = run(tmp_path, MAKER, **{**CLEAN, **constants})
    assert_refused(outcome)
    for name in constants:
        assert name in outcome.err


def test_folder_without_audio_is_an_error(tmp_path):
    (tmp_path / "data/audio").mkdir(parents=True)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert_refused(outcome)
    assert "no audio: put genuine recordings into " in outcome.err


@pytest.mark.slow
def test_script_runs_from_another_folder(tmp_path):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    (tmp_path / "elsewhere").mkdir()
    assert run_process(tmp_path, MAKER, cwd=tmp_path / "elsewhere", **CLEAN).status == 0
    assert (tmp_path / "data/original/combined/a__clean.png").exists()


# ---- Layout


def list_images(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_three_kinds_of_recordings_make_images_and_a_list(tmp_path):
    for name in ("original/o.wav", "deepfake/d.wav", "unknown/talk/u.wav"):
        write_wav(tmp_path / "data/audio" / name, make_tone(1000, 4.0))
    outcome = run(tmp_path, MAKER, CONDITIONS=("clean", "noise"))
    assert outcome.status == 0, outcome.err
    expected = [
        f"{kind}/combined/{kind[0]}__{what}_{n}.png"
        for kind in ("deepfake", "original")
        for what in ("clean", "noise")
        for n in (1, 2)
    ]
    expected += ["unknown/talk-u__clean_1.png", "unknown/talk-u__clean_2.png"]
    assert list_images(tmp_path / "data") == expected
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    assert [row["img_path"] for row in rows] == expected[-2:]
    assert [row["recording"] for row in rows] == ["talk-u"] * 2
    assert float(rows[0]["start_s"]) == 0 and float(rows[1]["start_s"]) == pytest.approx(4.0 - 1.85, abs=0.05)
    assert "unknown: 1 recordings, 2 images; 4 s of audio" in outcome.out


def test_folders_stand_in_the_names_and_shared_ones_become_sources(tmp_path):
    for name in ("original/sp1/001.wav", "original/sp2/001.wav", "deepfake/sp1/001.wav", "deepfake/x/y/001.wav"):
        write_wav(tmp_path / "data/audio" / name, make_tone(1000, 1.9))
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    assert list_images(tmp_path / "data") == [
        "deepfake/combined/sp1/sp1-001__clean.png",
        "deepfake/combined/x-y-001__clean.png",
        "original/combined/sp1/sp1-001__clean.png",
        "original/combined/sp2-001__clean.png",
    ]


def test_list_with_verdicts_on_other_images_is_kept(tmp_path):
    write_wav(tmp_path / "data/audio/unknown/a.wav", make_tone(1000, 1.9))
    write_csv(tmp_path / "test_data/unknown.csv", [["img_path", "predicted_output"], ["unknown/x.png", "Original"]])
    before = (tmp_path / "test_data/unknown.csv").read_bytes()
    assert_refused(run(tmp_path, MAKER), "unknown.csv holds verdicts on other images")
    assert (tmp_path / "test_data/unknown.csv").read_bytes() == before
    write_csv(tmp_path / "test_data/unknown.csv", [["img_path", "predicted_output"], ["unknown/x.png", ""]])
    assert run(tmp_path, MAKER).status == 0
    assert [row["img_path"] for row in read_csv(tmp_path / "test_data/unknown.csv")] == ["unknown/a__clean.png"]
    assert "already lists these 1 images" in run(tmp_path, MAKER).out


def test_whole_speakers_are_listed_for_testing(tmp_path):
    for kind in ("original", "deepfake"):
        for speaker in range(5):
            for number in range(2):
                write_wav(tmp_path / f"data/audio/{kind}/{kind[0]}{speaker}/{number}.wav", make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    rows = read_csv(tmp_path / "test_data/test_own.csv")
    assert len({row["speaker"] for row in rows}) == 2
    assert {row["actual_output"] for row in rows} == {"Original", "Deepfake"}
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["img_path"].startswith(row["actual_output"].lower() + "/combined/" + row["speaker"])
    first = {row["speaker"] for row in rows}
    for kind in ("original", "deepfake"):
        write_wav(tmp_path / f"data/audio/{kind}/{kind[0]}9/0.wav", make_tone(1000, 1.0))
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise")).status == 0
    assert len({row["speaker"] for row in read_csv(tmp_path / "test_data/test_own.csv")}) == 2
    shutil.rmtree(tmp_path / "test_data")
    assert run(tmp_path, MAKER, CONDITIONS=("clean", "noise"), HOLDOUT_SPEAKERS=0).status == 0
    assert not (tmp_path / "test_data").exists()
    assert len(first) == 2


# ---- What people's audio is like


@pytest.mark.parametrize("subtype", ["ALAW", "ULAW", "GSM610", "IMA_ADPCM"])
def test_telephone_wavs_are_read_by_content(tmp_path, subtype):
    (tmp_path / "data/audio/original").mkdir(parents=True)
    path = tmp_path / "data/audio/original/a.wav"
    soundfile.write(path, make_tone(1000, 1.9, rate=8000) / 2, 8000, subtype)
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    part = cut(read_mono(path))[0]
    assert abs(part[:, :50].astype(int).sum(axis=1).argmax() - find_row(1000)) <= 2


@pytest.mark.parametrize(("suffix", "container"), [("opus", "OGG"), ("wav", "MP3"), ("aiff", "AIFF"), ("dat", "FLAC")])
def test_files_are_read_whatever_their_suffix(tmp_path, suffix, container):
    (tmp_path / "data/audio/original").mkdir(parents=True)
    subtype = {"OGG": "OPUS", "MP3": "MPEG_LAYER_III"}.get(container, "PCM_16")
    path = tmp_path / f"data/audio/original/a.{suffix}"
    soundfile.write(path, make_tone(1000, 1.9) / 2, 16000, subtype, format=container)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert (outcome.status, outcome.err) == (0, "")
    assert list_images(tmp_path / "data") == ["original/combined/a__clean.png"]


def test_foreign_audio_is_named_and_other_files_are_counted(tmp_path):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    for name in ("b.m4a", "c.webm", "notes.txt", "d.txt"):
        (tmp_path / "data/audio/original" / name).write_bytes(b"x" * 100)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 1
    assert "b.m4a: .m4a cannot be read: convert with ffmpeg -i b.m4a b.wav" in outcome.err
    assert "c.webm: .webm cannot be read" in outcome.err
    assert "not audio: 2 .txt" in outcome.out


@pytest.mark.parametrize("second", ["inverted", "nearly inverted", "silent", "the same"])
def test_two_channels_give_the_picture_of_the_voice(tmp_path, second):
    voice = make_tone(1000, 1.9) / 2
    other = {"inverted": -voice, "nearly inverted": -0.97 * voice, "silent": 0 * voice, "the same": voice}[second]
    soundfile.write(tmp_path / "mono.wav", voice, 16000, "FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([voice, other], axis=1), 16000, "FLOAT")
    mono, stereo = (cut(read_mono(tmp_path / f"{name}.wav"))[0].astype(int) for name in ("mono", "stereo"))
    assert np.abs(mono - stereo).mean() < 0.1


def test_parts_without_sound_make_no_image_and_are_counted(tmp_path):
    voice = make_tone(1000, 5.0) / 2
    silence = np.zeros(5 * 16000)
    silence[::7] = 1 / 32768  # dither of one bit
    write = partial(soundfile.write, samplerate=16000, subtype="PCM_16")
    (tmp_path / "data/audio/unknown").mkdir(parents=True)
    write(tmp_path / "data/audio/unknown/half.wav", np.r_[voice, silence])
    write(tmp_path / "data/audio/unknown/none.wav", silence)
    outcome = run(tmp_path, MAKER)
    assert outcome.status == 1
    assert "none.wav: it holds nothing but silence" in outcome.err
    assert list_images(tmp_path / "data") == [f"unknown/half__clean_{n}.png" for n in (1, 2, 3, 4)]
    assert "2 parts without sound left out" in outcome.out


def test_hidden_files_are_passed_over_and_links_followed_once(tmp_path):
    folder = tmp_path / "data/audio/original"
    for name in ("a.wav", ".Trash-1000/files/x.wav", ".ipynb_checkpoints/a.wav", "._a.wav"):
        write_wav(folder / name, make_tone(1000, 1.9))
    write_wav(tmp_path / "elsewhere/b.wav", make_tone(1000, 1.9))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert (outcome.status, outcome.err) == (0, "")
    names = ["original/combined/a__clean.png", "original/combined/linked-b__clean.png"]
    assert list_images(tmp_path / "data") == names


@pytest.mark.parametrize("name", ["x" * 240, "语" * 80, "two\nlines", "a 'b' \"c\"", b"\xe9t\xe9"])
def test_names_of_every_kind_make_images_and_lists(tmp_path, name):
    folder = tmp_path / "data/audio/unknown"
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    write_wav(tmp_path / "a.wav", make_tone(1000, 1.9))
    for path in (folder / f"{name}.wav", folder / "good.wav"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a.wav", path)
    outcome = run(tmp_path, MAKER)
    assert (outcome.status, outcome.err) == (0, "")
    rows = read_csv(tmp_path / "test_data/unknown.csv")
    assert len(rows) == 2
    assert all((tmp_path / "data" / row["img_path"]).exists() for row in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda wav: wav[:44], "it holds no samples (or its header promises none)"),
        (lambda wav: wav[:40] + bytes(4) + wav[44:], "it holds no samples (or its header promises none)"),
        (lambda wav: wav[:24] + bytes(4) + wav[28:], "its header is invalid (a sample rate of 0?)"),
        (lambda wav: wav[:30], "it cannot be decoded ("),
        (lambda wav: b"", "it cannot be decoded ("),
    ],
)
def test_damaged_files_are_named_in_plain_words(tmp_path, change, words):
    path = tmp_path / "data/audio/original/a.wav"
    write_wav(path, make_tone(1000, 1.9))
    path.write_bytes(change(path.read_bytes()))
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 1
    assert outcome.err.startswith(f"left out: {path}: {words}")
    assert len(outcome.err.splitlines()) == 1
