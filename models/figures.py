"""Every picture that the scripts write, each as the bytes of a PNG."""

from __future__ import annotations

import io
import os
from itertools import zip_longest
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from torch import nn

from models.detector import Detector, Score, decide, to_scores
from models.images import read_again, to_input
from models.metrics import FEW_ROWS, REPORT_ORDER, SHOWN_GROUPS

if TYPE_CHECKING:
    import pandas

COLOURS = {"Original": "#0072B2", "Deepfake": "#D55E00"}  # told apart by the colour-blind: Okabe and Ito, 2008
MOST_TIMELINES = 12  # recordings whose timelines are drawn
COLOURS_MEAN = "Colours of the maker's images: red level, green and blue regular phase over time and over frequency"


def shorten(text: str, length: int = 40) -> str:
    """Cut a long name in its middle."""
    cut = text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    return cut.replace("$", r"\$")  # which begins a formula in a picture


def start_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple:
    """Start a figure, inches, without a screen. Returns the figure and its axes, shape (rows, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def finish_figure(figure: object) -> bytes:
    """Render a figure as PNG, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def draw_confusion(name: str, counts: np.ndarray) -> bytes:
    """Draw a confusion matrix with counts and row percentages. counts[i, j]: true i, predicted j, in REPORT_ORDER."""
    import seaborn

    figure, ((axes,),) = start_figure(5.2, 4.4)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{count:,}\n{share:.1%}" for count, share in zip(*row)] for row in zip(counts, shares)]
    seaborn.heatmap(
        shares,
        annot=np.array(texts),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        xticklabels=REPORT_ORDER,
        yticklabels=REPORT_ORDER,
        annot_kws={"size": 14},
        cbar_kws={"label": "fraction of the true class"},
        ax=axes,
    )
    axes.set(xlabel="predicted_output", ylabel="actual_output", title=f"{shorten(name)}: {counts.sum():,} images")
    return finish_figure(figure)


def draw_curves(name: str, table: pandas.DataFrame, measures: dict) -> bytes:
    """Draw the DET curve with its operating points, and the scores of both classes with the threshold."""
    figure, (axes,) = start_figure(11, 4.8, 1, 2)
    llr, is_fake = table["llr"].to_numpy(float), table["is_fake"].to_numpy(bool)
    draw_det(axes[0], llr, is_fake, measures)
    axes[0].set_title(f"DET curve, {shorten(name)}")
    draw_score_histograms(axes[1], llr, is_fake)
    return finish_figure(figure)


def draw_det(axes: object, llr: np.ndarray, is_fake: np.ndarray, measures: dict) -> None:
    """Draw a DET curve, on normal-deviate scales, with the equal error rate and the decision threshold."""
    from scipy.stats import norm
    from sklearn.metrics import det_curve

    ticks = np.array([0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
    edge = norm.ppf([0.0005, 0.995])

    def to_axis(rate: float) -> np.ndarray:
        return np.clip(norm.ppf(np.clip(rate, 1e-9, 1 - 1e-9)), *edge)

    false_alarms, misses, _ = det_curve(~is_fake, llr)
    axes.plot(to_axis(false_alarms), to_axis(misses), color=COLOURS["Original"], label="DET curve")
    own = measures["misses"], measures["false_alarms"]
    label = f"decision threshold: {own[0]:.1%} and {own[1]:.1%}"
    axes.plot(to_axis(own[1]), to_axis(own[0]), "s", color=COLOURS["Deepfake"], label=label)
    rate = to_axis(measures["eer"])
    axes.plot(rate, rate, "ok", label=f"equal error rate: {measures['eer']:.1%}")
    axes.plot(edge, edge, ":", color="grey")
    axes.set(xlabel="deepfakes passing as original", ylabel="originals flagged as deepfake", xlim=edge, ylim=edge)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(norm.ppf(ticks), [f"{100 * tick:g} %" for tick in ticks])
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)


def draw_score_histograms(axes: object, llr: np.ndarray, is_fake: np.ndarray) -> None:
    """Draw how the scores of both classes are distributed, and the decision threshold."""
    low, high = np.quantile(llr, (0.002, 0.998))
    bins = np.linspace(min(low - 0.1, -0.5), max(high + 0.1, 0.5), 41)
    for label in REPORT_ORDER:
        values = np.clip(llr[is_fake == (label == "Deepfake")], bins[0], bins[-1])
        percent = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=percent, alpha=0.55, color=COLOURS[label], label=f"{label}, {len(values):,}")
    axes.axvline(0, color="black", linestyle="--", label="threshold: deepfake_score 0.5")
    axes.set(xlabel="log-likelihood ratio (nats): deepfake  ←  → original", ylabel="% of the class", title="Scores")
    axes.margins(y=0.4)  # room for the legend
    axes.legend()


def draw_conditions(parts: list[dict], total: Optional[float]) -> bytes:
    """Draw the EER of all rows, and with its interval that of each value of the REPORT_BY columns, highest on top."""
    columns = list(dict.fromkeys(part["column"] for part in parts))
    chosen = {name: [part for part in parts if part["column"] == name and part["eer"] is not None] for name in columns}
    height = 1.6 + 0.32 * min(max(map(len, chosen.values())), SHOWN_GROUPS)
    figure, (all_axes,) = start_figure(1.5 + 5.5 * len(columns), height, 1, len(columns))
    for axes, (name, group) in zip(all_axes, chosen.items()):
        group = group[:SHOWN_GROUPS][::-1]
        for row, part in enumerate(group):
            low, high = part["eer_interval_95"] or (part["eer"], part["eer"])
            axes.plot([100 * low, 100 * high], [row, row], color=COLOURS["Original"], alpha=0.5, linewidth=3)
            axes.plot(100 * part["eer"], row, "o" if part["rows"] >= FEW_ROWS else "x", color=COLOURS["Deepfake"])
        axes.set_yticks(range(len(group)), [f"{shorten(part['value'], 30)} ({part['rows']:,})" for part in group])
        if total is not None:
            axes.axvline(100 * total, color="black", linestyle=":", label=f"all: {total:.1%}")
            axes.legend(loc="lower right")
        axes.set(xlabel=f"EER, % (95% CI; x: fewer than {FEW_ROWS} rows)", title=f"By {name} (rows)", xlim=(0, 100))
        axes.grid(axis="x", alpha=0.3)
    return finish_figure(figure)


@torch.inference_mode()
def map_activations(detector: Detector, pixels: torch.Tensor) -> torch.Tensor:
    """Map where in an image the evidence for the deciding class lies: Zhou et al., 2016, section 2.

    Returns:
        float32, shape (size, size), 0 to 1.
    """
    model, facts, kept = detector.model, detector.facts, []
    hook = model.layer4.register_forward_hook(lambda *results: kept.append(results[-1]))
    decided = model(to_input(pixels[None].float(), facts["mean"], facts["std"], 255)).argmax()
    hook.remove()
    evidence = torch.einsum("c,chw->hw", model.fc.weight[decided], kept[0][0])[None, None]
    evidence = nn.functional.interpolate(evidence, pixels.shape[1:], mode="bilinear")[0, 0].clamp_min(0)
    return evidence / evidence.max().clamp_min(1e-9)


def draw_mistakes(table: pandas.DataFrame, scores: dict[str, Score], detector: Detector) -> bytes:
    """Draw the most confident mistakes of each kind above the most confident right verdicts, with activation maps.

    Raises:
        ValueError: an image is gone, or was changed since it was judged.
    """
    wrong = decide(table["llr"].to_numpy(float)) != table["is_fake"].to_numpy(bool)
    figure, all_axes = start_figure(12, 13, 4, 4)
    kinds = [(is_wrong, label) for is_wrong in (True, False) for label in REPORT_ORDER]
    for row, (is_wrong, label) in zip(all_axes, kinds):
        group = table[(wrong == is_wrong) & (table["label"] == label)]
        group = group.reindex(group["llr"].abs().sort_values(ascending=False).index)
        row[0].set_ylabel(f"{label}\n" + (f"taken for {REPORT_ORDER[label == 'Original']}" if is_wrong else "correct"))
        for axes, image in zip_longest(row, group["path"][:4]):
            axes.set(xticks=[], yticks=[])
            if image is None:
                axes.set_title("none", fontsize=8)
            else:
                draw_evidence(axes, image, scores[image], detector)
    figure.suptitle(
        f"The most confident verdicts; outlined: where the evidence for the verdict is strongest\n{COLOURS_MEAN}"
    )
    return finish_figure(figure)


def draw_evidence(axes: object, path: str, score: Score, detector: Detector) -> None:
    """Draw an image, with an outline of where the evidence for the verdict is."""
    pixels = read_again(path, detector.facts["image_size"], score.fingerprint)
    axes.imshow(pixels.permute(1, 2, 0).numpy(), aspect="auto")
    evidence = map_activations(detector, pixels).numpy()
    for colour, width in (("black", 2.5), ("white", 1)):  # seen on any colours
        axes.contour(evidence, levels=[0.5], colors=colour, linewidths=width)
    name = os.path.splitext(os.path.basename(path))[0]
    axes.set_title(f"score {to_scores(np.array(score.llr)).item():.3f}\n{shorten(name, 36)}", fontsize=8)


def draw_timelines(recordings: pandas.DataFrame, scores: dict[str, Score], size: int) -> Optional[bytes]:
    """Draw for each of the first recordings the score of its parts along time over its spectrogram.

    Args:
        size: pixels, of the images as they were judged.

    Returns:
        None where no image says when it begins.

    Raises:
        ValueError: an image is gone, or was changed since it was judged.
    """
    chosen = [
        (name, spans, paths)
        for name, paths in zip(recordings["recording"], recordings["paths"])
        if None not in (spans := [scores[path].span for path in paths])
    ][:MOST_TIMELINES]
    if not chosen:
        return None
    figure, all_axes = start_figure(11, 0.6 + 1.9 * len(chosen), len(chosen), 1)
    for (axes,), (name, spans, paths) in zip(all_axes, chosen):
        ends = sorted(spans)
        for number, (path, (start_s, stop_s)) in enumerate(sorted(zip(paths, spans), key=lambda pair: pair[1])):
            following = ends[number + 1][0] if number + 1 < len(ends) else stop_s
            shown = min(stop_s, max(following, start_s + 0.01))  # up to where the next part begins
            pixels = read_again(path, size, scores[path].fingerprint).permute(1, 2, 0).numpy()
            pixels = pixels[:, : max(1, round(pixels.shape[1] * (shown - start_s) / (stop_s - start_s)))]
            axes.imshow(pixels, extent=(start_s, shown, 0, 1), aspect="auto", alpha=0.75)
            score = to_scores(np.array(scores[path].llr)).item()
            colour = COLOURS["Deepfake" if score >= 0.5 else "Original"]
            for line_colour, width in (("black", 7), ("white", 5.5), (colour, 3.5)):
                axes.plot([start_s, shown], [score, score], color=line_colour, linewidth=width)
        axes.axhline(0.5, color="white", linestyle="--", linewidth=1)
        axes.set(xlim=(ends[0][0], max(stop for _, stop in spans)), ylim=(-0.03, 1.03), ylabel="deepfake_score")
        axes.set_title(shorten(name, 80), fontsize=9, loc="left")
    words = "time, s (dashed: threshold; blue line below it: original, orange line above it: deepfake)"
    all_axes[-1, 0].set_xlabel(f"{words}\n{COLOURS_MEAN}")
    return finish_figure(figure)


def draw_learning_curves(history: list[dict], best_epoch: int) -> bytes:
    """Draw losses and validation metrics over the epochs, the best epoch marked."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure, ((left, right),) = start_figure(11, 4, 1, 2)
    left.plot(epochs, [row["train_loss"] for row in history], ".-", label="training (smoothed labels, cropped images)")
    left.plot(epochs, [row["val_loss"] for row in history], ".-", label="validation")
    right.plot(epochs, [row["val_balanced_accuracy"] for row in history], ".-", label="balanced accuracy")
    right.plot(epochs, [row["val_auc"] for row in history], ".-", label="area under the ROC curve")
    left.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, None))
    right.set(title="Validation", ylabel="fraction", ylim=(None, 1.01))
    for axes in (left, right):
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best checkpoint (epoch {best_epoch})")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return finish_figure(figure)
