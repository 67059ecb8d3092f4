"""Recordings: every format, rate and number of channels is read as people hear it; what cannot be is named."""

import containers
import numpy as np
import pytest
import recordings
import soundfile
from conftest import CLEAN, MAKER, RATE, cut, find_row, list_images, make_tone, make_voice, run, write_wav
from scipy.io import wavfile
from scipy.signal import fftconvolve, resample_poly


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


def test_files_that_need_soundfile_are_counted_and_named_without_it(tmp_path, without_soundfile):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    (tmp_path / "data/audio/original/b.flac").write_bytes(b"fLaC")
    outcome = run(tmp_path, MAKER, **CLEAN)
    assert outcome.status == 1
    assert "soundfile is not installed (pip install soundfile): 1 files that are not WAV need it" in outcome.out
    assert "b.flac: it needs the package soundfile: soundfile is not" in outcome.err
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
        (lambda wav: wav[:44], "its header promises 1.9 s, but only 0.0 s can be decoded: "),
        (lambda wav: wav[:40] + bytes(4) + b"LIST\4\0\0\0INFO", "it holds no samples (or its header promises none)"),
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


# ---- Blocks


@pytest.mark.parametrize("rate", [16000, 44100, 8000, 11127])
@pytest.mark.parametrize("block", [256, 1000, 30000])
def test_blocks_of_any_size_give_the_samples_of_the_whole(tmp_path, monkeypatch, rate, block):
    voices = np.stack([make_voice(1, 3.0), make_voice(2, 3.0), np.zeros(3 * 16000)], axis=1) * [0.5, 0.3, 1] + 0.01
    soundfile.write(tmp_path / "a.wav", voices, rate, "DOUBLE")
    mono = voices[:, :2].mean(axis=1)
    mono -= mono.mean()
    expected = resample_poly(mono, 16000, rate) / np.abs(mono).max()
    monkeypatch.setattr(containers, "BLOCK", block)
    monkeypatch.setattr(recordings, "BLOCK", block)
    monkeypatch.setattr(recordings, "KEPT", 2 * block)
    samples, peak = recordings.read_audio(tmp_path / "a.wav", 16000)
    assert peak == np.abs(mono).max()
    assert np.array_equal(samples, expected)


@pytest.mark.parametrize(("container", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None)])
def test_compressed_files_decode_in_blocks_as_in_one(tmp_path, monkeypatch, container, subtype):
    soundfile.write(tmp_path / "a", make_voice(1, 3.0) / 2, 24000, subtype, format=container)
    expected = soundfile.read(tmp_path / "a", always_2d=True)[0]
    monkeypatch.setattr(containers, "BLOCK", 7001)
    (piece,) = containers.open_pieces(str(tmp_path / "a"))
    assert np.array_equal(np.concatenate(list(piece.decode())), expected)


# ---- Channels


def make_call(first, second, crosstalk=0.0):
    """Two people who speak by turns of 1 s, one on each channel."""
    turn = np.arange(len(first)) // RATE % 2 == 0
    first, second = first * turn, second * ~turn
    return np.stack([first + crosstalk * second, second + crosstalk * first], axis=1)


ONE, OTHER = make_voice(1, 8.0), make_voice(2, 8.0)
ECHO = np.random.default_rng(3).normal(size=(2, 6400)) * 10 ** (-3 * np.arange(6400) / 6400)
HISS = np.random.default_rng(4).normal(size=len(ONE))


@pytest.mark.parametrize(
    ("channels", "voices"),
    [
        (make_call(ONE, OTHER), [0, 1]),
        (make_call(ONE, OTHER, 0.1), [0, 1]),
        (np.c_[make_call(ONE, OTHER, 0.1), 0 * ONE], [0, 1]),
        (make_call(ONE, OTHER, 0.1) + 0.003 * np.c_[HISS, HISS[::-1]], [0, 1]),
        (np.c_[ONE], [None]),
        (np.c_[ONE, ONE], [None]),
        (np.c_[ONE, -0.1 * ONE], [None]),
        (np.c_[ONE, np.roll(ONE, 80)], [None]),
        (np.c_[ONE, 0 * ONE], [None]),
        (np.c_[ONE, 0.001 * OTHER], [None]),
        (np.c_[ONE, 0.01 * HISS], [None]),
        (np.stack([fftconvolve(ONE, echo)[: len(ONE)] for echo in ECHO], axis=1), [None]),
        (np.c_[ONE + 0.5 * OTHER, 0.5 * ONE + OTHER], [None]),
    ],
)
def test_channels_with_a_voice_each_are_told_from_stereo(tmp_path, channels, voices):
    soundfile.write(tmp_path / "a.wav", channels / np.abs(channels).max(), RATE, "FLOAT")
    assert recordings.find_voices(tmp_path / "a.wav") == voices


def test_one_channel_is_read_alone(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.c_[ONE, OTHER] / 2, RATE, "FLOAT")
    for channel, voice in enumerate((ONE, OTHER)):
        soundfile.write(tmp_path / "b.wav", voice / 2, RATE, "FLOAT")
        alone = recordings.read_audio(tmp_path / "a.wav", RATE, channel)[0]
        assert np.array_equal(alone, read_mono(tmp_path / "b.wav"))
