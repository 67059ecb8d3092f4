"""Resynthesis of genuine recordings: fakes of the same voice, words and channel.

Each function takes samples (float64, shape (samples,), peak 1), their rate in Hz and a generator; it returns as many
samples, and words for what was done.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy  # its parts load when they are first used


def space_mel(low: float, high: float, count: int) -> np.ndarray:
    """Space frequencies evenly on the mel scale (O'Shaughnessy, 1987): Hz, float64, shape (count,)."""
    return 700 * np.expm1(np.linspace(np.log1p(low / 700), np.log1p(high / 700), count))


def invert_mel_spectrogram(samples: np.ndarray, rate: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Keep only a mel spectrogram and estimate the phases: Griffin and Lim, 1984, sped up as Perraudin et al., 2013."""
    length, bands, rounds = int(rng.choice([512, 1024])), int(rng.integers(40, 110)), int(rng.choice([3, 8, 20, 40]))
    to_frames = partial(scipy.signal.stft, fs=rate, nperseg=length, noverlap=3 * length // 4)
    to_samples = partial(scipy.signal.istft, fs=rate, nperseg=length, noverlap=3 * length // 4)
    frequencies, _, frames = to_frames(samples)
    edges = space_mel(40, rate / 2, bands + 2)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    magnitude = np.abs(frames)
    magnitude = np.maximum(np.linalg.pinv(filters) @ (filters @ magnitude), magnitude.max() * 1e-5)
    estimate, before = magnitude * np.exp(2j * np.pi * rng.random(magnitude.shape)), 0
    for _ in range(rounds):
        after = to_frames(to_samples(estimate)[1])[2][:, : magnitude.shape[1]]
        ahead = after + 0.9 * (after - before)
        estimate, before = magnitude * ahead / np.maximum(np.abs(ahead), 1e-9), after
    return to_samples(estimate)[1][: len(samples)], f"{bands} mel bands, Griffin-Lim in {rounds} rounds"


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
    return scipy.signal.medfilt(rate / lags, 5), scipy.signal.medfilt(correlation[np.arange(len(lags)), lags], 3)


def predict_linearly(samples: np.ndarray, rate: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Keep linear prediction, pitch and loudness: pulses and noise through the filters, as LPC vocoders do."""
    order, voiced_from, breath = int(rng.integers(10, 22)), rng.uniform(0.35, 0.6), rng.uniform(0, 0.4)
    hop, length = rate // 100, rate // 40
    pitch, periodic = track_pitch(samples, rate, hop)
    pulses, noise, position = np.zeros(len(samples)), rng.normal(size=len(samples)), 0.0
    while position < len(samples):
        period = rate / pitch[int(position / hop)] * (1 + 0.01 * rng.normal())
        pulses[int(position)], position = np.sqrt(period), position + period
    padded, window = np.pad(samples, (length // 2, length)), np.hanning(length)
    made, loudness, memory = np.zeros(len(samples)), 0.0, np.zeros(order)
    for number in range(-(-len(samples) // hop)):
        span = slice(number * hop, (number + 1) * hop)
        frame = padded[number * hop : number * hop + length] * window
        lags = np.correlate(frame, frame, "full")[length - 1 : length + order]
        lags[0] = lags[0] * 1.0001 + 1e-9
        prediction = scipy.linalg.solve_toeplitz(lags[:-1], lags[1:])
        loudness = 0.5 * loudness + 0.5 * np.sqrt(max(lags[0] - prediction @ lags[1:], 0) / np.sum(window**2))
        noise_fraction = breath if periodic[number] > voiced_from else 1
        source = pulses[span] * (1 - noise_fraction) + noise[span] * noise_fraction
        made[span], memory = scipy.signal.lfilter([loudness], np.r_[1, -prediction], source, zi=memory)
    return made, f"linear prediction of order {order}"


def add_harmonics_and_noise(samples: np.ndarray, rate: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Keep smooth envelopes, pitch and loudness: harmonics plus noise, as WORLD and similar vocoders do."""
    length, hop = 512, rate // 200
    smoothness, border, breath = int(rng.integers(20, 50)), rng.uniform(1500, 4500), rng.uniform(0.02, 0.25)
    pitch, periodic = track_pitch(samples, rate, hop)
    pitch = np.exp(np.convolve(np.log(pitch), np.ones(5) / 5, "same"))
    transform = partial(scipy.signal.stft, fs=rate, nperseg=length, noverlap=length - hop)
    frequencies, times, frames = transform(samples)
    cepstrum = np.fft.irfft(np.log(np.abs(frames) + 1e-6), axis=0)
    cepstrum[smoothness:-smoothness] = 0
    envelope = np.exp(np.fft.rfft(cepstrum, axis=0).real)
    time, hops = np.arange(len(samples)), np.arange(len(pitch)) * hop
    steady = np.interp(time, hops, pitch)
    voiced = np.interp(time, hops, (periodic > rng.uniform(0.4, 0.6)).astype(float))
    phase, made = 2 * np.pi * np.cumsum(steady) / rate, np.zeros(len(samples))
    for number in range(1, int(min(border, rate / 2) / pitch.min()) + 1):
        bins = [pitch * number * length / rate, np.minimum(np.arange(len(pitch)), envelope.shape[1] - 1)]
        level = scipy.ndimage.map_coordinates(envelope, bins, order=1, mode="nearest") * (pitch * number < border)
        made += 2 * np.interp(time, hops, level) * voiced * np.cos(number * phase)
    noise = transform(rng.normal(size=len(samples)))[2]
    quiet = (frequencies[:, None] < border) & (np.interp(times * rate, time, voiced) > 0.5)
    noise *= envelope / np.abs(noise).mean() * np.where(quiet, breath, 1)
    hiss = scipy.signal.istft(noise, fs=rate, nperseg=length, noverlap=length - hop)[1]
    made += np.resize(hiss, len(samples))
    loudness, now = (scipy.ndimage.uniform_filter1d(values**2, rate // 50) for values in (samples, made))
    made *= np.sqrt(np.maximum(loudness, 0) / np.maximum(now, 1e-12))
    return made, f"harmonics up to {border:.0f} Hz plus noise, {smoothness} cepstral values"


RESYNTHESES = {"griffinlim": invert_mel_spectrogram, "lpc": predict_linearly, "harmonic": add_harmonics_and_noise}
