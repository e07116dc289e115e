"""findings.py: every run begins, runs go on and fail as they should, results become tables and verdicts."""

import os
from pathlib import Path
from types import SimpleNamespace

from conftest import SIZE, call, metrics, refused
from files import write_lines

import findings

ENDED = SimpleNamespace(poll=lambda: 0, wait=lambda: 0, returncode=0)  # a process that has succeeded


def settings(folder, seeds=1, jobs=2):
    return SimpleNamespace(out=folder, seeds=seeds, jobs=jobs)


def test_every_run_trains_and_is_measured(tmp_path, monkeypatch):
    """Each of two steps, but tasks of one, in this process."""

    def launch(words, processes, jobs, log):
        script, brief = words[0].removesuffix(".py"), []
        if script != "evaluate":
            brief += ["--batch-size", 8, "--log-every", 1]
            brief += ["--steps", 2, "--eval-every", 0] if script == "train" else ["--epochs", 1e-9]
        if "dvae" in words:
            brief += [*SIZE[-4:], "--codes", 8, "--width", 16]
        elif script == "train" and "--init" not in words:
            brief += SIZE
        call(script, *words[1:], *brief)
        return ENDED

    monkeypatch.setattr(findings, "launch", launch)
    monkeypatch.setattr(findings.time, "sleep", lambda seconds: None)  # nothing runs meanwhile
    names, args = findings.runs_of(findings.TABLES.values()), settings(tmp_path)
    assert set(findings.RUNS) <= set(names)  # none is for nothing
    # Each task is fine-tuned from one row, of another architecture than the rest, to save time
    tasks = ["no-vl-experts+vqa", "separate+nlvr2", "momo-all+rte", "momo-all+probe"]
    assert set(tasks) <= set(names)
    findings.train_all([*findings.RUNS, *tasks], args)
    for table in findings.TABLES.values():
        for row in table.rows:
            assert metrics(tmp_path / f"{row}-0")[-2]["step"] == 2
            assert findings.minutes(row, args)[0] > 0
            for measure in table.measures:
                if findings.MEASURES[measure][0].format(row) in (row, *tasks):
                    assert len(findings.values(row, measure, args)) == 1
    assert findings.curves(findings.TABLES["momo3"].rows, args)
    assert findings.answers(findings.TABLES["table5"].rows, args, count=2)


def write_run(folder, **measured):
    write_lines(folder / "config.json", {"args": {"steps": 40, "batch_size": 30}})
    test = {"step": 40, "split": "test", **measured}
    write_lines(folder / "metrics.jsonl", {"step": 40, "pairs_per_s": 10.0}, test)


def test_a_report_has_means_errors_minutes_and_verdicts(tmp_path):
    args, table = settings(tmp_path, seeds=3), findings.TABLES["table6"]
    for seed in range(3):
        for name in ("dvae", "image"):
            write_run(tmp_path / f"{name}-{seed}")
        for name, mean, rare in (("image-vl", 60, 40), ("local", 50, 30)):
            write_run(tmp_path / f"{name}-{seed}", mean=mean + seed)
            write_lines(tmp_path / f"{name}-{seed}/rare.json", {"mean": rare})
        write_run(tmp_path / f"image-vl+nlvr2-{seed}", accuracy=70 + seed)
    for seed in (0, 2):  # seed 1 is not finished
        write_run(tmp_path / f"local+nlvr2-{seed}", accuracy=50 + 3 * seed)
    rows = findings.report(table, args).splitlines()
    for number, row in {
        4: "one of four processes | 51.0 ± 0.6 (50.0, 51.0, 52.0) | 30.0 ± 0.0 (30.0, 30.0, 30.0) | 53.0 ± 3.0 (50.0, 56.0)",
        5: "all processes | 61.0 ± 0.6 (60.0, 61.0, 62.0) | 40.0 ± 0.0 (40.0, 40.0, 40.0) | 71.0 ± 0.6 (70.0, 71.0, 72.0)",
    }.items():
        assert rows[number] == f"| {row} |  | 6.0 |"
    ordering = "all processes > one of four processes | +10.0 ± 0.8 | +10.0 ± 0.0 | reproduced: +18.0 ± 3.1"
    assert rows[9] == f"| {ordering} |  |"


def test_a_verdict_needs_two_standard_errors():
    assert findings.verdict([60, 61, 62], [50, 51, 52]) == "reproduced"
    assert findings.verdict([50, 51, 52], [60, 61, 62]) == "contradicted"
    assert findings.verdict([50, 60, 70], [50, 51, 52]) == "not settled"
    assert findings.verdict([60], [50]) == "not settled"  # one seed settles nothing


def test_a_run_comes_after_what_it_needs_goes_on_and_begins_anew_if_a_command_changes(tmp_path, monkeypatch):
    launched = []

    def launch(words, processes, jobs, log):
        out = Path(words[words.index("--out") + 1])
        for other in findings.needs(out.name.removesuffix("-0")):
            assert (tmp_path / f"{other}-0" / "metrics.jsonl").exists()
        launched.append((out.name, "--resume" in words))
        if out.name == broken:
            with open(log, "a") as file:
                print(findings.BEGINS, *words, f"\n{said}\n====", file=file)
            return SimpleNamespace(poll=lambda: 2, returncode=2)
        write_run(out, mean=50.0, accuracy=50.0)
        return ENDED

    monkeypatch.setattr(findings, "launch", launch)
    monkeypatch.setattr(findings.time, "sleep", lambda seconds: None)
    args, broken, said = settings(tmp_path), "image-0", "train.py: error: the disk is full"
    names = findings.runs_of([findings.TABLES["table4"]])
    refused(findings.train_all, names, args, says=f"image, seed 0: {said}")
    said = "killed"
    refused(findings.train_all, names, args, says="image, seed 0: status 2")  # not what it said before
    launched.clear()
    broken = None
    findings.train_all(names, args)
    assert ("image-0", True) in launched and ("dvae-0", False) not in launched
    broken = "momo-image-0"
    refused(findings.train_all, ["momo-image", "dvae"], args, says="momo-image")  # next to a finished run
    launched.clear()
    broken = "text-0"
    monkeypatch.setitem(findings.RUNS, "text", findings.RUNS["text"] + " --steps 7")
    refused(findings.train_all, names, args, says="text, seed 0")
    broken = None
    findings.train_all(names, args)  # what the earlier command has measured is not taken for this one's
    after = [(f"{name}-0", False) for name in ("text-vl", "text-vl+nlvr2", "text-vl+vqa")]
    assert launched == [("text-0", False), ("text-0", True), *after]


def test_mistakes_of_scripts_under_torchrun_are_told_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(findings.RUNS, "local", f"train.py {' '.join(SIZE)} --batch-size 7")
    monkeypatch.setitem(findings.PROCESSES, "local", 2)
    said = "local, seed 0: train.py: error: --batch-size 7"
    refused(findings.train_all, ["local"], settings(tmp_path), says=said)
    assert os.listdir(tmp_path) == ["local-0.log"]
    assert 'train.py", line' not in (tmp_path / "local-0.log").read_text()  # no traceback of ours
