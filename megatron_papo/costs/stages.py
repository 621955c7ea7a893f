"""The stages of a training step, as the clock names them (`time/<stage>`), and those of them that the planner knows."""

from __future__ import annotations

STEP_STAGES = ("draw", "generate", "reward", "advantage", "pack", "score", "update", "hand_over")
"""In their order. A step's seconds are the sum of theirs, and its tokens per second are counted over that sum."""

PLANNED_STAGES = ("generate", "score", "update", "hand_over")
"""The stages whose seconds the planner predicts (`planned/time/<stage>`), and which tables show one by one."""


def shown_stage(stage: str) -> str:
    """A stage's name as tables for people show it: `hand over` for `hand_over`."""
    return stage.replace("_", " ")
