"""The embedded model, dream-mini: what it knows, the world it was trained on, and how it was trained.

Importing this package needs neither torch nor numpy, so that the command can reject a prompt immediately.
"""

from pathlib import Path

from dream_fast.engine.dream_mini.vocabulary import check_prompt

MODEL_FOLDER = Path(__file__).parent / "weights"

__all__ = ["MODEL_FOLDER", "check_prompt"]
