"""The section `data`: data sets, the names of their columns, prompts, and limits of images and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Section
from megatron_papo.config.curriculum import StageConfig, fault_of_stages
from megatron_papo.config.data_sources import Preset, SourceConfig, Sources, source_entries


class ColumnsConfig(Section):
    problem: str = "problem"
    """Column of the question: a text, or one turn of the user."""
    answer: str = "answer"
    """Column of the right answer, or of a list of answers, each of which counts as right."""
    images: str | None = "images"
    """Column of one image or several, as bytes, paths, base64 or pictures; null: only the text is read."""
    system: str | None = None
    """Column of the text of a row's system turn; a row without one has that of data.system."""


MOST_IMAGE_PIXELS = 89_000_000
"""A little less than what Pillow takes for an attack."""


class DataConfig(Section):
    train: Sources = None
    """Training set: a file (parquet, jsonl), a pattern of files, an image folder or a name on the Hugging Face hub, as
    `datasets` reads them; or a list of these, each the name alone or a mapping with the keys below."""
    eval: Sources = None
    """Held-out set for evaluation, in the same forms as data.train, without weights."""
    split: str = "train"
    """Name of the split of data.train that is read."""
    eval_split: str | None = None
    """Name of the split of data.eval that is read; null: the same as data.split."""
    preset: Preset = "none"
    """Column names of a published data set, in place of data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    instruction: str = (
        "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
        "tags. Then, provide your final answer enclosed within \\boxed{}."
    )
    """Text that follows the question in the user's turn, after a blank line; empty: only the question."""
    system: str | None = None
    """Text of the system turn, where a row has none of its own; null: the chat template's own."""
    min_pixels: Count | None = None
    """Images of a smaller area, in pixels, are enlarged to it; null: the minimum of the model folder's image
    processor."""
    max_pixels: Count | None = None
    """Images of a larger area, in pixels, are reduced to it; null: the maximum of the model folder's image processor.
    Published processors allow areas of 16,384 tokens: compare data.max_prompt_tokens."""
    max_image_pixels: Annotated[int, Field(ge=1, le=MOST_IMAGE_PIXELS)] = 2**25
    """An image of more pixels is a bad row and is not decoded: decoding takes about 12 bytes of memory a pixel."""
    image_roots: list[Path] = []
    """Further folders in which images named by path may lie; without them, only the data set's own folder."""
    max_prompt_tokens: Count = 4096
    """Most tokens of a prompt, image tokens included; a row with a longer prompt is a bad row."""
    on_bad_row: Literal["skip", "stop"] = "stop"
    """What to do with a bad row (corrupt image, wrong number of image placeholders, no answer, too long and the like):
    leave it out, or stop and name it."""
    shuffle: bool = True
    """Whether the rows have a new order in each epoch; false: the order of the file. With data.order_by: whether rows
    of the same value have."""
    order_by: str | None = None
    """Column that rows are sorted by in each epoch, from the least number or the first text; rows without a value come
    last. Also a column that is read for nothing else, such as a difficulty."""
    order_descending: bool = False
    """Whether data.order_by sorts from the largest number or the last text."""
    sampler: str | None = None
    """Sampler of your own, `module:function`, in place of data.shuffle and data.order_by: a function of (num_rows,
    epoch, seed, column) that returns the numbers of the rows of an epoch in order; rows may come several times or not
    at all. `column("name")` gives the cells of a column. It must return the same for the same arguments."""
    curriculum: list[StageConfig] = []
    """Stages of the run, one after the other, each of which draws from some of the rows: mappings with the keys below.
    Within a stage, order and weights are as elsewhere."""
    on_change: Literal["stop", "continue"] = "stop"
    """What to do when a run is resumed with other rows of data.train, or another order of them, than it began with:
    refuse, or go on. It then goes on with the new rows in their order, of which as many prompts count as drawn as were
    drawn so far."""
    prefetch: bool = True
    """Whether `papo train` prepares the next prompts in a thread while it trains on the present ones. Takes host memory
    for one more batch of prompts."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels={self.min_pixels} exceeds data.max_pixels={self.max_pixels}")
        self._check_sources()
        if self.preset != "none" and self.columns != ColumnsConfig():
            raise ValueError(f"data.columns: data.preset={self.preset} names the columns; give one of the two")
        if self.sampler is not None and self.order_by is not None:
            raise ValueError(f"data.order_by={self.order_by}: data.sampler says the order; give one of the two")
        if self.sampler is not None and any(entry.weight != 1 for entry in self.sources("train")):
            raise ValueError("data.train: data.sampler says how often each row comes: leave the weights out")
        if fault := fault_of_stages(self.curriculum):
            raise ValueError(fault)
        return self

    def _check_sources(self) -> None:
        for which, entries in (("train", self.sources("train")), ("eval", self.sources("eval"))):
            names = [entry.name for entry in entries]
            for place, entry in enumerate(entries):
                key = f"data.{which}[{place}]"
                if unknown := sorted(set(entry.columns) - set(ColumnsConfig.model_fields)):
                    known = ", ".join(ColumnsConfig.model_fields)
                    raise ValueError(f"{key}.columns: unknown key {unknown[0]}, known are {known}")
                if names.index(entry.name) != place:
                    raise ValueError(f"{key}.name: {entry.name!r} is the name of another entry too")
                if which == "eval" and entry.weight != 1:
                    raise ValueError(f"{key}.weight: evaluation reads every row once")
                self.columns_of(entry)

    def sources(self, which: Literal["train", "eval"]) -> tuple[SourceConfig, ...]:
        """The entries of data.train or data.eval, each with its name and its split; none where it is not set."""
        split = self.split if which == "train" else self.eval_split or self.split
        entries = source_entries(self.train if which == "train" else self.eval)
        return tuple(entry.model_copy(update={"split": entry.split or split}) for entry in entries)

    def columns_of(self, source: SourceConfig) -> tuple[Preset, ColumnsConfig]:
        """The preset and the columns that hold for one entry: its own before those of the section."""
        preset = source.preset or ("none" if source.columns else self.preset)
        return preset, ColumnsConfig.model_validate({**self.columns.model_dump(), **source.columns})
