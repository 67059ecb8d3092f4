"""Measure recipes on speech whose voices and generators are held out, clean and laundered.

    .venv/bin/python tests/benchmarks/ablate.py [recipe ...]

In:  CORPUS_DIR/manifest.csv with the columns path, label (original, deepfake), speaker, engine (of deepfakes), group
     (clips of one group share a recording), and the clips that it names.
Out: WORK_DIR/results.csv, a row per recipe, fold, seed and measure; the table of means and spreads over them.

Each fold holds out whole generators and whole voices at once. What is in results.csv is not run again.
"""

from __future__ import annotations

import csv
import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, ResNet

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import make_spectrograms as maker  # noqa: E402

import evaluate_deepfake_model as evaluator  # noqa: E402
import train_deepfake_detector as trainer  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Settings
CORPUS_DIR = Path("corpus")
WORK_DIR = Path("ablation")
FOLDS = (  # held out together: generators, by the beginning of engine (none: only voices); voices, by a part of speaker
    (("hibari",), ("Carlo", "Armelle")),
    (("piper",), ("Allison",)),
    (("espeak", "copy-griffinlim"), ("tuxpaint",)),
    (("festival", "copy-lpc"), ("fillets", "July")),
    (("flite", "copy-world"), ("bass", "June")),
)
SIMILAR = {"copy-griffinlim": "griffinlim", "copy-lpc": "lpc", "copy-world": "harmonic"}  # held out together
SEEDS = (0, 1)
SMALL = False  # True: half the channels and half the rows, several times as fast, to choose by; named "..., small"
CONDITIONS = ("clean", "noise", "reverb", "resample", "codec", "bandlimit")
FORMAT = {"frequency_range_hz": [60, 3500]}  # what differs from the maker's own settings
LINEAR = {"frequency_scale": "linear"}
BASE = {
    "format": {},
    "copies": CONDITIONS,
    "resyntheses": 0.5,
    "known": (),
    "epochs": 12,
    "crop": 0.5,
    "augment": True,
    "rate": 1e-3,
    "decay": 0.05,
    "smoothing": 0.05,
    "dropout": 0.0,
    "mixup": 0.0,
    "paired": False,
    "average": False,
    "start": None,
    "halved": None,
}
START_EPOCHS = 4  # of the same number of epochs: a start costs no further time
RECIPES = {
    # What differs from BASE. resyntheses: share of the fakes; known: held-out generators that they may imitate; mixup:
    # both parameters of its beta distribution; paired: resyntheses stand in a batch with their originals; average: of
    # the weights over some 200 steps; start: another task for the first epochs; halved: which of the genuine clips are
    # not used
    "plain": {
        "format": {
            "window_s": 0.064,
            "hop_s": 0.032,
            "seconds_per_image": 3.0,
            **LINEAR,
            "frequency_range_hz": [0, 8000],
        },
        "copies": ("clean",),
        "resyntheses": 0,
        "augment": "flips and rotation",
        "crop": 1.0,
        "epochs": 8,
        "clips": 1200,
    },
    "ours": {},
    "ours, copies by known methods": {"known": tuple(SIMILAR)},
    "linear frequencies": {"format": LINEAR},
    "without copies": {"copies": ("clean",)},
    "without resyntheses": {"resyntheses": 0},
    "without augmentation": {"augment": False},
    "window of 32 ms": {"format": {"window_s": 0.032}},
    "half of the genuine voices": {"halved": "voices"},
    "half of the genuine clips": {"halved": "clips"},
    "24 epochs": {"epochs": 24},
    "crop of a quarter": {"crop": 0.25},
    "whole width": {"crop": 1.0},
    "decay of 0.3": {"decay": 0.3},
    "without smoothing": {"smoothing": 0},
    "dropout of 0.5": {"dropout": 0.5},
    "mixup": {"mixup": 0.3},
    "paired": {"paired": True},
    "fakes are resyntheses only": {"resyntheses": 1},
    "averaged weights": {"average": True},
    "start: which laundering": {"start": "laundering"},
    "start: forwards or backwards": {"start": "direction"},
    "start: hidden patches": {"start": "patches"},
    "start: original or resynthesis": {"start": "resyntheses"},
    "start: half resolution": {"start": "small"},
}
# ------------------------------------------------------------------------------------------------
MAGMA = torch.tensor(colormaps["magma"](np.linspace(0, 1, maker.GREY_LEVELS), bytes=True)[:, :3].copy())
COLOURS = torch.tensor(colormaps["magma"](np.linspace(0, 1, 256))[:, :3], dtype=torch.float32)


# ---- Pictures


def name_copies(row: dict, resyntheses: bool) -> list[str]:
    """Name the copies of a clip: laundered ones, and resyntheses of genuine ones, clean and laundered."""
    if row["label"] != "original" or not resyntheses:
        return list(CONDITIONS)
    draw = np.random.default_rng(zlib.crc32(row["path"].encode()))
    laundered = [f"{kind}+{draw.choice(CONDITIONS[1:])}" for kind in maker.RESYNTHESES]
    return [*CONDITIONS, *maker.RESYNTHESES, *laundered]


def make_clip(row: dict, settings: dict, resyntheses: bool) -> list[np.ndarray]:
    """Make the pictures of a clip: for each of its copies uint8 levels, shape (parts, 224, 224)."""
    samples = maker.read_audio(CORPUS_DIR / row["path"], settings["sample_rate"])
    pictures = []
    for condition in name_copies(row, resyntheses):
        laundered, _ = maker.launder(samples, condition, f"{row['path']}__{condition}", settings, [])
        pictures.append(np.stack(maker.cut_parts(laundered, settings)))
    return pictures


def load_pictures(rows: list[dict], settings: dict, resyntheses: bool) -> list[list[np.ndarray]]:
    """Make the pictures of all clips, or load those that were made with these settings before."""
    kind = "all" if resyntheses else "laundered"
    name = WORK_DIR / f"pictures-{kind}-{zlib.crc32(repr(sorted(settings.items())).encode()):08x}.npy"
    index = name.with_suffix(".counts.npy")
    if not index.exists():
        make = partial(make_clip, settings=settings, resyntheses=resyntheses)
        counts = np.zeros((len(rows), len(CONDITIONS) + 2 * len(maker.RESYNTHESES)), int)
        with ProcessPoolExecutor() as pool, open(name, "wb") as file:
            for number, pictures in enumerate(pool.map(make, rows, chunksize=8)):
                counts[number, : len(pictures)] = [len(parts) for parts in pictures]
                for parts in pictures:
                    file.write(parts.tobytes())
        np.save(index, counts)
    counts, size = np.load(index), settings["image_size"]
    pixels = np.memmap(name, np.uint8, "r").reshape(-1, size, size)
    ends = np.cumsum(counts.ravel()).reshape(counts.shape)
    return [[pixels[end - n : end] for end, n in zip(*pair)] for pair in zip(ends, counts)]


def paint(levels: np.ndarray) -> torch.Tensor:
    """Paint levels, uint8 (batch, height, width), with the colour map: float32 RGB (batch, 3, height, width)."""
    if SMALL:
        levels = levels.reshape(len(levels), -1, 2, levels.shape[2]).mean(2).round()
    return nn.functional.embedding(torch.from_numpy(levels).int(), MAGMA.float() / 255).permute(0, 3, 1, 2)


# ---- Folds


def choose_sides(rows: list[dict], generators: tuple, voices: tuple) -> tuple[list[int], dict[str, list[int]]]:
    """Choose the clips to train on, and those to test on by what is new in them."""
    train, test = [], {"both": [], "generator": [], "voice": []}
    for number, row in enumerate(rows):
        generator = row["label"] == "deepfake" and row["engine"].startswith(generators)
        voice = any(name in row["speaker"] for name in voices)
        if row["label"] == "original":
            (test["both"] if voice else train).append(number)
        elif generator:
            test["both" if voice or "copy" not in row["engine"] else "generator"].append(number)
        else:
            (test["voice" if generators else "both"] if voice else train).append(number)
    held = {rows[number]["group"] for name in test for number in test[name] if "copy" in rows[number]["engine"]}
    held |= {rows[number]["group"] for number in test["both"] if rows[number]["label"] == "original"}
    return [number for number in train if rows[number]["group"] not in held], test


# ---- Training


class NarrowResNet(ResNet):
    """A ResNet-18 with half the channels in its blocks."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(256, 2)

    def _make_layer(self, block: type, planes: int, *args, **options) -> nn.Sequential:
        return super()._make_layer(block, planes // 2, *args, **options)


def change_plainly(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Flip and rotate by up to 10 degrees, as tutorials do."""
    flip = torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5
    images = torch.where(flip, images.flip(3), images)
    angle = (torch.rand(len(images), generator=draw) - 0.5) * math.radians(20)
    rows = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def draw_batches(
    recipe: dict, pictures: list, labels: np.ndarray, chosen: list[int], kinds: list[int], draw: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the batches of an epoch: one part of one copy of each clip, and resyntheses in place of some fakes.

    Args:
        kinds: numbers of the resyntheses that may be used.

    Returns:
        Batches of levels, classes and numbers of copies.
    """
    which = [CONDITIONS.index(name) for name in recipe["copies"]]
    genuine = [clip for clip in chosen if labels[clip]]
    order = draw.permutation(chosen)
    for start in range(0, len(order) - 31, 32):
        batch, numbers = [], []
        clips = order[start : start + 32]
        beside = [clip for clip in clips if labels[clip]] if recipe["paired"] else []
        for clip in clips:
            copies = pictures[clip]
            copy = draw.choice(which)
            if not labels[clip] and draw.random() < recipe["resyntheses"]:
                copies = pictures[draw.choice(beside or genuine)]
                laundered = len(which) > 1 and draw.random() < 0.6
                copy = len(CONDITIONS) + draw.choice(kinds) + laundered * len(maker.RESYNTHESES)
            batch.append(copies[copy][draw.integers(len(copies[copy]))])
            numbers.append(copy)
        yield np.stack(batch), labels[clips], np.array(numbers)


def compute_start_loss(
    start: str, body: nn.Module, head: nn.Module, images: torch.Tensor, copies: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """Compute the loss of a task that needs no classes.

    Args:
        start: laundering (which one was applied?), direction (does time run backwards?) or patches (what is hidden?).
        body: images to features; head: features to outputs, a convolution.
    """
    classes = copies
    if start == "direction":
        classes = (torch.rand(len(images), generator=draw) < 0.5).long()
        images = torch.where(classes.bool().view(-1, 1, 1, 1), images.flip(3), images)
    if start != "patches":
        return nn.functional.cross_entropy(head(body(trainer.to_input(images))).mean((2, 3)).float(), classes)
    cells = -(-images.shape[2] // 32), -(-images.shape[3] // 32)
    hidden = (torch.rand(len(images), 1, *cells, generator=draw) < 0.4).float()
    cover = nn.functional.interpolate(hidden, scale_factor=32)[:, :, : images.shape[2], : images.shape[3]]
    brightness = trainer.to_brightness(images)[:, None].float()
    wanted = nn.functional.adaptive_avg_pool2d(brightness, (8 * cells[0], 8 * cells[1]))
    wanted = nn.functional.pixel_unshuffle(wanted, 8)
    found = head(body(trainer.to_input(images * (1 - cover) + images.mean((2, 3), keepdim=True) * cover)))
    return ((found.float() - wanted).square() * hidden).sum() / hidden.sum() / 64


def train(
    recipe: dict,
    pictures: list,
    labels: np.ndarray,
    chosen: list[int],
    held: tuple,
    seed: int,
    compute: trainer.Compute,
) -> nn.Module:
    """Train a network on one random part of each clip in each epoch; `held` names the generators held out."""
    torch.manual_seed(seed)
    model = NarrowResNet().to(memory_format=torch.channels_last) if SMALL else trainer.build_model(None, compute)
    body, features = nn.Sequential(*list(model.children())[:-2]), model.fc.in_features
    outputs = {"laundering": len(CONDITIONS), "direction": 2, "patches": 64}.get(recipe["start"])
    head = nn.Conv2d(features, outputs, 1) if outputs else nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(recipe["dropout"]), model.fc)
    weights = torch.tensor(1 / np.bincount(labels[chosen]), dtype=torch.float32)
    loss_fn = nn.CrossEntropyLoss(weights / weights.mean(), label_smoothing=recipe["smoothing"])
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe["rate"], weight_decay=recipe["decay"], fused=True)
    steps = recipe["epochs"] * (len(chosen) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(trainer.scale_rate, steps=steps))
    averaged = None
    if recipe["average"]:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    similar = {SIMILAR.get(name) for name in held if name not in recipe["known"]}
    kinds = [number for number, name in enumerate(maker.RESYNTHESES) if name not in similar]
    numpy_draw, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(recipe["epochs"]):
        start = recipe["start"] if epoch < START_EPOCHS else None
        share = {None: recipe["resyntheses"], "resyntheses": 1, "small": recipe["resyntheses"]}.get(start, 0)
        drawn = draw_batches({**recipe, "resyntheses": share}, pictures, labels, chosen, kinds, numpy_draw)
        for levels, truth, copies in drawn:
            targets, mix, other = torch.from_numpy(truth), 1.0, torch.arange(len(truth)).flip(0)
            if recipe["mixup"]:
                mix = float(numpy_draw.beta(recipe["mixup"], recipe["mixup"]))
                levels = (mix * levels + (1 - mix) * levels[::-1]).round()
            images = paint(levels)
            if recipe["augment"] == "flips and rotation":
                images = change_plainly(images, draw)
            elif recipe["augment"]:
                images = trainer.augment(images, COLOURS, recipe["crop"], draw)
            else:
                width = round(recipe["crop"] * images.shape[3])
                first = int(numpy_draw.integers(images.shape[3] - width + 1))
                images = images[:, :, :, first : first + width]
            if start == "small":
                images = nn.functional.avg_pool2d(images, 2)
            with compute.autocast():
                if outputs and start:
                    loss = compute_start_loss(start, body, head, images, torch.from_numpy(copies), draw)
                else:
                    logits = model(trainer.to_input(images)).float()
                    loss = mix * loss_fn(logits, targets) + (1 - mix) * loss_fn(logits, targets[other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if averaged:
                averaged.update_parameters(model)
    return (averaged or model).eval()


@torch.inference_mode()
def score(model: nn.Module, pictures: list, clips: list[int], copy: int, compute: trainer.Compute) -> np.ndarray:
    """Score clips by the mean over their parts of logit Deepfake - logit Original."""
    levels = np.concatenate([pictures[clip][copy] for clip in clips])
    owner = np.repeat(np.arange(len(clips)), [len(pictures[clip][copy]) for clip in clips])
    scores = []
    for start in range(0, len(levels), 32):
        with compute.autocast():
            logits = model(trainer.to_input(paint(levels[start : start + 32]))).float()
        scores.append((logits[:, 0] - logits[:, 1]).numpy())
    return np.bincount(owner, np.concatenate(scores)) / np.bincount(owner)


# ---- Measures


def compute_eer(fake: np.ndarray, genuine: np.ndarray) -> float:
    """Compute the equal error rate of scores that are higher for fakes, as the evaluator does."""
    return evaluator.measure(-np.r_[fake, genuine], np.arange(len(fake) + len(genuine)) < len(fake))["eer"]


def halve_genuine(chosen: list[int], rows: list[dict], what: str, seed: int) -> list[int]:
    """Leave out half of the genuine clips, drawn by clip or by voice ("clips", "voices")."""
    unit = {number: rows[number]["speaker"] if what == "voices" else number for number in chosen}
    units = sorted({unit[number] for number in chosen if rows[number]["label"] == "original"})
    kept = set(np.random.default_rng(seed).permutation(units)[: len(units) // 2].tolist())
    return [number for number in chosen if rows[number]["label"] == "deepfake" or unit[number] in kept]


def run_fold(recipe: dict, pictures: list, rows: list[dict], fold: int, seed: int, compute: trainer.Compute) -> dict:
    """Train on a fold and measure: {name of a measure: value}."""
    labels = np.array([int(row["label"] == "original") for row in rows])
    chosen, test = choose_sides(rows, *FOLDS[fold])
    draw = np.random.default_rng(seed)
    groups = sorted({rows[number]["group"] for number in chosen})
    held = set(draw.permutation(groups)[: len(groups) // 10].tolist())
    validation = [number for number in chosen if rows[number]["group"] in held]
    chosen = draw.permutation([number for number in chosen if rows[number]["group"] not in held])[: recipe.get("clips")]
    chosen = halve_genuine(chosen.tolist(), rows, recipe["halved"], seed) if recipe["halved"] else chosen.tolist()
    started = time.perf_counter()
    model = train(recipe, pictures, labels, chosen, FOLDS[fold][0], seed, compute)
    measures = {"training_s": time.perf_counter() - started, "clips": len(chosen)}

    clean = score(model, pictures, validation, 0, compute)
    known_fake, known_genuine = (clean[labels[validation] == label] for label in (0, 1))
    candidates = np.sort(clean)
    gaps = [abs((known_fake < value).mean() - (known_genuine >= value).mean()) for value in candidates]
    threshold = float(candidates[int(np.argmin(gaps))])
    measures["validation_eer"] = compute_eer(known_fake, known_genuine)
    both = np.array(test["both"])
    for copy, condition in enumerate(CONDITIONS):
        scores = score(model, pictures, test["both"], copy, compute)
        fake, genuine = scores[labels[both] == 0], scores[labels[both] == 1]
        measures[f"eer_{condition}"] = compute_eer(fake, genuine)
        if condition == "clean":
            measures["half_total_error"] = ((fake < threshold).mean() + (genuine >= threshold).mean()) / 2
            measures["eer_new_generator_known_voices"] = compute_eer(fake, known_genuine)
            measures["eer_known_generators_new_voices"] = compute_eer(known_fake, genuine)
            for engine in sorted({rows[number]["engine"] for number in test["both"]} - {""}):
                part = np.array([rows[number]["engine"] == engine for number in test["both"]])
                measures[f"eer_clean_{engine}"] = compute_eer(scores[part], genuine)
    return measures


# ---- Main


def print_table(results: list[dict]) -> None:
    """Print each measure's mean over folds and seeds for each recipe, and the lowest and highest run in brackets."""
    values = defaultdict(list)
    for row in results:
        values[row["measure"], row["recipe"]].append(float(row["value"]))
    recipes = list(dict.fromkeys(row["recipe"] for row in results))
    print(f"| measure | {' | '.join(recipes)} |\n|---|{'---|' * len(recipes)}")
    for measure in dict.fromkeys(row["measure"] for row in results):
        runs = [values[measure, recipe] for recipe in recipes]
        cells = [f"{np.mean(run):.3f} ({min(run):.3f} to {max(run):.3f})" if run else "" for run in runs]
        print(f"| {measure} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is not in results.csv yet, print the table."""
    WORK_DIR.mkdir(exist_ok=True)
    with open(CORPUS_DIR / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    path, fields = WORK_DIR / "results.csv", ["recipe", "fold", "seed", "measure", "value"]
    results = []
    if path.exists():
        with open(path, newline="") as file:
            results = list(csv.DictReader(file))
    compute = trainer.choose_compute("auto")
    for seed in SEEDS:
        for fold in range(len(FOLDS)):
            for name in sys.argv[1:] or RECIPES:
                recipe, name = {**BASE, **RECIPES[name]}, name + ", small" * SMALL
                if any((row["recipe"], row["fold"], row["seed"]) == (name, str(fold), str(seed)) for row in results):
                    continue
                settings = {**maker.collect_settings(), **FORMAT, **recipe["format"]}
                pictures = load_pictures(rows, settings, recipe["resyntheses"] > 0 or not recipe["format"])
                measures = run_fold(recipe, pictures, rows, fold, seed, compute)
                print(name, fold, seed, {key: round(value, 3) for key, value in measures.items()}, flush=True)
                results += [
                    dict(zip(fields, (name, str(fold), str(seed), key, value))) for key, value in measures.items()
                ]
                with open(path, "w", newline="") as file:
                    writer = csv.DictWriter(file, fields)
                    writer.writeheader()
                    writer.writerows(results)
    print_table(results)


if __name__ == "__main__":
    main()
