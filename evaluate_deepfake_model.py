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
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models import figures, report, runtime
from models.checks import UNLIKE_FRACTION, check_format, check_seen, format_checks
from models.detector import Detector, fuse_norms, load_detector, name_verdicts, to_scores
from models.images import read_image, read_span, take_fingerprint, to_input
from models.metrics import REPORT_ORDER, measure, measure_conditions, measure_table
from models.runtime import Compute, Team, write_file
from models.tables import OUTPUTS, Job, find_columns, name_recording, read_jobs, write_predictions

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


class Scores(NamedTuple):
    """What was found out about each image, by its path."""

    margins: dict[str, float]  # logit Deepfake - logit Original
    llr: dict[str, float]  # calibrated log-likelihood ratio, higher = more bona fide
    fingerprints: dict[str, int]
    unreadable: dict[str, str]  # the reasons why


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
            inputs = to_input(pixels.to(compute.device).float(), facts["mean"], facts["std"], white=255)
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

    columns = find_columns(job.rows[0])
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
    table["deepfake_score"] = to_scores(table["llr"].to_numpy(float))
    table["seconds"] = [count_seconds(paths) for paths in merged["paths"]]
    for name, label, side in (("originals_below", "Original", 1), ("deepfakes_above", "Deepfake", -1)):
        values = beyond[label].numpy() * side if beyond else None
        table[name] = [float((values <= side * llr).mean()) if beyond else "" for llr in table["llr"]]
    differs = [sum(path in unlike for path in paths) > UNLIKE_FRACTION * len(paths) for paths in merged["paths"]]
    table["rendering"] = np.where(differs, "differs", "")
    return table


def count_seconds(paths: list[str]) -> Optional[float]:
    """Count the seconds of a recording that its images show; None where the images do not say."""
    spans = [read_span(path) for path in paths]
    if None in spans:
        return None
    total, end = 0.0, 0.0
    for start_s, stop_s in sorted(spans):
        total, end = total + max(0.0, stop_s - max(start_s, end)), max(end, stop_s)
    return round(total, 2)


# ---- Report


def write_scores(job: Job, table: pandas.DataFrame, llr: dict[str, float]) -> list[Path]:
    """Write the score file, and where there are labels the key, in ASVspoof 5's form."""
    column = find_columns(job.rows[0])["img_path"]
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
        files[job.name_output("_timeline.png")] = figures.draw_timelines(merged, dict(zip(rows["path"], rows["llr"])))
    table, entry = rows[rows["label"] != ""], None
    if len(table):
        entry = {**measure_job(job, table, scores, model, settings), "format": look}
        verdicts, names = (
            name_verdicts(table["llr"].to_numpy(float)),
            {"labels": list(REPORT_ORDER), "zero_division": 0},
        )
        text = classification_report(table["label"], verdicts, digits=4, **names).rstrip()
        entry["report"] = report.format_report(entry, text)
        files[job.name_output("_report.txt")] = entry["report"].encode()
        pictures = {".png": figures.draw_confusion(job.path.stem, np.array(entry["confusion_matrix"]["counts"]))}
        pictures["_mistakes.png"] = figures.draw_mistakes(table, model)
        if entry["eer"] is not None:
            pictures["_curves.png"] = figures.draw_curves(job.path.stem, table, entry)
        if entry["by_condition"]:
            pictures["_conditions.png"] = figures.draw_conditions(entry["by_condition"], entry["eer"])
        files.update((job.name_output(what), picture) for what, picture in pictures.items())
        print(f"\n{entry['report']}")
    else:
        why = "it has no column actual_output" if job.labels is None else "no row has both a label and a verdict"
        print(f"{job.name}: no metrics, since {why}")
        report.print_recordings(recordings)
    if len(rows):
        sentences = report.write_summary(entry) if entry else report.summarise_verdicts(job, recordings, look)
        seen, shortcuts = check_seen(rows, model.facts, scores.fingerprints), model.facts.get("shortcuts")
        checks = format_checks(entry or {"seen": seen, "shortcuts": shortcuts, "format": look})
        pictures = {ending: files.get(job.name_output(ending)) for ending in report.CAPTIONS}
        context = {"checks": checks, "pictures": pictures, "origin": origin}
        metrics = report.format_metrics(entry) if entry else []
        page = report.write_page(job.name, sentences, recordings, metrics, context)
        files[job.name_output("_report.html")] = page.encode()
    for path, content in files.items():
        if content is not None:
            write_file(path, content)
    name_old_outputs(job, set(files))
    return entry


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
