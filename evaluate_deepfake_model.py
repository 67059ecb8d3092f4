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
import datetime
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Optional

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models import figures, report, runtime, script
from models.checks import UNLIKE_FRACTION, check_format, check_seen
from models.detector import Detector, Score, fuse_norms, load_detector, name_verdicts, to_scores
from models.images import count_seconds, read_image, read_span, take_fingerprint, to_input
from models.metrics import REPORT_ORDER, measure, measure_conditions, measure_table
from models.runtime import Compute, Team
from models.tables import (
    OUTPUTS,
    Job,
    find_columns,
    format_csv,
    list_merged_names,
    name_recording,
    read_jobs,
    write_predictions,
)

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

OWN_COLUMNS = ("path", "recording", "recording_by_name", "label", "is_fake", "llr", "margin")
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


# ---- Scores


def read_batches(paths: list[str], size: int, batch_size: int, threads: int, ahead: int) -> Iterator[list[tuple]]:
    """Read images in batches of (pixels, fingerprint, span, ""), or (None, 0, None, the reason why it cannot be read).

    Args:
        ahead: batches to read while the network is busy. For a GPU; on a CPU both would fight for the cores.
    """

    def read(path: str) -> tuple[Optional[torch.Tensor], int, Optional[tuple[float, float]], str]:
        try:
            if not path:
                raise ValueError("img_path is blank")
            pixels = read_image(path, size)
            return pixels, take_fingerprint(pixels.numpy()), read_span(path), ""
        except Exception as error:  # Pillow's decoders raise many kinds; every one is reported by name
            return None, 0, None, f"{type(error).__name__}: {error}".splitlines()[0]

    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for start in range(0, len(paths), batch_size):
            pending.append([pool.submit(read, path) for path in paths[start : start + batch_size]])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


@torch.inference_mode()
def score_images(paths: list[str], model: Detector, compute: Compute, settings: dict, team: Team) -> dict[str, Score]:
    """Score each image once, the ranks of a team each their part. Returns all results, by path, on all ranks."""
    started, total, facts = time.perf_counter(), len(paths), model.facts
    paths, about = team.take_part(paths), []
    network = fuse_norms(copy.deepcopy(model.model)).to(compute.device, memory_format=torch.channels_last)
    head, network.fc = network.fc, nn.Identity()  # in float32: bfloat16 logits would tie
    fake = facts["classes"].index("Deepfake")
    threads = max(1, runtime.choose_workers(settings["WORKERS"], team.local_size))
    ahead = 2 if compute.device.type == "cuda" else 0
    blank = torch.zeros(3, facts["image_size"], facts["image_size"], dtype=torch.uint8)
    margins = torch.empty(len(paths), device=compute.device)  # filled in place: the GPU need not be waited for
    with tqdm(total=len(paths), desc="Judging images", unit=" images", disable=None) as progress:
        for batch in read_batches(paths, facts["image_size"], settings["BATCH_SIZE"], threads, ahead):
            pixels = torch.stack([blank if pixels is None else pixels for pixels, *_ in batch])
            inputs = to_input(pixels.to(compute.device).float(), facts["mean"], facts["std"], white=255)
            with compute.autocast():
                features = network(inputs)
            logits = head(features.float())
            margins[len(about) : len(about) + len(batch)] = logits[:, fake] - logits[:, 1 - fake]
            about += [rest for _, *rest in batch]
            progress.update(len(batch))
    scale, offset = facts["calibration"]["scale"], facts["calibration"]["offset"]
    scores = {}
    for path, margin, (fingerprint, span, reason) in zip(paths, margins.tolist(), about):
        if not math.isfinite(margin):
            reason = reason or "the network's output is not finite"
        scores[path] = Score(margin, -(scale * margin + offset), fingerprint, reason, span)
    everything = {path: score for part in team.gather(scores) for path, score in part.items()}
    print(f"Judged {total:,} images in {time.perf_counter() - started:.2f} s")
    return everything


# ---- Tables of results


def choose_rows(job: Job, scores: dict[str, Score], facts: dict, report_by: tuple[str, ...]) -> pandas.DataFrame:
    """Choose the rows with a score, as a table of OWN_COLUMNS and those of REPORT_BY that the CSV has; no label: ""."""
    import pandas

    columns = find_columns(job.rows[0])
    columns = {name: columns[name] for name in report_by if name in columns}
    table = []
    for number, path in job.images.items():
        if not scores[path].reason:
            row = job.rows[number - 1]
            cells = [row[column] if column < len(row) else "" for column in columns.values()]
            name = name_recording(path, job.base, facts["recording_pattern"])
            recording, label = (job.recordings or {}).get(number, name), (job.labels or {}).get(number, "")
            table.append([*cells, path, recording, name, label, scores[path].llr, scores[path].margin])
    table = pandas.DataFrame(table, columns=[*columns, *(name for name in OWN_COLUMNS if name != "is_fake")])
    if job.recordings is None and (repeated := list_merged_names(table["path"], table["recording"])):
        print(
            f"Warning: {job.name}: {len(repeated):,} file names, such as {repeated[0]}, are in several folders and "
            "count as one recording each; a column recording tells them apart"
        )
    table["is_fake"] = table["label"] == "Deepfake"
    return table


def describe_recordings(
    table: pandas.DataFrame, scores: dict[str, Score], report_by: tuple[str, ...], unlike: set[str], facts: dict
) -> pandas.DataFrame:
    """Merge the images of each recording and label (and value of the columns): mean of their log-likelihood ratios.

    Returns:
        Columns recording, those of REPORT_BY, label, is_fake, parts, llr, paths, predicted_output,
        deepfake_score, seconds, originals_below and deepfakes_above (fractions of the validation recordings beyond
        this score; blank: unknown), rendering ("" or "differs").
    """
    labels = table["label"].mask(table["label"] == "").groupby(table["recording"])
    is_clear = (table["label"] == "") & (labels.transform("nunique") == 1)  # another row of the recording has the label
    table = table.assign(label=table["label"].mask(is_clear, labels.transform("first")))
    table["is_fake"] = table["label"] == "Deepfake"
    keys = ["recording", *(column for column in report_by if column in table), "label", "is_fake"]
    groups = table.groupby(keys, sort=False, as_index=False)
    merged = groups.agg(parts=("llr", "size"), llr=("llr", "mean"), paths=("path", list))
    llr, beyond = merged["llr"].to_numpy(float), facts.get("validation_scores")
    merged["predicted_output"] = name_verdicts(llr)
    merged["deepfake_score"] = to_scores(llr)
    merged["seconds"] = [count_seconds([scores[path].span for path in paths]) for paths in merged["paths"]]
    for name, label, side in (("originals_below", "Original", 1), ("deepfakes_above", "Deepfake", -1)):
        values = np.sort(beyond[label].numpy() * side) if beyond else None
        merged[name] = (
            np.searchsorted(values, (side * llr).astype(values.dtype), "right") / len(values) if beyond else ""
        )
    differs = [sum(path in unlike for path in paths) > UNLIKE_FRACTION * len(paths) for paths in merged["paths"]]
    merged["rendering"] = np.where(differs, "differs", "")
    return merged


def measure_job(job: Job, rows: pandas.DataFrame, recordings: pandas.DataFrame, report_by: tuple[str, ...]) -> dict:
    """Measure the labelled rows of one CSV. Returns its entry for the summary, without checks and the report's text."""
    from sklearn.metrics import classification_report, confusion_matrix

    table, recordings = (some[some["label"] != ""] for some in (rows, recordings))
    verdicts, order = name_verdicts(table["llr"].to_numpy(float)), list(REPORT_ORDER)
    raw = measure(-table["margin"].to_numpy(float), table["is_fake"].to_numpy(bool))
    counts = confusion_matrix(table["label"], verdicts, labels=order)
    of_classes = {"labels": order, "zero_division": 0, "output_dict": True}
    return {
        "file": job.name,
        "report": "",
        "rows": len(job.images),
        "rows_without_verdict": len(job.images) - len(rows),
        "rows_repeated": len(job.images) - len(set(job.images.values())),
        "labels": {name: int((table["label"] == name).sum()) for name in order},
        **measure_table(table),
        "eer_by_recording": measure(recordings["llr"].to_numpy(float), recordings["is_fake"].to_numpy(bool))["eer"],
        "before_calibration": {name: raw[name] for name in ("act_dcf", "cllr", "ece")},
        "confusion_matrix": {"order": order, "counts": counts.tolist()},
        "classification_report": classification_report(table["label"], verdicts, **of_classes),
        "by_condition": measure_conditions(table, report_by),
    }


# ---- Output


def format_scores(job: Job, table: pandas.DataFrame) -> dict[str, bytes]:
    """Write the score file, and where there are labels the key, in ASVspoof 5's form."""
    column = find_columns(job.rows[0])["img_path"]
    names = {}  # path -> its first spelling
    for number, path in job.images.items():
        names.setdefault(path, job.rows[number - 1][column])
    llr = dict(zip(table["path"], table["llr"]))
    truth = {path: label for path, label in zip(table["path"], table["label"]) if label}
    words = {"Deepfake": "spoof", "Original": "bonafide"}
    scores = [[names[path], repr(value)] for path, value in llr.items()]
    key = [[names[path], words[truth[path]]] for path in llr if path in truth]
    files = {"_scores.tsv": [["filename", "cm-score"], *scores], "_key.tsv": [["filename", "cm-label"], *key]}
    return {what: format_csv(rows, "\t") for what, rows in files.items() if len(rows) > 1}


def report_job(
    job: Job, scores: dict[str, Score], model: Detector, report_by: tuple[str, ...], origin: dict
) -> Optional[dict]:
    """Write all that belongs to one CSV. Returns its entry for the summary; None where nothing can be measured."""
    rows, entry = choose_rows(job, scores, model.facts, report_by), None
    labelled = rows[rows["label"] != ""]
    look, unlike = check_format({path: scores[path].fingerprint for path in rows["path"]}, model.facts)
    if look and look["warning"]:
        print(f"WARNING: {job.name}: {look['warning']}")
    seen = check_seen(labelled if len(labelled) else rows, model.facts, scores)
    checked = {"shortcuts": model.facts.get("shortcuts"), "seen": seen, "format": look}
    recordings = describe_recordings(rows, scores, report_by, unlike, model.facts)

    files = format_scores(job, rows)
    if len(recordings) < len(rows) or (job.labels is None and len(rows)):
        listed = recordings.drop(columns=["is_fake", "paths"]).rename(columns={"label": "actual_output"})
        files["_recordings.csv"] = listed.to_csv(index=False).encode()
        size = model.facts["image_size"]
        files["_timeline.png"] = try_draw(job, "_timeline.png", figures.draw_timelines, recordings, scores, size)
    if len(labelled):
        entry = {**measure_job(job, rows, recordings, report_by), **checked}
        entry["report"] = report.format_report(entry)
        files["_report.txt"] = entry["report"].encode()
        files[".png"] = figures.draw_confusion(job.path.stem, np.array(entry["confusion_matrix"]["counts"]))
        files["_mistakes.png"] = try_draw(job, "_mistakes.png", figures.draw_mistakes, labelled, scores, model)
        if entry["eer"] is not None:
            files["_curves.png"] = figures.draw_curves(job.path.stem, labelled, entry)
        if entry["by_condition"]:
            files["_conditions.png"] = figures.draw_conditions(entry["by_condition"], entry["eer"])
        print(f"\n{entry['report']}")
    else:
        why = "it has no column actual_output" if job.labels is None else "no row has both a label and a verdict"
        print(f"{job.name}: no metrics, since {why}")
    if len(labelled) < len(rows):
        report.print_recordings(recordings)
    if len(rows):
        files["_report.html"] = report.write_page(job.name, entry or checked, recordings, files, origin).encode()
    written = [what for what, content in files.items() if content and runtime.try_write(job.name_output(what), content)]
    name_old_outputs(job, written)
    return entry


def try_draw(job: Job, what: str, draw: Callable[..., Optional[bytes]], *arguments: object) -> Optional[bytes]:
    """Draw a picture; None, and named, where one of its images is gone or was changed since it was judged."""
    try:
        return draw(*arguments)
    except ValueError as error:
        runtime.leave_out(f"{job.name_output(what).name}: {error}")
        return None


def name_old_outputs(job: Job, written: Container[str]) -> None:
    """Name the files of an earlier run that this run did not write again."""
    paths = [job.name_output(what) for what in OUTPUTS if what not in written]
    if old := [path.name for path in paths if path.exists()]:
        print(f"{job.name}: left from an earlier run, not of this one: {', '.join(old)}")


# ---- Main


def describe_origin(name: str, model: Detector, compute: Compute) -> dict:
    """Describe where results come from: name and checksum of the model, versions, device, time."""
    return {
        "model": name,
        "model_sha256": model.sha256,
        "versions": runtime.list_versions(),
        "device": str(compute.device),
        "precision": str(compute.dtype).removeprefix("torch."),
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_summary(path: Path, summary: list[dict]) -> None:
    """Write the entries of all labelled CSVs; where there is none, name the summary of an earlier run."""
    if summary:
        if runtime.try_write(path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode()):
            print(f"Summary written to {path}")
    elif path.exists():
        print(f"Left from an earlier run, not of this one: {path.name}")


def write_back(jobs: list[Job], scores: dict[str, Score], encoding: str) -> dict[Path, tuple[Path, bytes]]:
    """Write the verdicts into all CSVs, and name each row without one and each CSV that could not be written.

    Returns:
        {path of the CSV: the file that was written, and its content}.

    Raises:
        ValueError: none could be written.
    """
    llr, written, reasons = {path: score.llr for path, score in scores.items() if not score.reason}, {}, []
    for folder in {job.path.parent for job in jobs}:
        runtime.remove_leftovers(folder)
    for job in jobs:
        try:
            written[job.path] = write_predictions(job, llr, encoding)
        except OSError as error:
            reasons.append(str(error))
            continue
        for number, path in job.images.items():
            if path not in llr:
                print(f"no verdict: {job.name}, row {number}: {path}: {scores[path].reason}", file=sys.stderr)
    if not written:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        runtime.leave_out(reason)
    return written


def main() -> int:
    """Judge every CSV. Returns the exit status: 0, or 1 if a row, a CSV or an output had to be left out."""
    here = Path(__file__).resolve().parent
    settings = runtime.check_settings({name: globals()[name] for name in RULES}, RULES)
    team = runtime.join_team()
    base, encoding = Path(os.path.normpath(here / settings["IMG_BASE_PATH"])), settings["CSV_ENCODING"]
    jobs, broken = read_jobs(here, settings["CSV_FILES"], base, encoding) if team.rank == 0 else ([], 0)
    model = load_detector(here / settings["MODEL_PATH"])
    if len(set(team.gather(model.sha256))) > 1:
        raise ValueError(f"{MODEL_PATH} was changed while the processes loaded it: start again")
    start = model.facts.get("initial_weights", "?")
    print(f"Model: {MODEL_PATH}, epoch {model.facts.get('epoch', '?')}, started from {start}")
    runtime.keep_freed_memory()
    compute = runtime.choose_compute(settings["PRECISION"])
    for job in jobs:
        counts = Counter((job.labels or {}).values())
        labels = ", ".join(f"{counts[name]:,} {name}" for name in REPORT_ORDER) if counts else "none"
        print(f"{job.name}: {len(job.images):,} rows; labels: {labels}")
        if job.recordings is not None:
            blank = len(job.images) - len(job.recordings)
            also = f"; in {blank:,} rows, where it is blank, by file name" * bool(blank)
            print(f"{job.name}: recordings are told apart by its column recording{also}")

    paths = list(dict.fromkeys(path for job in jobs for path in job.images.values()))
    scores = score_images(team.share(paths), model, compute, settings, team)
    team.leave()
    if team.rank:
        return 0
    written, summary, left_out = write_back(jobs, scores, encoding), [], 0
    origin = describe_origin(str(MODEL_PATH), model, compute)
    for job in (job for job in jobs if job.path in written):
        origin["csv_sha256"] = hashlib.sha256(written[job.path][1]).hexdigest()
        entry = report_job(job, scores, model, settings["REPORT_BY"], origin)
        bad = [{"row": n, "reason": scores[path].reason} for n, path in job.images.items() if scores[path].reason]
        left_out += len(bad)
        if entry is not None:
            summary.append({**entry, "unreadable_rows": bad, **origin})
    print("Predictions written into " + ", ".join(str(path) for path, _ in written.values()))
    broken += sum(job.path != written.get(job.path, [None])[0] for job in jobs)
    write_summary(jobs[0].path.with_name("aggregate_test_reports.json"), summary)
    if left_out or broken:
        print(f"Left out: {left_out} rows without a verdict, {broken} CSVs left as they were", file=sys.stderr)
    return 1 if left_out or broken else 0


if __name__ == "__main__":
    advice = "CSVs not yet written are as they were; run it again to judge them"
    sys.exit(script.run_script(main, __doc__, advice, "CSV_FILES"))
