"""The user's CSVs: read whatever people write, and everything in them but the verdicts stays."""

import csv
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest
from conftest import (
    D0,
    EVALUATOR,
    O0,
    assert_refused,
    evaluate_text,
    read_csv,
    read_summary,
    read_tsv,
    run,
    write_csv,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import resnet

import train_deepfake_detector as trainer
from models import dataset, tables
from models.tables import parse_table

OURS = ("img_path", "actual_output", "predicted_output", "deepfake_score")
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


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


def test_permissions_and_symbolic_link_of_the_csv_are_kept(judged):
    target = judged / "real.csv"
    shutil.move(judged / "test_data/test.csv", target)
    target.chmod(0o640)
    (judged / "test_data/test.csv").symlink_to(target)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    assert (judged / "test_data/test.csv").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert read_csv(target)[0]["predicted_output"]


def test_blanks_around_header_cells_do_not_hide_labels(judged):
    outcome = evaluate_text(judged, f"img_path , actual_output\n{O0},Original\n{D0},Deepfake\n")
    assert "labels: 1 Original, 1 Deepfake" in outcome.out
    text = (judged / "test_data/test.csv").read_text()
    assert text.startswith("img_path , actual_output,predicted_output,deepfake_score\n")


def test_rows_of_blanks_are_blank_lines_and_surplus_blanks_pass(judged):
    outcome = evaluate_text(judged, f"img_path,actual_output\n{O0},Original,,\n,\n  \n,,\n{D0},Deepfake\n")
    assert outcome.status == 0, outcome.err
    assert "2 rows" in outcome.out
    lines = (judged / "test_data/test.csv").read_text().splitlines()
    assert lines[2:5] == [",", "  ", ",,"]
    assert lines[1].startswith(f"{O0},Original,Original,0.")


def test_blank_path_beside_a_label_is_named(judged):
    outcome = evaluate_text(judged, f"img_path,actual_output\n,Original\n{D0},Deepfake\n")
    assert outcome.status == 1
    assert "no verdict: test.csv, row 2: " in outcome.err and "img_path is blank" in outcome.err


@pytest.mark.parametrize("cell", ["https://example.org/a.png", "C:\\clips\\a.png"])
def test_urls_and_drive_paths_are_named_as_they_stand(judged, cell):
    outcome = evaluate_text(judged, f"img_path\n{cell}\n{O0}\n")
    assert f"row 2: {cell}: " in outcome.err


@pytest.mark.parametrize("word", ["nan", "NaN", "None", " "])
def test_words_for_a_missing_label(judged, word):
    assert (
        "labels: 1 Original, 0 Deepfake"
        in evaluate_text(judged, f"img_path,actual_output\n{O0},real\n{D0},{word}\n").out
    )


def test_workbooks_and_missing_columns_are_called_what_they_are(judged):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    assert_refused(evaluate_text(judged, buffer.getvalue()), "is an Excel workbook, not a CSV")
    assert_refused(evaluate_text(judged, "image;label\na.png;real\n"), "columns found: 'image', 'label'")


def test_name_too_long_for_the_reports_is_refused_before_anything_is_judged(judged):
    path = judged / f"test_data/{'语' * 80}.csv"
    write_csv(path, [["img_path"], [O0]])
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=[f"test_data/{'语' * 80}.csv"])
    assert_refused(outcome, "the name is too long for the files that belong to it")
    assert "Judged" not in outcome.out


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_images_are_found_whatever_the_unicode_form(tmp_path, on_disk, listed):
    path = tmp_path / normalize(on_disk, "größe/и й/é.png")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert tables.resolve_image(tmp_path, normalize(listed, "größe\\и й/é.png")) == str(path)
    assert tables.resolve_image(tmp_path, normalize(listed, "größe/ö.png")) == str(
        path.parent.parent / normalize(listed, "ö.png")
    )
    names = {
        tables.name_recording(normalize(form, f"{tmp_path}/o/größe__1.png"), tmp_path, r"^(ö|.*?)__")
        for form in ("NFC", "NFD")
    }
    assert names == {normalize("NFC", "größe")}


def test_equal_file_names_count_as_merged_only_where_they_are_one_recording():
    paths = ["a/x.png", "b/x.png", "a/y.png", "b/y.png", "a/z.png"]
    assert tables.list_merged_names(paths, ["x", "x", "a/y", "b/y", "z"]) == ["x.png"]


def test_image_with_both_labels_is_judged_and_not_measured(judged):
    rows = read_csv(judged / "test_data/test.csv")
    wrong = {"Original": "Deepfake", "Deepfake": "Original"}[rows[0]["actual_output"]]
    table = [[*rows[0]], *([*row.values()] for row in rows), [str(judged / "data" / rows[0]["img_path"]), wrong]]
    write_csv(judged / "test_data/test.csv", table)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert "the labels in rows 2, 10: they call the same image Original and Deepfake" in outcome.err
    assert all(row["predicted_output"] for row in read_csv(judged / "test_data/test.csv"))
    assert read_summary(judged)[0]["rows_measured"] == len(rows) - 1
    assert len(read_tsv(judged / "test_data/test_key.tsv")) == len(rows)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("hint", "delimiter"), [("sep=;", ";"), ('"sep=,"', ","), ("SEP=\t", "\t"), ("sep=\\t", "\t"), ("sep=|", "|")]
)
def test_hint_for_excel_names_the_delimiter_and_is_no_row(tmp_path, mark, end, hint, delimiter):
    lines = [hint, delimiter.join(["img_path", "note, or; so"]), delimiter.join(["x.png", "1"])]
    lines[1] = delimiter.join(["img_path", '"note, or; so"'])
    (tmp_path / "a.csv").write_bytes((mark + end.join(lines) + end).encode())
    job = tables.read_job(tmp_path / "a.csv", "a.csv", tmp_path, "utf-8")
    assert job.rows == [["img_path", "note, or; so"], ["x.png", "1"]]
    assert list(job.images) == [2]
    tables.write_predictions(job, {job.images[2]: -1.0}, "utf-8")
    text = (tmp_path / "a.csv").read_bytes().decode()
    assert text.startswith(f"{mark}{hint}{end}img_path{delimiter}")
    assert f"{end}x.png{delimiter}1{delimiter}Deepfake{delimiter}0.7" in text
    assert tables.read_job(tmp_path / "a.csv", "a.csv", tmp_path, "utf-8").rows[1][:2] == ["x.png", "1"]


@pytest.mark.parametrize(
    ("pattern", "path", "name"),
    [
        (trainer.RECORDING_PATTERN, "original/a__b/x__clean_1.png", "x"),
        (trainer.RECORDING_PATTERN, "original/a__b/x.png", "x"),
        (r"^(.+?)__", "original/combined/x__clean.png", "x"),
        (r"(p\d+)", "original/combined/p225/000.png", "p225"),
        (r"([^/]+)/[^/]+$", "original/p225/000.png", "p225"),
        (dataset.FOLDER_PATTERN, "original/p225/000__clean_1.png", "p225/000"),
        (r"(p\d+)", "x.png", "x"),
    ],
)
def test_recordings_are_named_by_file_or_folder(tmp_path, pattern, path, name):
    assert tables.name_recording(str(tmp_path / path), tmp_path, pattern) == name


@given(
    names=st.lists(CELLS.filter(lambda name: name not in OURS), max_size=3, unique=True),
    lines=st.lists(st.lists(CELLS, max_size=3), max_size=5),
    delimiter=st.sampled_from(",;\t"),
    newline=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
@settings(max_examples=300, deadline=None)
def test_every_other_cell_of_any_csv_reads_back_the_same(names, lines, delimiter, newline, mark):
    buffer = io.StringIO(newline="")
    rows = [["img_path", *names], *(["x.png", *line[: len(names)]] for line in lines)]
    csv.writer(buffer, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.csv"
        path.write_bytes((mark + buffer.getvalue()).encode())
        job = tables.read_job(path, path.name, Path(folder), "utf-8")
        assert job.rows == rows
        llr = {job.images[number]: -1.5 for number in list(job.images)[:3]}
        tables.write_predictions(job, llr, "utf-8")
        once = path.read_bytes()
        again = tables.read_job(path, path.name, Path(folder), "utf-8")
        places = [index for index, name in enumerate(again.rows[0]) if name not in OURS[2:]]
        width = len(rows[0])
        for before, after in zip(rows, again.rows):
            assert [after[index] for index in places] == before + [""] * (width - len(before))
        assert once.decode().startswith(mark)
        tables.write_predictions(again, llr, "utf-8")
        assert path.read_bytes() == once


def test_csv_in_another_encoding_needs_the_setting_and_keeps_it(judged):
    text = "img_path;Bemerkung\noriginal/combined/o0__clean_1.png;Größe\n"
    (judged / "test_data/test.csv").write_bytes(text.encode("cp1252"))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "is not utf-8 (byte 55): set CSV_ENCODING, or re-save it as UTF-8" in outcome.err
    assert run(judged, EVALUATOR, WORKERS=0, CSV_ENCODING="cp1252").status == 0
    written = (judged / "test_data/test.csv").read_bytes().decode("cp1252")
    assert written.startswith(
        "img_path;Bemerkung;predicted_output;deepfake_score\noriginal/combined/o0__clean_1.png;Größe;"
    )


def test_utf_16_keeps_its_byte_order_mark(judged):
    (judged / "test_data/test.csv").write_bytes("img_path\noriginal/combined/o0__clean_1.png\n".encode("utf-16"))
    assert run(judged, EVALUATOR, WORKERS=0, CSV_ENCODING="utf-16").status == 0
    assert "predicted_output" in (judged / "test_data/test.csv").read_bytes().decode("utf-16")


@pytest.mark.parametrize("place", ["test_data/test.csv", "test_data"])
def test_read_only_csv_or_folder_is_refused_before_any_image_is_read(judged, place, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    (judged / place).chmod((judged / place).stat().st_mode & ~0o222)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    (judged / place).chmod(0o755)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "is read-only, so that predictions cannot be written" in outcome.err


@pytest.mark.parametrize("change", [lambda path: path.write_text("img_path\nother.png\n"), lambda path: path.unlink()])
def test_csv_changed_meanwhile_is_left_alone(judged, change, monkeypatch):
    table, forward = judged / "test_data/test.csv", resnet.ResNet.forward

    def change_first(self, images):
        change(table)
        monkeypatch.setattr(resnet.ResNet, "forward", forward)
        return forward(self, images)

    monkeypatch.setattr(resnet.ResNet, "forward", change_first)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert "was changed during this run, and is left so: see" in outcome.err
    assert read_csv(judged / "test_data/test.predicted.csv")[0]["predicted_output"]
    assert not table.exists() or table.read_text() == "img_path\nother.png\n"


@pytest.mark.parametrize("line", ['original/combined/o0__clean_1.png,"never closed', '"hello" world,x'])
def test_quotes_that_do_not_match_are_refused_and_swallow_nothing(judged, line):
    table = judged / "test_data/test.csv"
    table.write_text(f"img_path,note\n{line}\noriginal/combined/o0__clean_2.png,y\n")
    before = table.read_bytes()
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "unbalanced quotes?" in outcome.err
    assert table.read_bytes() == before


def test_report_never_overwrites_an_image_or_another_csv(judged):
    shutil.copy(judged / "data/original/combined/o0__clean_1.png", judged / "test_data/test.png")
    (judged / "test_data/test.csv").write_text("img_path,actual_output\n../test_data/test.png,Original\n")
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome, "would overwrite")
    (judged / "test_data/test.csv").write_text("img_path\noriginal/combined/o0__clean_1.png\n")
    (judged / "test_data/test_recordings.csv").write_text("img_path\noriginal/combined/o0__clean_1.png\n")
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/test.csv", "test_data/test_recordings.csv"])
    assert (outcome.status, "would overwrite" in outcome.err) == (2, True)


def test_csv_open_elsewhere_keeps_its_text_and_the_verdicts_are_not_lost(judged, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("test.csv"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    before = (judged / "test_data/test.csv").read_bytes()
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert (judged / "test_data/test.csv").read_bytes() == before
    assert all(row["predicted_output"] for row in read_csv(judged / "test_data/test.predicted.csv"))
