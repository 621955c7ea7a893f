"""Settings that are damaged, hostile or secret: each refusal is one line that names the file or the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_papo.config import ConfigError, dump_config, load_config, plain_tree
from megatron_papo.text.secret_values import LEFT_OUT, names_a_secret, text_without_secrets


def fault(*overrides: str, path: Path | None = None) -> str:
    """Of one line."""
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    (line,) = str(refused.value).splitlines()
    return line


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: {name: \xff}\n", "not UTF-8: byte 12 is 0xff"),
        (b"run: {name: a\0b}\n", "not YAML: unacceptable character #x0000"),
        (b"- 1\n", "the top level must be a mapping, not list"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "the key 'train' stands twice"),
        (b"train: {steps: 1, steps: 2}\n", "the key 'steps' stands twice"),
        (b"run: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
        (BOMB.encode(), "aliases (&, *) make more than 100,000 values of it"),
        (b"run: &a {name: *a}\n", "aliases (&, *) make more than 100,000 values of it"),
        (b"run: " + b"[" * 3000 + b"]" * 3000, "not YAML: nested too deeply"),
        (b"run: {seed: " + b"9" * 5000 + b"}\n", "not YAML: Exceeds the limit"),
        (b"run: {name: 2026-13-45}\n", "not YAML: month must be in 1..12"),
        (b"#" * (5 << 20), "more than 4 MiB are no settings"),
        (b"extends: [a, b]\n", "extends: must be the name of one file, got ['a', 'b']"),
        (b'extends: "a\\0b"\n', "extends: must be the name of one file, got 'a\\x00b'"),
        (b"extends: odd.yaml\n", "extends: odd.yaml extends this file in turn"),
        (b"extends: .\n", "Is a directory"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, content: bytes, words: str):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    line = fault(path=file)
    assert line.startswith(str(tmp_path)) and words in line and len(line) < 500
    assert not Path("pwned").exists()


def test_a_name_that_is_no_file(tmp_path: Path):
    assert fault(path=tmp_path) == f"{tmp_path}: Is a directory"
    (tmp_path / "file").touch()
    assert fault(path=tmp_path / "file" / "a.yaml").endswith("Not a directory")
    assert fault(path=tmp_path / ("n" * 300)).endswith("File name too long")
    assert fault(path=tmp_path / "a\0b").endswith("embedded null byte")
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    assert fault(path=tmp_path / "a.yaml") == f"{tmp_path}/b.yaml: extends: ./a.yaml extends this file in turn"


def test_files_as_people_write_them_are_read(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("\ufeffperception:\n  guard: &g {patience: 2}\ndata: {system: Größe}\n", "utf-8")
    assert load_config(file).data.system == "Größe"
    file.write_text("optim: &o {lr: 1.0e-5, eps: 1.0e-9}\nsft: {steps: 3}\noptim2: {<<: *o, lr: 2.0e-5}\n")
    assert fault(path=file) == "optim2: unknown key"  # and no key that stands twice
    file.write_text("")
    assert load_config(file) == load_config(None)


@pytest.mark.parametrize("override", ["=x", "a..b=1", ".=1", "run.=1", "cluster.variables.=1", "seed"])
def test_an_override_without_a_key(override: str):
    assert fault(override) == f"{override}: overrides are written key.path=value"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.dir=a\nb", r"run.dir: holds \n, a character that does not show"),
        ("run.dir=a\0b", r"run.dir: holds \x00, a character that does not show"),
        ("run.name=\x1b[31m", r"run.name: holds \x1b, a character that does not show"),
        ("run.name=\u202eslurm", r"run.name: holds \u202e, a character that does not show"),
        ("run.dir=\udcff", r"run.dir: holds \udcff, bytes that are no UTF-8"),
        ("data.system=a\0b", r"data.system: holds \x00, a character that does not show"),
        ('cluster.sbatch=["--hold\\n-x"]', r"cluster.sbatch.0: holds \n, a character that does not show"),
        ('run.stage_limits_s={"a\\nb": 3}', r"run.stage_limits_s: a key holds \n, a character that does not show"),
        ("run.dir=" + "n" * 256, "run.dir: a name of 256 bytes is too long for a file or folder, which has 255"),
        ("run.dir=" + "n/" * 2500, "run.dir: a path of 4999 bytes is too long"),
        ("run.seed=" + "9" * 30, "run.seed: a whole number of 100 bits is too large"),
    ],
)
def test_a_value_that_fits_nowhere(override: str, line: str):
    assert fault(override) == line


def test_prompts_and_shell_lines_may_have_lines():
    words = ["data.system=Zeile 1\n\tZeile 2 \u200fعربي", 'cluster.setup=["if true\\nthen\\n:\\nfi"]']
    config = load_config(None, [*words, 'cluster.variables={A: "1\\n2"}'])
    assert config.cluster.variables == {"A": "1\n2"} and config.data.system is not None


def test_a_long_value_is_shown_in_part():
    assert len(fault("generation.engine=" + "x" * 100_000)) < 400


@pytest.mark.parametrize("name", ["A B", "1A", "A;touch x", "A\u00e9", "A-B", "A=1"])
def test_a_name_that_is_no_variables(name: str):
    assert "is no name of an environment variable" in fault(f'cluster.variables={{"{name}": x}}')


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True), ("HF_TOKEN", True), ("hf_token", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("DB_PASSWORD", True), ("PGPASSWORD_FILE", False), ("OPENAI_APIKEY", True), ("GIT_AUTH", True),
        ("TOKENIZERS_PARALLELISM", False), ("NCCL_DEBUG", False), ("HF_HOME", False), ("MASTER_PORT", False),
        ("KEYBOARD", False), ("VLLM_MAX_TOKENS", False), ("SSH_AUTH_SOCK", False), ("HF_TOKEN_PATH", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False), ("AUTHOR", False), ("MONKEY_PATCH", False),
    ],
)  # fmt: skip
def test_names_of_secrets_are_told_by_whole_words(name: str, secret: bool):
    assert names_a_secret(name) == secret


def test_a_secret_among_the_variables_is_refused_with_the_way_to_do_it(tmp_path: Path):
    line = fault("cluster.variables={WANDB_API_KEY: abc}")
    assert line.startswith("cluster.variables: WANDB_API_KEY is named like a secret") and "abc" not in line
    assert "chmod 600" in line and "cluster.secrets_file" in line and "wandb login" in line
    assert load_config(None, ["cluster.variables={HF_HUB_DISABLE_IMPLICIT_TOKEN: '1', NUM_KEY_VALUE_HEADS: '16'}"])
    for shell in ("export HF_TOKEN=abc", "true; WANDB_API_KEY='abc' x", 'HF_TOKEN="a b"'):
        assert fault(f"cluster.setup={json.dumps([':', shell])}").startswith("cluster.setup.1: ")
    for shell in ("export HF_TOKEN=$(cat ~/.token)", ". ~/.papo_secrets", "export SSH_KEY=~/.ssh/id", "A=1 make KEY="):
        assert load_config(None, [f"cluster.setup={json.dumps([shell])}"])
    assert fault("cluster.sbatch=[--hold, '--export=ALL,HF_TOKEN=abc']").startswith(
        "cluster.sbatch.1: HF_TOKEN is named"
    )
    assert load_config(None, ["cluster.sbatch=['--export=HF_TOKEN,HF_HOME=/a']"])  # from the shell that submits
    old = tmp_path / "config.yaml"  # of a run that wrote it before this was refused
    old.write_text("cluster: {variables: {HF_TOKEN: abc}}\n")
    assert load_config(old, to_run=False).cluster.variables == {"HF_TOKEN": "abc"}
    assert load_config(old, ["cluster.variables={}"]).cluster.variables == {}


HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("hf_" + "a1" * 17, LEFT_OUT),
        ("sk-proj-A1" + "b" * 30, LEFT_OUT),
        ("key AKIAABCDEFGHIJKLMNOP.", f"key {LEFT_OUT}."),
        ("ghp_" + "a" * 36, LEFT_OUT),
        (HEX, LEFT_OUT),
        ("http://me:pass@proxy:3128/x", f"http://{LEFT_OUT}@proxy:3128/x"),
        ("s3://bucket/a?x=1&X-Amz-Signature=abc&y=2", f"s3://bucket/a?x=1&X-Amz-Signature={LEFT_OUT}&y=2"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", LEFT_OUT),
        (f"/hub/models--a/snapshots/{HEX}", f"/hub/models--a/snapshots/{HEX}"),
        (f"org/name@{HEX}", f"org/name@{HEX}"),
        ("sk-learn-experiments-with-names", "sk-learn-experiments-with-names"),
        ("hf_transfer", "hf_transfer"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
    ],
)
def test_what_looks_like_a_secret_is_left_out(text: str, left: str):
    assert text_without_secrets(text) == left
    assert text_without_secrets(left) == left


def test_settings_are_shown_and_kept_without_secrets_and_such_copies_are_not_run(tmp_path: Path):
    words = ["data.train=https://me:pass@host/rows.jsonl", "cluster.variables={HTTPS_PROXY: 'http://me:pass@proxy'}"]
    config = load_config(None, [*words, f"run.dir=runs/sk-A1{'b' * 30}"])
    text = dump_config(config)
    assert "pass@" not in text and "pass@" not in str(plain_tree(config))
    assert plain_tree(config)["run"]["dir"] == str(config.run.dir)  # files are looked for by it
    kept = tmp_path / "config.yaml"
    kept.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(kept)
    assert str(refused.value).splitlines() == [
        f"{key}: a secret was left out as these settings were written: give it again"
        for key in ("data.train", "cluster.variables.HTTPS_PROXY")
    ]
    assert load_config(kept, to_run=False).run == config.run
    kept.write_text(dump_config(config, secrets=True))
    assert load_config(kept) == config
