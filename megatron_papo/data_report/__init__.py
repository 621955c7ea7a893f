"""`papo data`: what the trainer will see of a data set, before anything is rented; a table and a page, no ranks.

It reads each row as the verb does that will train or evaluate on it, so the same rows are bad for the same reasons, and
it needs of the model folder the tokenizer, the chat template and the image processor, no weights. Pictures are decoded,
and of their pixels only the number of tokens is worked out. Leaves out what an engine or the model makes of a prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.config.derived import model_folder
from megatron_papo.data_report.examples import examples_of
from megatron_papo.data_report.page import report_page
from megatron_papo.data_report.reading import open_rows, read_rows
from megatron_papo.data_report.tables import print_report
from megatron_papo.files.small_files import write_atomically
from megatron_papo.text.untrusted import as_text


def main(config: Config, verb: str, limit: int | None, out: Path) -> int:
    """Reads at most `limit` rows of the data of `verb` (train, sft or eval), prints what they are and writes the page.

    Returns the exit code: 0 where a row is good, else 1. Raises ValueError for settings that cannot be.
    """
    rows = open_rows(config, verb, model_folder(config))
    survey = read_rows(rows, limit)
    examples = examples_of(rows, survey)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, report_page(config, survey, examples))
    print_report(config, survey)
    print(f"papo: data: {as_text(out)}")
    if not survey.good:
        print(f"papo: error: data.{survey.which}: no row can be a prompt", file=sys.stderr)
    return 0 if survey.good else 1
