"""`papo score`: log-probs of given responses, with the image and with it masked, token by token.

It reads JSON lines with `problem`, `images` (paths, relative to the file) and `response`, and writes the same rows in
the same order, with `tokens`, `policy_logprobs`, `masked_logprobs`, `entropy` and `perception_kl` (k3, nats) for every
response token, at temperature 1 over the model's whole vocabulary. No token is banned and no end-of-turn token is
added: the numbers are those of the plain model on the text as given. Rows without an image have null in the masked
columns. The output file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_papo.algorithm.estimators import kl_k3
from megatron_papo.config import Config
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import share_of
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.files.small_files import write_atomically
from megatron_papo.model.policy import HeadRequest
from megatron_papo.optimization.pipeline import score_views
from megatron_papo.packing import supervised_group
from megatron_papo.training.batching import pack_rows
from megatron_papo.training.console import say
from megatron_papo.training.session import Run, open_run
from megatron_papo.types import Group

_ROWS_AT_ONCE = 64
"""How many rows of the file are in memory at a time, with their images."""


def main(config: Config, data: Path, out: Path) -> None:
    """Writes every row of `data` with its scores to `out`. Raises ValueError that names a row that cannot be scored."""
    rows = _read_rows(data)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"eval": str(data), "eval_split": "train", "preset": "none"})}
    )
    with open_run(config) as run:
        dataset = PromptDataset(config.data, "eval", run.processor, needs_answer=False)
        own = share_of(range(len(rows)), run.layout.data_rank, run.layout.data_size)
        scored: list[dict[str, Any]] = []
        with run.clock.stage("score", total=len(own)) as progress:
            for start in range(0, len(own), _ROWS_AT_ONCE):
                chunk = own[start : start + _ROWS_AT_ONCE]
                scored += _score(run, [_group(run, dataset, rows[row], row) for row in chunk])
                progress.advance(len(chunk))
        everywhere = gather_objects(scored, run.layout.data_group)
        if run.is_writer:
            columns = [columns for share in everywhere for columns in share]
            _write_rows(out, [row | new for row, new in zip(rows, columns, strict=True)])
            say(run, f"{len(rows)} rows: {out}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; raises ValueError that names the line with no response."""
    rows = []
    # not str.splitlines: it also splits at separators that JSON allows within a string
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("response"), str) or not row["response"]:
            raise ValueError(f"{path}:{number}: has no text in `response`")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _group(run: Run, dataset: PromptDataset, cells: dict[str, Any], row: int) -> Group:
    """The prompt of a row with the response that the file gives, as a group of one rollout."""
    config = run.config
    prompt = dataset.prompt(row, Masks(config.perception.mask, config.run.seed))
    token_ids = run.processor.answer_ids(cells["response"])
    if not token_ids:
        raise ValueError(f"row {row}: `response` has no tokens")
    return supervised_group(prompt, token_ids, cells["response"])


def _score(run: Run, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The new columns of each group's only rollout, in the order of the groups."""
    head = HeadRequest(full_entropy=True, banned_ids=())
    rows = pack_rows(run, groups)
    scores: dict[str, dict[str, Any]] = {}
    for row, (seen, blind) in zip(rows, score_views(run.policy, rows, head), strict=True):
        assert seen.entropy_R is not None
        columns = {
            "tokens": row.target_ids_R,
            "policy_logprobs": seen.policy_logprobs_R,
            "masked_logprobs": blind.policy_logprobs_R,
            "entropy": seen.entropy_R,
            "perception_kl": kl_k3(seen.policy_logprobs_R, blind.policy_logprobs_R),
        }
        for index, (prompt_id, _) in enumerate(row.sequences):
            own_R = row.rollout_index_R == index
            scores[prompt_id] = {name: values_R.cpu()[own_R].tolist() for name, values_R in columns.items()}
    for group in groups:
        if group.prompt.inputs.pixel_values_PD is None:
            scores[group.prompt.id] |= {"masked_logprobs": None, "perception_kl": None}
    return [scores[group.prompt.id] for group in groups]
