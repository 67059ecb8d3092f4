"""The result in words: the report, what is printed, and a page to hand on."""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Optional

from PIL import Image

from models.checks import format_checks, list_caveats
from models.figures import COLOURS_MEAN
from models.metrics import FEW_ROWS, METRICS, REPORT_ORDER, SHOWN_GROUPS, format_rate

if TYPE_CHECKING:
    import pandas

LARGEST_PNG = 300_000  # bytes; larger pictures go into the page as JPEG


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


def summarise_verdicts(name: str, recordings: pandas.DataFrame, look: Optional[dict]) -> list[str]:
    """Say in two sentences what the verdicts on recordings without labels are, and how far they can be relied on."""
    counts = Counter(recordings["predicted_output"])
    verdicts = " and ".join(f"{counts[label]:,} as {label}" for label in REPORT_ORDER)
    second = "A score is evidence, not proof: expect errors on new voices, generators and channels."
    if look and look["warning"]:
        second = "The images were rendered unlike the training images: the verdicts cannot be relied on."
    return [f"Of {len(recordings):,} recordings in {name}, the detector classifies {verdicts}.", second]


def format_metrics(entry: dict) -> list[list[str]]:
    """Write each metric: its label, and its value with interval and value before calibration."""
    rows = []
    for key, (label, kind) in METRICS.items():
        value, before = entry[key], entry["before_calibration"].get(key)
        text = format_rate(value, entry["intervals_95"].get(key)) if kind == "rate" else f"{value or 0:.4f}"
        text += f"   before calibration {before:.4f}" if before is not None else ""
        rows.append([label, "not computed" if value is None else text])
    return rows


def format_classification(measures: dict) -> list[str]:
    """Write precision, recall and F1 of each class, to the last character as scikit-learn does."""
    columns = ("precision", "recall", "f1-score")
    lines = ["".join(f" {name:>9}" for name in ("            ", *columns, "support")), ""]
    support = ">9.0f" if measures["accuracy"] else ">9.1f"
    for name, values in measures.items():
        if name == "accuracy":
            lines += ["", f"{name:>12}  {'':>19} {values:>9.4f} {measures['macro avg']['support']:{support}}"]
        else:
            cells = [f"{values[column]:>9.4f}" for column in columns]
            lines.append(f"{name:>12}  {' '.join(cells)} {values['support']:{support}}")
    return lines


def format_report(entry: dict) -> str:
    """Write the report that people read, 100 columns wide at most."""
    lines = [line for sentence in write_summary(entry) for line in textwrap.wrap(sentence, 98)]
    lines += ["", *format_classification(entry["classification_report"]), ""]
    lines += [f"{label:<38}{text}" for label, text in format_metrics(entry)]
    lines += [f"Not computed: {reason}" for reason in entry["not_computed"]]
    lines += ["", *(line for check in format_checks(entry) for line in textwrap.wrap(check, 98))]
    for column in dict.fromkeys(part["column"] for part in entry["by_condition"]):
        lines += ["", f"{'By ' + column:<36}{'rows':>7}  {'EER, 95% CI':<26}{'accuracy':>9}"]
        parts = [part for part in entry["by_condition"] if part["column"] == column]
        for part in parts[:SHOWN_GROUPS]:
            rate = format_rate(part["eer"], part["eer_interval_95"])
            mark = "  few rows" if part["rows"] < FEW_ROWS else ""
            lines.append(f"  {part['value'][:33]:<34}{part['rows']:>7,}  {rate:<26}{part['accuracy']:>9.1%}{mark}")
        if len(parts) > SHOWN_GROUPS:
            lines.append(f"  … and {len(parts) - SHOWN_GROUPS:,} more, in aggregate_test_reports.json")
    return "\n".join(lines) + "\n"


def describe_verdict(row: dict) -> list[str]:
    """Write a row of the table of recordings: name, verdict, score, seconds, what scores beyond, rendering."""
    beyond = [format_rate(row[name]) if row[name] != "" else "" for name in ("originals_below", "deepfakes_above")]
    seconds = "" if row["seconds"] is None or row["seconds"] != row["seconds"] else f"{row['seconds']:.1f}"
    note = "rendered unlike the training images" if row["rendering"] else ""
    return [row["recording"], row["predicted_output"], f"{row['deepfake_score']:.3f}", seconds, *beyond, note]


def print_recordings(recordings: pandas.DataFrame, most: int = 40) -> None:
    """Print a table of verdicts on recordings."""
    if not len(recordings):
        return
    print(f"\n{'recording':<42}{'verdict':<10}{'score':>7}{'seconds':>9}  validation beyond: originals, deepfakes")
    for row in recordings.head(most).to_dict("records"):
        name, verdict, score, seconds, below, above, note = describe_verdict(row)
        sure = f"{below}, {above}" if below and above else "unknown"
        print(f"{name[:40]:<42}{verdict:<10}{score:>7}{seconds or '?':>9}  {sure}{note and '  ' + note}")
    if len(recordings) > most:
        print(f"… and {len(recordings) - most:,} more in the CSV")


# ---- The page

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #999; }
.verdict { font-size: 1.1rem; border-left: 4px solid #1a1a1a; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .25rem .6rem; text-align: left; }
th { border-bottom: 2px solid #1a1a1a; } td { border-bottom: 1px solid #ccc; }
td:last-child { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; break-inside: avoid; }
figcaption, .small { font-size: .85rem; } code { overflow-wrap: anywhere; }
h2 { break-after: avoid; }
@media print { @page { size: A4; margin: 15mm; } body { max-width: none; padding: 0; font-size: 10pt; }
               img { max-height: 235mm; } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
CAPTIONS = {  # of the pictures, in order, by what their names end with
    ".png": "Confusion matrix: rows are the true classes, columns the verdicts; the diagonal is right.",
    "_curves.png": "Left: DET curve, better towards the lower left. Right: scores by class; overlap means errors.",
    "_conditions.png": "Equal error rate by group, with 95% confidence intervals; the dotted line is the overall rate.",
    "_mistakes.png": "The most confident mistakes and right verdicts; outlined: where the evidence is strongest. "
    f"{COLOURS_MEAN}.",
    "_timeline.png": "Score of each part along time, over the spectrogram. Parts above the dashed threshold are "
    f"classified as deepfake; a jump may be a splice. {COLOURS_MEAN}.",
}
SCORE_NOTE = (
    '<p class="small">Score: 0 to 1, deepfake from 0.5. The two percentages say how many recordings of the '
    "validation set score beyond this one: few originals below it make a deepfake verdict more certain, few "
    "deepfakes above it an original verdict.</p>"
)
MOST_ROWS = 200  # of recordings on the page


def write_table(header: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    """Write an HTML table; cells are escaped, those in the columns `numbers` are set flush right."""

    def write_row(cells: list[str], tag: str) -> str:
        marks = [' class="number"' if index in numbers else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks)) + "</tr>"

    body = "\n".join(write_row(row, "td") for row in rows)
    return f'<div class="scroll"><table>{write_row(header, "th")}\n{body}</table></div>'


def tabulate_recordings(recordings: pandas.DataFrame) -> str:
    """Write the table of verdicts on recordings, the most suspicious first."""
    beyond = ("validation originals below", "validation deepfakes above")
    header = ["recording", "verdict", "score", "seconds", *beyond, ""]
    rows = [describe_verdict(row) for row in recordings.sort_values("llr").head(MOST_ROWS).to_dict("records")]
    more = f"<p>The CSV lists {len(recordings) - MOST_ROWS:,} more.</p>" if len(recordings) > MOST_ROWS else ""
    return write_table(header, rows, {2, 3, 4, 5}) + more


def embed_picture(content: bytes, caption: str) -> str:
    """Embed a PNG with its caption; a large one as JPEG."""
    kind = "png"
    if len(content) > LARGEST_PNG:
        buffer, kind = io.BytesIO(), "jpeg"
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=80)
        content = buffer.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(caption)}"><figcaption>{caption}</figcaption></figure>'


def write_page(name: str, results: dict, recordings: pandas.DataFrame, files: dict[str, bytes], origin: dict) -> str:
    """Write a self-contained HTML page on the results of one CSV.

    Args:
        name: of the CSV.
        results: its entry in the summary; without labels only the results of the checks.
        recordings: as `describe_recordings` of the evaluator returns them.
        files: pictures, by what their names end with.
    """
    has_metrics = "report" in results
    look = results["format"]
    sentences = write_summary(results) if has_metrics else summarise_verdicts(name, recordings, look)
    title = html.escape(f"Deepfake-audio report: {name}")
    parts = [f"<h1>{title}</h1>", f'<p class="verdict">{html.escape(" ".join(sentences[:2]))}</p>']
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences[2:]]
    if has_metrics:
        parts += ["<h2>Metrics</h2>", write_table(["metric", "value"], format_metrics(results), set())]
    if len(recordings):
        parts += ["<h2>Recordings</h2>", tabulate_recordings(recordings), SCORE_NOTE]
    pictures = [embed_picture(files[ending], text) for ending, text in CAPTIONS.items() if files.get(ending)]
    parts += ["<h2>Pictures</h2>", *pictures] if pictures else []
    parts += ["<h2>What was checked</h2>", "<ul>"]
    parts += [f"<li>{html.escape(line)}</li>" for line in format_checks(results)]
    rows = [[key, json.dumps(value) if isinstance(value, dict) else value] for key, value in origin.items()]
    parts += ["</ul>", "<h2>Origin</h2>", write_table(["", ""], rows, set())]
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))
