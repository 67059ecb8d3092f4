"""Can a result be believed? Leak, format and shortcut checks, and the caveats that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch

from models.detector import CLASSES, Score
from models.images import compare_rendering, read_again, take_fingerprint
from models.metrics import format_rate, measure_table
from models.pixel_cache import LOOKS
from models.runtime import leave_out

if TYPE_CHECKING:
    import pandas

FORMAT_SAMPLE = 200  # images of a CSV that the format check looks at
UNLIKE_FRACTION = 0.2  # so many of them may be rendered unlike the training images before it warns
UNLIKE_SHIFT = 5  # Mahalanobis distance of their mean, likewise
UNLIKE_FEW = 1.5  # median distance of fewer than five images, in units of what 99 % of validation's keep, likewise
FEW_RECORDINGS = 50  # with fewer, a narrow interval only says that there was hardly anything to draw
SHORTCUT_AUC = 0.75  # above it the class can be predicted without the voice


def check_seen(table: pandas.DataFrame, facts: dict, scores: dict[str, Score]) -> Optional[dict]:
    """Count rows that were trained or validated on, as image or as another image of a recording; measure the rest."""
    if "seen_images" not in facts:
        return None  # the checkpoint does not say
    images, recordings = (set(facts[name].tolist()) for name in ("seen_images", "seen_recordings"))
    as_image = np.array([scores[path].fingerprint in images for path in table["path"]], bool)
    names = zip(table["recording"], table["recording_by_name"])
    as_recording = np.array([any(take_fingerprint(n.encode()) in recordings for n in pair) for pair in names], bool)
    rest = table[~(as_image | as_recording)]
    return {
        "rows_as_image": int(as_image.sum()),
        "rows_as_recording": int((as_recording & ~as_image).sum()),
        "without_them": measure_table(rest) if 0 < len(rest) < len(table) and rest["label"].all() else None,
    }


def check_format(images: dict[str, int], facts: dict) -> tuple[Optional[dict], set[str]]:
    """Check, on a sample of images, whether they were rendered as the training images were.

    Args:
        images: {path: fingerprint of the pixels}; those that are gone or were changed since are named and left out.

    Returns:
        The fraction that lies further from the training images than 99 % of the validation images do, how far their
        mean does, what differs most, in standard deviations, and a warning or ""; None where the checkpoint does not
        say how the training images were rendered, {} where all images are gone. The images that lie further.
    """
    paths, chosen, gone = list(images) if "appearance" in facts else [], {}, []
    for i in np.linspace(0, len(paths) - 1, min(FORMAT_SAMPLE, len(paths))).astype(int):
        try:
            chosen[paths[i]] = read_again(paths[i], facts["image_size"], images[paths[i]])
        except ValueError as error:
            gone.append(str(error))
    if gone:
        leave_out(f"{len(gone)} of {len(gone) + len(chosen)} images of the format check, the first: {gone[0]}")
    found = compare_rendering(torch.stack([*chosen.values()]), facts["appearance"]) if chosen else None
    if found is None:
        return {} if gone else None, set()
    fraction = float((found.distances > 1).mean())
    few = len(chosen) < 5  # one in a hundred lies beyond by chance: few images have to lie far beyond
    is_unlike = np.median(found.distances) > UNLIKE_FEW if few else fraction > UNLIKE_FRACTION
    warning, largest = "", dict(list(found.differences.items())[:3])
    mirrored = "" if few else found.mirrored
    if is_unlike or found.shift > UNLIKE_SHIFT or mirrored:
        named = "; ".join(f"{name} {difference:+.1f}" for name, difference in largest.items())
        warning = (
            f"{fraction:.0%} of {len(chosen)} images were rendered unlike the training images (validation: 1%), and "
            f"their mean lies {found.shift:.1f} from theirs (usual: below {UNLIKE_SHIFT}). Largest differences, in "
            f"standard deviations: {named}. "
            + f"They would fit better {mirrored}. " * bool(mirrored)
            + "Verdicts on them cannot be relied on"
        )
    entry = {"images": len(chosen), "share_unlike": fraction, "shift": found.shift}
    entry |= {"largest_shifts": largest, "warning": warning}
    limit = UNLIKE_FEW if few else 1
    return entry, {path for path, distance in zip(chosen, found.distances) if distance > limit and warning}


def check_start(facts: dict, images: Iterable[int], recordings: Iterable[str], training: dict[str, int]) -> None:
    """Warn where the checkpoint that training starts from has seen what is held out, or was trained on other images.

    Args:
        facts: of that checkpoint.
        images, recordings: what is held out: fingerprints of pixels, names.
        training: the training images: {path: fingerprint of the pixels}.
    """
    held = {"seen_images": {*images}, "seen_recordings": {take_fingerprint(name.encode()) for name in recordings}}
    if any(counts := [len(held[name] & {*facts[name].tolist()}) if name in facts else 0 for name in held]):
        print(
            f"WARNING: PRETRAINED has seen {counts[0]:,} of the held-out images and {counts[1]:,} of their recordings: "
            "a test on them will be too good"
        )
    look, _ = check_format(training, facts)
    if look and look["warning"]:
        print(
            f"Note: {look['share_unlike']:.0%} of the training images were rendered unlike those of PRETRAINED: "
            "PRETRAINED = 'IMAGENET1K_V1' may be the better start"
        )


def check_shortcuts(looks: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Optional[dict[str, float]]:
    """Check whether image size or brightness alone predicts the class, and warn if so.

    Args:
        looks: float32, shape (images, 4), as LOOKS names them; labels: class indices; groups: as `group_images`.

    Returns:
        {feature, or "all together": area under the ROC curve of a logistic regression, cross-validated by group, 0.5 to
        1}; None where there are too few groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(5, *(len(np.unique(groups[labels == label])) for label in range(len(CLASSES))))
    if folds < 2:
        return None
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    predict = partial(cross_val_predict, regression, y=labels, groups=groups, cv=split, method="decision_function")
    columns = {**{name: [number] for number, name in enumerate(LOOKS)}, "all together": slice(None)}
    results = {
        name: max(0.5, float(roc_auc_score(labels, predict(looks[:, chosen])))) for name, chosen in columns.items()
    }
    predictive = [f"{name} {auc:.2f}" for name, auc in results.items() if auc > SHORTCUT_AUC]
    if predictive:
        print(
            f"WARNING: image size or brightness alone predicts the class (AUC: {', '.join(predictive)}): the network "
            "may learn that instead of the voice"
        )
    return results


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
    elif interval and entry["recordings"] < FEW_RECORDINGS:
        caveats.append("few recordings (their confidence interval is too narrow)")
    if entry["rows_repeated"]:
        caveats.append(f"{entry['rows_repeated']:,} rows repeat an image")
    if entry["eer"] is not None and entry["half_total_error"] - entry["eer"] > 0.05:
        caveats.append("the decision threshold, calibrated on validation, does not fit this set")
    if max((entry["shortcuts"] or {"": 0}).values()) > SHORTCUT_AUC:
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
    elif entry["format"] is not None:
        lines.append("Format check: not done, since the images are gone")
    if entry["shortcuts"]:
        values = ", ".join(f"{name} {auc:.2f}" for name, auc in entry["shortcuts"].items())
        lines.append(f"Shortcut check, AUC by which each predicts the class in training: {values}")
    unchecked = {"seen": "leak", "shortcuts": "shortcut", "format": "format"}
    if names := [name for key, name in unchecked.items() if entry[key] is None]:
        lines.append(f"The checkpoint holds nothing for these checks: {', '.join(names)}")
    return lines
