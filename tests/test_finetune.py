"""Fine-tuning and the evaluation of its checkpoints, as a user types them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import call, main_of, metrics, pictures
from test_nlvr2 import nlvr2
from test_vqa import picture, vqa

import checkpoint
import classify
import data
import evaluate
import finetune
import runtime
import shapes
from runtime import UserError

BRIEF = ["--batch-size", 8, "--log-every", 1]
SAMPLES = {"vqa": 4, "nlvr2": 4, "retrieval": 2}  # per scene; of the other tasks one


def epochs(task, steps):
    """The flag that gives so many steps of 8 in the built-in world."""
    return ["--epochs", 8 * steps / SAMPLES.get(task, 1) / shapes.SCENES["train"]]


@pytest.fixture
def start(stages):
    return stages / "vl/last.pt"


def answer(capsys):
    """The numbers that evaluate.py has printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def assert_same(one, two, atol=0.0):
    """Two checkpoints have the same model and head."""
    one, two = checkpoint.read(one), checkpoint.read(two)
    for first, second in ((one.tensors, two.tensors), (one.head, two.head)):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0)


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_tenth_of_the_steps_is_warm_up_and_four_times_at_least_it_is_measured():
    stage = SimpleNamespace(epoch=lambda: 1000, measured=lambda: ["val"])
    for number, steps, warmup, eval_every in ((20, 1000, 100, 50), (2, 100, 10, 25)):
        args = SimpleNamespace(epochs=number, batch_size=20, eval_every=None)
        finetune.schedule(args, stage)
        assert (args.steps, args.warmup, args.eval_every) == (steps, warmup, eval_every)


@pytest.mark.parametrize("task, size", [("nlvr2", 24), ("probe", 16)])
def test_a_killed_run_resumes_bit_for_bit(task, size, start, small_world, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = ["--task", task, "--init", start, *BRIEF, *epochs(task, 4), "--image-size", size]
    run += ["--eval-every", 2, "--save-every", 2]
    call(monkeypatch, finetune, *run, "--out", whole)
    entries = [entry for entry in metrics(whole) if "split" in entry]
    splits = [(2, "val"), (4, "val"), (4, "test")]
    assert [(entry["step"], entry["split"]) for entry in entries] == splits

    class Killed(Exception):
        pass

    def dies(self, split, step, measure=runtime.Log.measure):
        if step == 4:  # before best.pt and last.pt are written
            raise Killed
        return measure(self, split, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime.Log, "measure", dies)
        call(patch, finetune, *run, "--out", parts)
    call(monkeypatch, finetune, "--out", parts, "--resume")
    assert [entry for entry in metrics(parts) if "split" in entry] == entries
    for name in ("last.pt", "best.pt"):
        assert_same(whole / name, parts / name)


@pytest.mark.parametrize("task", finetune.TASKS)
def test_evaluation_finds_what_the_run_said_at_its_end(
    task, start, small_world, tmp_path, monkeypatch, capsys
):
    run = ["--task", task, *BRIEF, *epochs(task, 2), "--eval-every", 1]
    call(monkeypatch, finetune, "--init", start, *run, "--out", tmp_path)
    best, last = (checkpoint.read(tmp_path / name) for name in ("best.pt", "last.pt"))
    entries = [entry for entry in metrics(tmp_path) if "split" in entry]
    number = "mean" if task in ("retrieval", "flickr30k") else "accuracy"
    assert best.record == max(entry[number] for entry in entries if entry["split"] == "val")
    assert best.step == [entry[number] for entry in entries].index(best.record) + 1
    capsys.readouterr()
    call(monkeypatch, evaluate, "--task", task, "--checkpoint", tmp_path / "best.pt")
    results = answer(capsys)
    assert results == pytest.approx({name: entries[-1][name] for name in results}, abs=0.01)
    if task in ("classify", "probe"):  # only the probe's features are standardised
        assert last.head["1.bias"].abs().max() > 0  # it started at 0
        assert bool((last.head["0.deviation"] == 1).all()) == (task == "classify")


def test_the_best_step_is_kept_and_measured_at_the_end(start, small_world, tmp_path, monkeypatch):
    """Accuracies 10, 30, 20: the second is the best."""
    given, seen = iter([10.0, 30.0, 20.0, 0.0]), []

    def measure(self, split, device):
        seen.append(self.head[1].weight.detach().clone())
        return {"accuracy": next(given)}

    monkeypatch.setattr(classify.Classify, "measure", measure)
    run = ["--task", "classify", "--init", start, *BRIEF, *epochs("classify", 3)]
    call(monkeypatch, finetune, *run, "--eval-every", 1, "--out", tmp_path)
    best, last = (checkpoint.read(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert best.step == 2 and torch.equal(last.head["1.weight"], seen[2])
    assert torch.equal(best.head["1.weight"], seen[1]) and torch.equal(seen[3], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_two_processes_fine_tune_as_one(start, processes, tmp_path, monkeypatch):
    folder = nlvr2(tmp_path / "data", "train", "train.json")
    nlvr2(nlvr2(folder, "dev", "dev.json"), "test1", "test1.json")
    run = ["--task", "nlvr2", "--init", start, *BRIEF, "--eval-every", 1, "--data", folder]
    run += ["--epochs", 8, "--augment", "none"]
    call(monkeypatch, finetune, *run, "--out", tmp_path / "one")
    processes(2, main_of, "finetune", *run, "--out", tmp_path / "two", group=False)
    one, two = (
        [entry for entry in metrics(tmp_path / name) if "split" in entry] for name in ("one", "two")
    )
    assert one == two and len(one) == 3
    for name in ("last.pt", "best.pt"):
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name, atol=1e-5)


def test_pooler_second_image_and_head_of_a_new_task(start, small_world, tmp_path, monkeypatch):
    run = ["--task", "nlvr2", "--init", start, *BRIEF, *epochs("nlvr2", 1), "--lr", 1e-3]
    run += ["--head-factor", 10]
    before = checkpoint.read(start).tensors
    call(monkeypatch, finetune, *run, "--no-fresh-pooler", "--out", tmp_path / "kept")
    kept = checkpoint.read(tmp_path / "kept/last.pt")
    for name, row in (("types", 1), ("pooler.weight", slice(None))):
        step = kept.tensors[name][1:] - before[name][row if name == "types" else slice(1, None)]
        assert 0 < step.abs().max() <= 1.01e-3  # AdamW's first step, and a little decay
    rates = [group["lr"] for group in kept.optimizer["param_groups"]]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    call(monkeypatch, finetune, *run, "--fresh-pooler", "--seed", 1, "--out", tmp_path / "fresh")
    fresh = checkpoint.read(tmp_path / "fresh/last.pt").tensors
    assert (fresh["pooler.weight"] - before["pooler.weight"]).abs().max() > 0.03


def test_a_head_keeps_the_order_of_its_choices_and_a_probe_begins_with_its_own(
    small_world, tmp_path, monkeypatch
):
    run = [*BRIEF, *epochs("classify", 1), "--eval-every", 0]
    call(monkeypatch, finetune, "--task", "classify", *run, "--out", tmp_path / "first")
    last, other = tmp_path / "first/last.pt", tmp_path / "other.pt"
    content = torch.load(last, weights_only=True)
    assert content["config"]["dim"] == 128  # from random weights, --config tiny
    content["extra"]["choices"].reverse()
    torch.save(content, other)
    for task in ("classify", "probe"):
        flags = ["--task", task, "--init", other, *run, "--lr", 1e-4, "--seed", 1]
        call(monkeypatch, finetune, *flags, "--out", tmp_path / task)
        found = checkpoint.read(tmp_path / task / "last.pt")
        assert (found.extra == content["extra"]) == (task == "classify")
        moved = (found.head["1.weight"] - content["head"]["1.weight"]).abs().max()
        assert (moved < 1e-3) == (task == "classify")


# ---- Official formats ----------------------------------------------------------------------------


def test_vqa_from_its_files_to_a_submission(start, tmp_path, monkeypatch):
    folder = vqa(tmp_path / "data", ids=range(1, 21))  # the answer to all of them is 2
    vqa(folder, "val2014", ids=range(30, 41))
    vqa(folder, "test2015", ids=range(50, 63), annotated=())
    run = ["--task", "vqa", "--init", start, *BRIEF, "--epochs", 1, "--data", folder]
    call(monkeypatch, finetune, *run, "--out", tmp_path / "out")
    found = checkpoint.read(tmp_path / "out/last.pt")
    assert found.extra["choices"] == ["2"] and found.args["steps"] == 2
    assert metrics(tmp_path / "out")[-1]["number"] == 100  # there is only one answer
    ask = ["--task", "vqa", "--checkpoint", tmp_path / "out/last.pt", "--data", folder]
    path = tmp_path / "test.json"
    call(monkeypatch, evaluate, *ask, "--predictions", path, "--batch-size", 3)
    submission = [{"question_id": id, "answer": "2"} for id in range(50, 63)]
    assert json.loads(path.read_text()) == submission
    with pytest.raises(UserError):  # nothing to measure, and nothing to write
        call(monkeypatch, evaluate, *ask)
    call(monkeypatch, finetune, *run, "--trainval", "--out", tmp_path / "more")
    assert checkpoint.read(tmp_path / "more/last.pt").args["steps"] == 4


def test_nlvr2_writes_what_metrics_py_reads(start, tmp_path, monkeypatch, capsys):
    folder = nlvr2(nlvr2(tmp_path / "data", "train", "train.json"), "test1", "test1.json")
    run = ["--task", "nlvr2", "--init", start, *BRIEF, "--epochs", 4, "--data", folder]
    call(monkeypatch, finetune, *run, "--out", tmp_path / "out")
    capsys.readouterr()
    ask = ["--task", "nlvr2", "--checkpoint", tmp_path / "out/last.pt", "--data", folder]
    call(monkeypatch, evaluate, *ask, "--predictions", tmp_path / "test1.csv")
    rows = [line.split(",") for line in (tmp_path / "test1.csv").read_text().splitlines()]
    assert [id for id, _ in rows] == ["test1-5-0-0", "test1-5-1-0"]
    right = [said == label for (_, said), label in zip(rows, ("True", "False"))]
    assert answer(capsys) == {"accuracy": 50 * sum(right), "consistency": 100 * all(right)}


def test_retrieval_reranks_with_a_head_that_learned_itm(start, tmp_path, monkeypatch, capsys):
    folder = pictures(pictures(tmp_path / "data"), split="test")
    run = ["--task", "retrieval", "--init", start, *BRIEF, "--epochs", 1, "--data", folder]
    call(monkeypatch, finetune, *run, "--itm-weight", 1, "--out", tmp_path / "out")
    assert {"itc", "itm"} <= metrics(tmp_path / "out")[0].keys()
    capsys.readouterr()
    ask = ["--checkpoint", tmp_path / "out/last.pt", "--data", folder, "--rerank", 3]
    call(monkeypatch, evaluate, *ask)
    results = answer(capsys)
    assert "reranked IR@10" in results and results["TR@10"] == 100


# ---- Mistakes ------------------------------------------------------------------------------------


def refuse(monkeypatch, script, *flags):
    with pytest.raises(UserError):
        call(monkeypatch, script, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        "",  # no task
        "--task retrieval --head-factor 3",  # flags of another task
        "--task vqa --itm-weight 1",
        "--task nlvr2 --trainval",
        "--task vqa --config base",
        "--task vqa --epochs 0",
        "--task vqa --epochs nan",
        "--task vqa --image-size 17",
        "--task vqa --data absent",
        "--task retrieval --data absent",
        "--task nlvr2 --vocab absent.txt",
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, start, tmp_path, monkeypatch):
    refuse(monkeypatch, finetune, "--init", start, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_checkpoints_and_data_that_do_not_fit_are_refused(
    start, small_world, tmp_path, monkeypatch
):
    folder, last, three = tmp_path / "data", tmp_path / "out/last.pt", tmp_path / "three.pt"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(folder / split / name / "1.png")
    run = ["--task", "classify", "--init", start, *BRIEF, "--epochs", 1, "--out", tmp_path / "out"]
    call(monkeypatch, finetune, *run, "--data", folder)
    refuse(monkeypatch, finetune, "--data", "shapes", "--out", tmp_path / "out", "--resume")

    # Evaluation
    ask = ["--task", "classify", "--checkpoint", last, "--data", folder, "--split"]
    with pytest.raises(data.Absent):
        call(monkeypatch, evaluate, *ask, "test")
    (folder / "val/dog/1.png").write_bytes(b"broken")
    with pytest.raises(data.Unreadable):
        call(monkeypatch, evaluate, *ask, "val")
    picture(folder / "val/bird/1.png")  # a class that the head does not have
    refuse(monkeypatch, evaluate, *ask, "val")
    content = torch.load(last, weights_only=True)
    torch.save(content | {"extra": {"choices": ["bird", "cat", "dog"]}}, three)
    refuse(monkeypatch, evaluate, "--task", "classify", "--checkpoint", three)
    content = torch.load(start, weights_only=True)
    kept = {name: t for name, t in content["model"].items() if not name.startswith("itm_head")}
    torch.save(content | {"model": kept}, tmp_path / "itc.pt")
    for flags in [
        ["--checkpoint", start, "--task", "vqa"],  # has no head
        ["--checkpoint", last, "--task", "classify", "--split", "dev"],
        ["--checkpoint", last, "--task", "classify", "--predictions", "x.json"],
        ["--checkpoint", start, "--rerank", -1],
        ["--checkpoint", start, "--predictions", "x.json"],
        ["--checkpoint", last, "--task", "classify", "--rerank", 4],
        ["--checkpoint", start, "--task", "vqa", "--predictions", tmp_path / "no/x.json"],
        ["--checkpoint", tmp_path / "itc.pt", "--rerank", 4],
    ]:
        refuse(monkeypatch, evaluate, *flags)

    # Answers that are too rare, and none
    run = ["--task", "vqa", "--init", start, *BRIEF, "--epochs", 1, "--out", tmp_path / "none"]
    refuse(monkeypatch, finetune, *run, "--data", vqa(tmp_path / "few"))
    refuse(monkeypatch, finetune, *run, "--data", vqa(tmp_path / "no", annotated=()))
