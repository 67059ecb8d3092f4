"""Metrics of scores against labels, as the field defines them, with confidence intervals by recording.

In the field's terms: bona fide = Original = target; a higher score means more bona fide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional

import numpy as np
from tqdm import tqdm

from models.detector import decide, to_probability

if TYPE_CHECKING:
    import pandas

REPORT_ORDER = ("Original", "Deepfake")
FEW_ROWS = 20  # fewer are marked
SHOWN_GROUPS = 40  # values of a column that report and picture show
METRICS = {  # name in the summary: how the report calls and writes it; `measure` computes them
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
SPOOF_PRIOR, COST_MISS, COST_FALSE_ALARM = 0.05, 1, 10  # ASVspoof 5's costs of detection: Wang et al., 2024, section 3


def walk_errors(llr: np.ndarray, is_fake: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walk a threshold from below all scores to the highest; equal scores are passed together.

    Args:
        llr: float, shape (rows,), log-likelihood ratios, higher = more bona fide; is_fake: bool, same shape, both
            values present.
        weights: float, shape (draws, rows): how often each row counts.

    Returns:
        Rates of misses (bona fide rejected, rising) and of false alarms (fakes accepted, falling), both float,
        shape (draws, thresholds), as ASVspoof 5's evaluation package computes them on scores without ties.
    """
    order = np.argsort(llr, kind="stable")
    ends = np.flatnonzero(np.append(llr[order][1:] != llr[order][:-1], True))
    counts = []
    for chosen in (~is_fake, is_fake):
        passed = np.cumsum((weights * chosen)[:, order], axis=1)[:, ends]
        counts.append(np.concatenate([np.zeros((len(weights), 1)), passed], axis=1))
    rejected, found = counts
    return rejected / rejected[:, -1:], (found[:, -1:] - found) / found[:, -1:]


def compute_eer(misses: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """Compute the equal error rate, the mean of both rates where they are nearest: float, shape (draws,)."""
    nearest = np.abs(misses - false_alarms).argmin(axis=1)[:, None]
    return (np.take_along_axis(misses, nearest, 1) + np.take_along_axis(false_alarms, nearest, 1))[:, 0] / 2


def compute_ece(llr: np.ndarray, is_fake: np.ndarray, bins: int = 10) -> float:
    """Compute the expected calibration error of the probability of a fake, both classes weighing the same."""
    probability = to_probability(llr)
    weights = np.where(is_fake, 0.5 / is_fake.sum(), 0.5 / (~is_fake).sum())
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, weights * (probability - is_fake), bins)).sum())


def measure(llr: np.ndarray, is_fake: np.ndarray) -> dict[str, Optional[float]]:
    """Measure scores against labels; what cannot be computed is None.

    Args:
        llr: float, shape (rows,), calibrated, higher = more bona fide.
        is_fake: bool, same shape.
    """
    called_fake = decide(llr)
    measures = {"accuracy": float((called_fake == is_fake).mean())}
    names = ("balanced_accuracy", "roc_auc", "eer", "min_dcf", "act_dcf", "cllr", "ece")
    measures |= dict.fromkeys((*names, "misses", "false_alarms", "half_total_error"))
    if not is_fake.all():
        measures["misses"] = float(called_fake[~is_fake].mean())
    if is_fake.any():
        measures["false_alarms"] = float((~called_fake)[is_fake].mean())
    if not is_fake.any() or is_fake.all():
        return measures
    misses, false_alarms = walk_errors(llr, is_fake, np.ones((1, len(llr))))
    cost_miss, cost_alarm = COST_MISS * (1 - SPOOF_PRIOR), COST_FALSE_ALARM * SPOOF_PRIOR
    rejected = llr < -math.log(cost_miss / cost_alarm)
    act_cost = cost_miss * rejected[~is_fake].mean() + cost_alarm * (~rejected)[is_fake].mean()
    measures["half_total_error"] = (measures["misses"] + measures["false_alarms"]) / 2
    measures["balanced_accuracy"] = 1 - measures["half_total_error"]
    measures["roc_auc"] = float(compute_auc(misses, false_alarms)[0])
    measures["eer"] = float(compute_eer(misses, false_alarms)[0])
    measures["min_dcf"] = float((cost_miss * misses + cost_alarm * false_alarms).min()) / min(cost_miss, cost_alarm)
    measures["act_dcf"] = float(act_cost) / min(cost_miss, cost_alarm)
    # in bits: Brummer and du Preez, 2006
    cllr = float(np.logaddexp(0, -llr[~is_fake]).mean() + np.logaddexp(0, llr[is_fake]).mean()) / 2 / math.log(2)
    measures["cllr"] = cllr if math.isfinite(cllr) else None
    measures["ece"] = compute_ece(llr, is_fake)
    return measures


def compute_auc(misses: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """Compute the area under the ROC curve: float, shape (draws,)."""
    mean_hits = 1 - (misses[:, 1:] + misses[:, :-1]) / 2
    return (mean_hits * -np.diff(false_alarms)).sum(axis=1)


def estimate_intervals(
    llr: np.ndarray, is_fake: np.ndarray, recordings: list[str], draws: int = 1000
) -> dict[str, list[float]]:
    """Estimate 95 % intervals by bootstrap: recordings are drawn anew within each class, with all their images.

    Returns:
        {name of a measure: [low, high]}; empty where a class has fewer than two recordings.
    """
    numbers = {}
    owner = np.array(
        [numbers.setdefault((fake, name), len(numbers)) for fake, name in zip(is_fake.tolist(), recordings)]
    )
    of_fakes = np.array([fake for fake, _ in numbers])
    if of_fakes.sum() < 2 or (~of_fakes).sum() < 2:
        return {}
    random = np.random.default_rng(0)
    right = decide(llr) == is_fake
    chunk, draws = max(1, min(50, 2_000_000 // len(llr))), max(100, min(draws, 200_000_000 // len(llr)))
    values = {"accuracy": [], "half_total_error": [], "roc_auc": [], "eer": []}
    for start in range(0, draws, chunk):
        counts = np.zeros((min(chunk, draws - start), len(numbers)))
        for members in (np.flatnonzero(of_fakes), np.flatnonzero(~of_fakes)):
            counts[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), len(counts))
        weights = counts[:, owner]
        misses, false_alarms = walk_errors(llr, is_fake, weights)
        errors = [((weights * part) @ ~right) / (weights @ part) for part in (is_fake, ~is_fake)]
        values["accuracy"].append(weights @ right / weights.sum(axis=1))
        values["half_total_error"].append(sum(errors) / 2)
        values["roc_auc"].append(compute_auc(misses, false_alarms))
        values["eer"].append(compute_eer(misses, false_alarms))
    return {name: np.quantile(np.concatenate(parts), (0.025, 0.975)).tolist() for name, parts in values.items()}


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
    """Measure by each value of some columns, the worst first; a value of one class against all rows of the other.

    Only the SHOWN_GROUPS worst values of a column get intervals, each of up to 1,000 draws, fewer where rows are many.
    """
    table, parts = table.reset_index(drop=True), []
    llr, is_fake, owners = (table[name].to_numpy() for name in ("llr", "is_fake", "recording"))
    is_right = decide(llr) == is_fake
    for column in columns:
        if column not in table or table[column].nunique() < 2:
            continue
        groups = []
        for value, part in tqdm(table.groupby(column), f"Measuring by {column}", leave=False, disable=None):
            own = measured = part.index.to_numpy()
            if part["is_fake"].nunique() == 1:
                measured = np.append(own, np.flatnonzero(is_fake != is_fake[own[0]]))
            entry = {"column": column, "value": value, "rows": len(part), "recordings": part["recording"].nunique()}
            entry["classes"] = " and ".join(name for name in REPORT_ORDER if (part["label"] == name).any())
            entry |= {"eer": None, "eer_interval_95": None, "accuracy": float(is_right[own].mean())}
            if 0 < is_fake[measured].sum() < len(measured):
                errors = walk_errors(llr[measured], is_fake[measured], np.ones((1, len(measured))))
                entry["eer"] = float(compute_eer(*errors)[0])
            groups.append((entry, measured))
        groups.sort(key=lambda group: -(group[0]["eer"] or 0))
        shown = groups[:SHOWN_GROUPS]
        for entry, measured in tqdm(shown, f"Intervals by {column}", leave=False, disable=None):
            draws = max(200, min(1000, 100_000_000 // len(measured) // len(shown)))
            intervals = estimate_intervals(llr[measured], is_fake[measured], owners[measured].tolist(), draws)
            entry["eer_interval_95"] = intervals.get("eer")
        parts += [entry for entry, _ in groups]
    return parts


def format_rate(value: Optional[float], interval: Optional[list[float]] = None) -> str:
    """Write a rate in per cent, with its 95 % confidence interval."""
    if value is None:
        return "not computed"
    return f"{value:.1%}" + (f" (95% CI {100 * interval[0]:.1f}–{interval[1]:.1%})" if interval else "")
