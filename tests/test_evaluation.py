"""The evaluator: verdicts, the user's CSV, reports, checkpoints of every kind."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from conftest import EVALUATOR, assert_refused, read_csv, read_summary, run, write_csv
from PIL import Image

from models import tables
from models.detector import CLASSES, make_network
from models.tables import parse_table

CHECKPOINT = "models/experiments/best_laundered_processed.pth"


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


def test_bad_rows_stay_blank_and_every_other_cell_keeps_its_text(judged):
    good = judged / "data/original/combined/o0__clean_1.png"
    (judged / "data/text.png").write_text("not a picture")
    (judged / "data/cut.png").write_bytes(good.read_bytes()[:300])
    rows = [
        ["id", "img_path", "actual_output", "note"],
        ["007", "missing.png", "Original", "NA"],
        ["1e5", "text.png", " deepfake ", ""],
        ["", "cut.png", "", "two\nlines, and a comma"],
        ["x ", "original\\combined\\o0__clean_1.png", "REAL", 'a "quote"'],
        ["-0", str(good), "bona fide", "ünïcode"],
    ]
    write_csv(judged / "test_data/test.csv", rows)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    after = read_csv(judged / "test_data/test.csv")
    for before, row in zip(rows[1:], after):
        assert [row[name] for name in rows[0]] == before
    assert [bool(row["predicted_output"]) for row in after] == [False, False, False, True, True]
    assert [bool(row["deepfake_score"]) for row in after] == [False, False, False, True, True]
    assert after[3]["deepfake_score"] == after[4]["deepfake_score"]
    for number, name in ((2, "missing.png"), (3, "text.png"), (4, "cut.png")):
        assert any(f"row {number}: " in line and name in line for line in outcome.err.splitlines())
    (entry,) = read_summary(judged)
    assert [bad["row"] for bad in entry["unreadable_rows"]] == [2, 3, 4]
    assert entry["rows_measured"] == 2
    assert entry["eer"] is None and "both classes" in entry["not_computed"][0]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [True, False])
def test_format_of_the_csv_is_kept(newline, delimiter, bom, end, tmp_path):
    lines = [delimiter.join(["img_path", "b"]), delimiter.join(["x.png", "1"]), "", delimiter.join(["ü.png", ""])]
    content = bom + (newline.join(lines) + newline * end).encode()
    rows, found = parse_table(content, tmp_path, "utf-8")
    assert (found, rows[2]) == (delimiter, [])
    assert tables.format_table(rows, found, content, "utf-8") == content


def test_second_run_changes_nothing(judged):
    run(judged, EVALUATOR, WORKERS=0)
    first = (judged / "test_data/test.csv").read_bytes()
    run(judged, EVALUATOR, WORKERS=0)
    assert (judged / "test_data/test.csv").read_bytes() == first


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


def test_broken_csv_does_not_cost_the_others_their_work(judged):
    write_csv(judged / "test_data/labels.csv", [["img_path", "actual_output"], ["x.png", "Orignal"]])
    (judged / "test_data/columns.csv").write_text("path,label\nx.png,Original\n")
    names = ["labels", "columns", "nowhere", "test"]
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=[f"test_data/{name}.csv" for name in names])
    assert outcome.status == 1
    assert "labels.csv, row 2: unknown actual_output 'Orignal'" in outcome.err
    assert "columns.csv has no column img_path" in outcome.err
    assert "nowhere.csv" in outcome.err
    assert read_csv(judged / "test_data/test.csv")[0]["predicted_output"]
    assert (judged / "test_data/aggregate_test_reports.json").exists()


@pytest.mark.parametrize("word", ["deepfake", " Deepfake ", "SPOOF", "fake"])
def test_words_for_deepfake(word):
    assert tables.parse_label(word, "a.csv", 1) == "Deepfake"


@pytest.mark.parametrize("word", ["Original", "bonafide", "Bona  Fide", "real\n", "genuine"])
def test_words_for_original(word):
    assert tables.parse_label(word, "a.csv", 1) == "Original"


def test_only_broken_csvs_end_with_2_in_one_line(judged):
    write_csv(judged / "test_data/test.csv", [["img_path", "actual_output"], ["x.png", "maybe"]])
    before = (judged / "test_data/test.csv").read_bytes()
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome)
    assert (judged / "test_data/test.csv").read_bytes() == before


def test_evaluator_works_alone_with_a_bare_state_dict(judged, tmp_path_factory):
    state = torch.load(judged / CHECKPOINT, weights_only=True)["state_dict"]
    for number, (prefix, head) in enumerate([("", "fc."), ("module.", "fc."), ("", "fc.1."), ("module.", "fc.1.")]):
        folder = tmp_path_factory.mktemp(f"alone{number}")
        renamed = {prefix + name.replace("fc.", head): tensor for name, tensor in state.items()}
        torch.save(renamed, folder / "model.pth")
        shutil.copy(judged / "data/original/combined/o0__clean_1.png", folder / "a.png")
        write_csv(folder / "list.csv", [["img_path"], ["a.png"]])
        constants = {"MODEL_PATH": "model.pth", "IMG_BASE_PATH": ".", "CSV_FILES": ["list.csv"], "WORKERS": 0}
        outcome = run(folder, EVALUATOR, **constants)
        assert outcome.status == 0, outcome.err
        assert "holds weights only; assumed" in outcome.out
        assert read_csv(folder / "list.csv")[0]["predicted_output"]


def change_state(checkpoint, **changes):
    return {**checkpoint, "state_dict": {**checkpoint["state_dict"], **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: change_state(c, **{"fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}), "3 classes"),
        (lambda c: change_state(c, **{"fc.bias": torch.full((2,), float("nan"))}), "not finite"),
        (lambda c: {"weight": torch.zeros(3)}, "no ResNet-18"),
        (lambda c: {**c, "format": 99}, "format 99"),
        (lambda c: {key: value for key, value in c.items() if key != "mean"}, "lacks mean"),
        (lambda c: [1, 2, 3], "it holds a list, not a ResNet-18"),
        (lambda c: torch.zeros(3), "it holds a Tensor, not a ResNet-18"),
    ],
)
def test_wrong_checkpoints_are_refused_in_one_line(judged, change, words, tmp_path):
    checkpoint = torch.load(judged / CHECKPOINT, weights_only=True)
    torch.save(change(checkpoint), judged / CHECKPOINT)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome, words)


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"PK\x03\x04 no zip"])
def test_files_that_are_no_checkpoint_are_refused_in_one_line(judged, content):
    (judged / CHECKPOINT).write_bytes(content)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome)
    assert "is not a checkpoint, or is damaged" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_permissions_and_symbolic_link_of_the_csv_are_kept(judged):
    target = judged / "real.csv"
    shutil.move(judged / "test_data/test.csv", target)
    target.chmod(0o640)
    (judged / "test_data/test.csv").symlink_to(target)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    assert (judged / "test_data/test.csv").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert read_csv(target)[0]["predicted_output"]


def test_mixed_precision_keeps_the_verdicts(judged):
    results = []
    for precision in ("auto", "float32"):
        run(judged, EVALUATOR, WORKERS=0, PRECISION=precision)
        results.append(read_csv(judged / "test_data/test.csv"))
    scores = [[float(row["deepfake_score"]) for row in rows] for rows in results]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
