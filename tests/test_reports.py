"""What an evaluation shows: pictures, verdicts on recordings, the page; and what it says of odd input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import (
    EVALUATOR,
    assert_refused,
    copy_script,
    make_image,
    read_checkpoint,
    read_csv,
    read_summary,
    run,
    write_csv,
)
from PIL import Image, PngImagePlugin

from models import detector, figures, images

CHECKPOINT = "models/experiments/best_laundered_processed.pth"


def add_condition(folder):
    """Give the test CSV a column that its results are broken down by."""
    rows = read_csv(folder / "test_data/test.csv")
    cells = [[row["img_path"], row["actual_output"], f"c{number % 2}"] for number, row in enumerate(rows)]
    write_csv(folder / "test_data/test.csv", [["img_path", "actual_output", "condition"], *cells])


def write_parts(path, seed, fakes, seconds=1.8):
    """Write the images of a recording's parts, as the maker does: one for each entry of `fakes`."""
    for number, fake in enumerate(fakes, 1):
        part = path.with_name(f"{path.name}__clean_{number}.png")
        make_image(part, seed + number, fake)
        info = PngImagePlugin.PngInfo()
        notes = {"settings": {"seconds_per_image": seconds}, "parts": len(fakes), "start_s": (number - 1) * seconds}
        info.add_text("spectrogram", json.dumps(notes))
        with Image.open(part) as image:
            image.load()
            image.save(part, pnginfo=info)


def assert_picture(content, size):
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB"), float)
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# ---- Pictures


def test_every_picture_is_written_in_its_size_and_is_not_blank(judged):
    add_condition(judged)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    sizes = {
        ".png": (624, 528),
        "_curves.png": (1320, 576),
        "_mistakes.png": (1440, 1560),
        "_conditions.png": (840, 268),
    }
    for ending, size in sizes.items():
        assert_picture((judged / f"test_data/test{ending}").read_bytes(), size)


def test_activation_map_lights_up_where_the_image_differs():
    facts = {"mean": [0.4] * 3, "std": [0.2] * 3}
    torch.manual_seed(0)
    model = detector.make_network().eval()
    with torch.no_grad():  # features of random weights, of which the head takes those that answer to the bright patch
        pixels = torch.full((3, 256, 256), 100, dtype=torch.uint8)
        pixels[:, 20:60, 180:240] = 255
        kept = []
        hook = model.layer4.register_forward_hook(lambda *results: kept.append(results[-1][0]))
        model(images.to_input(pixels[None].float(), **facts, white=255))
        hook.remove()
        contrast = kept[0][:, :2, 5:].mean((1, 2)) - kept[0][:, 4:, :4].mean((1, 2))
        model.fc.weight.copy_(torch.stack([contrast, -contrast]))
    found = figures.map_activations(detector.Detector(model, facts), pixels)
    assert (found.shape, found.max()) == ((256, 256), 1)
    assert found[10:70, 170:250].mean() > 2 * found[128:, :128].mean()


def test_learning_curves_are_drawn():
    row = {"train_loss": 0.5, "val_loss": 0.4, "val_balanced_accuracy": 0.8, "val_auc": 0.9}
    history = [{**row, "epoch": epoch} for epoch in (1, 2, 3)]
    assert_picture(figures.draw_learning_curves(history, 2), (1320, 480))


# ---- Recordings and the page


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


def test_timeline_shows_a_splice(judged):
    write_parts(judged / "data/unknown/splice", 1, [False, False, True, False])
    names = [f"unknown/splice__clean_{n}.png" for n in (1, 2, 3, 4)]
    write_csv(judged / "test_data/test.csv", [["img_path"], *([name] for name in names)])
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    with Image.open(judged / "test_data/test_timeline.png") as image:
        assert image.size == (1320, 300)
        pixels = np.asarray(image.convert("RGB"), int)
    red, blue = (np.abs(pixels - colour).sum(2) < 30 for colour in ([213, 94, 0], [0, 114, 178]))
    columns = np.flatnonzero(red.sum(0) > 2)
    middle = (columns.min() + columns.max()) / 2
    left, right = np.flatnonzero(blue.sum(0) > 2)[[0, -1]]
    assert 0.5 < (middle - left) / (right - left) < 0.75  # the third of four parts
    assert np.flatnonzero(red.any(1)).mean() < np.flatnonzero(blue.any(1)).mean() - 50  # high up


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


def test_outputs_of_an_earlier_run_are_named(judged):
    add_condition(judged)
    assert run(judged, EVALUATOR, WORKERS=0).status == 0
    write_csv(judged / "test_data/test.csv", [["img_path"], ["original/combined/o0__clean_1.png"]])
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert outcome.status == 0
    assert "test.csv: left from an earlier run, not of this one: test.png, test_key.tsv, test_report.txt" in outcome.out
    assert "Left from an earlier run, not of this one: aggregate_test_reports.json" in outcome.out


def test_two_csvs_of_one_name_are_told_apart(judged):
    shutil.copytree(judged / "test_data", judged / "more")
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=["test_data/test.csv", "more/test.csv"])
    assert [entry["file"] for entry in read_summary(judged)] == ["test_data/test.csv", "more/test.csv"]
    assert "more/test.csv: 8 rows" in outcome.out


# ---- CSVs that people write


def evaluate_text(judged, text):
    (judged / "test_data/test.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return run(judged, EVALUATOR, WORKERS=0)


O0, D0 = "original/combined/o0__clean_1.png", "deepfake/combined/d0__clean_1.png"


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


def test_audio_is_sent_to_the_maker(judged):
    (judged / "data/a.wav").write_bytes(b"RIFF")
    outcome = evaluate_text(judged, f"img_path\na.wav\n{O0}\n")
    assert "it is audio: make images of it with data/make_spectrograms.py" in outcome.err


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


def test_rows_without_verdict_and_repeated_ones_are_counted_in_the_report(judged):
    rows = "".join(f"missing{n}.png,Original\n" for n in range(6))
    outcome = evaluate_text(judged, f"img_path,actual_output\n{rows}{O0},Original\n{O0},Original\n{D0},Deepfake\n")
    assert outcome.status == 1
    (entry,) = read_summary(judged)
    assert (entry["rows_without_verdict"], entry["rows_repeated"]) == (6, 1)
    text = " ".join(entry["report"].split())
    assert "6 of 9 rows have no verdict" in text and "1 rows repeat an image" in text


def test_name_too_long_for_the_reports_is_refused_before_anything_is_judged(judged):
    path = judged / f"test_data/{'语' * 80}.csv"
    write_csv(path, [["img_path"], [O0]])
    outcome = run(judged, EVALUATOR, WORKERS=0, CSV_FILES=[f"test_data/{'语' * 80}.csv"])
    assert_refused(outcome, "the name is too long for the files that belong to it")
    assert "Judged" not in outcome.out


# ---- Checkpoints of every kind


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", ""])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_bare_weights_load_under_every_usual_name(trained, tmp_path, prefix, key):
    state = {prefix + name: tensor for name, tensor in read_checkpoint(trained)["state_dict"].items()}
    torch.save({key: state} if key else state, tmp_path / "a.pth")
    content = detector.load_content(tmp_path / "a.pth")
    model = detector.build_model(detector.find_weights(content, "a.pth"), "a.pth")
    assert torch.equal(model.fc.weight, state[prefix + "fc.weight"])


def test_other_kinds_of_files_are_called_by_name(trained, tmp_path):
    model = detector.make_network().eval()
    with pytest.warns():  # torch calls torch.jit deprecated
        torch.jit.script(model).save(str(tmp_path / "a.pth"))
    with pytest.raises(ValueError, match="it is a TorchScript archive"):
        detector.load_content(tmp_path / "a.pth")
    header = json.dumps({"fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "b.pth").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="it is a safetensors file"):
        detector.load_content(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds no weights; its keys: epoch, optimizer"):
        detector.find_weights({"epoch": 3, "optimizer": {}}, "c.pth")


# ---- Streams


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>&-", ">&- 2>&-", "| head -n 1"])
def test_closed_streams_do_not_cost_the_work(judged, how):
    copy_script(judged, EVALUATOR, WORKERS=0)
    command = f"{sys.executable} -u {EVALUATOR} {how}"
    subprocess.run(["bash", "-c", command], cwd=judged, capture_output=True, timeout=120)
    assert all(row["predicted_output"] for row in read_csv(judged / "test_data/test.csv"))
    assert (judged / "test_data/test_report.txt").exists()


@pytest.mark.slow
def test_names_that_are_not_ascii_are_found_with_an_ascii_file_system(judged):
    shutil.copy(judged / "data" / O0, judged / "data/\u00e9t\u00e9.png")
    write_csv(judged / "test_data/test.csv", [["img_path"], ["\u00e9t\u00e9.png"]])
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    copy_script(judged, EVALUATOR, WORKERS=0)
    done = subprocess.run([sys.executable, EVALUATOR], cwd=judged, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_csv(judged / "test_data/test.csv")[0]["predicted_output"]
