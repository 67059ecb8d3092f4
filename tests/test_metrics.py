"""Metrics and intervals against independent references."""

import numpy as np
import pandas
import pytest
from conftest import EVALUATOR, draw_scores, read_summary, read_tsv, run, write_csv

from models import metrics

SIZES = [(5, 5), (5, 50), (50, 5), (17, 23), (100, 100), (100, 900), (900, 100), (300, 1500), (1000, 1000), (900, 3000)]


def measure_by_hand(llr, is_fake):
    """EER, minDCF, actDCF and Cllr by their definitions, threshold by threshold."""
    target, nontarget = llr[~is_fake], llr[is_fake]
    best, least = (2.0, None), np.inf
    for threshold in np.concatenate([[-np.inf], np.sort(llr)]):
        miss, alarm = np.sum(target <= threshold) / len(target), np.sum(nontarget > threshold) / len(nontarget)
        best = min(best, (abs(miss - alarm), (miss + alarm) / 2), key=lambda pair: pair[0])
        least = min(least, 0.95 * miss + 10 * 0.05 * alarm)
    bayes = -np.log(0.95 / 0.5)
    actual = 0.95 * np.mean(target < bayes) + 0.5 * np.mean(nontarget >= bayes)
    cllr = (np.mean(np.log2(1 + np.exp(-target))) + np.mean(np.log2(1 + np.exp(nontarget)))) / 2
    return best[1], least / 0.5, actual / 0.5, cllr


@pytest.mark.parametrize(("bona_fide", "spoof"), SIZES)
def test_measures_equal_their_definitions(bona_fide, spoof):
    llr, is_fake = draw_scores(bona_fide, spoof, seed=bona_fide + spoof)
    measures = metrics.measure(llr, is_fake)
    found = [measures[name] for name in ("eer", "min_dcf", "act_dcf", "cllr")]
    assert found == pytest.approx(measure_by_hand(llr, is_fake), abs=1e-9)
    pairs = (llr[~is_fake][:, None] > llr[is_fake]).mean()
    assert measures["roc_auc"] == pytest.approx(pairs, abs=1e-9)
    assert measures["half_total_error"] == pytest.approx((np.mean(llr[~is_fake] <= 0) + np.mean(llr[is_fake] > 0)) / 2)


def test_measures_of_a_large_and_uneven_set():
    llr, is_fake = draw_scores(900, 90_000)
    measures = metrics.measure(llr, is_fake)
    target, nontarget = np.sort(llr[~is_fake]), np.sort(llr[is_fake])
    misses = np.searchsorted(target, np.sort(llr), "right") / 900
    alarms = 1 - np.searchsorted(nontarget, np.sort(llr), "right") / 90_000
    nearest = np.abs(misses - alarms).argmin()
    assert measures["eer"] == pytest.approx((misses[nearest] + alarms[nearest]) / 2, abs=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_equal_scores_move_together(order):
    is_fake = np.array([False, True, False, True, True])[::order]
    measures = metrics.measure(np.full(5, 0.3), is_fake)
    assert (measures["eer"], measures["roc_auc"]) == (0.5, 0.5)
    half_tied = metrics.measure(np.array([1.0, 0, 0, -1]), np.array([False, False, True, True]))
    assert (half_tied["eer"], half_tied["roc_auc"]) == (0.25, 0.875)


def test_perfect_and_inverted_scores():
    is_fake = np.array([False, False, True, True])
    assert metrics.measure(np.array([3.0, 2, -2, -3]), is_fake)["eer"] == 0
    assert metrics.measure(np.array([-3.0, -2, 2, 3]), is_fake)["eer"] == 1


def test_one_class_and_infinite_scores_give_none_not_numbers():
    measures = metrics.measure(np.array([1.0, -1]), np.array([False, False]))
    assert (measures["accuracy"], measures["misses"]) == (0.5, 0.5)
    assert {measures[name] for name in ("eer", "roc_auc", "min_dcf", "cllr", "false_alarms", "half_total_error")} == {
        None
    }
    infinite = metrics.measure(np.array([np.inf, -np.inf, np.inf, 0]), np.array([False, True, True, False]))
    assert infinite["cllr"] is None and infinite["eer"] == 0.5


@pytest.mark.parametrize("images", [1, 5])
def test_intervals_cover_the_true_rate(images):
    """Recordings' scores vary, and their images' scores vary about them: true EER by theory of normal scores."""
    from scipy.stats import norm

    draw, draws, covered = np.random.default_rng(1), 300, 0
    true_eer = norm.cdf(-1 / np.sqrt(1 + 0.25))
    for _ in range(draws):
        centre = np.repeat(draw.normal(size=160), images)
        is_fake = np.repeat(np.arange(160) % 2 == 1, images)
        llr = np.where(is_fake, -1, 1) + centre + draw.normal(scale=0.5, size=len(centre))
        names = np.repeat(np.arange(160), images).astype(str).tolist()
        low, high = metrics.estimate_intervals(llr, is_fake, names, draws=200)["eer"]
        covered += low <= true_eer <= high
    assert 0.90 <= covered / draws <= 0.99


def test_interval_needs_two_recordings_of_each_class():
    assert metrics.estimate_intervals(np.array([1.0, 2, -1]), np.array([False, False, True]), ["a", "b", "c"]) == {}


def test_calibration_error_of_calibrated_and_overconfident_scores():
    draw = np.random.default_rng(0)
    llr = draw.normal(0, 2, 200_000)
    is_fake = draw.random(len(llr)) < 1 / (1 + np.exp(llr))
    assert metrics.compute_ece(llr, is_fake) < 0.01
    assert metrics.compute_ece(4 * llr, is_fake) > 0.1


def test_intervals_are_for_the_groups_that_are_shown():
    llr, is_fake = draw_scores(240, 240)
    label = np.where(is_fake, "Deepfake", "Original")
    columns = {"llr": llr, "is_fake": is_fake, "label": label, "recording": [f"r{n}" for n in range(480)]}
    table = pandas.DataFrame({**columns, "speaker": [f"s{n % 60}" for n in range(480)]})
    parts = metrics.measure_conditions(table[::-1], ("speaker", "source"))
    assert [bool(part["eer_interval_95"]) for part in parts] == [True] * 40 + [False] * 20
    for part in parts[::20]:
        group = table[table["speaker"] == part["value"]]
        expected = metrics.measure(group["llr"].to_numpy(), group["is_fake"].to_numpy())
        assert (part["eer"], part["accuracy"], part["rows"]) == (expected["eer"], expected["accuracy"], 8)


def test_report_breaks_down_by_condition_worst_first(judged):
    rows = [["img_path", "actual_output", "source", "condition"]]
    for number in range(2, 12):
        for kind in ("deepfake", "original"):
            condition = "noise" if number % 2 else "clean"
            source = f"engine {number % 3}" if kind == "deepfake" else "a voice"
            rows.append([f"{kind}/combined/{kind[0]}{number}__clean_1.png", kind, source, condition])
    write_csv(judged / "test_data/test.csv", rows)
    assert run(judged, EVALUATOR).status == 0
    (entry,) = read_summary(judged)
    parts = entry["by_condition"]
    assert [part["column"] for part in parts] == ["source"] * 4 + ["condition"] * 2
    for column in ("source", "condition"):
        rates = [part["eer"] for part in parts if part["column"] == column]
        assert rates == sorted(rates, reverse=True)
    engine = next(part for part in parts if part["value"] == "engine 2")
    assert (engine["rows"], engine["classes"]) == (4, "Deepfake")
    assert max(len(line) for line in entry["report"].splitlines()) <= 100
    assert entry["report"].count("few rows") == 6
    scores = {name: float(score) for name, score in read_tsv(judged / "test_data/test_scores.tsv")[1:]}
    chosen = [(scores[row[0]], row[1] == "deepfake") for row in rows[1:] if row[2] in ("engine 2", "a voice")]
    llr, is_fake = (np.array(column) for column in zip(*chosen))
    assert engine["eer"] == metrics.measure(llr, is_fake)["eer"]
