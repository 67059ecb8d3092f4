"""Recordings: every format, rate and number of channels is read as people hear it; what cannot be is named."""

import numpy as np
import pytest
import recordings
import soundfile
from conftest import CLEAN, MAKER, cut, find_row, list_images, make_tone, run, write_wav
from scipy.io import wavfile


def read_mono(path):
    return recordings.read_audio(path, 16000)[0]


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
    assert abs(part[:, :25, 0].astype(int).sum(axis=1).argmax() - find_row(1000)) <= 2


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


@pytest.mark.parametrize("subtype", ["ALAW", "ULAW", "GSM610", "IMA_ADPCM"])
def test_telephone_wavs_are_read_by_content(tmp_path, subtype):
    (tmp_path / "data/audio/original").mkdir(parents=True)
    path = tmp_path / "data/audio/original/a.wav"
    soundfile.write(path, make_tone(1000, 1.9, rate=8000) / 2, 8000, subtype)
    assert run(tmp_path, MAKER, **CLEAN).status == 0
    part = cut(read_mono(path))[0]
    assert abs(part[:, :25, 0].astype(int).sum(axis=1).argmax() - find_row(1000)) <= 2


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
