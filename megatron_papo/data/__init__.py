"""From a dataset to prompts as the model reads them, in a deterministic order, and to their masked views.

Reads files, decodes images, applies the chat template, draws rows. Knows nothing of ranks beyond the two numbers
`data_rank` and `data_size`, nothing of Megatron, and holds no state but the draw that `prefetch` has under way: the
cursor is a value that the caller keeps.
"""

from megatron_papo.data.bad_rows import BadRow, BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import Draw, draw_prompts, prompts_of
from megatron_papo.data.masking import Masks, mask_images, masked_raw_images
from megatron_papo.data.order import DataCursor, share_of
from megatron_papo.data.prefetch import Prefetch
from megatron_papo.data.processor import Processor, load_processor

__all__ = [
    "BadRow",
    "BadRows",
    "DataCursor",
    "Draw",
    "Masks",
    "Prefetch",
    "Processor",
    "PromptDataset",
    "draw_prompts",
    "load_processor",
    "mask_images",
    "masked_raw_images",
    "prompts_of",
    "share_of",
]
