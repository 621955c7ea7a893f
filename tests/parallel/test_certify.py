"""Certificates of real runs, in every layout and with both engines: the healthy pass, and each planted fault is named.

What each fault is stands in `certify_cases.py`. The limits are the defaults for fp32: on average 1e-4 of a token's rms
and 1e-4 nats, ten times that at most. Healthy runs are held to a tenth of them, so that a default that is far too wide
would show.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_papo.config import Config
from tests.parallel.certify_cases import (
    ENGINE_FAULTS,
    MODELS,
    TRAINER_FAULTS,
    hand_over_but_one_layer,
    layer_now,
    update_every_weight,
)
from tests.parallel.certify_cases import MODEL as MODEL  # of the inputs where a test takes no family
from tests.support.layouts import layout
from tests.support.ranks import run_ranks
from tests.support.tiny_run import CERTIFIED, tiny_run

LAYOUTS = ("TP2", "PP2", "TP2 SP", "DP2")
VLLM = {"generation__engine": "vllm", "generation__kv_cache_gib": 0.05}
NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENGINES: dict[str, dict[str, Any]] = {"transformers": {}, "vllm": VLLM}
KINDS = ("token ids", "position ids", "rotary angles", "pixel values", "image features", "log-probs")
OWN_PARTS = {
    "qwen2_5_vl": ("vision layer 0", "vision layer 1"),
    "qwen3_vl": (
        "position embeddings",
        *(f"{kind} {number}" for kind in ("vision layer", "DeepStack level") for number in range(3)),
    ),
}
"""What a family's tower has beside the kinds that all have."""
SECOND_FAMILY = {("PP2", "transformers"), ("TP2 SP", "vllm")}
"""Where the second family is not slow: its levels cross a stage in one, ranks hold shares of them in the other."""


def _cases() -> Iterator[Any]:
    """vLLM under TP2 alone is slow: with sequence parallelism it has the same hand-over and more beside it."""
    for family, name, engine in product(MODELS, LAYOUTS, ENGINES):
        if family == "qwen2_5_vl":
            slow, case = (name, engine) == ("TP2", "vllm"), f"{name}-{engine}"
        else:
            slow, case = (name, engine) not in SECOND_FAMILY, f"{family}-{name}-{engine}"
        marks = [NEEDS_VLLM] * (engine == "vllm") + [pytest.mark.slow] * slow
        yield pytest.param(family, name, engine, marks=marks, id=case)


@pytest.mark.parametrize(("family", "name", "engine"), _cases())
def test_the_healthy_pass_and_every_fault_is_named(family, name, engine, inputs_of, tmp_path):
    settings = {"generation__max_response_tokens": 12, **layout(name).settings, **ENGINES[engine], **CERTIFIED}
    config = tiny_run(inputs_of(**MODELS[family]), tmp_path, **settings)
    first, second = run_ranks(_certificates, 2, config)
    assert first["verdicts"] == second["verdicts"]  # all ranks hear the same
    assert first["random state kept"] and second["random state kept"]
    for name in ("healthy", "after the faults", "after a hand-over"):
        _check_healthy(first["findings"][name], family, first_step=name != "after a hand-over")
    for name, (_, part) in TRAINER_FAULTS[family].items():
        assert _named(first["verdicts"][name]) == f"{part}: trainer departs from Hugging Face", name
    for name, (_, part) in ENGINE_FAULTS.items():
        assert _named(first["verdicts"][name]) == f"{part}: engine departs from Hugging Face", name
    assert _named(first["verdicts"]["stale layer"]) == "language layer 2: engine departs from trainer"


def _named(verdict: str) -> str:
    return verdict.removeprefix("certificate: ").partition(" by ")[0]


def _check_healthy(findings: list[dict[str, Any]], family: str, *, first_step: bool) -> None:
    """Every part was compared between all parties, and by how much they may differ."""
    parts = (*KINDS, *OWN_PARTS[family], *(f"language layer {number}" for number in range(4)))
    pairs = [("engine", "trainer")]
    if first_step:
        pairs += [("engine", "Hugging Face"), ("trainer", "Hugging Face")]
    expected = {(part, *pair) for part in parts for pair in pairs}
    assert {(each["part"], each["party"], each["other"]) for each in findings} == expected
    for each in findings:
        assert each["difference"] <= each["limit"] / 10, each


def _certificates(config: Config) -> dict[str, Any]:
    """On one rank: the verdict under every fault, and the findings of the healthy."""
    from megatron_papo.generation import build_generator
    from megatron_papo.parity import Certifier
    from megatron_papo.parity.certificate import Certificate
    from megatron_papo.training.rollouts import hand_over
    from megatron_papo.training.session import open_run

    found: dict[str, Any] = {"verdicts": {}, "findings": {}}

    def keep(name: str, certificate: Certificate) -> None:
        found["verdicts"][name] = certificate.verdict
        found["findings"][name] = json.loads(json.dumps(certificate.as_json()["findings"]))

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        hand_over(run, generator, policy_version=0)
        state = _random_state()
        keep("healthy", Certifier(run, generator).at_start(0, weights_moved=False))
        found["random state kept"] = state == _random_state()
        for name, (fault, _) in (TRAINER_FAULTS[run.shape.model_type] | ENGINE_FAULTS).items():
            with fault(run, generator):  # a certifier of its own: prompts are read once
                keep(name, Certifier(run, generator).at_start(0, weights_moved=False))
        keep("after the faults", Certifier(run, generator).at_start(0, weights_moved=False))
        certifier, stale = Certifier(run, generator), layer_now(run)
        update_every_weight(run)
        hand_over(run, generator, policy_version=1)
        gaps = certifier.after_hand_over(1)
        assert not certifier.reason_to_stop and 0 < gaps["certify/logprobs_mean"][0] < gaps["certify/logprobs_max"][0]
        found["findings"]["after a hand-over"] = _written(run.folder, 1)["findings"] if run.is_writer else None
        hand_over_but_one_layer(run, generator, stale)
        certifier.after_hand_over(2)
        found["verdicts"]["stale layer"] = certifier.reason_to_stop
        generator.close()
    return found


def _written(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "certificate" / f"step_{step:08d}.json").read_text())


def _random_state() -> tuple:
    return random.getstate(), tuple(numpy.random.get_state()[1]), tuple(torch.get_rng_state().tolist())


@NEEDS_VLLM
def test_an_engine_over_two_data_parallel_ranks_and_over_a_tensor_group(inputs, tmp_path):
    for name in ("DP2", "TP2"):
        config = tiny_run(inputs, tmp_path / name, **VLLM, **layout(name).settings, generation__tensor=2)
        first, second = run_ranks(_at_start, 2, config)
        assert first == second
        assert first == "certificate: Hugging Face, trainer and engine agree on 12 parts"


def _at_start(config: Config) -> str:
    from megatron_papo.generation import build_generator
    from megatron_papo.parity import Certifier
    from megatron_papo.training.rollouts import hand_over
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        hand_over(run, generator, policy_version=0)
        verdict = Certifier(run, generator).at_start(0, weights_moved=False).verdict
        generator.close()
    return verdict


@pytest.mark.parametrize("engine", [pytest.param(name, marks=NEEDS_VLLM if name == "vllm" else ()) for name in ENGINES])
def test_a_healthy_run_in_bfloat16_keeps_its_limits_and_is_no_further_off_than_rounding(engine, inputs, tmp_path):
    settings = {"model__dtype": "bfloat16", "generation__max_response_tokens": 12, **ENGINES[engine]}
    (verdict,) = run_ranks(_at_start, 1, tiny_run(inputs, tmp_path, **settings))
    assert verdict == "certificate: Hugging Face, trainer and engine agree on 12 parts"
    for each in _written(tmp_path, 0)["findings"]:
        rounded = each["part"] not in ("token ids", "position ids") and each["difference"] > 1e-4
        assert rounded or each["difference"] == 0
        if each["part"] == "rotary angles":  # half a step of bfloat16 below 1: positions and frequencies are exact
            assert each["difference"] <= 2**-9


class _Elsewhere:
    """A real engine of which, as of one in other processes, only the answers are seen; it can be made to fail."""

    def __init__(self, engine: Any):
        self.generate, self.policy_version, self.forgotten_version = engine.generate, engine.policy_version, None
        self.fails = False

    def probe(self, prompt: Any, sampling: Any) -> Any:
        from megatron_papo.generation.remote.remote_generator import RemoteGenerator

        probe = RemoteGenerator.probe(self, prompt, sampling)  # type: ignore[arg-type]
        if self.fails:
            raise OSError("no room")
        return probe


def test_of_an_engine_elsewhere_the_log_probs_are_compared_and_what_fails_on_one_rank_is_raised_on_all(
    inputs, tmp_path
):
    config = tiny_run(inputs, tmp_path, parallel__tensor=2)
    first, second = run_ranks(_of_an_engine_elsewhere, 2, config)
    assert first == second
    assert first == (
        "certificate: Hugging Face, trainer and engine agree on 12 parts",
        "certificate: rank 1: OSError: no room",
        "certificate: rank 0: OSError: no room",
    )
    tree = _written(tmp_path, 0)
    compared = {each["part"] for each in tree["findings"] if each["party"] == "engine"}
    assert compared == {"log-probs"}
    assert set(tree["not_looked_at"]) == {*KINDS, "vision layer", "language layer"} - {"log-probs"}
    assert tree["not_looked_at"]["pixel values"] == {"engine": "the engine runs in other processes"}


def _of_an_engine_elsewhere(config: Config) -> tuple[str, ...]:
    """The verdict of a healthy engine, what is raised where the second rank's fails, and where both fail."""
    from megatron_papo.generation import build_generator
    from megatron_papo.parity import Certifier
    from megatron_papo.training.rollouts import hand_over
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        hand_over(run, generator, policy_version=0)
        engine: Any = _Elsewhere(generator)
        certifier = Certifier(run, engine)
        verdict = certifier.at_start(0, weights_moved=False).verdict
        engine.fails = run.layout.rank == 1
        with pytest.raises(ValueError) as one:
            certifier.at_start(0, weights_moved=False)
        engine.fails = True
        with pytest.raises(ValueError) as both:
            certifier.at_start(0, weights_moved=False)
    return verdict, str(one.value), str(both.value)
