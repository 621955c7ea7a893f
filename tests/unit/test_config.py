"""The settings: file, overrides, and what is refused with which words."""

import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_papo.config import Config, ConfigError, dump_config, load_config
from tests.support.interpreter import PYTHON


def faults(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    return str(refused.value).splitlines()


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_overrides_win_over_the_file_and_the_file_over_what_it_extends(tmp_path):
    write(tmp_path, "base.yaml", "loss: {perception_coef: 0.01, clip_low: 0.1}\nrun: {seed: 1}\n")
    top = write(tmp_path, "top.yaml", "extends: base.yaml\nloss: {perception_coef: 0.02}\n")
    config = load_config(top, ["loss.clip_low=0.15"])
    assert (config.loss.perception_coef, config.loss.clip_low, config.run.seed) == (0.02, 0.15, 1)
    assert config.loss.clip_high == 0.3


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("optim.lr=1e-6", lambda c: c.optim.lr, 1e-6),  # YAML 1.1 calls this a string
        ("parallel.sequence=true", lambda c: c.parallel.sequence, True),
        ("parallel.pipeline_layers=[1, 2]", lambda c: c.parallel.pipeline_layers, [1, 2]),
        ("data.instruction=", lambda c: c.data.instruction, ""),
        ("data.instruction=a: b", lambda c: c.data.instruction, "a: b"),
        ("observe.wandb=off", lambda c: c.observe.wandb, "off"),  # false, to YAML 1.1
        ("perception.guard.action=off", lambda c: c.perception.guard.action, "off"),
        ("data.system=- yes", lambda c: c.data.system, "- yes"),
        ("run.name=007", lambda c: c.run.name, "007"),
        ("model.path=2026", lambda c: c.model.path, Path("2026")),
        ("loss.dual_clip=null", lambda c: c.loss.dual_clip, None),
        ("run.dir=a=b", lambda c: c.run.dir, Path("a=b")),
        ("perception.mask.ratio=1", lambda c: c.perception.mask.ratio, 1.0),
    ],
)
def test_values_of_overrides(override, read, expected):
    extra = {
        "parallel.sequence=true": ["parallel.tensor=2"],
        "parallel.pipeline_layers=[1, 2]": ["parallel.pipeline=2"],
    }
    assert read(load_config(None, [override, *extra.get(override, [])])) == expected


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["loss.perception_coeff=1"], "loss.perception_coeff: unknown key"),
        (["nosuch.key=1"], "nosuch: unknown key"),
        (["loss.clip_low=1.5"], "loss.clip_low: Input should be less than 1, got 1.5"),
        (["generation.engine=sglang"], "generation.engine: Input should be 'transformers' or 'vllm', got 'sglang'"),
        (["train.steps=0"], "train.steps: Input should be greater than or equal to 1, got 0"),
        (["seed"], "seed: overrides are written key.path=value"),
        (["run.seed=1", "run.seed.deep=2"], "run.seed: is a value, not a section"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_path(overrides, line):
    assert faults(*overrides) == [line]


def test_every_fault_has_its_line():
    assert faults("train.steps=0", "optim.lrr=1") == [
        "train.steps: Input should be greater than or equal to 1, got 0",
        "optim.lrr: unknown key",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.sequence=true"], "parallel.sequence needs parallel.tensor > 1"),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[3]"], "parallel.pipeline_layers names 1 stages"),
        (["train.prompts_per_step=10", "train.updates_per_step=3"], "train.prompts_per_step=10 does not divide"),
        (
            [
                "train.dynamic_sampling.enabled=true",
                "train.dynamic_sampling.prompts_per_round=100",
                "train.dynamic_sampling.max_rounds=3",
            ],
            "train.dynamic_sampling: max_rounds=3 rounds of 100 prompts are fewer than train.prompts_per_step=384",
        ),
        (["loss.averaging=fixed"], "loss.averaging=fixed and loss.fixed_denominator go together"),
        (["loss.fixed_denominator=10"], "loss.averaging=fixed and loss.fixed_denominator go together"),
        (["perception.coef_end=0.0"], "perception.coef_end and perception.coef_steps go together"),
        (["perception.kl=full"], "perception.kl=full needs perception.masked_branch=joint"),
        (
            ["data.preset=virl39k", "data.columns.answer=label"],
            "data.columns: data.preset=virl39k names the columns; give one of the two",
        ),
        (["generation.engines=2"], "generation.engines: colocated engines are as many as the ranks make"),
        (["generation.quantization=fp8"], "generation.quantization=fp8 needs generation.engine=vllm"),
        (["train.ahead=true"], "train.ahead needs generation.placement=separate"),
        (["optim.precision_aware=true"], "optim.precision_aware needs parallel.distributed_optimizer=true"),
        (["optim.offload_fraction=0.5"], "optim.offload_fraction needs parallel.distributed_optimizer=true"),
        (
            ["optim.offload_fraction=0.5", "parallel.distributed_optimizer=true", "model.dtype=float32"],
            "optim.offload_fraction needs model.dtype=bfloat16",
        ),
        (["model.cuda_graphs=true"], "model.cuda_graphs needs train.fixed_rows=true"),
        (
            ["model.cuda_graphs=true", "train.fixed_rows=true", "model.recompute=selective"],
            "model.cuda_graphs captures the MLP that model.recompute=selective changes",
        ),
        (
            ["model.cuda_graphs=true", "train.fixed_rows=true", "model.spec=local"],
            "model.cuda_graphs needs model.spec=transformer_engine",
        ),
        (
            ["parallel.overlap_tensor=true", "train.fixed_rows=true", "parallel.tensor=2"],
            "parallel.overlap_tensor needs parallel.sequence=true",
        ),
        (
            ["reward.overlong.enabled=true", "generation.max_response_tokens=100"],
            "reward.overlong.buffer: 512 exceeds generation.max_response_tokens=100",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    (line,) = faults(*overrides)
    assert words in line


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert faults(path=tmp_path / "none.yaml") == [f"{tmp_path}/none.yaml: no such config file"]
    assert faults(path=write(tmp_path, "list.yaml", "- 1\n"))[0].endswith("must be a mapping, not list")
    assert ": not YAML: " in faults(path=write(tmp_path, "bad.yaml", "a: [1\n"))[0]
    lost = write(tmp_path, "lost.yaml", "extends: gone.yaml\n")
    assert faults(path=lost) == [f"{tmp_path}/gone.yaml: no such config file"]


def test_what_is_printed_reads_back_to_the_same_settings(tmp_path):
    config = load_config(None, ["optim.lr=3e-7", "model.path=some/where", "parallel.tensor=4", "data.system=a\n- b"])
    again = load_config(write(tmp_path, "dumped.yaml", dump_config(config)))
    assert again == config
    assert load_config(write(tmp_path, "defaults.yaml", dump_config(Config()))) == Config()


def test_settings_do_not_change_after_they_are_read():
    with pytest.raises(ValidationError, match="frozen"):
        Config().loss.clip_low = 0.1


def test_settings_without_effect_are_mentioned():
    assert Config().warnings() == []
    (warning,) = load_config(None, ["loss.masked_entropy_coef=0.1"]).warnings()
    assert warning.startswith("loss.masked_entropy_coef has no gradient")
    guarded = load_config(None, ["perception.guard.action=stop", "loss.perception_coef=0"])
    assert any(line.startswith("perception.guard watches") for line in guarded.warnings())


def test_a_budget_below_the_longest_sequence_is_mentioned_with_both_numbers():
    lengths = ["data.max_prompt_tokens=60", "generation.max_response_tokens=40"]
    assert load_config(None, [*lengths, "train.tokens_per_micro_batch=100"]).warnings() == []
    (warning,) = load_config(None, [*lengths, "train.tokens_per_micro_batch=99"]).warnings()
    assert "train.tokens_per_micro_batch=99 is less than the 100 tokens" in warning
    joint = [*lengths, "perception.masked_branch=joint"]
    assert load_config(None, [*joint, "train.tokens_per_micro_batch=200"]).warnings() == []
    (warning,) = load_config(None, [*joint, "train.tokens_per_micro_batch=199"]).warnings()
    assert (
        "train.tokens_per_micro_batch=199 is less than the 200 tokens of the longest sequence in two views" in warning
    )


def test_reading_settings_imports_no_torch():
    check = "import sys, megatron_papo.config, megatron_papo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", check]).returncode == 0


def test_the_guards_old_name_of_clipped_tokens_is_refused_and_read_where_a_run_has_written_its_default(tmp_path):
    (line,) = faults("perception.guard.clip_high_fraction=0.002")
    assert line.startswith("perception.guard: clip_high_fraction, of positive advantages alone, is now clip_fraction")
    written = dump_config(Config()).replace("clip_fraction: 0.007", "clip_high_fraction: 0.007")
    assert "clip_high_fraction" in written and load_config(write(tmp_path, "config.yaml", written)) == Config()
