"""The processor of a model folder that works out how many tokens a picture takes, and makes no pixels of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from megatron_papo.data.processor import Pixels, Processor, check_aspect


class MeasuringProcessor(Processor):
    """Gives prompts with the number of tokens that `Processor` gives, without pixels. May be called by many threads."""

    _lock = threading.Lock()
    """The tokenizer is no object for several threads."""

    def text_ids(self, problem: str, num_images: int, system: str | None = None) -> Tensor:
        with self._lock:
            return super().text_ids(problem, num_images, system)

    def encode_response(self, text: str) -> tuple[int, ...]:
        with self._lock:
            return super().encode_response(text)

    def pixel_values(self, images: Sequence[Image.Image]) -> Pixels:
        """No pixels, and for each picture a grid of one row that has as many patches as the picture would have; where
        the image processor cannot tell them from the size, pixels and grids as of `Processor`. Raises ImageTooExtreme.
        """
        count = getattr(self.image_processor, "get_number_of_image_patches", None)
        if count is None:
            return super().pixel_values(images)
        for image in images:
            check_aspect(image)
        return torch.empty(0, 0), torch.tensor([[1, 1, count(image.height, image.width, {})] for image in images])
