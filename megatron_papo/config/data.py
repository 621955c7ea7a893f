"""The section `data`: which rows are read, how they become prompts, and what is done about bad rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Section


class ColumnsConfig(Section):
    problem: str = "problem"
    """Column of the question: text, or one turn of the user."""
    answer: str = "answer"
    """Column of the right answer, or of a list of them, any of which counts."""
    images: str | None = "images"
    """Column of one image or several: bytes, paths, base64 or pictures; null: the text alone is read."""


MOST_IMAGE_PIXELS = 89_000_000
"""A little less than what Pillow takes for an attack."""


class DataConfig(Section):
    train: str | None = None
    """A file (parquet, jsonl), a pattern of files, an image folder or a hub name: anything `datasets` reads."""
    eval: str | None = None
    """The held-out set, likewise."""
    split: str = "train"
    """Split of data.train."""
    eval_split: str | None = None
    """Of data.eval; null: the same name."""
    preset: Literal["none", "virl39k", "geometry3k"] = "none"
    """Layouts of published data sets; replaces data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    instruction: str = (
        "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
        "tags. Then, provide your final answer enclosed within \\boxed{}."
    )
    """Follows the question in the user's turn, after a blank line; empty means the question alone."""
    system: str | None = None
    """The system turn; null: the chat template's own."""
    min_pixels: Count | None = None
    """Smaller images are enlarged to this area; null: to that of the model folder's own image processor."""
    max_pixels: Count | None = None
    """Larger images are reduced to this area; null likewise. Published processors allow areas of 16,384 tokens: mind
    data.max_prompt_tokens."""
    max_image_pixels: Annotated[int, Field(ge=1, le=MOST_IMAGE_PIXELS)] = 2**25
    """An image of more pixels is a bad row: it is not decoded, which takes some 12 bytes of memory a pixel."""
    image_roots: list[Path] = []
    """Further folders in which images named by path may lie; by default the data set's own folder alone."""
    max_prompt_tokens: Count = 4096
    """A longer prompt is a bad row."""
    on_bad_row: Literal["skip", "stop"] = "stop"
    """Corrupt image, wrong placeholder count, no answer, too long and the like: leave it out, or stop and name it."""
    shuffle: bool = True
    """A new order each epoch; false: the order of the file."""
    prefetch: bool = True
    """`papo train` prepares the next prompts in a thread while it trains on these: host memory for one draw more."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels={self.min_pixels} exceeds data.max_pixels={self.max_pixels}")
        if self.preset != "none" and self.columns != ColumnsConfig():
            raise ValueError(f"data.columns: data.preset={self.preset} names the columns; give one of the two")
        return self
