"""Make the shipped detector of the best checkpoint: the same with weights in half precision, half as large.

    .venv/bin/python tests/benchmarks/ship.py

Reads models/experiments/best_laundered_processed.pth, writes models/speech_resnet18.pth.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from models import detector, runtime  # noqa: E402


def halve(checkpoint: dict) -> dict:
    """Return the checkpoint with its weights in float16; what counts batches stays whole."""
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    return {**checkpoint, "state_dict": weights}


if __name__ == "__main__":
    buffer, target = io.BytesIO(), ROOT / "models/speech_resnet18.pth"
    torch.save(halve(detector.load_content(ROOT / "models/experiments/best_laundered_processed.pth")), buffer)
    runtime.write_file(target, buffer.getvalue())
    print(f"{target.relative_to(ROOT)}: {len(buffer.getvalue()) / 1e6:.1f} MB")
