"""Sets one thread, and silences the libraries so that they print nothing between the figures."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Sets one thread and silences warnings, progress bars and log lines of the libraries."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.utils.cpp_extension", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
