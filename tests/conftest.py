"""Helpers that run a script as its users do, and fixtures that make a small set of images."""

import contextlib
import csv
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from scipy.io import wavfile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import containers  # noqa: E402
import laundering  # noqa: E402
import pictures  # noqa: E402
import recordings  # noqa: E402

TRAINER, EVALUATOR, MAKER = "train_deepfake_detector.py", "evaluate_deepfake_model.py", "data/make_spectrograms.py"
QUICK = {"IMAGE_SIZE": 32, "EPOCHS": 1, "BATCH_SIZE": 8, "WORKERS": 0, "PRETRAINED": None, "VAL_FRACTION": 0.25}
FORMAT = pictures.Format(16000, 0.032, 0.008, (60, 7900), (-30, 40), 112, 32)
CLEAN = {"CONDITIONS": ("clean",)}
RATE = 16000
LAUNDERING = laundering.Laundering((5, 30), (0.2, 0.8), 0)
O0, D0 = "original/combined/o0__clean_1.png", "deepfake/combined/d0__clean_1.png"
CHECKPOINT = "models/experiments/best_laundered_processed.pth"
MODELS = "models/experiments"


def pytest_configure() -> None:
    """Let small networks compute in one thread: more would only wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)


class Outcome(NamedTuple):
    """What a script left."""

    status: int
    out: str
    err: str


def copy_script(folder: Path, script: str, **constants: object) -> Path:
    """Copy a script into a folder, beside the modules that it imports, and edit its constants, as a user would."""
    text = (ROOT / script).read_text(encoding="utf-8")
    for name, value in constants.items():
        text, count = re.subn(rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", text, flags=re.MULTILINE)
        assert count == 1, f"{script} has {count} lines '{name} = '"
    text = re.sub(r"\b(Posix|Windows)Path\(", "Path(", text)
    for module in (*ROOT.glob("models/*.py"), *ROOT.glob("data/*.py")):
        (folder / module.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(module, folder / module.parent.name)
    target = folder / script
    target.write_text(text, encoding="utf-8")
    return target


def run_process(folder: Path, script: str, env: dict = None, cwd: Path = None, **constants: object) -> Outcome:
    """Run an edited copy of a script as its users do: as a process of its own, from `cwd` or its own folder."""
    target = copy_script(folder, script, **constants)
    environment = {**os.environ, "TORCH_HOME": str(folder / "torch_home"), **(env or {})}
    command = [sys.executable, str(target)]
    done = subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def run(folder: Path, script: str, **constants: object) -> Outcome:
    """Run an edited copy of a script in this process: the same, but without seconds of imports."""
    target = copy_script(folder, script, **constants)
    out, err = io.StringIO(), io.StringIO()
    argv, handler, path = sys.argv, signal.getsignal(signal.SIGTERM), list(sys.path)
    sys.argv = [str(target)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(target), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv, sys.path[:] = argv, path
        signal.signal(signal.SIGTERM, handler)
    return Outcome(status, out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Assert that a script ended with status 2 and one line on standard error that holds these words."""
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def read_summary(folder: Path) -> list:
    """Read the summary that the evaluator wrote beside test_data/test.csv."""
    return json.loads((folder / "test_data/aggregate_test_reports.json").read_text(encoding="utf-8"))


def read_checkpoint(folder: Path, kind: str = "best") -> dict:
    """Read the best or final checkpoint."""
    return torch.load(folder / f"models/experiments/{kind}_laundered_processed.pth", weights_only=True)


def make_image(path: Path, seed: int, fake: bool, size: int = 40) -> None:
    """Write noise with a bright line: high for fakes, low for originals."""
    pixels = np.random.default_rng(seed).integers(0, 120, (size, size, 3), dtype=np.uint8)
    row = size // 4 if fake else 3 * size // 4
    pixels[row : row + size // 10 + 1] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_csv(path: Path, rows: list) -> None:
    """Write a CSV, header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_csv(path: Path) -> list:
    """Read a CSV as a list of dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_project(folder: Path, recordings: int = 16) -> Path:
    """Make a data folder of two images per recording, and a test CSV that lists the first two recordings of a class."""
    rows = [["img_path", "actual_output"]]
    for kind in ("deepfake", "original"):
        for number in range(recordings):
            for part in (1, 2):
                name = f"{kind}/combined/{kind[0]}{number}__clean_{part}.png"
                make_image(folder / "data" / name, seed=zlib.crc32(name.encode()), fake=kind == "deepfake")
                if number < 2:
                    rows.append([name, kind.capitalize()])
    write_csv(folder / "test_data" / "test.csv", rows)
    return folder


# ---- Recordings


def cut(samples, form=FORMAT):
    """The pictures of a recording."""
    return pictures.draw_parts(pictures.fill_up(samples, form.duration), pictures.place_parts(len(samples), form), form)


def make_tone(frequency, seconds, rate=16000, gap=0.5):
    """A tone that comes and goes, in a little noise: float64, shape (samples,)."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=len(time))
    return np.sin(2 * np.pi * frequency * time) * (time % (2 * gap) < gap) + 0.01 * noise


def write_wav(path, samples, rate=16000, kind=np.int16):
    """Write samples as WAV, scaled to their peak."""
    path.parent.mkdir(parents=True, exist_ok=True)
    peak = np.abs(samples).max()
    scale = {np.int16: 32000, np.int32: 2**31 - 1000, np.float32: 1.0, np.uint8: 100}[kind]
    wavfile.write(path, rate, (samples / peak * scale + (128 if kind is np.uint8 else 0)).astype(kind))


def find_row(frequency):
    """The row, from the top, in which a frequency lies."""
    return 111 * (7900 - frequency) / (7900 - 60)


def list_images(folder):
    """The paths of all images below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def make_voice(seed=0, seconds=2.0):
    """Bursts of noise with a voice-like slope: float64, peak 1."""
    draw = np.random.default_rng(seed)
    samples = np.convolve(draw.normal(size=int(seconds * RATE)), np.exp(-np.arange(40) / 8), mode="same")
    samples *= 0.1 + (np.sin(np.arange(len(samples)) / RATE * 2 * np.pi * 3) > 0)
    return samples / np.abs(samples).max()


def write_voices(folder, names):
    """Write a recording for each name; return their paths."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        wavfile.write(folder / f"{name}.wav", RATE, (make_voice(number) * 32000).astype(np.int16))
    return sorted(folder.iterdir())


def make_draw(seed, others=()):
    """What a laundering depends on, for a seed."""
    rng = np.random.default_rng(seed)
    return laundering.Draw(RATE, rng, LAUNDERING, others, lambda path: recordings.read_audio(path, RATE)[0])


@pytest.fixture
def without_soundfile(monkeypatch: pytest.MonkeyPatch):
    """As if the package soundfile were not installed."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    containers.try_soundfile.cache_clear()
    yield
    containers.try_soundfile.cache_clear()


# ---- Results


def evaluate_text(judged, text):
    """Evaluate a CSV of this text."""
    (judged / "test_data/test.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return run(judged, EVALUATOR, WORKERS=0)


def draw_scores(bona_fide, spoof, seed=0):
    """Log-likelihood ratios of two classes, and which are fakes."""
    draw = np.random.default_rng(seed)
    llr = np.concatenate([draw.normal(1, 1.5, bona_fide), draw.normal(-1, 1.5, spoof)])
    return llr, np.arange(len(llr)) >= bona_fide


def read_tsv(path):
    """Read a score or key file as rows."""
    return [line.split("\t") for line in path.read_text().splitlines()]


def add_condition(folder):
    """Give the test CSV a column that its results are broken down by."""
    rows = read_csv(folder / "test_data/test.csv")
    cells = [[row["img_path"], row["actual_output"], f"c{number % 2}"] for number, row in enumerate(rows)]
    write_csv(folder / "test_data/test.csv", [["img_path", "actual_output", "condition"], *cells])


def write_parts(path, seed, fakes, seconds=1.8):
    """Write the images of a recording's parts, as the maker does: one for each entry of `fakes`."""
    for number, fake in enumerate(fakes, 1):
        part = path.with_name(f"{path.name}__clean_{number}.png")
        make_image(part, seed + number, fake)
        info = PngImagePlugin.PngInfo()
        notes = {"settings": {}, "seconds": seconds, "parts": len(fakes), "start_s": (number - 1) * seconds}
        info.add_text("spectrogram", json.dumps(notes))
        with Image.open(part) as image:
            image.load()
            image.save(part, pnginfo=info)


def assert_picture(content, size):
    """Assert that a PNG has this size and is not blank."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB"), float)
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# ---- Projects


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with data/ and test_data/ as users keep them."""
    return make_project(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the trainer has run for long enough to tell the two classes apart."""
    folder = make_project(tmp_path_factory.mktemp("trained"))
    outcome = run(folder, TRAINER, **{**QUICK, "EPOCHS": 8})
    assert outcome.status == 0, outcome.err
    (folder / "train_output.txt").write_text(outcome.out, encoding="utf-8")
    return folder


@pytest.fixture
def judged(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained project's evaluation side: checkpoint, CSV and images, without the trainer."""
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "test_data", tmp_path / "test_data")
    shutil.copytree(trained / "models", tmp_path / "models")
    return tmp_path
