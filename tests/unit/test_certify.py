"""Certificates without a model: measures by hand, limits, which files stay, and what the page says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_papo.config import load_config
from megatron_papo.generation.readings import MOST_PLACES, ActivationRecorder, Places, Reading
from megatron_papo.parity.certificate import Certificate, Sides
from megatron_papo.parity.certificate_files import CertificateFolder
from megatron_papo.parity.certificate_page import certificate_page
from megatron_papo.parity.comparison import ENGINE, HUGGINGFACE, TRAINER, Case, Finding, compare, first_departure
from megatron_papo.parity.limits import Limits, coarser

FP32 = dict.fromkeys((HUGGINGFACE, TRAINER, ENGINE), "float32")


def limits(*settings: str) -> Limits:
    return Limits(load_config(None, list(settings)))


def found(part: str, trainer: Any, other: Any, **kwargs: Any) -> list[Finding]:
    """Of one prompt, between trainer and Hugging Face."""
    case = Case("p", {TRAINER: Reading({part: trainer}), HUGGINGFACE: Reading({part: other})})
    return compare([case], kwargs.get("precisions", FP32), kwargs.get("limits", limits()), rank=0)


def test_ids_are_counted_where_they_differ():
    (finding,) = found("token ids", torch.tensor([1, 2, 9, 9]), torch.tensor([1, 2, 3, 4]))
    assert (finding.difference, finding.place, finding.limit, finding.passed) == (2.0, 2, 0.0, False)
    positions = torch.arange(12).view(4, 3)
    assert found("position ids", positions, positions.clone())[0].passed


def test_layers_are_measured_token_by_token_in_their_own_scale():
    other = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    mean, largest = found("language layer 2", other + torch.tensor([[0.5, 0.0], [0.0, 5.0]]), other)
    assert mean.difference == pytest.approx((0.1 + 0.01) / 2) and largest.difference == pytest.approx(0.1)
    assert (mean.limit, largest.limit, largest.place) == (1e-4, 1e-3, 0)
    assert not largest.passed
    assert largest.line() == (
        "language layer 2: trainer departs from Hugging Face by 0.1 of its rms at most (limit 0.001)"
    )


def test_log_probs_have_a_mean_over_all_prompts_and_a_largest():
    cases = [
        Case(name, {TRAINER: Reading({"log-probs": torch.tensor(one)}), ENGINE: Reading({"log-probs": torch.zeros(2)})})
        for name, one in (("p", [-0.25, 0.0]), ("q", [0.0, 0.5]))
    ]
    mean, largest = compare(cases, FP32, limits("certify.limits.logprobs_mean=0.2"), rank=0)
    assert (mean.difference, mean.limit, mean.passed) == (0.1875, 0.2, True)
    assert (largest.difference, largest.prompt_id, largest.place, largest.passed) == (0.5, "q", 1, False)


@pytest.mark.parametrize("part", ["pixel values", "language layer 0", "log-probs", "image features"])
def test_nan_never_passes(part):
    values = torch.ones(2) if part == "log-probs" else torch.ones(2, 3)
    broken = values.clone()
    broken.view(-1)[0] = math.nan
    findings = found(part, broken, values)
    assert not any(finding.passed for finding in findings) and first_departure(findings) is not None


def test_values_of_another_length_depart():
    (finding,) = found("token ids", torch.arange(3), torch.arange(4))
    assert finding.difference == math.inf and not finding.passed


def test_the_first_part_in_the_order_of_the_model_is_named_and_of_the_first_pair():
    good, bad = torch.ones(2, 4), torch.full((2, 4), 2.0)
    parts = {"log-probs": torch.zeros(1), "language layer 10": good, "language layer 9": good, "image features": good}
    engine = parts | {"language layer 10": bad, "language layer 9": bad}
    readings = {HUGGINGFACE: Reading(parts), TRAINER: Reading(parts), ENGINE: Reading(engine)}
    findings = compare([Case("p", readings)], FP32, limits(), rank=0)
    departure = first_departure(findings)
    assert departure is not None
    assert (departure.part, departure.party, departure.other) == ("language layer 9", ENGINE, HUGGINGFACE)
    assert [finding.part for finding in findings[::6]] == [
        "image features", "language layer 9", "language layer 10", "log-probs"
    ]  # fmt: skip


def test_limits_are_those_of_the_less_precise_party_or_the_settings():
    assert coarser("float32", "bfloat16") == "bfloat16" and coarser("fp8", "bfloat16") == "fp8"
    assert limits().of_layers("bfloat16") == (0.05, 0.5)
    assert limits("certify.limits.features=0.2").of_layers("float32") == (0.2, 2.0)
    assert limits("fp8.gap_limit=0.3").of_logprobs("fp8") == pytest.approx((0.38, 3.8))
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert limits().of_values("pixel values", torch.zeros(1), half) == 1e-2
    assert limits().of_values("rotary angles", torch.zeros(1), torch.zeros(1)) == 1e-3


def test_places_are_spread_over_the_prompt_and_all_of_the_response():
    places = Places(1000, 1010)
    kept = places.within(0, 2000)
    assert len(kept) == MOST_PLACES + 10 and kept[0] == 0 and kept[MOST_PLACES - 1] == 999 and kept[-1] == 1009
    pieces = [start + places.within(start, start + 100) for start in range(0, 2000, 100)]
    assert torch.equal(torch.cat(pieces), kept)  # chunks and shards keep the same places as the whole


def test_a_recorder_joins_chunks_and_removes_its_hooks():
    layer, rows = torch.nn.Identity(), torch.arange(24.0).view(12, 2)
    with ActivationRecorder() as recorder:
        recorder.after(layer, lambda _, __, out: recorder.note("layer", out, Places(4, 6)))
        for chunk in rows.split(5):
            layer(chunk)
    layer(rows)
    assert torch.equal(recorder.parts()["layer"], rows[:6])


def test_what_a_module_is_given_is_recorded_before_the_module_writes_over_it():
    module = torch.nn.ReLU(inplace=True)
    with ActivationRecorder() as recorder:
        recorder.before(module, lambda args, _, output: recorder.note("given", args[0]) if output is None else None)
        module(torch.tensor([[-1.0, 2.0]]))
    module(torch.zeros(1, 2))
    assert recorder.parts()["given"].tolist() == [[-1.0, 2.0]]


def test_a_kind_that_no_party_has_is_not_said_to_be_missing():
    trainer = Reading({"log-probs": torch.zeros(1), "image features": torch.ones(1, 2)})
    engine = Reading({"log-probs": torch.zeros(1)}, dict.fromkeys(("image features", "DeepStack level"), "elsewhere"))
    made = Certificate.of(
        step=0,
        at_start=True,
        findings=[],
        cases=[Case("p", {TRAINER: trainer, ENGINE: engine})],
        responses=[["a"]],
        sides=Sides(FP32, "vllm, separate", {"ranks": 2}, "the trainer's").without_huggingface("no memory"),
    )
    assert made.not_looked_at == {
        "image features": {ENGINE: "elsewhere", HUGGINGFACE: "no memory"},
        "log-probs": {HUGGINGFACE: "no memory"},
    }


def certificate(step: int, *, at_start: bool = False, difference: float = 0.0) -> Certificate:
    finding = Finding("log-probs", ENGINE, TRAINER, difference, " nats at most", 1e-3, "train:0", 0, 1)
    readings = {TRAINER: Reading({"log-probs": torch.tensor([-1.0])}), ENGINE: Reading({"log-probs": torch.zeros(1)})}
    sides = Sides(FP32, "vllm, colocated", {"ranks": 2}, "the trainer's")
    return Certificate.of(
        step=step,
        at_start=at_start,
        findings=[finding],
        cases=[Case("<p>", readings)],
        responses=[["<b>"]],
        sides=sides,
    )


def test_the_start_the_failed_and_the_last_two_stay(tmp_path: Path):
    folder = CertificateFolder(tmp_path / "certificate", lambda _: None)
    for step in range(7):
        folder.write(certificate(step, at_start=step == 0, difference=math.nan if step == 2 else 0.0))
    kept = [f"step_{step:08d}" for step in (0, 2, 5, 6)]
    assert sorted(path.name for path in folder.path.iterdir()) == [
        name + suffix for name in kept for suffix in (".html", ".json")
    ]
    failed = json.loads((folder.path / f"{kept[1]}.json").read_text())
    assert not failed["passed"] and failed["findings"][0]["difference"] == "nan"
    assert failed["verdict"].endswith("rank 1")


def test_a_disk_that_takes_nothing_costs_the_files_alone(tmp_path: Path):
    (tmp_path / "certificate").write_text("in the way")
    told: list[str] = []
    CertificateFolder(tmp_path / "certificate", told.append).write(certificate(3))
    assert len(told) == 1 and "the certificate of step 3 is not written" in told[0]


def test_a_damaged_certificate_stays_and_is_told_of_once(tmp_path: Path):
    told: list[str] = []
    folder = CertificateFolder(tmp_path / "certificate", told.append)
    for step in range(4):
        folder.write(certificate(step))
    spoilt = (b"", b"{", b"\xff", b"[]", b"null", b"{}", b'{"passed": true}')
    for number, content in enumerate(spoilt):
        (folder.path / f"step_{number + 90:08d}.json").write_bytes(content)
    (folder.path / "step_00000001_mine.json").write_text('{"passed": true, "at_start": false}')
    for step in range(4, 7):
        folder.write(certificate(step))
    assert len(told) == 5 and all("a certificate that is damaged; it is left as it is" in text for text in told)
    left = {path.stem for path in folder.path.glob("*.json")}
    mine = {f"step_{number + 90:08d}" for number in range(len(spoilt))} | {"step_00000001_mine"}
    assert left == {"step_00000005", "step_00000006"} | mine


def test_the_page_shows_the_verdict_and_all_log_probs_and_escapes_text():
    page = certificate_page(certificate(3, difference=0.5))
    assert "departs from trainer by 0.5 nats at most" in page and "<td>fail" in page
    assert "&lt;b&gt;" in page and "<b>" not in page and "&lt;p&gt;" in page
    assert "<th>trainer<th>engine" in page and "-1.00000" in page
    assert "default-src 'none'" in page and "<script" not in page
