"""Judge spectrogram images with a trained checkpoint: Original or Deepfake, for each row of a CSV.

    python evaluate_deepfake_model.py

In:  MODEL_PATH, and CSVs with a column img_path (relative to IMG_BASE_PATH) and, where the truth is known,
     actual_output (Original or Deepfake). The images must be rendered as the training images were.
Out: the columns predicted_output and deepfake_score (0 to 1; Deepfake from 0.5) in the same CSV;
     <name>_report.html, a page to read or hand on; <name>_scores.tsv (log-likelihood ratios as in ASVspoof 5);
     where recordings have several images, <name>_recordings.csv and <name>_timeline.png; where there are labels,
     <name>_report.txt, <name>.png (confusion matrix), further pictures and, beside the first CSV,
     aggregate_test_reports.json.

Needs the modules in models/ beside it; all that it must know about the model is in the checkpoint.
About 160 images of 224 pixels a second on two cores, 30 figures of 2325x1155.
"""

from __future__ import annotations

import copy
import csv
import datetime
import hashlib
import io
import json
import math
import os
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from models import detector, report, runtime
from models.detector import CLASSES, Detector, decide, name_recording, name_verdicts, read_image, take_fingerprint
from models.metrics import estimate_intervals, measure
from models.report import FEW_ROWS, REPORT_ORDER, format_rate
from models.runtime import Compute, Team, write_file

if TYPE_CHECKING:
    import pandas

# ------------------------------------------------------------------------------------------------
# Settings. Relative paths start at this script's folder.
# Paths
MODEL_PATH = Path("models/experiments/best_laundered_processed.pth")
IMG_BASE_PATH = Path("data")  # img_path is relative to this folder
CSV_FILES = ["test_data/test.csv"]
CSV_ENCODING = "utf-8"  # of the CSVs, with or without a byte order mark; "cp1252", "utf-16", ...
REPORT_BY = ("source", "speaker", "condition")  # columns of the CSV by whose values results are broken down, if there
# System
BATCH_SIZE = 32  # images; larger is slower on a CPU
WORKERS = None  # threads that decode images; 0: one; None: one for each core, up to 8
PRECISION = "auto"  # "auto": bfloat16 or float16 where the hardware is faster with it; "float32"
# ------------------------------------------------------------------------------------------------

OWN_COLUMNS = ("path", "recording", "label", "is_fake", "llr", "margin")
RULES = {
    "MODEL_PATH": runtime.PATH,
    "IMG_BASE_PATH": runtime.PATH,
    "CSV_FILES": runtime.PATH_LIST,
    "CSV_ENCODING": runtime.ENCODING,
    "REPORT_BY": runtime.Rule(
        lambda value: isinstance(value, (list, tuple)) and not set(value) & set(OWN_COLUMNS),
        f"a list of columns other than {', '.join(OWN_COLUMNS)}",
    ),
    "BATCH_SIZE": runtime.whole_number(1),
    "WORKERS": runtime.or_none(runtime.whole_number(0)),
    "PRECISION": runtime.one_of("auto", "float32"),
}
LABELS = {  # what actual_output may say, without regard to case and surrounding blanks
    "Deepfake": ("deepfake", "spoof", "fake"),
    "Original": ("original", "bonafide", "bona fide", "bona-fide", "real", "genuine"),
}
BLANK_LABELS = ("", "nan", "none")
METRICS = {  # name in the summary: how the report calls and writes it; models/metrics.py computes them
    "eer": ("Equal error rate (EER)", "rate"),
    "accuracy": ("Accuracy", "rate"),
    "half_total_error": ("Half total error, decision threshold", "rate"),
    "misses": ("  originals flagged as deepfake", "rate"),
    "false_alarms": ("  deepfakes passing as original", "rate"),
    "eer_by_recording": ("EER by recording", "rate"),
    "roc_auc": ("Area under the ROC curve", "number"),
    "min_dcf": ("minDCF (costs of ASVspoof 5)", "number"),
    "act_dcf": ("actDCF", "number"),
    "cllr": ("Cllr, bits (1: no information)", "number"),
    "ece": ("Expected calibration error", "number"),
}
OUTPUTS = (  # <name>_<output> beside <name>.csv
    *("scores.tsv", "key.tsv", "recordings.csv", "timeline.png", "report.txt", "report.html"),
    *("curves.png", "conditions.png", "mistakes.png"),
)
FORMAT_SAMPLE = 200  # images of a CSV that the format check looks at
UNLIKE_FRACTION = 0.2  # so many of them may be rendered unlike the training images before it warns
UNLIKE_SHIFT = 3  # Mahalanobis distance of their mean, likewise
UNLIKE_FEW = 1.5  # median distance of fewer than five images, in units of what 99 % of validation's keep, likewise
BARE_FACTS = {  # assumed where a file holds weights only
    "classes": list(CLASSES),
    "image_size": 224,
    "mean": list(detector.IMAGENET_MEAN),
    "std": list(detector.IMAGENET_STD),
    "calibration": {"scale": 1.0, "offset": 0.0},
    "recording_pattern": r"^([^/]+?)__[^/]*$",
}


class Job(NamedTuple):
    """One CSV to judge."""

    path: Path
    name: str  # on the screen and in the summary
    base: Path  # IMG_BASE_PATH
    before: bytes  # what the file held when it was read
    rows: list[list[str]]  # as they stand in it, header first
    delimiter: str
    images: dict[int, str]  # row number -> absolute path of its image; rows that are blank lines are missing
    labels: Optional[dict[int, str]]  # row number -> class; rows with a blank label are missing; None: no such column

    def name_output(self, what: str) -> Path:
        """Name a file that belongs to this CSV: its stem, then `what`."""
        return self.path.with_name(self.path.stem + what)


class Scores(NamedTuple):
    """What was found out about each image, by its path."""

    margins: dict[str, float]  # logit Deepfake - logit Original
    llr: dict[str, float]  # calibrated log-likelihood ratio, higher = more bona fide
    fingerprints: dict[str, int]
    unreadable: dict[str, str]  # the reasons why


# ---- CSV


def read_jobs(paths: list[Path], names: list[str], base: Path, encoding: str) -> tuple[list[Job], int]:
    """Read all CSVs; name those that cannot be used. Returns the usable ones and the number of others.

    Args:
        names: how to call each on the screen.

    Raises:
        ValueError: none can be used, two would write the same report, or a report would overwrite an input.
    """
    jobs, reasons = [], []
    for path, name in dict(zip(paths, names)).items():
        try:
            jobs.append(read_job(path, name, base, encoding))
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    outputs = {}
    for job in jobs:
        other = outputs.setdefault(job.path.with_suffix(""), job.path)
        if other != job.path:
            raise ValueError(f"{other} and {job.path} would write the same report: rename one")
    if not jobs:
        raise ValueError("; ".join(reasons) or "CSV_FILES is empty")
    inputs = {os.path.realpath(path) for job in jobs for path in (job.path, *job.images.values())}
    for job in jobs:
        for what in (".predicted.csv", ".png", *(f"_{name}" for name in OUTPUTS)):
            if os.path.realpath(path := job.name_output(what)) in inputs:
                raise ValueError(f"the report on {job.path} would overwrite {path}, which is an input: rename one")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return jobs, len(reasons)


def read_job(path: Path, name: str, base: Path, encoding: str) -> Job:
    """Read one CSV and check all of it before any image is read.

    Raises:
        ValueError: the file is missing, or not a CSV with a column img_path; a row has more cells than the header; a
            label is unknown; the file or what belongs to it cannot be written.
    """
    if not path.is_file():
        raise ValueError(f"CSV not found: {path}")
    check_writable(path)
    before = path.read_bytes()
    rows, delimiter = detector.parse_table(before, path, encoding)
    columns, names = detector.find_columns(rows[0]), [cell.strip(" ") for cell in rows[0]]
    for column in ("img_path", "actual_output", "predicted_output", "deepfake_score"):
        if names.count(column) > 1:
            raise ValueError(f"{path} has {names.count(column)} columns named {column}")
    job = Job(path, name, base, before, rows, delimiter, {}, {} if "actual_output" in columns else None)
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if any(cell.strip() for cell in row[len(names) :]):
            raise ValueError(f"{path}, row {number}: {len(row)} cells, but the header has {len(names)}")
        cells = row + [""] * (len(names) - len(row))
        cell = cells[columns["img_path"]]
        job.images[number] = detector.resolve_image(base, cell) if cell.strip() else ""
        if job.labels is not None and (label := parse_label(cells[columns["actual_output"]], path, number)):
            job.labels[number] = label
    return job


def check_writable(path: Path) -> None:
    """Raise ValueError if a CSV or what belongs to it cannot be written: better now than after hours."""
    if len(os.fsencode(f"{path.stem}_recordings.csv")) > 250:
        raise ValueError(f"{path}: the name is too long for the files that belong to it: rename it")
    path = Path(os.path.realpath(path))
    for entry in (path, path.parent):
        bits_tell = os.name != "nt" or entry.is_file()  # on Windows a folder's read-only bit means something else
        if not os.access(entry, os.W_OK) or (bits_tell and not entry.stat().st_mode & 0o222):
            raise ValueError(f"{entry} is read-only, so that predictions cannot be written")


def parse_label(cell: str, path: Path, row: int) -> str:
    """Parse a label: a class, or "" for a blank one.

    Raises:
        ValueError: the label is unknown.
    """
    word = " ".join(cell.lower().split())
    if word in BLANK_LABELS:
        return ""
    for name, words in LABELS.items():
        if word in words:
            return name
    allowed = ", ".join(word for words in LABELS.values() for word in words)
    raise ValueError(f"{path}, row {row}: unknown actual_output {cell!r} (allowed: {allowed}, or blank)")


def format_table(rows: list[list[str]], delimiter: str, before: bytes, encoding: str) -> bytes:
    """Write rows as CSV with the BOM, line endings and end of file that the file had before."""
    text = before.decode(encoding)
    line_end = text.find("\n")
    newline = "\r\n" if text[line_end - 1 : line_end] == "\r" else "\n"
    if line_end < 0 and "\r" in text:
        newline = "\r"
    lines = []  # before Python 3.13 a lone line break in a cell is quoted only where the terminator holds it
    csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    after = "".join(line.removesuffix("\r\n") + newline for line in lines)
    if not text.endswith(("\n", "\r")):
        after = after[: -len(newline)]
    return ((text[:1] if text.startswith("\ufeff") else "") + after).encode(encoding)


def write_predictions(job: Job, llr: dict[str, float], encoding: str) -> tuple[Path, bytes]:
    """Write predicted_output and deepfake_score back into the CSV; every other cell keeps its text.

    A CSV that was changed since it was read is left alone, and <name>.predicted.csv written instead.

    Args:
        llr: {path: log-likelihood ratio}; rows of other paths stay blank.

    Returns:
        The file that was written, and its content.
    """
    values = np.array(list(llr.values()))
    cells = {path: pair for path, *pair in zip(llr, name_verdicts(values), detector.to_scores(values).tolist())}
    header = list(job.rows[0])
    header += [name for name in ("predicted_output", "deepfake_score") if name not in detector.find_columns(header)]
    columns, rows = detector.find_columns(header), [header]
    for number, row in enumerate(job.rows[1:], 2):
        if number in job.images:
            row = row[: len(job.rows[0])]  # surplus blanks
            row += [""] * (len(header) - len(row))
            verdict, score = cells.get(job.images[number], ("", None))
            row[columns["predicted_output"]] = verdict
            row[columns["deepfake_score"]] = "" if score is None else f"{score:.6f}"
        rows.append(row)
    content, path = format_table(rows, job.delimiter, job.before, encoding), job.path
    if not path.is_file() or path.read_bytes() != job.before:
        path = job.name_output(".predicted.csv")
        print(f"{job.path} was changed during this run, and is left so: see {path}", file=sys.stderr)
    try:
        write_file(path, content)
    except PermissionError as error:  # on Windows: it is open in another program
        path = job.name_output(".predicted.csv")
        print(f"{job.path} cannot be written ({error.strerror}), and is left as it is: see {path}", file=sys.stderr)
        write_file(path, content)
    return path, content


# ---- Model


def load_detector(path: Path) -> Detector:
    """Rebuild a detector from a checkpoint, or from a bare state_dict, without running any code in it.

    Raises:
        ValueError: the file is missing, damaged, or not a two-class ResNet-18.
    """
    if not path.is_file():
        raise ValueError(f"MODEL_PATH: file not found: {path} (train_deepfake_detector.py makes it)")
    try:
        facts = detector.load_content(path)
        if "format" not in facts:
            print(
                f"Warning: {path.name} holds weights only; assumed: classes {', '.join(CLASSES)}, image size "
                f"{BARE_FACTS['image_size']}, ImageNet's mean and deviation, no calibration"
            )
            facts = {
                "state_dict": detector.find_weights(facts, path),
                **BARE_FACTS,
                "format": detector.CHECKPOINT_FORMAT,
            }
        if facts["format"] != detector.CHECKPOINT_FORMAT:
            raise ValueError(f"{path} has format {facts['format']}; this script reads {detector.CHECKPOINT_FORMAT}")
        missing = [name for name in BARE_FACTS if name not in facts]
        if missing or sorted(facts["classes"]) != sorted(CLASSES):
            raise ValueError(f"{path} lacks {', '.join(missing) or 'the classes ' + str(CLASSES)}")
        return Detector(detector.build_model(detector.find_weights(facts, path), path), facts)
    except ValueError as error:
        raise ValueError(f"MODEL_PATH: {error}") from None


def fuse_norms(model: nn.Module) -> nn.Module:
    """Fold each batch norm of a ResNet-18 into the convolution before it: the same outputs, a seventh faster."""
    for block in (model, *(part for part in model.modules() if isinstance(part, BasicBlock))):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        if getattr(block, "downsample", None):
            block.downsample = fuse_conv_bn_eval(*block.downsample)
    return model


# ---- Scores


def read_batches(paths: list[str], size: int, batch_size: int, threads: int, ahead: int) -> Iterator[list[tuple]]:
    """Read images in batches of (pixels, fingerprint, ""), or (None, 0, the reason why it cannot be read).

    Args:
        ahead: batches to read while the network is busy. For a GPU; on a CPU both would fight for the cores.
    """

    def read(path: str) -> tuple[Optional[torch.Tensor], int, str]:
        try:
            if not path:
                raise ValueError("img_path is blank")
            pixels = read_image(path, size)
            return pixels, take_fingerprint(pixels.numpy()), ""
        except Exception as error:  # Pillow's decoders raise many kinds; every one is reported by name
            return None, 0, f"{type(error).__name__}: {error}".splitlines()[0]

    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for start in range(0, len(paths), batch_size):
            pending.append([pool.submit(read, path) for path in paths[start : start + batch_size]])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


@torch.inference_mode()
def score_images(paths: list[str], model: Detector, compute: Compute, settings: dict, team: Team) -> Scores:
    """Score each image once, the ranks of a team each their part. Returns all results on all ranks."""
    started, total, facts = time.perf_counter(), len(paths), model.facts
    paths, scores = team.take_part(paths), Scores({}, {}, {}, {})
    network = fuse_norms(copy.deepcopy(model.model)).to(compute.device, memory_format=torch.channels_last)
    head, network.fc = network.fc, nn.Identity()  # in float32: bfloat16 logits would tie
    fake = facts["classes"].index("Deepfake")
    threads = max(1, runtime.choose_workers(settings["WORKERS"], team.local_size))
    ahead = 2 if compute.device.type == "cuda" else 0
    blank, done = torch.zeros(3, facts["image_size"], facts["image_size"], dtype=torch.uint8), 0
    margins = torch.empty(len(paths), device=compute.device)  # filled in place: the GPU need not be waited for
    with tqdm(total=len(paths), desc="Judging images", unit=" images", disable=None) as progress:
        for batch in read_batches(paths, facts["image_size"], settings["BATCH_SIZE"], threads, ahead):
            pixels = torch.stack([blank if pixels is None else pixels for pixels, *_ in batch])
            inputs = detector.to_input(pixels.to(compute.device).float(), facts["mean"], facts["std"], white=255)
            with compute.autocast():
                features = network(inputs)
            logits = head(features.float())
            margins[done : done + len(batch)] = logits[:, fake] - logits[:, 1 - fake]
            for path, (_, fingerprint, reason) in zip(paths[done : done + len(batch)], batch):
                scores.fingerprints[path] = fingerprint
                if reason:
                    scores.unreadable[path] = reason
            done += len(batch)
            progress.update(len(batch))
    scale, offset = facts["calibration"]["scale"], facts["calibration"]["offset"]
    for path, margin in zip(paths, margins.tolist()):
        if not math.isfinite(margin):
            scores.unreadable.setdefault(path, "the network's output is not finite")
        if path not in scores.unreadable:
            scores.margins[path], scores.llr[path] = margin, -(scale * margin + offset)
    everything = Scores({}, {}, {}, {})
    for part in team.gather(scores):
        for whole, some in zip(everything, part):
            whole.update(some)
    print(f"Judged {total:,} images in {time.perf_counter() - started:.2f} s")
    return everything


# ---- Tables of results


def choose_rows(job: Job, scores: Scores, facts: dict, report_by: tuple[str, ...]) -> pandas.DataFrame:
    """Choose the rows with a score, as a table: what is measured is measured on those with a label.

    Returns:
        Columns path, recording, label ("": none), is_fake, llr, margin, and those of REPORT_BY that the CSV has.
    """
    import pandas

    columns = detector.find_columns(job.rows[0])
    columns = {name: columns[name] for name in report_by if name in columns}
    table = []
    for number, path in job.images.items():
        if path in scores.llr:
            row = job.rows[number - 1]
            cells = {name: row[column] if column < len(row) else "" for name, column in columns.items()}
            label = (job.labels or {}).get(number, "")
            about = {
                "path": path,
                "recording": name_recording(path, job.base, facts["recording_pattern"]),
                "label": label,
            }
            table.append({**cells, **about, "llr": scores.llr[path], "margin": scores.margins[path]})
    table = pandas.DataFrame(table, columns=[*columns, "path", "recording", "label", "llr", "margin"])
    table["is_fake"] = table["label"] == "Deepfake"
    return table


def measure_table(table: pandas.DataFrame) -> dict:
    """Measure rows: numbers, intervals, and how many rows and recordings are behind them."""
    llr, is_fake = table["llr"].to_numpy(float), table["is_fake"].to_numpy(bool)
    measures = {"rows_measured": len(table), "recordings": int(table["recording"].nunique()), **measure(llr, is_fake)}
    measures["intervals_95"] = estimate_intervals(llr, is_fake, table["recording"].tolist())
    reasons = []
    if is_fake.all() or not is_fake.any():
        reasons.append(f"metrics that need both classes: all labels are {table['label'].iloc[0]}")
    elif not measures["intervals_95"]:
        reasons.append("intervals need two recordings of each class")
    if measures["cllr"] is None and not reasons:
        reasons.append("Cllr: a score is infinite")
    return {**measures, "not_computed": reasons}


def measure_conditions(table: pandas.DataFrame, columns: tuple[str, ...]) -> list[dict]:
    """Measure by each value of some columns, the worst first; a value of one class against all rows of the other."""
    import pandas

    parts = []
    for column in columns:
        if column not in table or table[column].nunique() < 2:
            continue
        for value, part in table.groupby(column):
            measured = part
            if part["is_fake"].nunique() == 1:
                others = table[table["is_fake"] != part["is_fake"].iloc[0]]
                measured = pandas.concat([part, others])
            measures = measure_table(measured)
            parts.append(
                {
                    "column": column,
                    "value": value,
                    "rows": len(part),
                    "recordings": int(part["recording"].nunique()),
                    "classes": " and ".join(name for name in REPORT_ORDER if (part["label"] == name).any()),
                    "eer": measures["eer"],
                    "eer_interval_95": measures["intervals_95"].get("eer"),
                    "accuracy": float((decide(part["llr"].to_numpy(float)) == part["is_fake"].to_numpy(bool)).mean()),
                }
            )
    return sorted(parts, key=lambda part: (columns.index(part["column"]), -(part["eer"] or 0)))


def merge_recordings(table: pandas.DataFrame, columns: tuple[str, ...]) -> pandas.DataFrame:
    """Merge the images of each recording and label (and value of the columns): mean of their log-likelihood ratios."""
    keys = ["recording", *(column for column in columns if column in table), "label", "is_fake"]
    merged = table.groupby(keys, sort=False, as_index=False).agg(
        parts=("llr", "size"), llr=("llr", "mean"), paths=("path", list)
    )
    merged["verdict"] = name_verdicts(merged["llr"].to_numpy(float))
    return merged


def describe_recordings(merged: pandas.DataFrame, unlike: set[str], facts: dict) -> pandas.DataFrame:
    """Add to merged recordings what a verdict on each should be read with.

    Args:
        unlike: the images that are rendered unlike the training images.

    Returns:
        Columns recording, those of REPORT_BY, actual_output, predicted_output, deepfake_score, llr, parts, seconds,
        originals_below and deepfakes_above (fractions of the validation recordings beyond this score; blank: unknown),
        rendering ("" or "differs").
    """
    beyond = facts.get("validation_scores")
    table = merged.drop(columns=["is_fake", "paths"])
    table = table.rename(columns={"label": "actual_output", "verdict": "predicted_output"})
    table["deepfake_score"] = detector.to_scores(table["llr"].to_numpy(float))
    table["seconds"] = [count_seconds(paths) for paths in merged["paths"]]
    for name, label, side in (("originals_below", "Original", 1), ("deepfakes_above", "Deepfake", -1)):
        values = beyond[label].numpy() * side if beyond else None
        table[name] = [float((values <= side * llr).mean()) if beyond else "" for llr in table["llr"]]
    differs = [sum(path in unlike for path in paths) > UNLIKE_FRACTION * len(paths) for paths in merged["paths"]]
    table["rendering"] = np.where(differs, "differs", "")
    return table


def count_seconds(paths: list[str]) -> Optional[float]:
    """Count the seconds of a recording that its images show; None where the images do not say."""
    spans = [report.read_span(path) for path in paths]
    if None in spans:
        return None
    total, end = 0.0, 0.0
    for start_s, stop_s in sorted(spans):
        total, end = total + max(0.0, stop_s - max(start_s, end)), max(end, stop_s)
    return round(total, 2)


# ---- Checks


def check_seen(table: pandas.DataFrame, facts: dict, fingerprints: dict[str, int]) -> Optional[dict]:
    """Count the rows that were trained or validated on, as image or as another image of a recording; measure the rest.

    Returns:
        None where the checkpoint does not say what it has seen.
    """
    if "seen_images" not in facts:
        return None
    images, recordings = (set(facts[name].tolist()) for name in ("seen_images", "seen_recordings"))
    as_image = np.array([fingerprints[path] in images for path in table["path"]])
    as_recording = np.array([take_fingerprint(name.encode()) in recordings for name in table["recording"]])
    rest = table[~(as_image | as_recording)]
    return {
        "rows_as_image": int(as_image.sum()),
        "rows_as_recording": int((as_recording & ~as_image).sum()),
        "without_them": measure_table(rest) if 0 < len(rest) < len(table) and rest["label"].all() else None,
    }


def check_format(paths: list[str], facts: dict) -> tuple[Optional[dict], set[str]]:
    """Check, on a sample of readable images, whether they were rendered as the training images were.

    Returns:
        The fraction that lies further from the training images than 99 % of the validation images do, how far their
        mean does, what differs most, in standard deviations, and a warning or ""; None where the checkpoint does not
        say how the training images were rendered. The images that lie further.
    """
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(FORMAT_SAMPLE, len(paths))).astype(int)]
    found = None
    if chosen and "appearance" in facts:
        pixels = torch.stack([read_image(path, facts["image_size"]) for path in chosen])
        found = detector.compare_rendering(pixels, facts["appearance"])
    if found is None:
        return None, set()
    fraction = float((found.distances > 1).mean())
    few = len(chosen) < 5  # one in a hundred lies beyond by chance: few images have to lie far beyond
    is_unlike = np.median(found.distances) > UNLIKE_FEW if few else fraction > UNLIKE_FRACTION
    warning = ""
    if is_unlike or found.shift > UNLIKE_SHIFT:
        largest = "; ".join(f"{name} {difference:+.1f}" for name, difference in list(found.differences.items())[:3])
        warning = (
            f"{fraction:.0%} of {len(chosen)} images were rendered unlike the training images (validation: 1%), and "
            f"their mean lies {found.shift:.1f} from theirs (usual: below {UNLIKE_SHIFT}). Largest differences, in "
            f"standard deviations: {largest}. Verdicts on them cannot be relied on"
        )
    entry = {
        "images": len(chosen),
        "share_unlike": fraction,
        "shift": found.shift,
        "largest_shifts": dict(list(found.differences.items())[:3]),
        "warning": warning,
    }
    limit = UNLIKE_FEW if few else 1
    return entry, {path for path, distance in zip(chosen, found.distances) if distance > limit and warning}


# ---- Report


def write_summary(entry: dict) -> list[str]:
    """Say in plain sentences how good the detector was, on what, and with which caveats."""
    name, rates = entry["file"], {key: format_rate(entry[key]) for key, (_, kind) in METRICS.items() if kind == "rate"}
    good = f"{format_rate(entry['accuracy'], entry['intervals_95'].get('accuracy'))} of the verdicts are right."
    if entry["eer"] is not None:
        good = (
            f"Equal error rate: {format_rate(entry['eer'], entry['intervals_95'].get('eer'))}. At the decision "
            f"threshold, {rates['misses']} of originals are flagged as deepfake and {rates['false_alarms']} of "
            "deepfakes pass as original."
        )
    counts = " and ".join(f"{entry['labels'][label]:,} {label}" for label in REPORT_ORDER)
    what = f"Measured on {counts} images of {entry['recordings']:,} recordings in {name}"
    parts = [part for part in entry["by_condition"] if part["eer"] is not None]
    if parts:
        worst = max(parts, key=lambda part: part["eer"])
        what += f"; highest EER: {worst['column']} {worst['value']} ({format_rate(worst['eer'])})"
    if entry["rows_without_verdict"]:
        what += f". {entry['rows_without_verdict']:,} of {entry['rows']:,} rows have no verdict"
    return [good, what + ".", f"Caveats: {'; '.join(list_caveats(entry))}."]


def list_caveats(entry: dict) -> list[str]:
    """List the reasons for which the measured error may not be what to expect."""
    caveats, interval = [], entry["intervals_95"].get("eer")
    if entry["seen"] is None:
        caveats.append("the checkpoint does not record its training images, so train/test overlap could not be checked")
    elif entry["seen"]["rows_as_image"] + entry["seen"]["rows_as_recording"]:
        caveats.append("some of these images or their recordings were used in training (data leakage)")
    if entry["format"] and entry["format"]["warning"]:
        caveats.append("the images were rendered unlike the training images (see the format check)")
    if interval and interval[1] - interval[0] > 0.05:
        caveats.append("few recordings (wide confidence interval)")
    if entry["rows_repeated"]:
        caveats.append(f"{entry['rows_repeated']:,} rows repeat an image")
    if entry["eer"] is not None and entry["half_total_error"] - entry["eer"] > 0.05:
        caveats.append("the decision threshold, calibrated on validation, does not fit this set")
    if max((entry["shortcuts"] or {"": 0}).values()) > detector.SHORTCUT_AUC:
        caveats.append("image size or brightness alone predicts the class of the training images (shortcut check)")
    return [*caveats, "expect higher error on other voices, generators and channels"]


def format_checks(entry: dict) -> list[str]:
    """Write the results of the leak, format and shortcut checks, a sentence each."""
    lines = []
    if seen := entry["seen"]:
        lines.append(
            f"Leak check: {seen['rows_as_image']:,} rows were trained or validated on, "
            f"{seen['rows_as_recording']:,} more show a recording that was"
        )
        if rest := seen["without_them"]:
            rates = f"EER {format_rate(rest['eer'])}, accuracy {format_rate(rest['accuracy'])}"
            lines.append(f"Without them: {rates}, {rest['rows_measured']:,} rows")
    if entry["format"]:
        fraction = f"{entry['format']['share_unlike']:.0%} of {entry['format']['images']:,} images"
        lines.append(f"Format check: {fraction} were rendered unlike the training images (1 % of validation's are)")
        lines += [entry["format"]["warning"]] * bool(entry["format"]["warning"])
    if entry["shortcuts"]:
        values = ", ".join(f"{name} {auc:.2f}" for name, auc in entry["shortcuts"].items())
        lines.append(f"Shortcut check, AUC by which each predicts the class in training: {values}")
    unchecked = {"seen": "leak", "shortcuts": "shortcut", "format": "format"}
    if names := [name for key, name in unchecked.items() if entry[key] is None]:
        lines.append(f"The checkpoint holds nothing for these checks: {', '.join(names)}")
    return lines


def format_metrics(entry: dict) -> list[list[str]]:
    """Write each metric: its label, and its value with interval and value before calibration."""
    rows = []
    for key, (label, kind) in METRICS.items():
        value, before = entry[key], entry["before_calibration"].get(key)
        text = format_rate(value, entry["intervals_95"].get(key)) if kind == "rate" else f"{value or 0:.4f}"
        text += f"   before calibration {before:.4f}" if before is not None else ""
        rows.append([label, "not computed" if value is None else text])
    return rows


def format_report(entry: dict, classification: str) -> str:
    """Write the report that people read, 100 columns wide at most."""
    lines = [line for sentence in write_summary(entry) for line in textwrap.wrap(sentence, 98)]
    lines += ["", classification, ""]
    lines += [f"{label:<38}{text}" for label, text in format_metrics(entry)]
    lines += [f"Not computed: {reason}" for reason in entry["not_computed"]]
    lines += ["", *(line for check in format_checks(entry) for line in textwrap.wrap(check, 98))]
    for column in dict.fromkeys(part["column"] for part in entry["by_condition"]):
        lines += ["", f"{'By ' + column:<36}{'rows':>7}  {'EER, 95% CI':<26}{'accuracy':>9}"]
        for part in entry["by_condition"]:
            if part["column"] == column:
                rate = format_rate(part["eer"], part["eer_interval_95"])
                mark = "  few rows" if part["rows"] < FEW_ROWS else ""
                lines.append(f"  {part['value'][:33]:<34}{part['rows']:>7,}  {rate:<26}{part['accuracy']:>9.1%}{mark}")
    return "\n".join(lines) + "\n"


def write_scores(job: Job, table: pandas.DataFrame, llr: dict[str, float]) -> list[Path]:
    """Write the score file, and where there are labels the key, in ASVspoof 5's form."""
    column = detector.find_columns(job.rows[0])["img_path"]
    names = {}  # path -> its first spelling
    for number, path in job.images.items():
        if path in llr:
            names.setdefault(path, job.rows[number - 1][column])
    truth = {path: label == "Deepfake" for path, label in zip(table["path"], table["label"]) if label}
    scores = [["filename", "cm-score"]] + [[name, repr(llr[path])] for path, name in names.items()]
    key = [["filename", "cm-label"]]
    key += [[name, "spoof" if truth[path] else "bonafide"] for path, name in names.items() if path in truth]
    written = []
    for what, rows in (("scores", scores), ("key", key)):
        if len(rows) > 1:
            buffer = io.StringIO(newline="")
            csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(rows)
            written.append(job.name_output(f"_{what}.tsv"))
            write_file(written[-1], buffer.getvalue().encode())
    return written


def measure_job(job: Job, table: pandas.DataFrame, scores: Scores, model: Detector, settings: dict) -> dict:
    """Measure the labelled rows of one CSV. Returns its entry for the summary, without the report's text."""
    from sklearn.metrics import classification_report, confusion_matrix

    merged = merge_recordings(table, settings["REPORT_BY"])
    is_fake, verdicts = table["is_fake"].to_numpy(bool), name_verdicts(table["llr"].to_numpy(float))
    names = {"labels": list(REPORT_ORDER), "zero_division": 0}
    counts = confusion_matrix(table["label"], verdicts, labels=list(REPORT_ORDER))
    raw = measure(-table["margin"].to_numpy(float), is_fake)
    return {
        "file": job.name,
        "report": "",
        "rows": len(job.images),
        "rows_without_verdict": sum(path not in scores.llr for path in job.images.values()),
        "rows_repeated": len(job.images) - len(set(job.images.values())),
        "labels": {name: int((table["label"] == name).sum()) for name in REPORT_ORDER},
        **measure_table(table),
        "eer_by_recording": measure(merged["llr"].to_numpy(float), merged["is_fake"].to_numpy(bool))["eer"],
        "before_calibration": {name: raw[name] for name in ("act_dcf", "cllr", "ece")},
        "confusion_matrix": {"order": list(REPORT_ORDER), "counts": counts.tolist()},
        "classification_report": classification_report(table["label"], verdicts, output_dict=True, **names),
        "by_condition": measure_conditions(table, tuple(settings["REPORT_BY"])),
        "shortcuts": model.facts.get("shortcuts"),
        "seen": check_seen(table, model.facts, scores.fingerprints),
    }


def report_job(job: Job, scores: Scores, model: Detector, settings: dict, origin: dict) -> Optional[dict]:
    """Write all that belongs to one CSV. Returns its entry for the summary; None where nothing can be measured."""
    from sklearn.metrics import classification_report

    rows = choose_rows(job, scores, model.facts, settings["REPORT_BY"])
    files = dict.fromkeys(write_scores(job, rows, scores.llr))
    look, unlike = check_format(
        [path for path in dict.fromkeys(job.images.values()) if path in scores.llr], model.facts
    )
    if look and look["warning"]:
        print(f"WARNING: {job.name}: {look['warning']}")
    merged = merge_recordings(rows, settings["REPORT_BY"])
    recordings = describe_recordings(merged, unlike, model.facts)
    if len(merged) < len(rows) or (job.labels is None and len(rows)):
        files[job.name_output("_recordings.csv")] = recordings.to_csv(index=False).encode()
        files[job.name_output("_timeline.png")] = report.draw_timelines(merged, dict(zip(rows["path"], rows["llr"])))
    table, entry = rows[rows["label"] != ""], None
    if len(table):
        entry = {**measure_job(job, table, scores, model, settings), "format": look}
        verdicts, names = (
            name_verdicts(table["llr"].to_numpy(float)),
            {"labels": list(REPORT_ORDER), "zero_division": 0},
        )
        text = classification_report(table["label"], verdicts, digits=4, **names).rstrip()
        entry["report"] = format_report(entry, text)
        files[job.name_output("_report.txt")] = entry["report"].encode()
        pictures = {".png": report.draw_confusion(job.path.stem, np.array(entry["confusion_matrix"]["counts"]))}
        pictures["_mistakes.png"] = report.draw_mistakes(table, model)
        if entry["eer"] is not None:
            pictures["_curves.png"] = report.draw_curves(job.path.stem, table, entry)
        if entry["by_condition"]:
            pictures["_conditions.png"] = report.draw_conditions(entry["by_condition"], entry["eer"])
        files.update((job.name_output(what), picture) for what, picture in pictures.items())
        print(f"\n{entry['report']}")
    else:
        why = "it has no column actual_output" if job.labels is None else "no row has both a label and a verdict"
        print(f"{job.name}: no metrics, since {why}")
        print_recordings(recordings)
    if len(rows):
        sentences = write_summary(entry) if entry else summarise_verdicts(job, recordings, look)
        seen, shortcuts = check_seen(rows, model.facts, scores.fingerprints), model.facts.get("shortcuts")
        checks = format_checks(entry or {"seen": seen, "shortcuts": shortcuts, "format": look})
        pictures = {ending: files.get(job.name_output(ending)) for ending in report.CAPTIONS}
        context = {"checks": checks, "pictures": pictures, "origin": origin}
        page = report.write_page(job.name, sentences, recordings, format_metrics(entry) if entry else [], context)
        files[job.name_output("_report.html")] = page.encode()
    for path, content in files.items():
        if content is not None:
            write_file(path, content)
    name_old_outputs(job, set(files))
    return entry


def summarise_verdicts(job: Job, recordings: pandas.DataFrame, look: Optional[dict]) -> list[str]:
    """Say in two sentences what the verdicts on recordings without labels are, and how far they can be relied on."""
    counts = Counter(recordings["predicted_output"])
    verdicts = " and ".join(f"{counts[name]:,} as {name}" for name in REPORT_ORDER)
    first = f"Of {len(recordings):,} recordings in {job.name}, the detector classifies {verdicts}."
    if look and look["warning"]:
        return [first, "The images were rendered unlike the training images: the verdicts cannot be relied on."]
    return [
        first,
        "A score is evidence, not proof: expect errors on new voices, generators and channels.",
    ]


def print_recordings(recordings: pandas.DataFrame, most: int = 40) -> None:
    """Print a table of verdicts on recordings."""
    if not len(recordings):
        return
    print(f"\n{'recording':<42}{'verdict':<10}{'score':>7}{'seconds':>9}  validation beyond: originals, deepfakes")
    for row in recordings.head(most).to_dict("records"):
        beyond = [row["originals_below"], row["deepfakes_above"]]
        sure = "unknown" if "" in beyond else ", ".join(f"{value:.1%}" for value in beyond)
        seconds = "?" if row["seconds"] is None or row["seconds"] != row["seconds"] else f"{row['seconds']:.1f}"
        differs = "  rendered unlike the training images" if row["rendering"] else ""
        score = f"{row['deepfake_score']:.3f}"
        print(f"{row['recording'][:40]:<42}{row['predicted_output']:<10}{score:>7}{seconds:>9}  {sure}{differs}")
    if len(recordings) > most:
        print(f"… and {len(recordings) - most:,} more in the CSV")


def name_old_outputs(job: Job, written: set[Path]) -> None:
    """Name the files of an earlier run that this run did not write again."""
    paths = [job.name_output(".png"), *(job.name_output(f"_{name}") for name in OUTPUTS)]
    if old := [path.name for path in paths if path.exists() and path not in written]:
        print(f"{job.name}: left from an earlier run, not of this one: {', '.join(old)}")


# ---- Main


def describe_origin(model_path: Path, compute: Compute) -> dict:
    """Describe where results come from: model, versions, device, time."""
    return {
        "model": str(MODEL_PATH),
        "model_sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        "versions": runtime.list_versions(),
        "device": str(compute.device),
        "precision": str(compute.dtype).removeprefix("torch."),
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    """Judge every CSV. Returns the exit status: 0, or 1 if a row or a CSV had to be left out."""
    here = Path(__file__).resolve().parent
    settings = {name: globals()[name] for name in RULES}
    runtime.check_settings(settings, RULES)
    team = runtime.join_team()
    base = Path(os.path.normpath(here / IMG_BASE_PATH))
    csv_paths = [Path(os.path.normpath(here / path)) for path in CSV_FILES]
    stems = Counter(path.name for path in csv_paths)
    names = [path.name if stems[path.name] == 1 else str(given) for path, given in zip(csv_paths, CSV_FILES)]
    jobs, broken = read_jobs(csv_paths, names, base, CSV_ENCODING) if team.rank == 0 else ([], 0)
    model = load_detector(here / MODEL_PATH)
    start = model.facts.get("initial_weights", "?")
    print(f"Model: {MODEL_PATH}, epoch {model.facts.get('epoch', '?')}, started from {start}")
    runtime.keep_freed_memory()
    compute = runtime.choose_compute(PRECISION)
    for job in jobs:
        counts = Counter((job.labels or {}).values())
        labels = ", ".join(f"{counts[name]:,} {name}" for name in REPORT_ORDER) if counts else "none"
        print(f"{job.name}: {len(job.images):,} rows; labels: {labels}")

    paths = list(dict.fromkeys(path for job in jobs for path in job.images.values()))
    scores = score_images(team.share(paths), model, compute, settings, team)
    team.leave()
    if team.rank:
        return 0
    origin, summary, left_out, written = describe_origin(here / MODEL_PATH, compute), [], 0, []
    for folder in {job.path.parent for job in jobs}:
        runtime.remove_leftovers(folder)
    for job in jobs:
        path, content = write_predictions(job, scores.llr, CSV_ENCODING)
        written.append(path)
        bad = [(number, path) for number, path in job.images.items() if path in scores.unreadable]
        for number, path in bad:
            print(f"no verdict: {job.name}, row {number}: {path}: {scores.unreadable[path]}", file=sys.stderr)
        left_out += len(bad)
        csv_hash = hashlib.sha256(content).hexdigest()
        entry = report_job(job, scores, model, settings, {**origin, "csv_sha256": csv_hash})
        if entry is not None:
            unreadable_rows = [{"row": number, "reason": scores.unreadable[path]} for number, path in bad]
            summary.append({**entry, "unreadable_rows": unreadable_rows, "csv_sha256": csv_hash, **origin})
    print("Predictions written into " + ", ".join(map(str, written)))
    broken += sum(path != job.path for path, job in zip(written, jobs))
    summary_path = jobs[0].path.with_name("aggregate_test_reports.json")
    if summary:
        write_file(summary_path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        print(f"Summary written to {summary_path}")
    elif summary_path.exists():
        print(f"Left from an earlier run, not of this one: {summary_path.name}")
    if left_out or broken:
        print(f"Left out: {left_out} rows without a verdict, {broken} CSVs left as they were", file=sys.stderr)
    return 1 if left_out or broken else 0


if __name__ == "__main__":
    advice = "CSVs not yet written are as they were; run it again to judge them"
    sys.exit(runtime.run_script(main, __doc__, advice))
