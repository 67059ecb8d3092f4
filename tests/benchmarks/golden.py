"""Compare what this working tree computes with what another commit computes, bit for bit, on small images.

    .venv/bin/python tests/benchmarks/golden.py COMMIT

Trains for three epochs and evaluates with both (float32, one thread, fixed seed), and compares weights, calibration,
history, CSV, score and key files, and the numbers of the summary. Prints a line for each; exit status 1 if any differs.
Run it before and after a change that should not change results. Takes 30 seconds.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import EVALUATOR, TRAINER, make_project, read_csv  # noqa: E402

SETTINGS = {"IMAGE_SIZE": 64, "EPOCHS": 3, "BATCH_SIZE": 8, "WORKERS": 0, "PRETRAINED": None, "VAL_FRACTION": 0.25}
CHANGING = ("report", "time_utc", "model_sha256", "csv_sha256", "versions")  # keys of the summary that may differ


def run_version(folder: Path, source: Path) -> Path:
    """Train and evaluate in a folder with the scripts and modules of a source tree."""
    make_project(folder)
    for script in (TRAINER, EVALUATOR):
        text = (source / script).read_text(encoding="utf-8")
        for name, value in {**SETTINGS, "PRECISION": "float32"}.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        (folder / script).write_text(text, encoding="utf-8")
    for module in source.glob("models/*.py"):
        (folder / "models").mkdir(exist_ok=True)
        (folder / "models" / module.name).write_bytes(module.read_bytes())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script in (TRAINER, EVALUATOR):
        subprocess.run([sys.executable, script], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return folder


def read_results(folder: Path) -> dict[str, object]:
    """Read what is compared, by name."""
    results: dict[str, object] = {}
    for kind in ("best", "final"):
        content = torch.load(folder / f"models/experiments/{kind}_laundered_processed.pth", weights_only=True)
        results[f"weights, {kind}"] = {name: tensor.tolist() for name, tensor in content["state_dict"].items()}
        results[f"calibration, {kind}"] = content["calibration"]
    history = read_csv(folder / "models/experiments/history.csv")
    results["history"] = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
    for name in ("test.csv", "test_scores.tsv", "test_key.tsv"):
        results[name] = (folder / "test_data" / name).read_bytes()
    (entry,) = json.loads((folder / "test_data/aggregate_test_reports.json").read_text(encoding="utf-8"))
    results.update((f"summary, {name}", value) for name, value in entry.items() if name not in CHANGING)
    return results


def main() -> int:
    """Compare with the commit that the command line names. Returns the exit status."""
    with tempfile.TemporaryDirectory() as work:
        archive = subprocess.run(["git", "archive", sys.argv[1]], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = [member for member in tar if member.name.endswith(".py")]
            tar.extractall(Path(work) / "source", members)
        sources = {"before": Path(work) / "source", "now": ROOT}
        before, now = (read_results(run_version(Path(work) / name, source)) for name, source in sources.items())
    differing = [name for name in before if name not in now or before[name] != now[name]]
    for name in before:
        print(f"{name}: {'DIFFERS' if name in differing else 'equal'}")
    print(f"New: {', '.join(name for name in now if name not in before) or 'nothing'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
