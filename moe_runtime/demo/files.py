"""Files that ship with the demo model."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CARVING = FOLDER / "calibration.npz"  # how the dense model is carved into experts
EXPERT_CALIBRATION = FOLDER / "routing_calibration.json"  # written by `moe-runtime calibrate demo`
