"""What an audio file holds: its pieces, decoded block by block, and whether all that its header promises is there.

Servers send MP3, WAV, FLAC and OGG in pieces, each with a header of its own or none, and downloads end early. A decoder
goes by the first header: it stops before the end, or after it, without a word.
"""

from __future__ import annotations

import importlib.util
import io
import mmap
import os
import re
import shlex
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Callable, NamedTuple, Optional, Union

import numpy as np

BLOCK = 2**20  # samples of a channel that are decoded at once
TOLERANCE_S = 0.1  # s by which a header may be wrong
STREAMED = 0x7FFF0000  # bytes: programs that write into a pipe put such sizes or larger ones, for they don't know them
WAV_TYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "u1", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
PIECES = {"WAV": rb"RIFF....WAVE", "FLAC": rb"fLaC[\0\x80]\0\0\x22"}  # how a piece begins
KBPS = (  # of an MP3's frames: MPEG 2 and 2.5; MPEG 1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)


class Piece(NamedTuple):
    """A part of a file that has a header of its own; mostly the whole file."""

    rate: int  # Hz
    channels: int
    decode: Callable[[], Iterator[np.ndarray]]  # float64, shape (samples, channels), full scale 1; anew at each call


def check_soundfile() -> str:
    """Say why the package soundfile, which reads more than plain WAV, cannot be used; empty: it can."""
    if importlib.util.find_spec("soundfile") is None:
        return "soundfile is not installed (pip install soundfile)"
    return try_soundfile()


@cache
def try_soundfile() -> str:
    """Try to import soundfile; why it fails."""
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:  # its C library is missing
        return f"soundfile does not work ({str(error).splitlines()[0]}; pip install --force-reinstall soundfile)"
    return ""


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep what C libraries write on standard error off the screen: libmpg123 comments on each odd frame."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def open_pieces(path: str) -> list[Piece]:
    """Open all pieces of a file; ValueError: it cannot be decoded, or ends before its header says or after it."""
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                wavs = [open_wav(path, data, *limits) for limits in split_at(PIECES["WAV"], data)]
            if all(wavs):
                return check_pieces(path, wavs)
        if check_soundfile():
            raise ValueError(f"it needs the package soundfile: {check_soundfile()}")
        with open_sound(path) as sound:
            kind, frames, rate = sound.format, sound.frames, sound.samplerate
            whole = Piece(rate, sound.channels, partial(decode_sound, path, path))
        sources = []
        if kind in ("MP3", "FLAC", "OGG"):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if kind == "MP3":
                    sources = [b"".join(parts)] if (parts := join_mp3(path, data, frames)) else []
                else:
                    limits = split_at(PIECES[kind], data) if kind == "FLAC" else split_ogg(path, data, frames / rate)
                    sources = [data[start:stop] for start, stop in limits] if len(limits) > 1 else []
    pieces = []
    for source in sources:
        with open_sound(source) as sound:
            pieces.append(Piece(sound.samplerate, sound.channels, partial(decode_sound, path, source)))
    return check_pieces(path, pieces or [whole])


def check_pieces(path: str, pieces: list[Piece]) -> list[Piece]:
    """Check that pieces can be put together."""
    kinds = {(piece.rate, piece.channels): f"{piece.rate} Hz, {piece.channels} channels" for piece in pieces}
    if len(kinds) > 1:
        raise ValueError(f"its pieces differ ({'; '.join(kinds.values())}): {advise_repair(path)}")
    return pieces


def advise_repair(path: str) -> str:
    """Say how to make one whole file of what a file holds."""
    name = os.path.basename(path)
    source, output = shlex.quote(name), shlex.quote(f"{os.path.splitext(name)[0]}-repaired.wav")
    option = "-ignore_length 1 " if name.lower().endswith((".wav", ".wave")) else ""
    return f"get it whole, or write what it holds anew with ffmpeg {option}-i {source} {output} and move {source} away"


def compare_length(path: str, promised_s: float, found_s: float) -> None:
    """Raise ValueError if a file holds more or less than its header promises."""
    if abs(promised_s - found_s) > TOLERANCE_S:
        found = f"only {found_s:.1f} s can be decoded" if found_s < promised_s else f"it holds {found_s:.1f} s"
        raise ValueError(f"its header promises {promised_s:.1f} s, but {found}: {advise_repair(path)}")


def split_at(header: bytes, data: mmap.mmap) -> list[tuple[int, int]]:
    """Find where the pieces of a file start and stop, each with a header of this pattern."""
    starts = [match.start() for match in re.finditer(header, data, re.DOTALL)]
    starts[:1] = [0]  # tags may stand before the first
    return list(zip(starts, [*starts[1:], len(data)]))


# ---- WAV


def open_wav(path: str, data: mmap.mmap, start: int, stop: int) -> Optional[Piece]:
    """Open a piece of plain WAV; None: it is of another kind, or damaged."""
    at, form = start + 12, b""
    while (name := data[at : at + 4]) != b"data":
        if at + 8 > stop:
            return None
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        form = data[at + 8 : at + 8 + min(size, 40)] if name == b"fmt " else form
        at += 8 + size + size % 2
    size, at = int.from_bytes(data[at + 4 : at + 8], "little"), at + 8
    if len(form) < 16 or at > stop:
        return None
    tag, channels, rate, _, width, bits = struct.unpack("<HHIIHH", form[:16])
    tag = int.from_bytes(form[24:26], "little") if tag == 0xFFFE else tag
    if (tag, bits) not in WAV_TYPES or width != channels * bits // 8 or not rate * width:
        return None
    after = skip_chunks(data, at + size + size % 2, stop)
    if stop - at < size >= STREAMED or (size == 0 and after < stop):
        size = stop - at
    elif size > stop - at:
        compare_length(path, size / width / rate, (stop - at) / width / rate)
    elif data[after:stop].strip(b"\0"):
        compare_length(path, size / width / rate, (size + stop - after) / width / rate)
    count = min(size, stop - at) // width
    return Piece(rate, channels, partial(decode_wav, path, at, count, (WAV_TYPES[tag, bits], bits, channels)))


def skip_chunks(data: mmap.mmap, at: int, stop: int) -> int:
    """Skip the chunks that may follow the samples of a WAV; return where something else begins, or `stop`."""
    while at + 8 <= stop and re.match(rb"[ -~]{4}", data[at : at + 4]):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > stop:
            break
        at += 8 + size + size % 2
    return min(at, stop)


def decode_wav(path: str, start: int, count: int, form: tuple[str, int, int]) -> Iterator[np.ndarray]:
    """Decode `count` samples of plain WAV from a byte on; the form: type, bits and channels."""
    kind, bits, channels = form
    with open(path, "rb") as file:
        file.seek(start)
        for first in range(0, count, BLOCK):
            values = np.frombuffer(file.read(min(BLOCK, count - first) * channels * bits // 8), kind)
            if bits == 24:
                wide = np.zeros((len(values) // 3, 4), np.uint8)
                wide[:, 1:] = values.reshape(-1, 3)
                values = wide.view("<i4")
            values = values.reshape(-1, channels)
            if bits == 8:
                yield (values - 128.0) / 128
            else:
                yield values / (1.0 if values.dtype.kind == "f" else -float(np.iinfo(values.dtype).min))


# ---- All that libsndfile reads


def open_sound(source: Union[str, bytes, int]) -> object:
    """Open a path, a descriptor or the content of a file with soundfile, as its own `read` does."""
    import soundfile

    if isinstance(source, str):
        source = os.fsencode(source)
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with silence_libraries():
            sound = soundfile.SoundFile(source, closefd=not isinstance(source, int))
            if sound.seekable():
                sound.seek(0)  # or the last bits of MP3 differ
            sound.seekable = lambda: False  # or it seeks after each block, and MP3 is decoded otherwise
    except soundfile.LibsndfileError as error:
        if "SF_INFO" in str(error):
            raise ValueError("its header is invalid (a sample rate of 0?)") from None
        raise ValueError(f"it cannot be decoded ({error.error_string.rstrip('.')})") from None
    return sound


def decode_sound(path: str, source: Union[str, bytes]) -> Iterator[np.ndarray]:
    """Decode a file, or a piece of it; at its end compare what was decoded with what the header promises."""
    import soundfile

    with open(path, "rb") as file, open_sound(file.fileno() if source is path else source) as sound:
        done, error = 0, None
        while error is None and done < sound.frames:
            block = np.full((min(BLOCK, sound.frames - done), sound.channels), np.nan)
            try:
                with silence_libraries():
                    block = block[: len(sound.read(out=block))]
            except soundfile.LibsndfileError as failure:
                error, block = failure, block[~np.isnan(block[:, 0])]  # what came before it
            if not len(block):
                break
            done += len(block)
            yield block
        if error and not done:
            raise ValueError(f"it cannot be decoded ({error.error_string.rstrip('.')})")
        found_s = promised_s = done / sound.samplerate
        if done < sound.frames < 2**60:  # more: unknown
            promised_s = sound.frames / sound.samplerate
        for promised, there in re.findall(r": (\d+) \(should be (\d+)\)", sound.extra_info):  # sizes of chunks
            if int(there) < int(promised) < STREAMED:
                promised_s = max(promised_s, found_s * int(promised) / int(there))
        if source is path and sound.format == "FLAC" and done == sound.frames:  # what it leaves unread
            found_s *= max(1, os.fstat(file.fileno()).st_size / max(os.lseek(file.fileno(), 0, os.SEEK_CUR), 1))
        compare_length(path, promised_s, found_s)


def split_ogg(path: str, data: mmap.mmap, seconds: float) -> list[tuple[int, int]]:
    """Find where the links of a chain of OGG streams start and stop."""
    starts, in_header, at = [], False, 0
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        is_first = bool(data[at + 5] & 2)
        if is_first and not in_header:
            starts.append(at)
        in_header, count = is_first, data[at + 26]
        at += 27 + count + sum(data[at + 27 : at + 27 + count])
    if at > len(data) or data[at:].strip(b"\0"):
        held = f"after {seconds:.1f} s " if seconds < 2**40 else ""
        raise ValueError(f"it ends {held}in the middle of a page, it was cut off: {advise_repair(path)}")
    return list(zip(starts, [*starts[1:], at]))


# ---- MP3


class Frame(NamedTuple):
    """What the header of an MP3's frame says."""

    kind: tuple[int, bool, bool]  # Hz, mono, MPEG 1
    length: int  # bytes
    samples: int


@lru_cache(4096)
def parse_frame(first: int, second: int, third: int, fourth: int) -> Optional[Frame]:
    """Parse the header of an MP3's frame (ISO 11172-3, 2.4.1.3); None: it isn't one."""
    version, rate, bit_rate = second >> 3 & 3, third >> 2 & 3, third >> 4
    if first < 255 or second & 0xE6 != 0xE2 or version == 1 or rate == 3 or bit_rate in (0, 15):
        return None
    hertz = (44100, 48000, 32000)[rate] >> (2, 0, 1, 0)[version]
    samples = 1152 if version == 3 else 576
    length = samples // 8 * KBPS[version == 3][bit_rate] * 1000 // hertz + (third >> 1 & 1)
    return Frame((hertz, fourth >> 6 == 3, version == 3), length, samples)


def find_frames(data: mmap.mmap) -> Iterator[tuple[int, Frame]]:
    """Find where each frame of an MP3 starts and what its header says, past tags and what else lies between them."""

    def parse(at: int) -> Optional[Frame]:
        return parse_frame(*data[at : at + 4]) if at + 4 <= len(data) else None

    at, kind = 0, None
    while 0 <= at < len(data):
        frame = parse(at)
        end = at + (frame.length if frame else 0)
        if frame and end <= len(data) and frame.kind in (kind, getattr(parse(end), "kind", None)):
            yield at, frame
            at, kind = end, frame.kind
        elif data[at : at + 3] == b"ID3":
            at, kind = at + 10 + sum(byte << shift for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0))), None
        else:
            at, kind = data.find(b"\xff", at + 1), None


def join_mp3(path: str, data: mmap.mmap, expected: int) -> list[bytes]:
    """Join MP3s that follow each other, under a header that says how long they are; empty: the file is right as it is.

    Args:
        expected: samples that libsndfile expects, by the first header, or else by the first frame and the file's size.
    """
    audio, headers, kinds = [], [], {}
    for at, frame in find_frames(data):
        kinds[frame.kind] = f"{frame.kind[0]} Hz, {'mono' if frame.kind[1] else 'stereo'}"
        if header := re.search(rb"(?:Xing|Info)...(.)(....)", data[at : at + min(frame.length, 60)], re.DOTALL):
            headers.append(int.from_bytes(header[2], "big") if header[1][0] & 1 else 0)
        else:
            audio.append((at, frame))
    if not audio:  # MPEG audio of another layer
        return []
    if len(kinds) > 1:
        raise ValueError(f"its pieces differ ({'; '.join(kinds.values())}): {advise_repair(path)}")
    start, frame = audio[0]
    if sum(headers) > len(audio):
        compare_length(path, *(count * frame.samples / frame.kind[0] for count in (sum(headers), len(audio))))
    promised = sum(headers) if headers else expected / frame.samples
    if len(headers) <= 1 and abs(promised - len(audio)) <= 2:
        return []
    head = bytes([255, data[start + 1] | 1, data[start + 2] & 0x0C | 0x90, data[start + 3]])
    _, is_mono, is_mpeg_1 = frame.kind
    header = head + bytes((17 if is_mono else 32) if is_mpeg_1 else (9 if is_mono else 17))
    header += b"Xing" + struct.pack(">II", 1, len(audio))
    return [header.ljust(parse_frame(*head).length, b"\0"), *(data[at : at + frame.length] for at, frame in audio)]
