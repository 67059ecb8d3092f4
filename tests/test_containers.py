"""Containers: files in pieces are read to their end, files that were cut off are named, whatever their headers say."""

import struct
import sys

import containers
import numpy as np
import pytest
import recordings
import soundfile
from conftest import CLEAN, MAKER, make_tone, make_voice, run, write_wav

RATE = 24000
COVER = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 800
ID3 = b"ID3\x03\0\0" + bytes([0, 12, 64, 4]) + COVER  # 204,804 bytes, in sevens of bits


def encode(path, seconds, container, subtype=None, seed=1, rate=RATE):
    """A recording of some seconds, as bytes."""
    soundfile.write(path, make_voice(seed, seconds * rate / 16000) / 2, rate, subtype, format=container)
    return path.read_bytes()


def strip(mp3):
    """An MP3 without the frame that says how long it is."""
    return mp3[mp3.index(mp3[:2], mp3.index(b"LAME")) :]


def read_seconds(path, content):
    path.write_bytes(content)
    return len(recordings.read_audio(str(path), 16000)[0]) / 16000


@pytest.fixture
def mp3s(tmp_path):
    """Three MP3s, of 2, 3 and 4 s."""
    return [encode(tmp_path / "a.mp3", seconds, "MP3", seed=seconds) for seconds in (2, 3, 4)]


@pytest.mark.parametrize(
    ("join", "seconds"),
    [
        (lambda a, b, c: a, 2),
        (lambda a, b, c: a + strip(b) + strip(c), 9),
        (lambda a, b, c: a + b + c, 9),
        (lambda a, b, c: strip(a) + strip(b) + c, 9),
        (lambda a, b, c: strip(c), 4),
        (lambda a, b, c: ID3 + c + b"TAG" + b"x" * 125, 4),
        (lambda a, b, c: ID3 + a + b"TAG" + b"x" * 125 + ID3 + b, 5),
        (lambda a, b, c: strip(c)[:-5000], 3.5),
    ],
)
def test_mp3_is_read_to_its_end_without_a_word(tmp_path, capfd, mp3s, join, seconds):
    assert read_seconds(tmp_path / "b.mp3", join(*mp3s)) == pytest.approx(seconds, abs=0.3)
    assert capfd.readouterr() == ("", "")


def test_joined_mp3_has_the_samples_of_its_pieces(tmp_path, mp3s):
    (tmp_path / "b.mp3").write_bytes(mp3s[1])
    expected = soundfile.read(tmp_path / "b.mp3")[0]
    (tmp_path / "b.mp3").write_bytes(strip(mp3s[0]) + mp3s[1])
    (piece,) = containers.open_pieces(str(tmp_path / "b.mp3"))
    found = np.concatenate(list(piece.decode()))[:, 0]
    lags = np.correlate(found[-len(expected) - 2000 :], expected[:RATE])
    start = len(found) - len(expected) - 2000 + lags.argmax()
    assert np.corrcoef(found[start : start + 2 * RATE], expected[: 2 * RATE])[0, 1] > 0.999


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None), ("WAV", None)])
def test_files_that_follow_each_other_in_one_are_all_read(tmp_path, container, subtype):
    pieces = [encode(tmp_path / "a", seconds, container, subtype, seed=seconds) for seconds in (2, 3)]
    assert read_seconds(tmp_path / "b", b"".join(pieces)) == pytest.approx(5, abs=0.1)
    other = encode(tmp_path / "a", 2, container, subtype, rate=16000)
    with pytest.raises(ValueError, match="its pieces differ .24000 Hz, 1 channels; 16000 Hz, 1 channels.: .*ffmpeg"):
        read_seconds(tmp_path / "b", pieces[0] + other)


CUT = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "ULAW"), ("WAV", "GSM610"), ("FLAC", None), ("MP3", None)]


@pytest.mark.parametrize(("container", "subtype"), [*CUT, ("AIFF", None), ("AU", None), ("W64", None), ("RF64", None)])
def test_what_ends_before_its_header_says_is_named_with_the_repair(tmp_path, capfd, container, subtype):
    rate = 8000 if subtype == "GSM610" else RATE
    whole = encode(tmp_path / "a", 6, container, subtype, rate=rate)
    assert read_seconds(tmp_path / "cut.snd", whole) == pytest.approx(6, abs=0.05)
    words = r"its header promises 6\.[01] s, but only [23]\.\d s can be decoded: .* -i cut.snd cut-repaired.wav "
    with pytest.raises(ValueError, match=words):
        read_seconds(tmp_path / "cut.snd", whole[: len(whole) // 2])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_that_ends_within_a_page_is_named(tmp_path, subtype):
    whole = encode(tmp_path / "a", 6, "OGG", subtype)
    with pytest.raises(ValueError, match=r"it ends after [0-5]\.\d s in the middle of a page, it was cut off: "):
        read_seconds(tmp_path / "b", whole[: len(whole) // 2])


@pytest.mark.parametrize("size", [0, 2**32 - 1, 0x7FFFF000, 2**31, "odd"])
@pytest.mark.parametrize("chunk", [b"", b"LIST\x0e\0\0\0INFOISFT\2\0\0\0a\0"])
def test_wav_out_of_a_pipe_is_read_whole(tmp_path, size, chunk):
    wav = encode(tmp_path / "a", 2, "WAV")
    size = len(wav) - 45 if size == "odd" else size
    wav = wav[:36] + chunk + b"data" + struct.pack("<I", size) + wav[44:]
    assert read_seconds(tmp_path / "b.wav", wav) == pytest.approx(2, abs=0.001)
    if size >= 2**31:
        assert read_seconds(tmp_path / "b.wav", wav + wav) == pytest.approx(4, abs=0.001)


def test_chunks_behind_the_samples_of_a_wav_are_no_sound(tmp_path):
    wav = encode(tmp_path / "a", 2, "WAV") + b"id3 " + struct.pack("<I", len(ID3)) + ID3
    assert read_seconds(tmp_path / "b.wav", wav) == 2
    with pytest.raises(ValueError, match=r"promises 2.0 s, but it holds 4.0 s: .*ffmpeg -ignore_length 1 -i b.wav"):
        read_seconds(tmp_path / "b.wav", wav[: 44 + 2 * 2 * RATE] + wav[44 : 44 + 2 * 2 * RATE])


@pytest.mark.parametrize(("total", "seconds"), [(0, 3), (RATE, None)])
def test_flac_whose_header_does_not_say_its_length(tmp_path, total, seconds):
    flac = bytearray(encode(tmp_path / "a", 3, "FLAC"))
    flac[22:26] = struct.pack(">I", total)
    if seconds:
        assert read_seconds(tmp_path / "b.flac", flac) == seconds
        return
    with pytest.raises(ValueError, match=r"its header promises 1.0 s, but it holds [23]\.\d s"):
        read_seconds(tmp_path / "b.flac", flac)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_is_read_without_soundfile_to_the_last_bit(tmp_path, subtype):
    encode(tmp_path / "a", 1, "WAV", subtype)
    (piece,) = containers.open_pieces(str(tmp_path / "a"))
    assert np.array_equal(np.concatenate(list(piece.decode())), soundfile.read(tmp_path / "a", always_2d=True)[0])


def test_broken_soundfile_is_said_and_wav_is_read(tmp_path, monkeypatch, without_soundfile):
    write_wav(tmp_path / "data/audio/original/a.wav", make_tone(1000, 1.9))
    (tmp_path / "data/audio/original/b.flac").write_bytes(b"fLaC")
    (tmp_path / "data/audio/original/notes.txt").write_text("hi")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/soundfile.py").write_text("raise OSError('sndfile library not found')")
    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.syspath_prepend(tmp_path / "stub")
    outcome = run(tmp_path, MAKER, **CLEAN)
    reason = "soundfile does not work (sndfile library not found; pip install --force-reinstall soundfile)"
    assert f"{reason}: 1 files that are not WAV need it" in outcome.out
    assert "not audio: 1 .txt" in outcome.out
    assert (
        outcome.err
        == f"left out: {tmp_path / 'data/audio/original/b.flac'}: it needs the package soundfile: {reason}\n"
    )
    assert (tmp_path / "data/original/combined/a__clean.png").exists()
