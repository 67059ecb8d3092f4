"""The result in words: the text, the table of recordings, the page."""

import re

import numpy as np
import pytest
from conftest import (
    D0,
    EVALUATOR,
    O0,
    evaluate_text,
    make_image,
    read_checkpoint,
    read_csv,
    read_summary,
    run,
    write_csv,
    write_parts,
)
from sklearn.metrics import classification_report

from models.report import format_classification


def test_verdicts_on_recordings_without_labels(judged):
    write_parts(judged / "data/unknown/talk", 1, [False, False, False, False])
    write_parts(judged / "data/unknown/made", 9, [True, True])
    names = [f"unknown/talk__clean_{n}.png" for n in (1, 2, 3, 4)] + [f"unknown/made__clean_{n}.png" for n in (1, 2)]
    write_csv(judged / "test_data/unknown.csv", [["img_path"], *([name] for name in names)])
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/unknown.csv"])
    assert outcome.status == 0, outcome.err
    talk, made = read_csv(judged / "test_data/unknown_recordings.csv")
    assert (talk["recording"], talk["predicted_output"], talk["seconds"]) == ("talk", "Original", "7.2")
    assert (made["recording"], made["predicted_output"], made["seconds"]) == ("made", "Deepfake", "3.6")
    scores = read_checkpoint(judged)["validation_scores"]
    assert float(talk["originals_below"]) == (scores["Original"] <= float(talk["llr"])).float().mean()
    assert float(made["deepfakes_above"]) == (scores["Deepfake"] >= float(made["llr"])).float().mean()
    assert re.search(r"^talk +Original +0\.\d+ +7\.2", outcome.out, flags=re.MULTILINE)
    page = (judged / "test_data/unknown_report.html").read_text()
    assert "Of 2 recordings in unknown.csv, the detector classifies 1 as Original and 1 as Deepfake." in page
    assert "Leak check: 0 rows were trained or validated on" in page


def test_label_in_one_row_neither_hides_nor_splits_recordings(judged):
    write_parts(judged / "data/unknown/talk", 1, [False, False])
    write_parts(judged / "data/unknown/made", 9, [True, True])
    names = [f"unknown/{name}__clean_{n}.png" for name in ("talk", "made") for n in (1, 2)]
    labels = ["Original", "", "", ""]
    write_csv(judged / "test_data/unknown.csv", [["img_path", "actual_output"], *map(list, zip(names, labels))])
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/unknown.csv"])
    talk, made = read_csv(judged / "test_data/unknown_recordings.csv")
    assert (talk["recording"], talk["actual_output"], talk["parts"]) == ("talk", "Original", "2")
    assert (made["recording"], made["actual_output"], made["parts"]) == ("made", "", "2")
    assert read_summary(judged)[0]["rows_measured"] == 1
    assert re.search(r"^made +Deepfake", outcome.out, flags=re.MULTILINE)
    assert "<h2>Recordings</h2>" in (judged / "test_data/unknown_report.html").read_text()


def test_images_of_one_name_in_several_folders_are_said_to_be_one_recording(judged):
    for folder, fake in (("a", False), ("b", True)):
        make_image(judged / f"data/unknown/{folder}/call.png", 1, fake)
    write_csv(judged / "test_data/test.csv", [["img_path"], ["unknown/a/call.png"], ["unknown/b/call.png"]])
    said = run(judged, EVALUATOR, WORKERS=0).out
    assert "Warning: test.csv: 1 file names, such as call.png, are in several folders and count as one" in said


def test_page_is_self_contained_small_and_escapes_names(judged):
    name = "<script>alert(1)</script>&"
    make_image(judged / f"data/unknown/{name.replace('/', '_')}.png", 1, fake=False)
    rows = [["img_path", "actual_output", "condition"], [f"unknown/{name.replace('/', '_')}.png", "Original", name]]
    rows += [[row["img_path"], row["actual_output"], "b"] for row in read_csv(judged / "test_data/test.csv")]
    write_csv(judged / "test_data/a&b.csv", rows)
    assert run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/a&b.csv"]).status == 0
    page = (judged / "test_data/a&b_report.html").read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    assert "<script" not in page and "a&amp;b.csv" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("<img") == 4
    checksum = read_summary(judged)[0]["model_sha256"]
    assert checksum in page and "Leak check" in page and "95% CI" in page


def test_rows_without_verdict_and_repeated_ones_are_counted_in_the_report(judged):
    rows = "".join(f"missing{n}.png,Original\n" for n in range(6))
    outcome = evaluate_text(judged, f"img_path,actual_output\n{rows}{O0},Original\n{O0},Original\n{D0},Deepfake\n")
    assert outcome.status == 1
    (entry,) = read_summary(judged)
    assert (entry["rows_without_verdict"], entry["rows_repeated"]) == (6, 1)
    text = " ".join(entry["report"].split())
    assert "6 of 9 rows have no verdict" in text and "1 rows repeat an image" in text


@pytest.mark.parametrize("right", [0, 0.3, 1])
@pytest.mark.parametrize("of_fakes", [0, 0.5, 1])
def test_table_of_classes_is_that_of_scikit_learn(right, of_fakes):
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(200) < of_fakes, "Deepfake", "Original")
    verdicts = np.where((rng.random(200) < right) == (truth == "Deepfake"), "Deepfake", "Original")
    names = {"labels": ["Original", "Deepfake"], "zero_division": 0}
    found = format_classification(classification_report(truth, verdicts, output_dict=True, **names))
    assert "\n".join(found) == classification_report(truth, verdicts, digits=4, **names).rstrip()
