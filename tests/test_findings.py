"""findings.py: every run begins, results become tables and verdicts, stopped runs go on."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SIZE, call

import findings
from runtime import UserError


@pytest.fixture
def launched(monkeypatch, small_world):
    """Runs are of two steps, and in this process → what was launched."""
    found = []

    def launch(words, processes, jobs, log):
        found.append(words[words.index("--out") + 1] if "--out" in words else words[0])
        script = importlib.import_module(words[0].removesuffix(".py"))
        small = {
            "train": ["--steps", "2", "--batch-size", "8", "--eval-every", "0", "--log-every", "1"],
            "finetune": ["--epochs", str(16 / 4000), "--batch-size", "8", "--log-every", "1"],
        }.get(script.__name__, [])
        if script.__name__ == "train" and "--init" not in words:
            small += SIZE[-4:] + ["--codes", "8", "--width", "16"] if "dvae" in words else SIZE
        call(monkeypatch, script, *words[1:], *small)

    monkeypatch.setattr(findings, "launch", launch)
    return found


def test_every_run_of_every_table_trains_and_is_measured(tmp_path, launched, monkeypatch, capsys):
    args = SimpleNamespace(out=tmp_path, seeds=1, jobs=1)
    names = findings.needed(findings.TABLES.values())
    assert set(findings.RUNS) <= set(names)  # no run is for nothing
    for name in names:
        findings.train_one(name, 0, args)
    assert len(launched) == len(names)
    for name in names:
        findings.train_one(name, 0, args)
    assert len(launched) == len(names)  # all are finished

    for table in findings.TABLES.values():
        text = findings.report(table, args)
        assert text.count("not settled") == len(table.claims) * len(table.measures)
        assert findings.curves(table.rows, args)
    assert findings.answers(findings.TABLES["table4"].rows, args, count=2)


def test_a_verdict_needs_two_standard_errors():
    assert findings.verdict([60, 61, 62], [50, 51, 52]) == "reproduced: +10.0 ± 0.8"
    assert findings.verdict([50, 51, 52], [60, 61, 62]) == "contradicted: -10.0 ± 0.8"
    assert findings.verdict([50, 60, 70], [50, 51, 52]) == "not settled: +9.0 ± 5.8"
    assert findings.verdict([60], [50]) == "not settled: +10.0 ± 0.0"  # one seed settles nothing


def test_a_run_comes_after_what_it_needs_and_a_failure_ends_all_with_one_line(tmp_path, monkeypatch):
    """A stopped run goes on; one whose command has changed begins anew."""
    resumed = []

    def launch(words, processes, jobs, log):
        out = Path(words[words.index("--out") + 1])
        resumed.append((out.name, "--resume" in words))
        if "image" in words and seen["fails"]:
            log.write("train.py: error: the disk is full\n")
            return
        out.mkdir(exist_ok=True)
        (out / "metrics.jsonl").write_text('{"step": 2, "split": "test", "mean": 50}\n')

    seen = {"fails": True}
    monkeypatch.setattr(findings, "launch", launch)
    args = SimpleNamespace(out=tmp_path, seeds=1, jobs=2)
    names = findings.needed([findings.TABLES["table4"]])
    assert names.index("dvae") < names.index("image") < names.index("text") < names.index("text-vl+vqa")
    with pytest.raises(UserError, match="image, seed 0: train.py: error: the disk is full"):
        findings.train_all(names, args)
    begun = set(resumed)
    assert ("image-0", False) in begun and not any(name.startswith("text") for name, _ in begun)
    seen["fails"] = False
    findings.train_all(names, args)
    assert ("image-0", True) in resumed and resumed.count(("dvae-0", False)) == 1
    monkeypatch.setitem(findings.RUNS, "scratch", findings.RUNS["scratch"] + " --steps 7")
    resumed.clear()
    findings.train_all(names, args)
    assert resumed == [("scratch-0", False)]
