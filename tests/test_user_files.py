"""Files of users and of strangers: the CSV keeps what is in it, no checkpoint runs code or loads damaged."""

import csv
import io
import os
import random
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from benchmarks.chaos import damage_checkpoint
from conftest import EVALUATOR, QUICK, TRAINER, assert_refused, read_csv, run, run_process
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import resnet

from models import tables

CHECKPOINT = "models/experiments/best_laundered_processed.pth"
OURS = ("img_path", "actual_output", "predicted_output", "deepfake_score")


# ---- The user's CSV


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


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


# ---- Hostile files


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload_ran",)


def test_pickle_with_code_is_refused_and_never_runs(judged, monkeypatch):
    monkeypatch.chdir(judged)
    torch.save({"state_dict": Payload()}, judged / CHECKPOINT)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)
    assert "it holds posix.system, which is not loaded" in outcome.err
    assert not (judged / "payload_ran").exists()


def test_damaged_checkpoints_are_refused_or_right(judged):
    counts, faults = damage_checkpoint(judged / CHECKPOINT, 20, 60, random.Random(0))
    assert not faults
    assert counts["refused"] > 40


def test_other_zip_is_refused(judged):
    with zipfile.ZipFile(judged / CHECKPOINT, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1)


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


def test_outputs_that_are_not_finite_are_no_verdicts(judged, monkeypatch):
    monkeypatch.setattr(resnet.ResNet, "forward", lambda self, images: torch.full((len(images), 512), float("inf")))
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 1
    assert "the network's output is not finite" in outcome.err
    assert {row["predicted_output"] for row in read_csv(judged / "test_data/test.csv")} == {""}


def test_names_with_dollars_and_of_other_encodings_pass(judged):
    name = "cost$5_$6_\udce9__clean.png"
    shutil.copy(judged / "data/original/combined/o0__clean_1.png", judged / "data/cost$5_$6__clean.png")
    table = judged / "test_data/test.csv"
    table.write_text(table.read_text().rstrip("\n") + "\ncost$5_$6__clean.png,Deepfake\n")
    outcome = run_process(judged, EVALUATOR, env={"PYTHONIOENCODING": "ascii"}, WORKERS=0)
    assert outcome.status == 0, outcome.err
    shutil.copy(judged / "data/original/combined/o0__clean_1.png", os.fsencode(judged / "data/original" / name))
    outcome = run_process(judged, TRAINER, env={"PYTHONIOENCODING": "ascii"}, **QUICK)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("value", ["source", ("llr",), 3])
def test_wrong_report_by_is_refused(judged, value):
    outcome = run(judged, EVALUATOR, WORKERS=0, REPORT_BY=value)
    assert (outcome.status, "REPORT_BY" in outcome.err) == (2, True)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_evaluator_out_of_memory_says_what_to_do_and_leaves_the_csv(judged, error, monkeypatch):
    def run_out(*_):
        raise error

    monkeypatch.setattr(resnet.ResNet, "forward", run_out)
    before = (judged / "test_data/test.csv").read_bytes()
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert (outcome.status, outcome.err) == (2, "error: out of memory: lower BATCH_SIZE or IMAGE_SIZE\n")
    assert (judged / "test_data/test.csv").read_bytes() == before
