"""The trainer: what it learns, what it writes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, TRAINER, assert_refused, read_checkpoint, read_csv, run
from PIL import Image

import train_deepfake_detector as trainer
from models import dataset, detector
from models.images import IMAGENET_MEAN, IMAGENET_STD
from models.runtime import Team


def test_run_writes_every_file_of_the_design(trained):
    folder = trained / "models/experiments"
    assert {path.name for path in folder.iterdir()} == {
        "best_laundered_processed.pth",
        "final_laundered_processed.pth",
        "history.csv",
        "learning_curves.png",
    }
    assert [row["epoch"] for row in read_csv(folder / "history.csv")] == [str(n) for n in range(1, 9)]
    with Image.open(folder / "learning_curves.png") as image:
        assert image.size == (1320, 480)


def test_training_learns_the_difference(trained):
    history = read_csv(trained / "models/experiments/history.csv")
    assert max(float(row["val_auc"]) for row in history) >= 0.9


def test_checkpoint_holds_plain_types_and_every_fact(trained):
    best, final = (
        torch.load(trained / f"models/experiments/{kind}_laundered_processed.pth", weights_only=True)
        for kind in ("best", "final")
    )
    assert best["classes"] == ["Deepfake", "Original"]
    assert (best["image_size"], best["recording_pattern"]) == (32, trainer.RECORDING_PATTERN)
    assert (best["mean"], best["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert best["initial_weights"] == "random (PRETRAINED = None)"
    assert best["settings"]["LEARNING_RATE"] == 1e-3
    assert {tensor.dtype for tensor in best["state_dict"].values()} == {torch.float32, torch.int64}
    detector.make_network().load_state_dict(best["state_dict"])
    history = read_csv(trained / "models/experiments/history.csv")
    losses = [float(row["val_loss"]) for row in history]
    assert best["epoch"] == 1 + losses.index(min(losses))
    assert best["metrics"]["val_loss"] == min(losses)
    assert final["epoch"] == 8


def test_unreadable_image_is_named_counted_and_left_out(project):
    (project / "data/deepfake/combined/d9__clean_1.png").write_text("no picture")
    outcome = run(project, TRAINER, **{**QUICK, "MAX_UNREADABLE": 0.1})
    assert outcome.status == 1
    assert "left out, unreadable: " in outcome.err
    assert "d9__clean_1.png" in outcome.err
    checkpoint = read_checkpoint(project, "final")
    assert checkpoint["unreadable_images"] == 1


def test_too_many_unreadable_images_stop_the_run(project):
    (project / "data/deepfake/combined/d9__clean_1.png").write_bytes(b"")
    outcome = run(project, TRAINER, **QUICK)
    assert_refused(outcome, "MAX_UNREADABLE = 0.01")
    assert not list((project / "models/experiments").iterdir())


def test_identical_images_in_both_classes_are_named(project):
    copies = [project / f"data/deepfake/combined/copy{number}__clean_1.png" for number in range(5)]
    for number, copy in enumerate(copies):
        shutil.copy(project / f"data/original/combined/o{number + 3}__clean_1.png", copy)
    outcome = run(project, TRAINER, **QUICK)
    assert outcome.status == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "in both classes" in line]
    assert line.startswith("WARNING: 5 images are in both classes; delete the wrong one of each: ")
    assert f"{copies[0]} = {project}/data/original/combined/o3__clean_1.png; " in line
    assert line.endswith("; and 2 more")


@pytest.mark.parametrize(("workers", "what"), [(0, "file"), (2, "file"), (0, "folder"), (0, "damaged")])
def test_image_that_vanishes_during_training_is_named(project, monkeypatch, workers, what):
    choose, folder = dataset.choose_images, project / "data/original/combined"

    def vanish(*arguments):
        chosen = choose(*arguments)
        for path in map(Path, chosen.paths):
            if path.parent == folder:
                path.write_bytes(b"\x89PNG\r\n\x1a\n") if what == "damaged" else path.unlink()
        if what == "folder":
            shutil.rmtree(folder)
        return chosen

    monkeypatch.setattr(dataset, "choose_images", vanish)
    outcome = run(project, TRAINER, **{**QUICK, "CACHE_GB": 0, "WORKERS": workers})
    assert_refused(outcome, f"error: {folder}/o", ".png can no longer be read: ")


@pytest.mark.parametrize(
    "constants",
    [
        {"BATCH_SIZE": 0, "EPOCHS": "5", "VAL_FRACTION": 1.5},
        {"RECORDING_PATTERN": "(", "IMAGE_SIZE": 8},
        {"RECORDING_PATTERN": "no group", "PRECISION": "half"},
        {"LEARNING_RATE": -1, "WORKERS": -1, "SEED": 1.5},
    ],
)
def test_wrong_settings_are_all_named_at_once(project, constants):
    outcome = run(project, TRAINER, **{**QUICK, **constants})
    assert_refused(outcome)
    for name, value in constants.items():
        assert f"{name} = {value!r} (allowed: " in outcome.err


def test_batches_are_drawn_by_weight():
    batches = trainer.Batches(np.array([0.5] + [0.5 / 99] * 99), 50, 10, Team())
    drawn = [index for _ in range(100) for batch in batches for index in batch]
    assert len(drawn) == 5_000
    assert drawn.count(0) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert len(set(drawn)) == 100


def test_learning_rate_rises_for_a_twentieth_of_the_steps_then_falls_to_zero():
    rates = [trainer.scale_rate(step, 200) for step in range(201)]
    assert rates[:2] == [0.1, 0.2] and rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[105] == pytest.approx(0.5)
    assert rates[200] == 0
    assert trainer.scale_rate(0, 1) == 1  # a single step is taken in full


def test_patience_ends_training(project):
    outcome = run(project, TRAINER, **{**QUICK, "EPOCHS": 40, "PATIENCE": 1})
    rows = read_csv(project / "models/experiments/history.csv")
    assert outcome.status == 0
    assert len(rows) < 40
    assert "Stopped early" in outcome.out
    assert float(rows[-1]["val_loss"]) >= float(rows[-2]["val_loss"])


def test_crops_begin_anywhere_and_keep_the_axes():
    images = torch.arange(64).repeat(32, 3, 48, 1)  # each column shows its own number
    cropped = trainer.crop_in_time(images, 0.875, torch.Generator().manual_seed(0))
    assert cropped.shape == (32, 3, 48, 56)
    starts = cropped[:, 0, 0, 0]
    assert len(starts.unique()) > 15
    assert torch.equal(cropped[:, 0, 0], (starts[:, None] + torch.arange(56)) % 64)
    assert torch.equal(cropped, cropped[:, :1, :1].expand_as(cropped))
    assert trainer.crop_in_time(images, 0.1, torch.Generator()).shape == (32, 3, 48, 48)  # see SHORTEST_CROP


def test_checkpoint_holds_the_scores_of_validation(trained):
    scores = read_checkpoint(trained)["validation_scores"]
    assert {name: len(values) for name, values in scores.items()} == {"Deepfake": 3, "Original": 3}
    assert scores["Deepfake"].max() < scores["Original"].min()
    assert all(torch.equal(values, values.sort().values) for values in scores.values())
