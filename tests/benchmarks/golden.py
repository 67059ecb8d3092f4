"""Compare what this working tree computes with what another commit computes, bit for bit, on the demo.

    .venv/bin/python tests/benchmarks/golden.py COMMIT

With both versions, one after the other (float32, one thread, fixed seed): makes images of a folder of recordings (every
condition and resynthesis, several rates, lengths and channels, speakers, recordings to judge), trains for two epochs on
them and on the demo images, and evaluates three CSVs, one without labels. Compares the images, both checkpoints with
all that is in them, history, CSVs, score and key files, text reports, pages, the pixels of pictures, the summary and
what was printed; times, checksums of checkpoint and CSV, and versions aside. Prints a line for each; exit status 1 if
any differs. Run it before and after a change that should not change results. Takes 5 minutes.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import EVALUATOR, MAKER, TRAINER, read_csv  # noqa: E402

CONSTANTS = {
    MAKER: {
        "CONDITIONS": ("clean", "noise", "reverb", "resample", "codec", "bandlimit", "gain", "clip", "reverb+noise"),
        "FAKES": ("griffinlim", "lpc", "harmonic+codec"),
        "BABBLE_DIR": "audio",
    },
    TRAINER: {
        "HOLDOUT_CSVS": ["test_data/test.csv", "test_data/test_own.csv"],
        "EPOCHS": 2,
        "WORKERS": 0,
        "PRETRAINED": None,
        "PRECISION": "float32",
    },
    EVALUATOR: {
        "CSV_FILES": ["test_data/test.csv", "test_data/test_own.csv", "test_data/unknown.csv"],
        "WORKERS": 0,
        "PRECISION": "float32",
    },
}
CHANGING = ("time_utc", "model_sha256", "csv_sha256", "versions")  # keys of summary and checkpoint that may differ


def make_recordings(folder: Path) -> None:
    """Write recordings of two classes, with shared folders and without, and some to judge."""
    rng = np.random.default_rng(0)
    for number, (kind, speaker) in enumerate((k, s) for k in ("original", "deepfake", "unknown") for s in "abc"):
        for take, seconds in enumerate((0.4, 1.9, 5.3)):
            rate, channels = ((16000, 1), (44100, 2), (8000, 1))[take]
            time_s = np.arange(int(seconds * rate))[:, None] / rate
            tones = [np.sin(2 * np.pi * 110 * (number + 2) * k * time_s + rng.uniform(0, 6)) / k for k in range(1, 12)]
            samples = sum(tones) * (np.sin(5 * time_s) > -0.5) + 0.05 * rng.normal(size=(len(time_s), channels))
            shared = speaker == "a" and kind != "unknown"
            path = folder / kind / (speaker if shared else f"{kind}-{speaker}") / f"take{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            wavfile.write(path, rate, (samples / np.abs(samples).max() * 30000).astype(np.int16))


def run_version(folder: Path, source: Path) -> dict[str, str]:
    """Run all three scripts of a source tree in a folder with the demo. Returns what each printed, times left out."""
    for kind in ("original", "deepfake"):
        shutil.copytree(ROOT / "data" / kind / "combined", folder / "data" / kind / "combined")
    shutil.copytree(ROOT / "test_data", folder / "test_data", ignore=lambda _, names: set(names) - {"test.csv"})
    make_recordings(folder / "data/audio")
    for module in (*source.glob("models/*.py"), *source.glob("data/*.py")):
        (folder / module.parent.name).mkdir(exist_ok=True)
        shutil.copy(module, folder / module.parent.name)
    printed = {}
    for script, constants in CONSTANTS.items():
        text = (source / script).read_text(encoding="utf-8")
        for name, value in constants.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        (folder / script).write_text(text, encoding="utf-8")
        command = [sys.executable, str(folder / script)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source / script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        text = f"{done.stdout}\n{done.stderr}".replace(str(folder), "")
        printed[script] = re.sub(r"[\d.]+ s\b|seconds [\d.]+", "", text)
    return printed


def to_plain(value: object) -> object:
    """Turn what a checkpoint holds into what `==` compares."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items() if key not in CHANGING}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def read_results(folder: Path, printed: dict[str, str]) -> dict[str, object]:
    """Read what is compared, by name."""
    results: dict[str, object] = {f"printed by {script}": text for script, text in printed.items()}
    images = {path.relative_to(folder): path.read_bytes() for path in folder.glob("data/*/**/*.png")}
    results[f"{len(images):,} images, byte by byte"] = images
    for kind in ("best", "final"):
        content = torch.load(folder / f"models/experiments/{kind}_laundered_processed.pth", weights_only=True)
        results |= {f"{kind} checkpoint, {name}": value for name, value in to_plain(content).items()}
    history = read_csv(folder / "models/experiments/history.csv")
    results["history"] = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
    entries = json.loads((folder / "test_data/aggregate_test_reports.json").read_text(encoding="utf-8"))
    for entry in entries:
        results |= {f"summary of {entry['file']}, {name}": value for name, value in to_plain(entry).items()}
    for path in [*sorted((folder / "test_data").iterdir()), folder / "models/experiments/learning_curves.png"]:
        if path.suffix == ".png":
            with Image.open(path) as image:
                results[f"{path.name}, pixels"] = np.asarray(image).tolist()
        elif path.suffix != ".json":
            content = path.read_bytes()
            results[path.name] = re.sub(rb"[0-9a-f]{64}|\d{4}-\d\d-\d\dT[\d:+]+", b"", content)
    return results


def main() -> int:
    """Compare with the commit that the command line names. Returns the exit status."""
    with tempfile.TemporaryDirectory() as work:
        archive = subprocess.run(["git", "archive", sys.argv[1]], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = [member for member in tar if member.name.endswith(".py")]
            tar.extractall(Path(work) / "source", members)
        sources = {"before": Path(work) / "source", "now": ROOT}
        folders = {name: Path(work) / name for name in sources}
        before, now = (read_results(folders[name], run_version(folders[name], sources[name])) for name in sources)
    differing = [name for name in before if name not in now or before[name] != now[name]]
    for name in before:
        print(f"{name}: {'DIFFERS' if name in differing else 'equal'}")
    print(f"New: {', '.join(name for name in now if name not in before) or 'nothing'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
