"""Turn a folder of audio files into spectrogram images that the detector can learn from and judge.

    python data/make_spectrograms.py

In:  every audio file below INPUT_DIR: WAV, and FLAC, OGG or MP3 where `soundfile` is installed.
Out: OUTPUT_DIR/<recording>__<condition>[_<part>].png, IMAGE_SIZE x IMAGE_SIZE, 8-bit palette (magma).

CONDITIONS lists the copies to make of each recording: clean, and laundered as speech is on its way to a
listener; or resynthesised (griffinlim, lpc, harmonic), which makes fakes of genuine recordings, with
nothing else to tell them apart. What was done is drawn anew for each file, the same in each run,
whatever the class, and stored in the image.
Training images and images to judge must be made with the same settings: they are stored in each
image, and images made with other settings are never mixed with new ones. Every pixel column stands for
the same time: long recordings become several images, short ones are repeated to fill one.
`<recording>` is the audio file's name up to `__`; what follows that (another voice reading the same
text, a copy) goes behind the condition: `<recording>__<condition>-<rest>.png`.
About 75 clean recordings a second on one core.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
import zlib
from collections import defaultdict
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from scipy.io import wavfile
from scipy.linalg import solve_toeplitz
from scipy.ndimage import map_coordinates, uniform_filter1d
from scipy.signal import butter, fftconvolve, get_window, istft, lfilter, medfilt, resample_poly, sosfiltfilt, stft
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
INPUT_DIR = Path("../audio/original")  # folder of recordings, searched at any depth
OUTPUT_DIR = Path("original/combined")  # folder for the images; made where it is missing

CONDITIONS = ("clean", "noise", "reverb", "resample", "codec", "bandlimit")  # also gain, clip; "reverb+noise": in turn
BABBLE_DIR = None  # folder of recordings for babble among the noises, one for both classes; None: no babble
SNR_RANGE_DB = (5, 30)  # dB, speech over noise
RT60_RANGE_S = (0.2, 0.8)  # s, time in which the reverberation falls by 60 dB
SEED = 0  # of all that is drawn

SAMPLE_RATE = 16000  # Hz; recordings of any other rate are resampled
WINDOW_S = 0.064  # s, length of one Hann window
HOP_S = 0.008  # s, from one window to the next
FREQUENCY_RANGE_HZ = (60, 7600)  # Hz, bottom and top row; (60, 3500) for telephone band
FREQUENCY_SCALE = "mel"  # "mel" gives low frequencies more rows, where the harmonics tell most; or "linear"
DB_RANGE = (-30, 40)  # dB, darkest and brightest level, relative to each frequency's mean over time
SECONDS_PER_IMAGE = 1.792  # s; with the hop above: 224 windows, one per pixel
IMAGE_SIZE = 224  # pixels, width and height
GREY_LEVELS = 64  # 2 to 256; fewer make smaller files
# ------------------------------------------------------------------------------------------------

SOUNDFILE_SUFFIXES = (".flac", ".ogg", ".mp3")
TEXT_KEY = "spectrogram"  # PNG text chunk that holds the settings
LAUNDERING_SETTINGS = ("snr_range_db", "rt60_range_s", "seed")
CODECS = {  # soundfile's (format, subtype); without soundfile the first three, by arithmetic
    "mu-law": None,
    "A-law": None,
    "ADPCM": None,
    "GSM": ("WAV", "GSM610"),
    "Vorbis": ("OGG", "VORBIS"),
    "Opus": ("OGG", "OPUS"),
    "MP3": ("MP3", "MPEG_LAYER_III"),
}
FRAMES_AT_ONCE = 8192  # the spectra of an hour of audio at once would take 11 GB
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


# ---- Laundering. Each takes samples (float64, shape (samples,), peak 1), their rate in Hz and a generator, and returns
# as many samples with words for what was done.


def add_noise(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Add white noise, pink noise or the babble of four other recordings, at an SNR in SNR_RANGE_DB."""
    kind = draw.choice(["white", "pink", "babble"] if len(others) >= 4 else ["white", "pink"])
    if kind == "babble":
        noise = np.zeros(len(samples))
        for number in draw.choice(len(others), 4, replace=False):
            voice = read_audio(others[number], rate)
            noise += np.resize(np.roll(voice, draw.integers(len(voice))), len(samples)) / voice.std()
    else:
        spectrum = np.fft.rfft(draw.normal(size=len(samples)))
        slope = np.sqrt(np.maximum(np.arange(len(spectrum)), 1)) if kind == "pink" else 1
        noise = np.fft.irfft(spectrum / slope, len(samples))
    snr_db = draw.uniform(*settings["snr_range_db"])
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return samples + noise, f"{kind} noise, SNR {snr_db:.1f} dB"


def add_reverb(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Convolve with a synthetic room response: the direct sound, then noise that falls by 60 dB in RT60_RANGE_S."""
    rt60_s, direct_db = draw.uniform(*settings["rt60_range_s"]), draw.uniform(-3, 6)
    time_s = np.arange(int(rt60_s * rate)) / rate
    response = draw.normal(size=len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    response[0] = np.sqrt(np.sum(response[1:] ** 2)) * 10 ** (direct_db / 20)
    words = f"reverberation, RT60 {rt60_s:.2f} s, direct sound {direct_db:.1f} dB"
    return fftconvolve(samples, response)[: len(samples)], words


def resample(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Resample to a lower rate and back."""
    lower = int(rate * draw.choice([0.3, 0.375, 0.5, 0.6875]))
    there_and_back = resample_poly(resample_poly(samples, lower, rate), rate, lower)
    return np.resize(there_and_back, len(samples)), f"resampled to {lower} Hz and back"


def limit_band(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Let a band pass: Butterworth, order 8, forth and back."""
    low, high = draw.uniform(100, 400), draw.uniform(0.125, 0.22) * rate
    filtered = sosfiltfilt(butter(8, (low, high), "bandpass", fs=rate, output="sos"), samples)
    return filtered, f"band {low:.0f} to {high:.0f} Hz"


def lower_gain(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Lower the level before rounding to 16 bits."""
    gain_db = draw.uniform(-70, -40)
    return np.round(samples * 10 ** (gain_db / 20) * 32767), f"16 bits at {gain_db:.1f} dB"


def clip(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Clip the peaks."""
    level = draw.uniform(0.1, 0.5)
    return np.clip(samples, -level, level), f"clipped at {level:.2f} of the peak"


def code(samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]) -> tuple:
    """Encode and decode with a codec of CODECS; telephone codecs at 8 kHz."""
    try:
        import soundfile
    except ImportError:
        soundfile = None
    usable = [
        name
        for name, kind in CODECS.items()
        if kind is None or (soundfile and kind[1] in soundfile.available_subtypes(kind[0]))
    ]
    name = str(draw.choice(usable))
    code_rate = 16000 if name in ("Vorbis", "Opus", "MP3") else 8000
    coded = resample_poly(samples, code_rate, rate) * 0.9
    if CODECS[name]:
        buffer, (container, subtype) = io.BytesIO(), CODECS[name]
        quality = {} if container == "WAV" else {"compression_level": draw.uniform(0.5, 1)}
        soundfile.write(buffer, coded, code_rate, subtype, format=container, **quality)
        buffer.seek(0)
        coded = soundfile.read(buffer)[0]
    else:
        coded = {"mu-law": code_mu_law, "A-law": code_a_law, "ADPCM": code_adpcm}[name](coded)
    return np.resize(resample_poly(coded, rate, code_rate), len(samples)), f"{name} at {code_rate} Hz"


def code_mu_law(samples: np.ndarray) -> np.ndarray:
    """Compand to 8 bits and back by the formula of ITU-T G.711's mu-law (mu = 255)."""
    levels = np.round(np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log(256) * 127) / 127
    return np.sign(levels) * np.expm1(np.abs(levels) * np.log(256)) / 255


def code_a_law(samples: np.ndarray) -> np.ndarray:
    """Compand to 8 bits and back by the formula of ITU-T G.711's A-law (A = 87.6)."""
    size, scale = np.abs(samples), 1 + np.log(87.6)
    curve = np.where(size < 1 / 87.6, 87.6 * size, 1 + np.log(np.maximum(87.6 * size, 1))) / scale
    levels = np.round(curve * 127) / 127 * scale
    return np.sign(samples) * np.where(levels < 1, levels, np.exp(levels - 1)) / 87.6


def code_adpcm(samples: np.ndarray) -> np.ndarray:
    """Encode to 4 bits a sample and back, as IMA ADPCM does (IMA Digital Audio Focus Group, 1992)."""
    step_sizes = np.minimum(np.round(7 * 1.1 ** np.arange(89)), 32767).tolist()
    decoded, value, index = [], 0.0, 0
    for target in (samples * 32767).tolist():
        step = step_sizes[index]
        size = min(int(abs(target - value) / step * 4), 7)
        change = step * (size + 0.5) / 4
        value = min(max(value + (change if target >= value else -change), -32768), 32767)
        index = min(max(index + (-1, -1, -1, -1, 2, 4, 6, 8)[size], 0), 88)
        decoded.append(value)
    return np.array(decoded) / 32767


def space_frequencies(low: float, high: float, count: int, scale: str) -> np.ndarray:
    """Space frequencies evenly on a scale, "linear" or "mel" (O'Shaughnessy, 1987): Hz, float64, shape (count,)."""
    if scale == "linear":
        return np.linspace(low, high, count)
    return 700 * np.expm1(np.linspace(np.log1p(low / 700), np.log1p(high / 700), count))


# ---- Resynthesis. The same signature; what comes out is a fake of the same voice, words and channel.


def keep_mel_spectrogram(
    samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]
) -> tuple:
    """Keep a mel spectrogram only and guess the phases: Griffin and Lim, 1984, sped up as Perraudin et al., 2013."""
    length, bands, rounds = int(draw.choice([512, 1024])), int(draw.integers(40, 110)), int(draw.choice([3, 8, 20, 40]))
    to_frames = partial(stft, fs=rate, nperseg=length, noverlap=3 * length // 4)
    to_samples = partial(istft, fs=rate, nperseg=length, noverlap=3 * length // 4)
    frequencies, _, frames = to_frames(samples)
    edges = space_frequencies(40, rate / 2, bands + 2, "mel")
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    size = np.abs(frames)
    size = np.maximum(np.linalg.pinv(filters) @ (filters @ size), size.max() * 1e-5)
    guess, before = size * np.exp(2j * np.pi * draw.random(size.shape)), 0
    for _ in range(rounds):
        after = to_frames(to_samples(guess)[1])[2][:, : size.shape[1]]
        ahead = after + 0.9 * (after - before)
        guess, before = size * ahead / np.maximum(np.abs(ahead), 1e-9), after
    return to_samples(guess)[1][: len(samples)], f"{bands} mel bands, Griffin-Lim in {rounds} rounds"


def track_pitch(samples: np.ndarray, rate: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Track the pitch by autocorrelation: Hz, and how periodic the sound is, 0 to 1; a value per hop."""
    length, shortest, longest = int(0.04 * rate), rate // 400, rate // 65
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, (length // 2, length)), length)[::hop]
    window = np.hanning(length)
    spectra = np.fft.rfft(np.vstack([(frames - frames.mean(1, keepdims=True)) * window, window]), 2 * length)
    correlation = np.fft.irfft(np.abs(spectra) ** 2)[:, :length]
    correlation /= np.maximum(correlation[:, :1], 1e-9)
    correlation = correlation[:-1] / np.maximum(correlation[-1], 0.05)
    lags = correlation[:, shortest:longest].argmax(1) + shortest
    return medfilt(rate / lags, 5), medfilt(correlation[np.arange(len(lags)), lags], 3)


def keep_prediction(
    samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]
) -> tuple:
    """Keep linear prediction, pitch and loudness only: pulses and noise through the filters, as LPC vocoders do."""
    order, voiced_from, breath = int(draw.integers(10, 22)), draw.uniform(0.35, 0.6), draw.uniform(0, 0.4)
    hop, length = rate // 100, rate // 40
    pitch, periodic = track_pitch(samples, rate, hop)
    pulses, noise, place = np.zeros(len(samples)), draw.normal(size=len(samples)), 0.0
    while place < len(samples):
        period = rate / pitch[int(place / hop)] * (1 + 0.01 * draw.normal())
        pulses[int(place)], place = np.sqrt(period), place + period
    padded, window = np.pad(samples, (length // 2, length)), np.hanning(length)
    made, loudness, memory = np.zeros(len(samples)), 0.0, np.zeros(order)
    for number in range(-(-len(samples) // hop)):
        part = slice(number * hop, (number + 1) * hop)
        frame = padded[number * hop : number * hop + length] * window
        lags = np.correlate(frame, frame, "full")[length - 1 : length + order]
        lags[0] = lags[0] * 1.0001 + 1e-9
        prediction = solve_toeplitz(lags[:-1], lags[1:])
        loudness = 0.5 * loudness + 0.5 * np.sqrt(max(lags[0] - prediction @ lags[1:], 0) / np.sum(window**2))
        share = breath if periodic[number] > voiced_from else 1
        source = pulses[part] * (1 - share) + noise[part] * share
        made[part], memory = lfilter([loudness], np.r_[1, -prediction], source, zi=memory)
    return made, f"linear prediction of order {order}"


def keep_envelope(
    samples: np.ndarray, rate: int, draw: np.random.Generator, settings: dict, others: list[Path]
) -> tuple:
    """Keep smooth envelopes, pitch and loudness only: harmonics plus noise, as WORLD and its kind do."""
    length, hop = 512, rate // 200
    smoothness, border, breath = int(draw.integers(20, 50)), draw.uniform(1500, 4500), draw.uniform(0.02, 0.25)
    pitch, periodic = track_pitch(samples, rate, hop)
    pitch = np.exp(np.convolve(np.log(pitch), np.ones(5) / 5, "same"))
    transform = partial(stft, fs=rate, nperseg=length, noverlap=length - hop)
    frequencies, times, frames = transform(samples)
    cepstrum = np.fft.irfft(np.log(np.abs(frames) + 1e-6), axis=0)
    cepstrum[smoothness:-smoothness] = 0
    envelope = np.exp(np.fft.rfft(cepstrum, axis=0).real)
    time, hops = np.arange(len(samples)), np.arange(len(pitch)) * hop
    steady = np.interp(time, hops, pitch)
    voiced = np.interp(time, hops, (periodic > draw.uniform(0.4, 0.6)).astype(float))
    phase, made = 2 * np.pi * np.cumsum(steady) / rate, np.zeros(len(samples))
    for number in range(1, int(min(border, rate / 2) / pitch.min()) + 1):
        place = [pitch * number * length / rate, np.minimum(np.arange(len(pitch)), envelope.shape[1] - 1)]
        level = map_coordinates(envelope, place, order=1, mode="nearest") * (pitch * number < border)
        made += 2 * np.interp(time, hops, level) * voiced * np.cos(number * phase)
    noise = transform(draw.normal(size=len(samples)))[2]
    quiet = (frequencies[:, None] < border) & (np.interp(times * rate, time, voiced) > 0.5)
    noise *= envelope / np.abs(noise).mean() * np.where(quiet, breath, 1)
    hiss = istft(noise, fs=rate, nperseg=length, noverlap=length - hop)[1]
    made += np.resize(hiss, len(samples))
    loudness, now = (uniform_filter1d(values**2, rate // 50) for values in (samples, made))
    made *= np.sqrt(np.maximum(loudness, 0) / np.maximum(now, 1e-12))
    return made, f"harmonics up to {border:.0f} Hz plus noise, {smoothness} cepstral values"


RESYNTHESES = {"griffinlim": keep_mel_spectrogram, "lpc": keep_prediction, "harmonic": keep_envelope}
LAUNDERING = {
    "noise": add_noise,
    "reverb": add_reverb,
    "resample": resample,
    "codec": code,
    "bandlimit": limit_band,
    "gain": lower_gain,
    "clip": clip,
    **RESYNTHESES,
}


def launder(
    samples: np.ndarray, condition: str, stem: str, settings: dict, others: list[Path]
) -> tuple[np.ndarray, str]:
    """Launder a recording as one of CONDITIONS says.

    Args:
        stem: the name of the image to be made, from which with SEED all draws follow.
        others: recordings that babble may be made of.

    Returns:
        As many samples, with a peak of 1, and words for what was done.
    """
    draw = np.random.default_rng([settings["seed"], zlib.crc32(stem.encode())])
    words = []
    for name in condition.split("+"):
        if name != "clean":
            length = len(samples)
            if name in RESYNTHESES:  # their windows are longer than the shortest recordings
                samples = np.resize(samples, max(length, 2048))
            samples, done = LAUNDERING[name](samples, settings["sample_rate"], draw, settings, others)
            samples = samples[:length]
            samples = samples / np.abs(samples).max()
            words.append(done)
    return samples, "; ".join(words)


# ---- Pictures


def fill_up(samples: np.ndarray, length: int) -> np.ndarray:
    """Repeat a short recording from a place of its own until it is `length` samples long.

    Silence or a constant would show how long the recording was, and so would a seam that stands at
    the same place in every picture: the starting point is drawn from the number of samples.
    """
    if len(samples) >= length:
        return samples
    start = np.random.default_rng(len(samples)).integers(len(samples))
    return np.resize(np.roll(samples, -start), length)


@cache
def weigh_bins(range_hz: tuple[float, float], rows: int, scale: str, fft_length: int, rate: int) -> np.ndarray:
    """Weigh the bins of a spectrum for each row of a picture: float64, shape (fft_length // 2 + 1, rows)."""
    rows_bin = space_frequencies(*range_hz, rows, scale) * fft_length / rate
    reach = np.maximum(np.gradient(rows_bin), 1)  # a triangle up to the next rows, or else between two bins
    weights = np.maximum(0, 1 - np.abs(np.arange(fft_length // 2 + 1)[:, None] - rows_bin) / reach)
    return weights / weights.sum(axis=0)


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
    window = get_window("hann", window_length)
    range_hz, size, scale = tuple(settings["frequency_range_hz"]), settings["image_size"], settings["frequency_scale"]
    weights = weigh_bins(range_hz, size, scale, fft_length, rate)
    blocks = np.array_split(frames, -(-len(frames) // FRAMES_AT_ONCE))
    power = np.concatenate([np.abs(np.fft.rfft(block * window, fft_length)) ** 2 @ weights for block in blocks])
    level_db = 10 * np.log10(np.maximum(power, power.max() * 10 ** (-DYNAMIC_RANGE_DB / 10)))
    return (level_db - level_db.mean(axis=0)).T


def cut_parts(samples: np.ndarray, settings: dict) -> list[np.ndarray]:
    """Cut a recording's spectrogram into pictures of equal duration, spread evenly from start to end.

    Neighbours overlap where the length is no multiple, but a rest under a quarter of a picture is left out.

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


def encode_png(part: np.ndarray, settings: dict, notes: dict) -> bytes:
    """Encode one picture as a palette PNG that carries its settings, and notes of how it came to be."""
    image = Image.frombytes("P", part.shape[::-1], part.tobytes())
    palette = colormaps["magma"](np.linspace(0, 1, settings["grey_levels"]), bytes=True)[:, :3]
    image.putpalette(palette.tobytes())
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, json.dumps({"settings": settings, **notes}))
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


def find_audio(folder: Path) -> list[Path]:
    """Find the audio files at any depth below a folder.

    Raises:
        ValueError: there is none, or `soundfile` is needed.
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".wav", *SOUNDFILE_SUFFIXES) and path.is_file()
        if not path.name.startswith(".")
    ]
    if not paths:
        raise ValueError(f"{folder}: no .wav, .flac, .ogg or .mp3 file below it")
    compressed = [path for path in paths if path.suffix.lower() in SOUNDFILE_SUFFIXES]
    if compressed and not find_spec("soundfile"):
        raise ValueError(
            f"{len(compressed)} of {len(paths)} files (first: {compressed[0]}) need the package "
            "soundfile: pip install soundfile"
        )
    return paths


def name_images(paths: list[Path], conditions: list[str]) -> dict[str, tuple[Path, str]]:
    """Name the images to be made: {stem: (audio file, condition)}.

    Raises:
        ValueError: two files would make the same image.
    """
    images = {}
    for path in paths:
        recording, _, rest = path.stem.partition("__")
        for condition in conditions:
            stem = f"{recording}__{condition}" + (f"-{rest}" if rest else "")
            if stem in images:
                raise ValueError(f"{images[stem][0]} and {path} would make the same image: rename one")
            images[stem] = path, condition
    for stem, (path, _) in images.items():
        whole, _, number = stem.rpartition("_")
        if whole in images and number.isdigit():
            raise ValueError(f"{images[whole][0]} and {path} might make the same image: rename one")
    return images


def choose_settings(settings: dict, condition: str) -> dict:
    """Choose the settings that shape an image: those of the laundering do not concern a clean one."""
    return {key: value for key, value in settings.items() if condition != "clean" or key not in LAUNDERING_SETTINGS}


def checksum_file(path: Path) -> int:
    """Compute the CRC-32 of a file's content."""
    return zlib.crc32(path.read_bytes())


def find_finished(folder: Path, images: dict[str, tuple[Path, str]], settings: dict) -> set[str]:
    """Find the stems whose images are all there, made with these settings from these recordings.

    Raises:
        ValueError: an image in the folder was made with other settings; or one of the same name from another
            recording, or not by this script.
    """
    found, take_checksum = defaultdict(list), cache(checksum_file)
    for path in folder.glob("*.png"):
        stem = path.stem if path.stem in images else path.stem.rpartition("_")[0]
        try:
            with Image.open(path) as image:
                stored = json.loads(image.text[TEXT_KEY])
            stored["settings"], stored["parts"]
        except (OSError, KeyError, ValueError, TypeError, AttributeError, UnidentifiedImageError):
            if stem in images:
                raise ValueError(f"{path} is there, but not from this script: move it away") from None
            continue
        condition = images[stem][1] if stem in images else "clean"
        for key, value in choose_settings(settings, condition).items():
            if stored["settings"].get(key) != value:
                raise ValueError(
                    f"{path} was made with {key.upper()} = {stored['settings'].get(key)}, now it is "
                    f"{value}: choose another OUTPUT_DIR, or move the old images away"
                )
        if stem in images:
            if stored.get("recording_crc32") != take_checksum(images[stem][0]):
                raise ValueError(f"{path} was made from another {images[stem][0].name}: move the old images away")
            found[stem].append(stored["parts"])
    return {stem for stem, parts in found.items() if len(parts) == parts[0]}


def check_settings(settings: dict) -> None:
    """Raise ValueError that names every setting which cannot be used, its value and what is allowed."""
    rate = settings["sample_rate"]
    steps = [step for condition in settings["conditions"] for step in str(condition).split("+")]
    rules = {
        "conditions": (
            lambda v: steps and set(steps) <= {"clean", *LAUNDERING},
            f"some of clean, {', '.join(LAUNDERING)}, or several joined by +",
        ),
        "snr_range_db": (lambda v: v[0] <= v[1], "(lowest, highest)"),
        "rt60_range_s": (lambda v: 0.05 <= v[0] <= v[1], "(shortest, longest), from 0.05"),
        "seed": (lambda v: v == int(v) and v >= 0, "a whole number of at least 0"),
        "sample_rate": (lambda v: v >= 1000 and v == int(v), "a whole number of at least 1000 Hz"),
        "window_s": (lambda v: v * rate >= 8, "at least 8 samples long"),
        "hop_s": (lambda v: v * rate >= 1, "at least 1 sample long"),
        "frequency_range_hz": (lambda v: 0 <= v[0] < v[1] <= rate / 2, "(low, high), up to half the sample rate"),
        "frequency_scale": (lambda v: v in ("mel", "linear"), "mel or linear"),
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


def make_images(
    images: dict[str, tuple[Path, str]], folder: Path, settings: dict, babble: list[Path]
) -> tuple[int, list[str]]:
    """Make the images of every recording; go on past what cannot be read.

    Returns:
        The number of files written, and a line for each recording or copy that was left out.
    """
    by_recording = defaultdict(dict)
    for stem, (path, condition) in images.items():
        by_recording[path][stem] = condition
    written, failed = 0, []
    for path, copies in tqdm(by_recording.items(), "Making spectrograms", unit=" recordings", disable=None):
        others = [other for other in babble if other.stem != path.stem]
        try:
            checksum, samples = checksum_file(path), read_audio(path, settings["sample_rate"])
            if len(samples) < settings["window_s"] * settings["sample_rate"]:
                raise ValueError("it is shorter than WINDOW_S")
        except Exception as error:  # the decoders raise many kinds; every one is reported by name
            failed.append(f"{path}: {str(error) or type(error).__name__}")
            continue
        for stem, condition in copies.items():
            try:
                laundered, words = launder(samples, condition, stem, settings, others)
                parts = cut_parts(laundered, settings)
            except Exception as error:
                failed.append(f"{path} ({condition}): {str(error) or type(error).__name__}")
                continue
            notes = {"parts": len(parts), "recording_crc32": checksum, **({"laundering": words} if words else {})}
            for number, part in enumerate(parts, 1):
                name = f"{stem}_{number}.png" if len(parts) > 1 else f"{stem}.png"
                write_file(folder / name, encode_png(part, choose_settings(settings, condition), notes))
                written += 1
    return written, [f"left out: {line}".splitlines()[0] for line in failed]


def collect_settings() -> dict:
    """Collect the settings that shape images."""
    return {
        "sample_rate": SAMPLE_RATE,
        "window_s": WINDOW_S,
        "hop_s": HOP_S,
        "frequency_range_hz": FREQUENCY_RANGE_HZ,
        "frequency_scale": FREQUENCY_SCALE,
        "db_range": DB_RANGE,
        "seconds_per_image": SECONDS_PER_IMAGE,
        "image_size": IMAGE_SIZE,
        "grey_levels": GREY_LEVELS,
        "snr_range_db": SNR_RANGE_DB,
        "rt60_range_s": RT60_RANGE_S,
        "seed": SEED,
    }


def main() -> int:
    """Make what is missing in OUTPUT_DIR. Returns the exit status: 0, or 1 if a file was left out."""
    here = Path(__file__).resolve().parent
    settings = collect_settings()
    check_settings({"conditions": CONDITIONS, **settings})
    settings = json.loads(json.dumps(settings))  # as the images will give them back
    paths = find_audio(here / INPUT_DIR)
    images = name_images(paths, list(dict.fromkeys(CONDITIONS)))
    babble = find_audio(here / BABBLE_DIR) if BABBLE_DIR else []
    if any("codec" in condition for condition in CONDITIONS) and not find_spec("soundfile"):
        print("soundfile is not installed: codecs are mu-law, A-law and ADPCM only")
    folder = here / OUTPUT_DIR
    folder.mkdir(parents=True, exist_ok=True)
    finished = find_finished(folder, images, settings)
    todo = {stem: image for stem, image in images.items() if stem not in finished}
    written, failed = make_images(todo, folder, settings, babble)
    for line in failed:
        print(line, file=sys.stderr)
    print(
        f"{len(paths)} recordings, {len(images)} copies of them: {len(finished)} had their images already, "
        f"{written} images made now, {len(failed)} recordings or copies left out"
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
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
