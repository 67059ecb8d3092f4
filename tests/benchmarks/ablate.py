"""Measure recipes on speech of voices, pages and systems that training never met, clean and laundered.

    .venv/bin/python tests/benchmarks/ablate.py [recipe ...]

In:  CORPUS_DIR/manifest.csv with the columns path, label (original, deepfake), repo (what is held out together: a page
     or corpus), family and kind (of deepfakes), and the clips that it names; soundfile.
Out: WORK_DIR/results.csv, a row for each recipe, fold, seed and measure; the table of means and ranges over them.

Each fold holds out a fifth of the repos, with all their voices, channels, texts and most of their systems. The scripts
themselves run, with the constants that a recipe sets. What is in results.csv is not run again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import EVALUATOR, MAKER, TRAINER, copy_script, read_csv, write_csv  # noqa: E402

from models.metrics import compute_eer, walk_errors  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Settings
CORPUS_DIR = Path("corpus")
WORK_DIR = Path("ablation")
FOLDS = 5
SEEDS = (0, 1)
SMALL = False  # True: half the channels in each stage of the network, to choose by; named "..., small"
CONDITIONS = ("clean", "noise", "reverb", "resample", "codec", "bandlimit")  # of the test clips
RECIPES = {  # constants of the maker and of the trainer that differ from ours; sources: False hides them
    "ours": {},
    "no laundered copies": {"maker": {"CONDITIONS": ("clean",)}},
    "classes balanced over all": {"sources": False},
    "window of 64 ms": {"maker": {"WINDOW_S": 0.064}},
    "window of 16 ms": {"maker": {"WINDOW_S": 0.016}},
    "resyntheses": {"maker": {"FAKES": ("griffinlim", "lpc", "harmonic")}},
    "224 pixels": {"trainer": {"IMAGE_SIZE": 224}},
    "whole width": {"trainer": {"TIME_CROP": 1.0}},
    "weight decay of 0.5": {"trainer": {"WEIGHT_DECAY": 0.5}},
    "8 epochs": {"trainer": {"EPOCHS": 8}},
    "batches of 128": {"trainer": {"BATCH_SIZE": 128, "LEARNING_RATE": 2e-3}},
}
# ------------------------------------------------------------------------------------------------

HALF = """

from torchvision.models.resnet import BasicBlock, ResNet


class HalfResNet(ResNet):
    def _make_layer(self, block, planes, *others, **options):
        return super()._make_layer(block, planes // 2, *others, **options)


def make_network():
    network = HalfResNet(BasicBlock, [2, 2, 2, 2])
    network.fc = nn.Linear(256, len(CLASSES))
    return network
"""


# ---- Images and folds


def make_images(rows: list[dict], recipe: dict, **changes) -> Path:
    """Make the images of all clips, or find those that were made with these constants before. Returns their data/."""
    constants = {"CONDITIONS": ("clean", "any"), **recipe.get("maker", {}), **changes}
    sources = recipe.get("sources", True)
    folder = WORK_DIR.resolve() / f"images-{zlib.crc32(repr((sorted(constants.items()), sources)).encode()):08x}"
    for row in rows:
        repo = row["repo"].replace("/", "_")
        name = Path(row["path"]).name if sources else f"{repo}-{Path(row['path']).name}"
        link = folder / "data/audio" / row["label"] / (repo if sources else "") / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((CORPUS_DIR / row["path"]).resolve())
    script = copy_script(folder, MAKER, HOLDOUT_SPEAKERS=0, **constants)
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def choose_folds(rows: list[dict]) -> dict[str, int]:
    """Choose the fold of each repo, the largest first, so that classes and sizes are balanced."""
    counts = defaultdict(lambda: np.zeros(2))
    for row in rows:
        counts[row["repo"]][row["label"] == "original"] += 1
    total, loads, folds = sum(counts.values()) / FOLDS, np.zeros((FOLDS, 2)), {}
    for repo in sorted(sorted(counts), key=lambda name: -counts[name].sum()):
        loaded = (loads + counts[repo]) / total
        folds[repo] = int(np.argmin(loaded.max(1) + loaded.sum(1) / 2))
        loads[folds[repo]] += counts[repo]
    return folds


def list_test_images(rows: list[dict], data_dir: Path) -> list[list[str]]:
    """List the images of some clips, clean and laundered: img_path, actual_output, condition, path of the clip."""
    paths = defaultdict(list)
    for path in sorted(data_dir.glob("*/combined/**/*.png")):
        paths[re.sub(r"_\d+$", "", path.stem)].append(path)  # the parts of a clip
    images = []
    for row in rows:
        repo, stem = row["repo"].replace("/", "_"), Path(row["path"]).stem
        for condition in CONDITIONS:
            for path in paths[f"{repo}-{stem}__{condition}"]:
                label = row["label"].capitalize()
                images.append([str(path.relative_to(data_dir)), label, condition, row["path"]])
    return images


# ---- A run


def run_fold(data_dir: Path, test_dir: Path, test: list[list[str]], constants: dict) -> list[dict]:
    """Train on data_dir without the clips of the test images and judge these, of test_dir. Returns the CSV's rows."""
    folder = WORK_DIR.resolve() / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write_csv(folder / "test.csv", [["img_path", "actual_output", "condition", "clip"], *test])
    held = [[image[0]] for image in test if (data_dir / image[0]).exists()]
    write_csv(folder / "holdout.csv", [["img_path"], *held])
    common = {"DATA_DIR": str(data_dir), "HOLDOUT_CSVS": ["holdout.csv"], "PRETRAINED": None, "CACHE_DIR": "../cache"}
    common |= {"EPOCHS": 4, "EPOCH_IMAGES": 25_000, "VAL_FRACTION": 0.06}
    settings = {"IMG_BASE_PATH": str(test_dir), "CSV_FILES": ["test.csv"], "REPORT_BY": ("condition",)}
    for script, changes in ((TRAINER, {**common, **constants}), (EVALUATOR, settings)):
        target = copy_script(folder, script, **changes)
        if SMALL:
            with open(folder / "models/detector.py", "a") as module:
                module.write(HALF)
        done = subprocess.run([sys.executable, str(target)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stdout}")
    return read_csv(folder / "test.csv")


def measure_eer(llr: np.ndarray, is_fake: np.ndarray) -> float:
    """Measure the equal error rate."""
    return float(compute_eer(*walk_errors(llr, is_fake, np.ones((1, len(llr)))))[0])


def measure_fold(judged: list[dict], clips: dict[str, dict], known: set[str], both: set[str]) -> dict[str, float]:
    """Measure a fold: errors on speech of new pages, voices and systems.

    Args:
        judged: rows of the CSV; clips: rows of the manifest by path.
        known: families of training; both: repos that hold both classes.
    """
    scores = {name: {} for name in CONDITIONS}
    for row in judged:
        score = np.clip(float(row["deepfake_score"]), 1e-6, 1 - 1e-6)
        scores[row["condition"]].setdefault(row["clip"], []).append(np.log(1 / score - 1))
    chosen = [clips[path] for path in scores["clean"]]
    llr = np.array([np.mean(values) for values in scores["clean"].values()])
    is_fake = np.array([row["label"] == "deepfake" for row in chosen])
    repos = np.array([row["repo"] for row in chosen])
    measures = {"EER, all": measure_eer(llr, is_fake)}
    pages = [
        repos == repo
        for repo in sorted(both)
        if min(sum((repos == repo) & is_fake), sum((repos == repo) & ~is_fake)) > 2
    ]
    measures["EER within pages, mean"] = float(np.mean([measure_eer(llr[page], is_fake[page]) for page in pages]))
    unknown = np.array([row["family"] not in known for row in chosen])
    vocoded = np.array([row["kind"] in ("vocoder", "codec") for row in chosen])
    for name, part in (("families unknown in training", unknown), ("vocoder and codec fakes", vocoded)):
        measures[f"EER, {name}"] = measure_eer(llr[part | ~is_fake], is_fake[part | ~is_fake])
    misses, false_alarms = walk_errors(llr, is_fake, np.ones((1, len(llr))))
    threshold = np.unique(llr)[max(0, np.abs(misses - false_alarms).argmin() - 1)]
    on_page = np.isin(repos, list(both))
    measures["genuine flagged, pages with fakes"] = float((llr[~is_fake & on_page] <= threshold).mean())
    measures["genuine flagged, other"] = float((llr[~is_fake & ~on_page] <= threshold).mean())
    half = (np.mean(llr[~is_fake] < 0) + np.mean(llr[is_fake] >= 0)) / 2
    measures["half total error"] = float(half)
    for condition in CONDITIONS[1:]:
        if scores[condition]:
            values = np.array(
                [np.mean(scores[condition][row["path"]]) for row in chosen if row["path"] in scores[condition]]
            )
            measures[f"EER, {condition}"] = measure_eer(values, is_fake)
    return measures


# ---- Main


def print_table(results: list[dict]) -> None:
    """Print each measure's mean over folds and seeds for each recipe, in per cent, and the lowest and highest run."""
    values = defaultdict(list)
    for row in results:
        values[row["measure"], row["recipe"]].append(100 * float(row["value"]))
    recipes = list(dict.fromkeys(row["recipe"] for row in results))
    print(f"| %, mean (lowest to highest run) | {' | '.join(recipes)} |\n|---|{'---|' * len(recipes)}")
    for measure in dict.fromkeys(row["measure"] for row in results):
        runs = [values[measure, recipe] for recipe in recipes]
        cells = [f"{np.mean(run):.1f} ({min(run):.1f} to {max(run):.1f})" if run else "" for run in runs]
        print(f"| {measure} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is not in results.csv yet, print the table."""
    WORK_DIR.mkdir(exist_ok=True)
    rows = read_csv(CORPUS_DIR / "manifest.csv")
    clips, folds = {row["path"]: row for row in rows}, choose_folds(rows)
    labels = defaultdict(set)
    for row in rows:
        labels[row["repo"]].add(row["label"])
    both = {repo for repo, found in labels.items() if len(found) == 2}
    path, fields = WORK_DIR / "results.csv", ["recipe", "fold", "seed", "measure", "value"]
    results = read_csv(path) if path.exists() else []
    for seed in SEEDS:
        for fold in range(FOLDS):
            for name in sys.argv[1:] or RECIPES:
                recipe, name = RECIPES[name], name + ", small" * SMALL
                if any((row["recipe"], row["fold"], row["seed"]) == (name, str(fold), str(seed)) for row in results):
                    continue
                data_dir = make_images(rows, recipe)
                test_dir = make_images(rows, recipe, CONDITIONS=CONDITIONS)
                test = list_test_images([row for row in rows if folds[row["repo"]] == fold], test_dir)
                judged = run_fold(data_dir, test_dir, test, {"SEED": seed, **recipe.get("trainer", {})})
                known = {row["family"] for row in rows if folds[row["repo"]] != fold}
                measures = measure_fold(judged, clips, known, both)
                print(
                    name, fold, seed, json.dumps({key: round(value, 3) for key, value in measures.items()}), flush=True
                )
                results += [dict(zip(fields, (name, fold, seed, key, value))) for key, value in measures.items()]
                results = [{key: str(value) for key, value in row.items()} for row in results]
                write_csv(path, [fields, *([row[field] for field in fields] for row in results)])
    print_table(results)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
