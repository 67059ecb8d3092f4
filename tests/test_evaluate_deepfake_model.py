"""The evaluator: verdicts, scores, outputs."""

import hashlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHECKPOINT,
    EVALUATOR,
    O0,
    add_condition,
    assert_refused,
    make_image,
    read_csv,
    read_summary,
    read_tsv,
    run,
    write_csv,
    write_parts,
)
from PIL import Image
from torchvision.models import resnet

from models import checks, metrics, runtime
from models.detector import CLASSES, make_network

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


def test_path_listed_twice_is_judged_once(judged):
    write_csv(judged / "test_data/test.csv", [["img_path"]] + [["original/combined/o0__clean_1.png"]] * 3)
    assert "Judged 1 images in " in run(judged, EVALUATOR).out


def test_run_writes_verdicts_report_picture_and_summary(judged):
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 0, outcome.err
    rows = read_csv(judged / "test_data/test.csv")
    assert list(rows[0]) == ["img_path", "actual_output", "predicted_output", "deepfake_score"]
    for row in rows:
        assert row["predicted_output"] == ("Deepfake" if float(row["deepfake_score"]) >= 0.5 else "Original")
    assert sum(row["predicted_output"] == row["actual_output"] for row in rows) >= 6
    (entry,) = read_summary(judged)
    assert list(entry)[:2] == ["file", "report"]
    assert entry["report"] == (judged / "test_data/test_report.txt").read_text()
    assert entry["rows"] == entry["rows_measured"] == 8
    for key, path in (("model_sha256", CHECKPOINT), ("csv_sha256", "test_data/test.csv")):
        assert entry[key] == hashlib.sha256((judged / path).read_bytes()).hexdigest()
    with Image.open(judged / "test_data/test.png") as image:
        assert image.size[0] > 400


def test_numbers_agree_with_the_csv(judged):
    run(judged, EVALUATOR, WORKERS=0)
    rows = read_csv(judged / "test_data/test.csv")
    (entry,) = read_summary(judged)
    right = [row["predicted_output"] == row["actual_output"] for row in rows]
    assert entry["accuracy"] == pytest.approx(np.mean(right))
    fake = np.array([float(r["deepfake_score"]) for r in rows if r["actual_output"] == "Deepfake"])
    real = np.array([float(r["deepfake_score"]) for r in rows if r["actual_output"] == "Original"])
    pairs = (fake[:, None] > real).mean() + (fake[:, None] == real).mean() / 2
    assert entry["roc_auc"] == pytest.approx(pairs)
    counts = np.array(entry["confusion_matrix"]["counts"])
    assert entry["confusion_matrix"]["order"] == ["Original", "Deepfake"]
    assert counts[1, 0] == sum(r["actual_output"] == "Deepfake" and r["predicted_output"] == "Original" for r in rows)


def test_scores_follow_from_the_checkpoint_alone(judged):
    checkpoint = torch.load(judged / CHECKPOINT, weights_only=True)
    size = checkpoint["image_size"]
    for row in read_csv(judged / "test_data/test.csv"):  # two ways to resize would differ by a level
        path = judged / "data" / row["img_path"]
        with Image.open(path) as image:
            image.convert("RGB").resize((size, size)).save(path)
    run(judged, EVALUATOR, WORKERS=0, PRECISION="float32")
    model = make_network()
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()
    for row in read_csv(judged / "test_data/test.csv"):
        with Image.open(judged / "data" / row["img_path"]) as image:
            pixels = np.asarray(image) / 255
        inputs = torch.tensor((pixels - checkpoint["mean"]) / checkpoint["std"]).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            deepfake, original = model(inputs)[0].tolist()
        scale, offset = checkpoint["calibration"]["scale"], checkpoint["calibration"]["offset"]
        expected = 1 / (1 + np.exp(-(scale * (deepfake - original) + offset)))
        assert float(row["deepfake_score"]) == pytest.approx(expected, abs=1e-5)


def test_number_of_workers_and_batch_size_do_not_matter(judged):
    results = []
    for constants in ({"WORKERS": 0, "BATCH_SIZE": 64}, {"WORKERS": 2, "BATCH_SIZE": 3}):
        assert run(judged, EVALUATOR, PRECISION="float32", **constants).status == 0
        results.append([float(row["deepfake_score"]) for row in read_csv(judged / "test_data/test.csv")])
    assert results[0] == pytest.approx(results[1], abs=2e-5)


def test_rows_of_every_batch_keep_their_own_scores_and_reasons(judged):
    names = sorted(str(path.relative_to(judged / "data")) for path in (judged / "data").rglob("*.png"))[:20]
    scores = []
    for order in (names, names[::-1]):
        write_csv(judged / "test_data/test.csv", [["img_path"], *([name] for name in order), ["missing.png"]])
        outcome = run(judged, EVALUATOR, WORKERS=0, BATCH_SIZE=3, PRECISION="float32")
        rows = {row["img_path"]: row["deepfake_score"] for row in read_csv(judged / "test_data/test.csv")}
        assert "row 22: " in outcome.err and "missing.png" in outcome.err
        assert rows.pop("missing.png") == "" and all(rows.values())
        scores.append({name: float(score) for name, score in rows.items()})
    assert scores[0] == pytest.approx(scores[1], abs=2e-5)
    assert len(set(scores[0].values())) == len(names)


def test_csv_without_labels_gets_predictions_and_a_reason(judged):
    write_csv(judged / "test_data/test.csv", [["img_path"], ["original/combined/o0__clean_1.png"]])
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 0
    assert "no metrics, since it has no column actual_output" in outcome.out
    assert read_csv(judged / "test_data/test.csv")[0]["predicted_output"] in CLASSES
    assert sorted(path.name for path in (judged / "test_data").iterdir()) == [
        "test.csv",
        "test_recordings.csv",
        "test_report.html",
        "test_scores.tsv",
    ]


def test_mixed_precision_keeps_the_verdicts(judged):
    results = []
    for precision in ("auto", "float32"):
        run(judged, EVALUATOR, WORKERS=0, PRECISION=precision)
        results.append(read_csv(judged / "test_data/test.csv"))
    scores = [[float(row["deepfake_score"]) for row in rows] for rows in results]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_score_file_and_key_have_the_form_of_asvspoof(judged):
    rows = [["img_path", "actual_output"]]
    rows += [
        [f"{kind}/combined/{kind[0]}{n}__clean_1.png", kind] for kind in ("deepfake", "original") for n in range(3)
    ]
    rows += [rows[1], ["missing.png", "original"], ["original/combined/o5__clean_1.png", ""]]
    write_csv(judged / "test_data/test.csv", rows)
    assert run(judged, EVALUATOR).status == 1
    header, *scores = read_tsv(judged / "test_data/test_scores.tsv")
    assert header == ["filename", "cm-score"]
    assert [name for name, _ in scores] == [row[0] for row in rows[1:7]] + ["original/combined/o5__clean_1.png"]
    header, *key = read_tsv(judged / "test_data/test_key.tsv")
    assert header == ["filename", "cm-label"]
    assert key == [[row[0], {"deepfake": "spoof", "original": "bonafide"}[row[1]]] for row in rows[1:7]]
    verdicts = {row["img_path"]: float(row["deepfake_score"]) for row in read_csv(judged / "test_data/test.csv")[:6]}
    for name, score in scores[:6]:
        assert 1 / (1 + np.exp(float(score))) == pytest.approx(verdicts[name], abs=1e-6)
    llr = np.array([float(score) for _, score in scores[:6]])
    (entry,) = read_summary(judged)
    assert entry["rows_measured"] == 7
    assert entry["before_calibration"]["cllr"] is not None
    assert metrics.measure(llr, np.arange(6) < 3)["eer"] is not None


def test_recordings_are_judged_by_the_mean_of_their_parts(judged):
    assert run(judged, EVALUATOR).status == 0
    recordings = read_csv(judged / "test_data/test_recordings.csv")
    scores = {name: float(score) for name, score in read_tsv(judged / "test_data/test_scores.tsv")[1:]}
    assert [(row["recording"], row["actual_output"], row["parts"]) for row in recordings] == [
        ("d0", "Deepfake", "2"),
        ("d1", "Deepfake", "2"),
        ("o0", "Original", "2"),
        ("o1", "Original", "2"),
    ]
    parts = [score for name, score in scores.items() if "/o1__" in name]
    assert float(recordings[3]["llr"]) == pytest.approx(np.mean(parts))
    assert recordings[3]["predicted_output"] == ("Original" if np.mean(parts) > 0 else "Deepfake")


def test_recordings_are_those_of_the_column_recording(judged):
    rows = [["img_path", "actual_output", "recording"]]
    for kind in ("deepfake", "original"):
        for number in range(2):
            rows += [[f"{kind}/combined/{kind[0]}{number}__clean_{part}.png", kind, f"call {part}"] for part in (1, 2)]
        rows[-1][2] = " "
    write_csv(judged / "test_data/test.csv", rows)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 0, outcome.err
    assert "by its column recording; in 2 rows, where it is blank, by file name\n" in outcome.out
    parts = [(row["recording"], row["parts"]) for row in read_csv(judged / "test_data/test_recordings.csv")]
    assert parts == [("call 1", "2"), ("call 2", "1"), ("d1", "1"), ("call 1", "2"), ("call 2", "1"), ("o1", "1")]
    (entry,) = read_summary(judged)
    assert entry["recordings"] == 4  # of both classes together
    assert entry["intervals_95"]


def test_outputs_of_an_earlier_run_are_named(judged):
    add_condition(judged)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    write_csv(judged / "test_data/test.csv", [["img_path"], ["original/combined/o0__clean_1.png"]])
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 0
    assert "test.csv: left from an earlier run, not of this one: test.png, test_key.tsv, test_report.txt" in outcome.out
    assert "Left from an earlier run, not of this one: aggregate_test_reports.json" in outcome.out


def refuse(monkeypatch, *names):
    """Let no file of these names be replaced."""
    replace = os.replace

    def check(source, target):
        if Path(target).name in names:
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", check)
    monkeypatch.setattr(runtime, "RENAME_WAITS_S", (0,))


def copy_csv(judged):
    """Two CSVs of the same images."""
    for name in ("one", "two"):
        shutil.copy(judged / "test_data/test.csv", judged / f"test_data/{name}.csv")
    return {"CSV_FILES": ["test_data/one.csv", "test_data/two.csv"], "WORKERS": 0}


def test_outputs_that_cannot_be_replaced_are_named_and_all_others_written(judged, monkeypatch):
    names = ["one_recordings.csv", "one.png", "one_report.html", "aggregate_test_reports.json"]
    refuse(monkeypatch, *names)
    outcome = run(judged, EVALUATOR, **copy_csv(judged))
    assert outcome.status == 1
    lines = [f"left out: {judged / 'test_data' / name} cannot be written: Permission denied" for name in names]
    assert sorted(line.partition(" (is")[0] for line in outcome.err.splitlines()) == sorted(lines)
    found = {path.name for path in (judged / "test_data").iterdir()}
    assert found >= {"one_report.txt", "two_recordings.csv", "two.png", "two_report.html"} and not found & {*names}
    for name in ("one", "two"):
        assert all(row["predicted_output"] for row in read_csv(judged / f"test_data/{name}.csv"))


@pytest.mark.parametrize("refused", [["one.csv"], ["one.csv", "one.predicted.csv"]])
def test_csv_that_cannot_be_replaced_leaves_the_others_judged(judged, monkeypatch, refused):
    before = (judged / "test_data/test.csv").read_bytes()
    refuse(monkeypatch, *refused)
    outcome = run(judged, EVALUATOR, **copy_csv(judged))
    assert outcome.status == 1
    assert f"{judged / 'test_data/one.csv'} " in outcome.err or "one.predicted.csv cannot be written" in outcome.err
    assert (judged / "test_data/one.csv").read_bytes() == before
    assert (judged / "test_data/one.predicted.csv").exists() == (len(refused) == 1)
    assert all(row["predicted_output"] for row in read_csv(judged / "test_data/two.csv"))
    for entry in read_summary(judged):
        path = judged / "test_data" / (entry["file"] if entry["file"] == "two.csv" else "one.predicted.csv")
        assert entry["csv_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_csv_that_cannot_be_written_at_all_is_an_error(judged, monkeypatch):
    refuse(monkeypatch, "test.csv", "test.predicted.csv")
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome, "test.predicted.csv cannot be written: Permission denied")


def after_judging(monkeypatch, change):
    """Call `change` when the images have been judged, before anything is written."""
    check = checks.check_seen
    monkeypatch.setattr(checks, "check_seen", lambda *arguments: (change(), check(*arguments))[1])
    look = checks.check_format
    monkeypatch.setattr(checks, "check_format", lambda *arguments: (change(), look(*arguments))[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(missing_ok=True), "can no longer be read: there is no such file"),
        (lambda path: make_image(path, 1, fake=True), "was changed during the run"),
        (lambda path: path.write_bytes(b"no picture"), "can no longer be read"),
    ],
)
def test_image_that_vanishes_or_changes_after_it_was_judged_is_named(judged, monkeypatch, change, words):
    path = judged / "data" / O0
    after_judging(monkeypatch, lambda: change(path))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    look, picture = outcome.err.splitlines()
    assert look.startswith(f"left out: 1 of 8 images of the format check, the first: {path} {words}")
    assert picture.startswith(f"left out: test_mistakes.png: {path} {words}")
    names = {file.name for file in (judged / "test_data").iterdir()}
    assert {"test_report.txt", "test_report.html", "test.png"} <= names and "test_mistakes.png" not in names
    assert read_summary(judged)[0]["rows_measured"] == 8


def test_folder_that_vanishes_after_it_was_judged_leaves_a_report(judged, monkeypatch):
    write_parts(judged / "data/unknown/talk", 1, [False, True])
    write_csv(judged / "test_data/test.csv", [["img_path"], *([f"unknown/talk__clean_{n}.png"] for n in (1, 2))])
    after_judging(monkeypatch, lambda: shutil.rmtree(judged / "data/unknown", ignore_errors=True))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert "2 of 2 images of the format check, the first: " in outcome.err
    assert f"left out: test_timeline.png: {judged}/data/unknown/talk__clean_1.png can no longer" in outcome.err
    assert "Format check: not done, since the images are gone" in (judged / "test_data/test_report.html").read_text()
    assert read_csv(judged / "test_data/test_recordings.csv")[0]["seconds"] == "3.6"


def test_checksum_of_the_model_is_of_what_was_loaded(judged, monkeypatch):
    path = judged / CHECKPOINT
    used = hashlib.sha256(path.read_bytes()).hexdigest()
    after_judging(monkeypatch, lambda: path.write_bytes(b"a better one"))
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    assert read_summary(judged)[0]["model_sha256"] == used


def test_two_csvs_of_one_name_are_told_apart(judged):
    shutil.copytree(judged / "test_data", judged / "more")
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/test.csv", "more/test.csv"])
    assert [entry["file"] for entry in read_summary(judged)] == ["test_data/test.csv", "more/test.csv"]
    assert "more/test.csv: 8 rows" in outcome.out


def test_evaluation_ends_on_sigterm_with_a_line_and_leaves_the_csv(judged, monkeypatch):
    before = (judged / "test_data/test.csv").read_bytes()
    monkeypatch.setattr(resnet.ResNet, "forward", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 143
    assert outcome.err == "stopped by SIGTERM; CSVs not yet written are as they were; run it again to judge them\n"
    assert (judged / "test_data/test.csv").read_bytes() == before


def test_outputs_that_are_not_finite_are_no_verdicts(judged, monkeypatch):
    monkeypatch.setattr(resnet.ResNet, "forward", lambda self, images: torch.full((len(images), 512), float("inf")))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert "the network's output is not finite" in outcome.err
    assert {row["predicted_output"] for row in read_csv(judged / "test_data/test.csv")} == {""}


@pytest.mark.parametrize("value", ["source", ("llr",), 3])
def test_wrong_report_by_is_refused(judged, value):
    outcome = run(judged, EVALUATOR, WORKERS=0, REPORT_BY=value)
    assert (outcome.status, "REPORT_BY" in outcome.err) == (2, True)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_evaluator_out_of_memory_says_what_to_do_and_leaves_the_csv(judged, error, monkeypatch):
    def run_out(*_):
        raise error

    monkeypatch.setattr(resnet.ResNet, "forward", run_out)
    before = (judged / "test_data/test.csv").read_bytes()
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, outcome.err) == (2, "error: out of memory: lower BATCH_SIZE or IMAGE_SIZE\n")
    assert (judged / "test_data/test.csv").read_bytes() == before
