"""CSVs of images: read, resolved, written back with verdicts."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np

from models.runtime import leave_out, write_file

LABELS = {  # what actual_output may say, without regard to case and surrounding blanks
    "Deepfake": ("deepfake", "spoof", "fake"),
    "Original": ("original", "bonafide", "bona fide", "bona-fide", "real", "genuine"),
}
BLANK_LABELS = ("", "nan", "none")
OUTPUTS = (  # <name><output> beside <name>.csv
    *(".png", "_scores.tsv", "_key.tsv", "_recordings.csv", "_timeline.png", "_report.txt", "_report.html"),
    *("_curves.png", "_conditions.png", "_mistakes.png"),
)


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
    recordings: Optional[dict[int, str]]  # row number -> cell of the column recording; likewise

    def name_output(self, what: str) -> Path:
        """Name a file that belongs to this CSV: its stem, then `what`."""
        return self.path.with_name(self.path.stem + what)


def read_jobs(folder: Path, given: list[str], base: Path, encoding: str) -> tuple[list[Job], int]:
    """Read all CSVs; name those that cannot be used. Returns the usable ones and the number of others.

    Args:
        given: CSV_FILES, relative to `folder`; base: IMG_BASE_PATH.

    Raises:
        ValueError: none can be used, or reports would overwrite one another or an input.
    """
    jobs, reasons, outputs = [], [], {}
    paths = [Path(os.path.normpath(folder / path)) for path in given]
    counts = Counter(path.name for path in paths)
    for path, name in dict(zip(paths, map(str, given))).items():
        try:
            jobs.append(read_job(path, path.name if counts[path.name] == 1 else name, base, encoding))
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    for job in jobs:
        other = outputs.setdefault(job.path.with_suffix(""), job.path)
        if other != job.path:
            raise ValueError(f"{other} and {job.path} would write the same report: rename one")
    if not jobs:
        raise ValueError("; ".join(reasons) or "CSV_FILES is empty")
    inputs = {os.path.realpath(path) for job in jobs for path in (job.path, *job.images.values())}
    for job in jobs:
        for what in (".predicted.csv", *OUTPUTS):
            if os.path.realpath(path := job.name_output(what)) in inputs:
                raise ValueError(f"the report on {job.path} would overwrite {path}, which is an input: rename one")
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return jobs, len(reasons)


def read_job(path: Path, name: str, base: Path, encoding: str) -> Job:
    """Read one CSV and check all of it before any image is read; ValueError if it cannot be used or written."""
    if not path.is_file():
        raise ValueError(f"CSV not found: {path}")
    check_writable(path)
    before = path.read_bytes()
    rows, delimiter = parse_table(before, path, encoding)
    columns, names = find_columns(rows[0]), [cell.strip(" ") for cell in rows[0]]
    for column in ("img_path", "actual_output", "recording", "predicted_output", "deepfake_score"):
        if names.count(column) > 1:
            raise ValueError(f"{path} has {names.count(column)} columns named {column}")
    labels, recordings = ({} if column in columns else None for column in ("actual_output", "recording"))
    job = Job(path, name, base, before, rows, delimiter, {}, labels, recordings)
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if any(cell.strip() for cell in row[len(names) :]):
            raise ValueError(f"{path}, row {number}: {len(row)} cells, but the header has {len(names)}")
        cells = row + [""] * (len(names) - len(row))
        cell = cells[columns["img_path"]]
        job.images[number] = resolve_image(base, cell) if cell.strip() else ""
        if labels is not None and (label := parse_label(cells[columns["actual_output"]], path, number)):
            labels[number] = label
        if recordings is not None and (cell := cells[columns["recording"]].strip()):
            recordings[number] = unicodedata.normalize("NFC", cell)
    leave_out_contradictions(job)
    return job


def leave_out_contradictions(job: Job) -> None:
    """Leave out, and name, the labels of an image that has both; its verdict is still written."""
    labels = job.labels or {}
    count = Counter(image for image, _ in {(job.images[number], label) for number, label in labels.items()} if image)
    if wrong := [number for number in labels if count[job.images[number]] > 1]:
        shown = ", ".join(map(str, wrong[:6])) + ", ..." * (len(wrong) > 6)
        leave_out(f"{job.name}: the labels in rows {shown}: they call the same image Original and Deepfake")
    for number in wrong:
        del labels[number]


def check_writable(path: Path) -> None:
    """Raise ValueError if a CSV or what belongs to it cannot be written: better now than after hours."""
    if len(os.fsencode(f"{path.stem}_recordings.csv")) > 250:
        raise ValueError(f"{path}: the name is too long for the files that belong to it: rename it")
    path = Path(os.path.realpath(path))
    for entry in (path, path.parent):
        bits_tell = os.name != "nt" or entry.is_file()  # on Windows a folder's read-only bit means something else
        if not os.access(entry, os.W_OK) or (bits_tell and not entry.stat().st_mode & 0o222):
            raise ValueError(f"{entry} is read-only, so that predictions cannot be written")


def parse_table(content: bytes, path: Path, encoding: str) -> tuple[list[list[str]], str]:
    """Parse a CSV as text: its rows, header first, and its delimiter (comma, semicolon, tab, or what sep= names)."""
    if content.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is an Excel workbook, not a CSV: save it as CSV UTF-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        where = getattr(error, "start", 0)
        raise ValueError(f"{path} is not {encoding} (byte {where}): set CSV_ENCODING, or re-save it as UTF-8") from None
    csv.field_size_limit(2**31 - 1)
    headers, (hint, named) = [], split_hint(text)
    text = text[len(hint) :]
    for blanks in ("", " "):  # a column of exactly this name in one delimiter comes before one with blanks in another
        for delimiter in dict.fromkeys(named + ",;\t"):
            try:
                headers.append(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))
                if "img_path" in [name.strip(blanks) if blanks else name for name in headers[-1]]:
                    # strict: a quote that is never closed would swallow the rows after it
                    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)), delimiter
            except csv.Error as error:
                raise ValueError(f"{path} is not a valid CSV: {error} (unbalanced quotes?)") from None
    found = ", ".join(repr(name.strip()[:40]) for name in max(headers, key=len)[:20]) or "none"
    raise ValueError(f"{path} has no column img_path; columns found: {found}")


def split_hint(text: str) -> tuple[str, str]:
    """Split off what tells Excel the delimiter, a first line sep=; or the like: that line, and the delimiter, or ""."""
    match = re.match(r'("?)sep=(\\t|[^"\r\n])\1[,;\t]*(\r\n|\r|\n)', text, re.IGNORECASE)
    return (match[0], match[2].replace("\\t", "\t")) if match else ("", "")


def find_columns(header: list[str]) -> dict[str, int]:
    """Find the columns of a table by their names, blanks around them left out: {name: index}, the first of equals."""
    return {name.strip(" "): index for index, name in reversed(list(enumerate(header)))}


def parse_label(cell: str, path: Path, row: int) -> str:
    """Parse a label: a class, or "" for a blank one."""
    word = " ".join(cell.lower().split())
    if word in BLANK_LABELS:
        return ""
    for name, words in LABELS.items():
        if word in words:
            return name
    allowed = ", ".join(word for words in LABELS.values() for word in words)
    raise ValueError(f"{path}, row {row}: unknown actual_output {cell!r} (allowed: {allowed}, or blank)")


def resolve_image(base: Path, cell: str) -> str:
    """Resolve an img_path: slashes of either kind, relative to base, ~/ to home; absolute paths and URLs stay."""
    cell = cell.strip()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", cell) or (os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", cell)):
        return cell
    cell = cell.replace("\\", "/")
    path = os.path.normpath(os.path.join(base, os.path.expanduser(cell) if cell.startswith("~/") else cell))
    return find_spelling(os.fsdecode(path.encode("utf-8", "surrogateescape")))  # as os.walk spells it


def unify_spelling(name: str) -> str:
    """Spell a name in Unicode's composed form (NFC): macOS and its archives store letters and accents apart (NFD)."""
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


@cache
def list_spellings(folder: str) -> dict[str, str]:
    """List the names in a folder: {in NFC: as they are stored}; none where it cannot be read."""
    try:
        return {unify_spelling(name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def find_spelling(path: str) -> str:
    """Find a path under another Unicode form of its names; as it is where there is none, or it exists."""
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    folder = find_spelling(folder) if name else folder
    return os.path.join(folder, list_spellings(folder).get(unify_spelling(name), name))


def name_recording(path: str, base: Path, pattern: str) -> str:
    """Name the recording that an image belongs to.

    Args:
        path: of the image.
        base: the folder that holds the class folders.
        pattern: RECORDING_PATTERN, searched in the file name without its suffix, then in the path below the class
            folder (with forward slashes); group 1 is the recording. Without a match the file name is.
    """
    stem = unify_spelling(os.path.splitext(os.path.basename(path))[0])
    match = re.search(pattern, stem)
    if not match:
        below = os.path.splitext(os.path.relpath(path, base).replace(os.sep, "/").partition("/")[2])[0]
        match = re.search(pattern, unify_spelling(below))
    name = (match and match.group(1)) or stem
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # file names may hold other bytes


def list_merged_names(paths: Iterable[str], recordings: Iterable[str]) -> list[str]:
    """List the file names that stand for one recording although they lie in several folders."""
    folders = defaultdict(set)
    for path, recording in zip(paths, recordings):
        folders[os.path.basename(path), recording].add(os.path.dirname(path))
    return [name for (name, _), found in folders.items() if len(found) > 1]


def format_table(rows: list[list[str]], delimiter: str, before: bytes, encoding: str) -> bytes:
    """Write rows as CSV with the BOM, first line sep=, line endings and end of file that the file had before."""
    text = before.decode(encoding)
    mark = text[:1] if text.startswith("\ufeff") else ""
    line_end = text.find("\n")
    newline = "\r\n" if text[line_end - 1 : line_end] == "\r" else "\n"
    if line_end < 0 and "\r" in text:
        newline = "\r"
    lines = []  # before Python 3.13 a lone line break in a cell is quoted only where the terminator holds it
    csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    after = "".join(line.removesuffix("\r\n") + newline for line in lines)
    if not text.endswith(("\n", "\r")):
        after = after[: -len(newline)]
    return (mark + split_hint(text[len(mark) :])[0] + after).encode(encoding)


def write_predictions(job: Job, llr: dict[str, float], encoding: str) -> tuple[Path, bytes]:
    """Write predicted_output and deepfake_score back into the CSV; every other cell keeps its text.

    A CSV that was changed since it was read is left alone, and <name>.predicted.csv written instead.

    Args:
        llr: {path: log-likelihood ratio}; rows of other paths stay blank.

    Returns:
        The file that was written, and its content.

    Raises:
        OSError: neither could be written.
    """
    from models.detector import name_verdicts, to_scores  # not above: the maker works without torch

    values = np.array(list(llr.values()))
    cells = {path: pair for path, *pair in zip(llr, name_verdicts(values), to_scores(values).tolist())}
    header = list(job.rows[0])
    header += [name for name in ("predicted_output", "deepfake_score") if name not in find_columns(header)]
    columns, rows = find_columns(header), [header]
    for number, row in enumerate(job.rows[1:], 2):
        if number in job.images:
            row = row[: len(job.rows[0])]  # surplus blanks
            row += [""] * (len(header) - len(row))
            verdict, score = cells.get(job.images[number], ("", None))
            row[columns["predicted_output"]] = verdict
            row[columns["deepfake_score"]] = "" if score is None else f"{score:.6f}"
        rows.append(row)
    content, instead = format_table(rows, job.delimiter, job.before, encoding), job.name_output(".predicted.csv")
    try:
        if job.path.is_file() and job.path.read_bytes() == job.before:
            write_file(job.path, content)
            return job.path, content
        why = "was changed during this run, and is left so"
    except OSError as error:  # on Windows: it is open in another program
        why = f"is left as it is ({error})"
    write_file(instead, content)
    print(f"{job.path} {why}: see {instead}", file=sys.stderr)
    return instead, content


def format_csv(rows: list, delimiter: str = ",", newline: str = "\n") -> bytes:
    """Write rows as a new CSV in UTF-8."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=newline).writerows(rows)
    return buffer.getvalue().encode()
