"""What `papo doctor` finds, on folders and version lists made for it, and once on this machine."""

import megatron_papo.doctor as doctor
from megatron_papo.doctor import Finding, apex, required, shortened


def _package(folder, *subfolders):
    for path in (folder / "apex", *(folder / "apex" / name for name in subfolders)):
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("raise ImportError('must not be imported')")
    return [folder]


def test_apex_is_told_from_its_namesake_without_importing_it(tmp_path):
    assert apex([tmp_path]).state == "absent"
    assert apex(_package(tmp_path / "ours", "optimizers", "multi_tensor_apply", "normalization")).state == "ok"
    namesake = apex(_package(tmp_path / "other", "forms", "models"))
    assert namesake.state == "warning"
    assert "pip uninstall apex" in namesake.note


def test_requirements_are_checked_version_by_version():
    installed = {"torch": "2.13.0+cu130", "numpy": "2.5.1", "rich": "15.0.0"}
    findings = required(
        ["torch>=2.11", "numpy<2.5", "rich>=14.1", "datasets>=4", "vllm==0.32.0; extra == 'vllm'"], installed.get
    )
    assert [(finding.name, finding.state) for finding in findings] == [
        ("torch", "ok"), ("numpy", "missing"), ("rich", "ok"), ("datasets", "missing"),
    ]  # fmt: skip
    assert findings[1].note == "needed: numpy<2.5"
    assert [finding.name for finding in shortened(findings)] == ["torch", "numpy", "datasets", "other packages"]


def test_nccl_versions_that_fail_are_known():
    assert doctor._nccl("2.28.5").state == "warning"
    assert doctor._nccl("2.29.7").state == "ok"
    assert doctor._nccl("2.27.7").state == "ok"


def test_exit_code_says_whether_something_required_is_missing(monkeypatch, capsys):
    fine = [Finding("torch", "2.13.0", "ok"), Finding("vLLM", "", "absent", "slow"), Finding("apex", "0.9", "warning")]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    assert doctor.main() == 0
    assert "papo: warning: see apex above" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [*fine, Finding("numpy", "2.5", "missing", "needed: numpy<2.5")])
    assert doctor.main() == 1
    assert capsys.readouterr().out.strip().endswith("papo: cannot run: numpy")


def test_this_machine_has_what_the_tests_need():
    found = {finding.name: finding for finding in doctor.examine()}
    assert {"Python", "accelerator", "NCCL", "vLLM", "Transformer Engine", "NVIDIA Apex"} <= set(found)
    assert [finding for finding in found.values() if finding.state == "missing"] == []
    assert found["torch"].found.startswith("2.") and found["megatron-core"].found.startswith("0.19.")
