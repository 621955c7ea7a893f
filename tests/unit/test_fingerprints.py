"""What a run is made from, told again: copies are the same, a changed cell, picture or weight is not."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from megatron_papo.checkpoint.weight_fingerprint import fingerprint_of_weights
from megatron_papo.config import Config, plain_tree
from megatron_papo.data import fingerprint as of_rows
from megatron_papo.data.fingerprint import fingerprint, fingerprints_of_rows
from megatron_papo.training.origin import changed_settings, compare_origins, kept_origin

ROWS = [{"problem": f"what is {row}?", "answer": str(row), "level": row} for row in range(40)]


def pictures(row: int) -> tuple[bytes, ...]:
    if row == 3:
        raise ValueError("a bad row")
    return (bytes([row]),) * (row % 3)


def of(rows, columns=("problem", "answer"), images=pictures) -> dict[str, str]:
    return fingerprints_of_rows(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), columns, images)


def test_a_copy_of_the_rows_is_the_same_in_any_format(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "copy.jsonl")
    found = [Dataset.from_parquet(str(tmp_path / "rows.parquet")), Dataset.from_json(str(tmp_path / "copy.jsonl"))]
    assert of(found[0]) == of(found[1]) == of(ROWS)
    assert of(ROWS) == of([{**row, "level": 0} for row in ROWS]), "a column that is not read"
    assert of(rows.select(range(39, -1, -1)).select(range(39, -1, -1))) == of(ROWS)


def test_other_rows_or_pictures_are_others(monkeypatch):
    changed = {
        "cell": [*ROWS[:-1], {**ROWS[-1], "answer": "nothing"}],
        "order": [*ROWS[:-2], ROWS[-1], ROWS[-2]],
        "number": ROWS[:-1],
        "kind": [{**row, "answer": int(row["answer"])} for row in ROWS],
        "borders": [{**row, "problem": row["problem"] + row["answer"], "answer": ""} for row in ROWS],
    }
    assert len({of(ROWS)["rows"], *(of(rows)["rows"] for rows in changed.values())}) == 1 + len(changed)
    assert of(ROWS, ("problem", "level"))["rows"] != of(ROWS)["rows"]
    assert of(ROWS, images=lambda row: (b"another",))["pictures"] != of(ROWS)["pictures"]
    monkeypatch.setattr(of_rows, "_TEXT_ROWS", 7)
    assert of(ROWS)["rows"] != of(ROWS[:-1])["rows"] != of([{**ROWS[0], "answer": "nothing"}, *ROWS[1:-1]])["rows"]


def test_weights_are_the_same_in_however_many_files(tmp_path):
    torch.manual_seed(0)
    tensors = {f"layer.{number}": torch.randn(4, 3).bfloat16() for number in range(200)} | {"norm": torch.ones(5)}

    def written(name: str, *files: dict[str, torch.Tensor]) -> Path:
        (tmp_path / name).mkdir()
        if len(files) == 1:
            save_file(files[0], tmp_path / name / "model.safetensors")
            return tmp_path / name
        names = [f"part-{number}.safetensors" for number in range(len(files))]
        for file, part in zip(names, files, strict=True):
            save_file(part, tmp_path / name / file)
        weight_map = {tensor: file for file, part in zip(names, files, strict=True) for tensor in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path / name

    whole = written("whole", tensors)
    halves = [{name: tensors[name] for name in sorted(tensors)[half::2]} for half in (0, 1)]
    seen = fingerprint_of_weights(whole)
    assert seen == fingerprint_of_weights(written("halves", *halves))
    others = ({**tensors, "norm": torch.ones(6)}, {name: tensor + 1 for name, tensor in tensors.items()})
    assert seen not in [
        fingerprint_of_weights(written(f"other {len(other)} {place}", other)) for place, other in enumerate(others)
    ]
    assert load_file(whole / "model.safetensors").keys() == tensors.keys(), "left as it is"


def test_where_parts_end_counts():
    assert len({fingerprint(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abc", b""], [])}) == 5


def test_what_is_refused_and_what_is_told():
    config = Config.model_validate(
        {"model": {"path": "now"}, "data": {"train": "rows"}, "loss": {"reference_coef": 0.01}}
    )
    before = {"model": {"path": "then", "checkpoint": None}, "data": {"train": "rows"}}

    def compare(cursor, now=config, verb="train"):
        return compare_origins(Path("last"), {"cursor": {"verb": verb, **cursor}, "config": before}, ORIGIN, now)

    same = {"origin": dict(ORIGIN)}
    assert compare(same) == [] == compare({}), "a checkpoint from before origins were kept has nothing to compare"
    weights = {"origin": {**ORIGIN, "weights": "9"}}
    began = "model.path: now has other weights than then, with which this run began"
    with pytest.raises(ValueError, match=f"^{began}, of which the reference policy is made; take another run.dir"):
        compare(weights)
    alone = config.model_copy(update={"loss": config.loss.model_copy(update={"reference_coef": 0.0})})
    assert compare(weights, alone) == compare(weights, verb="sft") == [f"{began}: it goes on with those of last"]
    assert compare({"origin": {**ORIGIN, "pictures": "9"}}) == [
        "data.train: rows has other pictures than when this run began: it goes on with these"
    ]
    with pytest.raises(ValueError) as error:
        compare({"origin": dict.fromkeys(ORIGIN, "9")})
    assert [line.partition(" than ")[0] for line in str(error.value).splitlines()] == [
        "data.train: rows has other rows",
        "model.path: now has another tokenizer",
        "model.path: now has another image processor",
        "model.path: now has other weights",
    ]
    assert kept_origin({"origin": [1]}) == {}


ORIGIN = {"rows": "1", "pictures": "2", "tokenizer": "3", "image processor": "4", "weights": "5"}


def test_changed_settings_are_listed_shortly():
    config = Config.model_validate({"train": {"steps": 2}, "data": {"instruction": "short"}})
    was = {"train": {"steps": 1, "gone": 5}, "run": {"dir": "a"}, "data": {"instruction": "x" * 99, "shuffle": True}}
    assert changed_settings(was, config) == f'data.instruction "{"x" * 39}... -> "short", train.steps 1 -> 2'
    lists = [{"data": {"eval": ["a", {"path": "b", "filter": {"x": least}}]}} for least in (1, 2)]
    now = Config.model_validate(lists[1])
    assert changed_settings(lists[0], now) == "data.eval[1].filter.x 1 -> 2"
    assert changed_settings({}, config) == changed_settings(plain_tree(config), config) == ""
    nothing = {section: dict.fromkeys(values) for section, values in plain_tree(config).items()}
    assert re.search(r", and \d+ more$", changed_settings(nothing, config))
