"""Checkpoints of every kind, and calibration; no checkpoint runs code or loads damaged."""

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.chaos import damage_checkpoint
from conftest import CHECKPOINT, EVALUATOR, assert_refused, draw_scores, read_checkpoint, read_csv, run, write_csv

from models import detector


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
        (lambda c: {"weight": torch.zeros(3)}, "holds no weights of a ResNet-18, but: weight (3)"),
        (
            lambda c: change_state(c, **{"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            "It holds: conv1.weight (64x1x7x7), bn1",
        ),
        (lambda c: {**c, "format": 99}, "format 99"),
        (lambda c: {key: value for key, value in c.items() if key != "mean"}, "lacks mean"),
        (lambda c: [1, 2, 3], "it holds a list); needed: a .pth with the state_dict of a ResNet-18"),
        (lambda c: torch.zeros(3), "it holds a Tensor); needed: "),
    ],
)
def test_wrong_checkpoints_are_refused_in_one_line(judged, change, words, tmp_path):
    checkpoint = torch.load(judged / CHECKPOINT, weights_only=True)
    torch.save(change(checkpoint), judged / CHECKPOINT)
    outcome = run(judged, EVALUATOR, WORKERS=0)
    assert_refused(outcome, words)


def zip_notes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"PK\x03\x04 no zip", zip_notes()])
def test_files_that_are_no_checkpoint_are_refused_in_one_line(judged, content):
    (judged / CHECKPOINT).write_bytes(content)
    assert_refused(run(judged, EVALUATOR, WORKERS=0), "is not a checkpoint, or is damaged")


def fit(margins, is_fake):
    logits = torch.tensor(np.stack([margins, np.zeros(len(margins))], axis=1))
    return detector.fit_calibration(logits, torch.tensor(np.where(is_fake, 0, 1)))


def test_calibration_finds_scale_and_offset_whatever_the_balance():
    for bona_fide, spoof in ((4000, 4000), (8000, 1000)):
        llr, is_fake = draw_scores(bona_fide, spoof)  # its true log-likelihood ratio is 2 / 1.5 ** 2 * llr
        calibration = fit(-3 * llr + 5, is_fake)
        assert calibration["scale"] == pytest.approx(2 / 1.5**2 / 3, rel=0.1)
        assert calibration["offset"] / calibration["scale"] == pytest.approx(-5, abs=0.3)


@pytest.mark.parametrize("margins", [[5.0, 6, -5, -6], [1e-3, 1e-3, -1e-3, -1e-3], [0.0, 0, 0, 0], [-1.0, -2, 1, 2]])
def test_calibration_is_sound_for_tiny_separated_constant_and_inverted_scores(margins):
    calibration = fit(np.array(margins), np.array([True, True, False, False]))
    assert np.isfinite(list(calibration.values())).all()
    assert calibration["scale"] > 0
    if margins[0] > 0:
        scores = 1 / (1 + np.exp(-(calibration["scale"] * np.array(margins) + calibration["offset"])))
        assert (scores[:2] > 0.5).all() and (scores[2:] < 0.5).all()
        assert scores.max() < 0.99


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        *((None, prefix) for prefix in ("", "_orig_mod.", "module._orig_mod.", "net.")),
        *((key, "") for key in ("state_dict", "model_state_dict", "model", "net", "ema", "weights")),
        *(("state_dict", "model."), ("state_dict", "model.backbone."), ("model", "module.")),
    ],
)
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
    content = {"epoch": 3, "net": {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}}
    with pytest.raises(ValueError) as caught:
        detector.find_weights(content, "c.pth")
    words = "but: epoch (int), net (features.0.weight (64x3x3x3), features.0.bias (64))"
    assert str(caught.value) == f"c.pth holds no weights of a ResNet-18, {words}"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file, as Keras writes it"),
        (b"\x08\x07\x12\x07pytorch" + bytes(500), "an ONNX file"),
        (b"\x08\x0a\x3a\x07" + bytes(500), "an ONNX file"),
        (pickle.dumps({"weights": [1.0]}), "a pickle of Python objects"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(50), "a compressed file: unpack it"),
    ],
)
def test_files_of_other_programs_are_called_what_they_are(tmp_path, content, kind):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        detector.load_content(tmp_path / "a.pth")
    assert f"(it is {kind}" in str(caught.value)
    assert str(caught.value).endswith("needed: a .pth with the state_dict of a ResNet-18, written by torch.save")


def test_files_of_older_torch_load(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert detector.load_content(tmp_path / "a.pth")["a"].tolist() == [1, 1]


def test_of_several_networks_the_usual_one_is_taken_and_said(trained, capsys):
    state = read_checkpoint(trained)["state_dict"]
    other = {f"module.{name}": tensor * 0 for name, tensor in state.items()}
    content = {"ema": other, "net": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3}
    assert torch.equal(detector.find_weights(content, Path("a.pth"))["fc.weight"], state["fc.weight"])
    assert capsys.readouterr().out == "Note: a.pth holds several networks: net is used, not ema.module\n"
    lightning = {
        "state_dict": {**{f"model.{name}": tensor for name, tensor in state.items()}, "loss.weight": torch.ones(2)}
    }
    assert detector.find_weights(lightning, Path("a.pth")).keys() == state.keys()
    assert capsys.readouterr().out == ""


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
