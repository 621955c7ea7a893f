"""The command line as a user types it: help, refusals before any rank starts, the resolved settings."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_papo.cli import main
from megatron_papo.config import dump_config, load_config
from megatron_papo.preflight.inputs import faults_of_inputs
from megatron_papo.preflight.layout_faults import faults_of_ranks
from tests.support import commands
from tests.support.tiny_run import make_inputs, metrics, tiny_run
from tests.unit.test_shape import PUBLISHED_3B

PAPO = Path(sys.prefix, "bin", "papo")
REPO = Path(__file__).resolve().parents[2]
OUTER = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID")


def papo(*words: object, cwd: Path, stdout: int = subprocess.PIPE, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with the imports that it needs."""
    command = [str(PAPO), *map(str, words)]
    streams = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=cwd, env=_shell() | environ, timeout=120, **streams)


def _shell() -> dict[str, str]:
    """This process's variables, but for those of a rank."""
    return {name: value for name, value in os.environ.items() if name not in OUTER}


def refusal(*words: object, cwd: Path, **environ: str) -> list[str]:
    """The lines of a refusal; nothing was printed, written or started for it. Its process is forked."""
    before = sorted(cwd.iterdir())
    done = commands.papo(*words, cwd=cwd, environ=_shell() | environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(cwd.iterdir()) == before
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED_3B))
    return folder


def test_help_names_the_verbs_and_does_not_wait_for_torch(tmp_path):
    done = papo("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("sft", "train", "eval", "score", "doctor"))
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "megatron_papo" in imported and not {"torch", "transformers", "megatron"} & imported


@pytest.mark.fast
def test_dry_run_prints_the_settings_it_would_run_with(tmp_path):
    (tmp_path / "a.yaml").write_text("loss: {perception_coef: 0.01}\n")
    words = ["train", "optim.lr=2e-6", "--dry-run", "a.yaml", "--ranks", "4", "parallel.tensor=2"]
    done = papo(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    expected = load_config(tmp_path / "a.yaml", ["optim.lr=2e-6", "parallel.tensor=2"])
    assert yaml.safe_load(done.stdout) == json.loads(expected.model_dump_json())
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_settings_without_effect_are_warned_of(tmp_path):
    done = papo("train", "--dry-run", "loss.masked_entropy_coef=0.1", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("papo: warning: loss.masked_entropy_coef has no gradient")


@pytest.mark.fast
def test_every_setting_that_cannot_be_is_refused_on_a_line_of_its_own(tmp_path):
    done = papo("train", "loss.perception_coeff=1", "train.steps=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(done.stderr.splitlines()) == [
        "papo: error: loss.perception_coeff: unknown key",
        "papo: error: train.steps: Input should be greater than or equal to 1, got 0",
    ]


@pytest.mark.parametrize("verb", ["sft", "train", "eval", "score"])
def test_layouts_that_the_model_does_not_allow_are_refused_by_every_verb(tmp_path, model, verb):
    for name in ("in.jsonl", "x.jsonl"):
        (tmp_path / name).write_text("")
    given = (
        ["--model", model, "--data", "in.jsonl", "--out", "out.jsonl"] if verb == "score" else [f"model.path={model}"]
    )
    words = [verb, *given, "data.train=x.jsonl", "data.eval=x.jsonl", "parallel.tensor=3"]
    assert refusal(*words, cwd=tmp_path) == [
        "papo: error: parallel.tensor: 16 attention heads do not divide by 3",
        "papo: error: parallel.tensor: 2 key-value heads and 3 ranks do not divide",
        "papo: error: parallel.tensor: 16 heads of the vision tower do not divide by 3",
    ]


def test_what_a_verb_lacks_is_named(tmp_path, model):
    assert refusal("train", cwd=tmp_path) == [
        "papo: error: model.path: needed, a Hugging Face folder or a Megatron checkpoint",
        "papo: error: data.train: papo train needs it",
    ]
    assert refusal("eval", "--model", model, cwd=tmp_path) == ["papo: error: data.eval: papo eval needs it"]
    assert refusal("eval", "--model", "gone", cwd=tmp_path) == ["papo: error: --model: gone is not a folder"]
    words = ["score", "--model", model, "--data", "gone.jsonl", "--out", "out.jsonl"]
    assert refusal(*words, cwd=tmp_path) == ["papo: error: --data: gone.jsonl: no such file"]
    (model / "config.json").write_text("{}")
    (line,) = refusal("eval", "--model", model, "data.eval=x", cwd=tmp_path)
    assert line.startswith("papo: error: model.path: ") and "config.json" in line


GIVEN = ("data.train=rows.jsonl", "data.eval=rows.jsonl")


@pytest.fixture
def rows(tmp_path) -> Path:
    """The working directory with everything that `GIVEN` names."""
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "rewards" / "own.py").write_text("def share(response, answer, problem): ...")
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("train", ["data.train=gone.jsonl"], ["data.train: gone.jsonl: no such file or folder"]),
        ("train", ["data.eval=./gone"], ["data.eval: ./gone: no such file or folder"]),
        ("eval", ["data.eval=a/b/c"], ["data.eval: a/b/c: no such file or folder"]),
        ("sft", ["data.train=gone/"], ["data.train: gone/: no such file or folder"]),
        ("train", ["reward.function=share"], ["reward.function: 'share' is not written module:function"]),
        ("train", ["reward.function=nowhere:share"], ["reward.function: there is no module nowhere"]),
        ("eval", ["reward.function=rewards.gone:share"], ["reward.function: there is no module rewards.gone"]),
        ("train", ["reward.function=rewards.own:shares"], ["reward.function: there is no shares in {}/rewards/own.py"]),
        ("train", ["model.checkpoint=gone"], ["model.checkpoint: gone is not a folder"]),
        ("train", ["checkpoint.reference=gone"], ["checkpoint.reference: gone is not a folder"]),
        ("train", ["checkpoint.reference=rows.jsonl"], ["checkpoint.reference: rows.jsonl is a file, not a folder"]),
        ("eval", ["data.image_roots=[rows.jsonl]"], ["data.image_roots: rows.jsonl is a file, not a folder"]),
        (
            "sft",
            ["model.freeze.vision=true", "model.freeze.projector=true", "model.freeze.language=true"],
            ["model.freeze: nothing is left to train"],
        ),
        (
            "train",
            ["generation.engine=vllm", "generation.tensor=3", "--ranks", "4"],
            ["generation.tensor: 3 does not divide the 4 ranks"],
        ),
        (
            "train",
            ["train.prompts_per_step=6", "train.updates_per_step=2", "parallel.tensor=2", "--ranks", "8"],
            [
                "train.prompts_per_step: 6 with train.updates_per_step=2 leaves an update 3 prompts, fewer than the "
                "4 data-parallel ranks (8 ranks, parallel.tensor=2, parallel.pipeline=1)"
            ],
        ),
        (
            "train",
            [
                "train.dynamic_sampling.enabled=true",
                "train.dynamic_sampling.prompts_per_round=3",
                "train.dynamic_sampling.max_rounds=200",
                "parallel.tensor=2",
                "--ranks",
                "8",
            ],
            [
                "train.dynamic_sampling.prompts_per_round: 3 prompts are fewer than the 4 data-parallel ranks "
                "(8 ranks, parallel.tensor=2, parallel.pipeline=1)"
            ],
        ),
        (
            "sft",
            ["sft.batch_size=1", "train.prompts_per_step=1", "train.updates_per_step=1", "--ranks", "2"],
            [
                "sft.batch_size: 1 rows are fewer than the 2 data-parallel ranks "
                "(2 ranks, parallel.tensor=1, parallel.pipeline=1)"
            ],
        ),
    ],
)
def test_what_could_only_fail_in_the_ranks_is_refused_before(rows, model, verb, words, expected):
    found = refusal(verb, f"model.path={model}", *GIVEN, *words, cwd=rows)
    assert found == [f"papo: error: {line.format(rows)}" for line in expected]


@pytest.mark.parametrize(
    ("verb", "settings", "num_ranks"),
    [
        ("train", ["reward.function=rewards.own:share"], 1),
        ("train", ["data.train=org/name", "data.eval=name"], 1),
        ("train", ["data.train=shards/*.parquet", "data.eval=hf://datasets/org/name/a.parquet"], 1),
        ("train", ["train.prompts_per_step=6", "train.updates_per_step=2", "parallel.tensor=2"], 6),
        ("train", ["sft.batch_size=1"], 2),
        ("eval", ["train.prompts_per_step=1", "train.updates_per_step=1", "data.train=gone.jsonl"], 4),
        ("eval", ["model.freeze.vision=true", "model.freeze.projector=true", "model.freeze.language=true"], 1),
        ("train", ["generation.tensor=3"], 4),  # without vLLM it means nothing
        ("score", ["data.eval=gone.jsonl", "generation.engine=vllm", "generation.tensor=3"], 4),
    ],
)
def test_what_may_still_work_is_not_refused(rows, model, monkeypatch, verb, settings, num_ranks):
    monkeypatch.chdir(rows)
    config = load_config(None, [f"model.path={model}", *GIVEN, *settings])
    assert faults_of_inputs(verb, config) + faults_of_ranks(verb, config, num_ranks) == []


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("rows.jsonl", " is a file, where a folder belongs"),
        ("./rows.jsonl/a/b", ": {}/rows.jsonl is a file, where a folder belongs"),
        ("loop/a", ": {}/loop is no folder that can be written to"),
        ("run", "/checkpoints is a file, where a folder belongs"),
        ("/proc/a", ": No such file or directory"),
    ],
)
def test_a_run_folder_that_cannot_be_is_refused_by_every_verb(rows, model, monkeypatch, capsys, folder, why):
    (rows / "loop").symlink_to("loop")
    (rows / "run").mkdir(exist_ok=True)
    (rows / "run/checkpoints").touch()
    monkeypatch.chdir(rows)
    for name in OUTER:
        monkeypatch.delenv(name, raising=False)
    words = ["data.train=rows.jsonl", "data.eval=rows.jsonl", f"run.dir={folder}", "train.tokens_per_micro_batch=99999"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which --cpu does too, for good
    for verb in ("train", "sft", "eval", "certify"):
        assert main([verb, "--cpu", f"model.path={model}", *words]) == 2
        line = f"papo: error: run.dir: {Path(folder)}{why.format(rows)}"
        assert capsys.readouterr().err.splitlines()[-1:] == [line]


def test_a_processor_of_another_family_is_refused_by_every_verb(rows, model, monkeypatch, capsys):
    file = model / "preprocessor_config.json"
    file.write_text('{"patch_size": 16}')
    monkeypatch.chdir(rows)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["data.train=rows.jsonl", "data.eval=rows.jsonl", "train.tokens_per_micro_batch=99999"]
    for verb in ("train", "sft", "eval", "certify"):
        assert main([verb, "--cpu", f"model.path={model}", *words]) == 2
        said = f"papo: error: model.path: {file}: patch_size: is 16, the vision tower of config.json takes 14"
        assert capsys.readouterr().err.splitlines() == [said]


def test_a_rank_started_from_outside_fails_without_its_folder_and_may_be_started_again(
    rows, model, monkeypatch, capsys
):
    monkeypatch.chdir(rows)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for folder, why in (("rows.jsonl/a", ": Not a directory"), ("rows.jsonl", " is a file, where a folder belongs")):
        words = [f"model.path={model}", *GIVEN, f"run.dir={folder}", "train.tokens_per_micro_batch=99999"]
        assert main(["train", *words]) == 1  # 2 would tell the supervisor of a job that it is no use
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"papo: rank 0 failed: ValueError: run.dir: {folder}{why}"


def test_what_score_writes_is_looked_at_before(rows, model, monkeypatch, capsys):
    monkeypatch.chdir(rows)
    for out, why in (("rewards", ": is a folder"), ("rows.jsonl/a", " is a file, where a folder belongs")):
        assert main(["score", "--model", str(model), "--data", "rows.jsonl", "--out", out]) == 2
        assert f"papo: error: --out: {out.removesuffix('/a')}{why}" in capsys.readouterr().err


def test_a_refusal_shows_what_was_given_as_text(rows, model, monkeypatch, capsys):
    monkeypatch.chdir(rows)
    assert main(["train", "run.\x1b[31mname=1"]) == 2
    assert capsys.readouterr().err == "papo: error: run.\\x1b[31mname: unknown key\n"
    assert main(["train", "a\x1b.yaml"]) == 2
    assert capsys.readouterr().err == "papo: error: a\\x1b.yaml: no such config file\n"
    assert main(["train", f"model.path={model}", f"data.train={'n' * 300}.jsonl"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_variables_of_a_launcher_that_are_no_numbers_are_one_line(rows, model, monkeypatch, capsys):
    monkeypatch.chdir(rows)
    monkeypatch.setenv("RANK", "0")
    for world, why in (("x", "'x'"), ("0", "RANK=0 is none of WORLD_SIZE=0 ranks")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert main(["train", f"model.path={model}", *GIVEN, "--ranks=1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("papo: error: ") and why in line


def test_a_working_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["train"]) == 2
    assert capsys.readouterr().err == ("papo: error: the working folder is not there any more: cd to another one\n")


def test_an_engine_that_is_not_installed_is_refused(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not
    config = load_config(None, [f"model.path={model}", "data.train=org/name", "generation.engine=vllm"])
    (line,) = faults_of_inputs("train", config)
    assert line.startswith("generation.engine: vLLM is not installed; run: make gpu-venv")
    assert faults_of_inputs("sft", config) == []


def test_a_grader_that_is_not_installed_is_refused(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pylatexenc", None)  # which mathruler imports and does not ask for
    config = load_config(None, [f"model.path={model}", "data.train=org/name", "reward.accuracy=mathruler"])
    (line,) = faults_of_inputs("train", config)
    assert line.startswith("reward.accuracy: pylatexenc is not installed; install the package's [mathruler] extra")
    assert faults_of_inputs("sft", config) == []


def test_an_engine_that_is_too_old_is_refused(model, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.25.1")
    config = load_config(None, [f"model.path={model}", "data.train=org/name", "generation.engine=vllm"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # installed
    assert faults_of_inputs("train", config) == ["generation.engine: vLLM 0.25.1 is too old: at least 0.26 is needed"]


@pytest.mark.parametrize(
    "settings",
    [
        ["model.spec=transformer_engine"],
        ["model.spec=transformer_engine", "fp8.recipe=tensorwise"],
        ["model.cuda_graphs=true", "train.fixed_rows=true"],
        ["optim.precision_aware=true", "parallel.distributed_optimizer=true"],
        ["parallel.overlap_tensor=true", "train.fixed_rows=true", "parallel.sequence=true", "parallel.tensor=2"],
    ],
)
def test_transformer_engine_asked_for_and_not_installed_is_refused(model, monkeypatch, settings):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # as if it were not
    config = load_config(None, [f"model.path={model}", "data.train=org/name", *settings])
    key = settings[0].partition("=")[0]
    assert faults_of_inputs("train", config) == [
        f"{key}: needs Transformer Engine, which is not installed; run: make gpu-venv"
    ]
    assert faults_of_inputs("train", config, packages=False) == []  # a container's image has them, or not


def test_given_weights_win_over_those_of_the_file(tmp_path, model):
    text = "model: {path: other, checkpoint: runs/a/checkpoints/step_00000050, random_init: true}\n"
    (tmp_path / "a.yaml").write_text(text)
    done = papo("eval", "a.yaml", "--model", model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["model"]
    assert (read["path"], read["checkpoint"], read["random_init"]) == (str(model), None, False)
    assert refusal("eval", "--model", model, "model.checkpoint=b", "--dry-run", cwd=tmp_path) == [
        "papo: error: --model: names the weights, and model.checkpoint=b others; give one of the two"
    ]


def test_ranks_that_the_layout_does_not_fit_are_refused(tmp_path):
    words = ["train", "--dry-run", "parallel.tensor=2"]
    assert refusal(*words, "--ranks", "3", cwd=tmp_path) == [
        "papo: error: --ranks: 3 is no multiple of parallel.tensor=2 x parallel.pipeline=1"
    ]
    outside = {"RANK": "0", "WORLD_SIZE": "4"}
    assert refusal(*words, "--ranks", "2", cwd=tmp_path, **outside) == [
        "papo: error: --ranks: 2 asked for, but 4 were started from outside"
    ]


def test_of_the_ranks_started_from_outside_one_speaks(tmp_path):
    words = ["train", "no.such=1"]
    assert refusal(*words, cwd=tmp_path, RANK="0", WORLD_SIZE="2") == ["papo: error: no: unknown key"]
    assert refusal(*words, cwd=tmp_path, RANK="1", WORLD_SIZE="2") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--fast"], "unrecognized arguments: --fast"),
        (["train", "a.yaml", "b.yaml"], "one settings file at most, got a.yaml b.yaml"),
        (["score"], "the following arguments are required: --model, --data, --out"),
    ],
)
def test_words_that_are_not_understood(tmp_path, words, expected):
    assert expected in refusal(*words, cwd=tmp_path)[-1]


def test_a_run_prints_no_remarks_of_the_libraries_and_needs_neither_home_nor_reader(tmp_path):
    inputs = make_inputs(tmp_path)
    settings = {"data__max_prompt_tokens": 194, "parallel__distributed_optimizer": True, "observe__console": True}
    (tmp_path / "a.yaml").write_text(dump_config(tiny_run(inputs, tmp_path / "run", **settings)))
    reader, broken = os.pipe()
    os.close(reader)  # as of `papo train | head`
    own = {"PYTHONPATH": str(REPO), "HOME": "/proc"}  # which takes no file
    done = papo("train", "a.yaml", "--ranks", "2", cwd=tmp_path, stdout=broken, **own)
    os.close(broken)
    assert done.returncode == 0, done.stderr
    warning, *rest = done.stderr.splitlines()
    assert warning.startswith("papo: warning: HOME: is no folder that can be written to: ")
    assert rest == [
        "papo: starting 2 ranks",
        "papo: warning: standard output: Broken pipe; the run goes on without it, and says so once",
    ]
    assert len(metrics(tmp_path / "run")) == 2


def test_doctor_says_what_is_there(tmp_path):
    done = papo("doctor", cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0, done.stdout
    for name in ("accelerator", "torch", "megatron-core", "Transformer Engine", "NVIDIA Apex", "vLLM", "NCCL"):
        assert name in done.stdout
    assert done.stdout.strip().endswith("papo: everything required is there")
