"""Turn a folder of audio files into spectrogram images that the detector can learn from and judge.

    python data/make_spectrograms.py

In:  every audio file below INPUT_DIR: WAV, and FLAC, OGG or MP3 where `soundfile` is installed.
Out: OUTPUT_DIR/<recording>__clean[_<part>].png, IMAGE_SIZE x IMAGE_SIZE, 8-bit palette (magma).

Training images and images to judge must be made with the same settings: they are stored in each
image, and images made with other settings are never mixed with new ones. Every pixel column stands for
the same time: long recordings become several images, short ones are repeated to fill one.
`<recording>` is the audio file's name up to `__`; what follows that (another voice reading the same
text, a copy) goes behind the condition: `<recording>__clean-<rest>.png`.
About 100 recordings a second on one core.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from scipy.io import wavfile
from scipy.signal import get_window, resample_poly
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
INPUT_DIR = Path("../audio/original")  # folder of recordings, searched at any depth
OUTPUT_DIR = Path("original/combined")  # folder for the images; made where it is missing

SAMPLE_RATE = 16000  # Hz; recordings of any other rate are resampled
WINDOW_S = 0.032  # s, length of one Hann window
HOP_S = 0.008  # s, from one window to the next
FREQUENCY_RANGE_HZ = (60, 7600)  # Hz, bottom and top row; (60, 3500) for telephone band
DB_RANGE = (-30, 40)  # dB, darkest and brightest level, relative to each frequency's mean over time
SECONDS_PER_IMAGE = 1.792  # s; with the hop above: 224 windows, one per pixel
IMAGE_SIZE = 224  # pixels, width and height
GREY_LEVELS = 64  # 2 to 256; fewer make smaller files
# ------------------------------------------------------------------------------------------------

SOUNDFILE_SUFFIXES = (".flac", ".ogg", ".mp3")
TEXT_KEY = "spectrogram"  # PNG text chunk that holds the settings
DYNAMIC_RANGE_DB = 80  # what lies further below a recording's peak counts as silence


def read_audio(path: Path, sample_rate: int) -> np.ndarray:
    """Read one recording as mono samples at `sample_rate`: float64, shape (samples,).

    Raises:
        ValueError: the file holds no samples, nothing but silence, or numbers that are not finite.
    """
    if path.suffix.lower() in SOUNDFILE_SUFFIXES:
        import soundfile

        samples, file_rate = soundfile.read(path, always_2d=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # unknown chunks after the samples
            file_rate, samples = wavfile.read(path)
        # The mean is removed below and the scale cancels in the picture; only the type must be widened.
        samples = samples.reshape(len(samples), -1).astype(np.float64)
    mono = samples.mean(axis=1)
    if len(mono) == 0:
        raise ValueError("it holds no samples")
    if not np.isfinite(mono).all():
        raise ValueError("it holds samples that are not finite")
    mono -= mono.mean()
    peak = np.abs(mono).max()
    if peak == 0:
        raise ValueError("it holds nothing but silence")
    if file_rate != sample_rate:
        mono = resample_poly(mono, sample_rate, file_rate)
    return mono / peak


def fill_up(samples: np.ndarray, length: int) -> np.ndarray:
    """Repeat a short recording from a place of its own until it is `length` samples long.

    Silence or a constant would show how long the recording was, and so would a seam that stands at
    the same place in every picture: the starting point is drawn from the samples themselves.
    """
    if len(samples) >= length:
        return samples
    start = np.random.default_rng(len(samples)).integers(len(samples))
    return np.resize(np.roll(samples, -start), length)


def compute_levels(samples: np.ndarray, settings: dict) -> np.ndarray:
    """Compute the levels of a recording's spectrogram, each frequency's mean over time removed.

    Args:
        samples: float64, shape (samples,), at settings["sample_rate"].
        settings: as `collect_settings` returns them.

    Returns:
        float64 in dB, shape (IMAGE_SIZE, windows), row 0 the lowest frequency.
    """
    rate = settings["sample_rate"]
    window_length, hop = round(settings["window_s"] * rate), round(settings["hop_s"] * rate)
    fft_length = 2 ** int(np.ceil(np.log2(2 * window_length)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window_length)[::hop]
    power = np.abs(np.fft.rfft(frames * get_window("hann", window_length), fft_length)) ** 2
    level_db = 10 * np.log10(np.maximum(power, power.max() * 10 ** (-DYNAMIC_RANGE_DB / 10)))

    low, high = settings["frequency_range_hz"]
    rows_bin = np.linspace(low, high, settings["image_size"]) * fft_length / rate
    below = np.minimum(rows_bin.astype(int), level_db.shape[1] - 2)
    share = rows_bin - below
    rows_db = level_db[:, below] * (1 - share) + level_db[:, below + 1] * share
    return (rows_db - rows_db.mean(axis=0)).T


def cut_parts(samples: np.ndarray, settings: dict) -> list[np.ndarray]:
    """Cut a recording's spectrogram into pictures of equal duration, spread evenly from start to end.

    Neighbours overlap where the length is no multiple: nothing is filled up, nothing is left out.

    Returns:
        uint8 arrays, shape (IMAGE_SIZE, IMAGE_SIZE), values below GREY_LEVELS, highest frequency on top.
    """
    rate, size = settings["sample_rate"], settings["image_size"]
    width = round(settings["seconds_per_image"] / settings["hop_s"])
    shortest = round(settings["window_s"] * rate) + (width - 1) * round(settings["hop_s"] * rate)
    levels_db = compute_levels(fill_up(samples, shortest), settings)
    darkest, brightest = settings["db_range"]
    shades = np.clip((levels_db - darkest) / (brightest - darkest), 0, 1)

    count = int(np.ceil(levels_db.shape[1] / width - 0.25))  # a rest under a quarter makes no part
    parts = []
    for start in np.linspace(0, shades.shape[1] - width, max(count, 1)).astype(int):
        part = shades[::-1, start : start + width]
        if width != size:
            resized = Image.fromarray(part.astype(np.float32)).resize((size, size), Image.BILINEAR)
            part = np.asarray(resized)
        parts.append(np.round(part * (settings["grey_levels"] - 1)).astype(np.uint8))
    return parts


def encode_png(part: np.ndarray, settings: dict, parts: int) -> bytes:
    """Encode one picture as a palette PNG that carries its settings and its recording's part count."""
    image = Image.frombytes("P", part.shape[::-1], part.tobytes())
    palette = colormaps["magma"](np.linspace(0, 1, settings["grey_levels"]), bytes=True)[:, :3]
    image.putpalette(palette.tobytes())
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, json.dumps({"settings": settings, "parts": parts}))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: after a crash at any moment the old content or the new one is there."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_audio(folder: Path) -> dict[str, Path]:
    """Find the audio files at any depth below a folder, as {stem of the image's name: path}.

    Raises:
        ValueError: no audio, two files that would make the same images, or `soundfile` is needed.
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".wav", *SOUNDFILE_SUFFIXES) and path.is_file()
        if not path.name.startswith(".")
    ]
    if not paths:
        raise ValueError(f"INPUT_DIR {folder}: no .wav, .flac, .ogg or .mp3 file below it")
    sources = {}
    for path in paths:
        recording, _, rest = path.stem.partition("__")
        stem = f"{recording}__clean" + (f"-{rest}" if rest else "")
        if stem in sources:
            raise ValueError(f"{sources[stem]} and {path} would make the same image: rename one")
        sources[stem] = path
    compressed = [path for path in paths if path.suffix.lower() in SOUNDFILE_SUFFIXES]
    if compressed:
        try:
            import soundfile  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{len(compressed)} of {len(paths)} files (first: {compressed[0]}) need the package "
                "soundfile: pip install soundfile"
            ) from None
    return sources


def find_finished(folder: Path, sources: dict[str, Path], settings: dict) -> set[str]:
    """Find the stems whose images are all there, made with these settings.

    Raises:
        ValueError: an image that would be replaced was made with other settings, or not by this script.
    """
    found = defaultdict(list)
    for path in folder.glob("*.png"):
        stem = path.stem if path.stem in sources else path.stem.rpartition("_")[0]
        if stem not in sources:
            continue
        try:
            with Image.open(path) as image:
                stored = json.loads(image.text[TEXT_KEY])
        except (OSError, KeyError, ValueError, UnidentifiedImageError):
            raise ValueError(f"{path} is there, but not from this script: move it away") from None
        wrong = [key for key in settings if stored["settings"].get(key) != settings[key]]
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"{path} was made with {key.upper()} = {stored['settings'].get(key)}, now it is "
                f"{settings[key]}: choose another OUTPUT_DIR, or move the old images away"
            )
        found[stem].append(stored["parts"])
    return {stem for stem, parts in found.items() if len(parts) == parts[0]}


def check_settings(settings: dict) -> None:
    """Raise ValueError that names every setting which cannot be used, its value and what is allowed."""
    rate = settings["sample_rate"]
    rules = {
        "sample_rate": (lambda v: v >= 1000 and v == int(v), "a whole number of at least 1000 Hz"),
        "window_s": (lambda v: v * rate >= 8, "at least 8 samples long"),
        "hop_s": (lambda v: v * rate >= 1, "at least 1 sample long"),
        "frequency_range_hz": (lambda v: 0 <= v[0] < v[1] <= rate / 2, "(low, high), up to half the sample rate"),
        "db_range": (lambda v: v[0] < v[1], "(darkest, brightest)"),
        "seconds_per_image": (lambda v: v >= settings["hop_s"], "at least HOP_S"),
        "image_size": (lambda v: v >= 8 and v == int(v), "a whole number of at least 8"),
        "grey_levels": (lambda v: 2 <= v <= 256 and v == int(v), "a whole number from 2 to 256"),
    }

    def is_legal(name: str) -> bool:
        try:
            return rules[name][0](settings[name])
        except (TypeError, ValueError, IndexError):
            return False

    wrong = [f"{name.upper()} = {settings[name]!r} (allowed: {rules[name][1]})" for name in rules if not is_legal(name)]
    if wrong:
        raise ValueError("; ".join(wrong))


def make_images(sources: dict[str, Path], folder: Path, settings: dict) -> tuple[int, list[str]]:
    """Make the images of every recording; go on past what cannot be read.

    Returns:
        The number of images written, and a line for each file that was left out.
    """
    written, failed = 0, []
    for stem, path in tqdm(sources.items(), "Making spectrograms", unit="file", disable=None):
        try:
            parts = cut_parts(read_audio(path, settings["sample_rate"]), settings)
        except Exception as error:  # the decoders raise many kinds; every one is reported by name
            failed.append(f"left out: {path}: {str(error) or type(error).__name__}".splitlines()[0])
            continue
        for number, part in enumerate(parts, 1):
            name = f"{stem}_{number}.png" if len(parts) > 1 else f"{stem}.png"
            write_file(folder / name, encode_png(part, settings, len(parts)))
            written += 1
    return written, failed


def main() -> int:
    """Make what is missing in OUTPUT_DIR. Returns the exit status: 0, or 1 if a file was left out."""
    here = Path(__file__).resolve().parent
    settings = {
        "sample_rate": SAMPLE_RATE,
        "window_s": WINDOW_S,
        "hop_s": HOP_S,
        "frequency_range_hz": FREQUENCY_RANGE_HZ,
        "db_range": DB_RANGE,
        "seconds_per_image": SECONDS_PER_IMAGE,
        "image_size": IMAGE_SIZE,
        "grey_levels": GREY_LEVELS,
    }
    check_settings(settings)
    settings = json.loads(json.dumps(settings))  # as the images will give them back
    sources = find_audio(here / INPUT_DIR)
    folder = here / OUTPUT_DIR
    folder.mkdir(parents=True, exist_ok=True)
    finished = find_finished(folder, sources, settings)
    todo = {stem: path for stem, path in sources.items() if stem not in finished}
    written, failed = make_images(todo, folder, settings)
    for line in failed:
        print(line, file=sys.stderr)
    print(
        f"{len(sources)} recordings: {len(finished)} had their images already, "
        f"{len(todo) - len(failed)} made now ({written} images), {len(failed)} left out"
    )
    print(f"Images in {folder}")
    return 1 if failed else 0


def run_script() -> int:
    """Run main() as a command: its status, or one line on standard error and the status that fits."""
    if len(sys.argv) > 1:
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(__doc__)
            return 0
        print("error: no arguments are taken: edit the settings at the top of the script", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_script())
