"""Fine-tuning and the evaluation of its checkpoints, as a user types them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_metrics, call, commands, metrics, refused, tune
from files import nlvr2, picture, vqa, write_lines

import checkpoint
import classify
import finetune
import images
from sides import bare

BRIEF = ["--batch-size", 8, "--log-every", 1]
ONE_STEP = ["--batch-size", 8, "--epochs", 1e-9, "--eval-every", 0]


@pytest.fixture
def start(stages):
    return stages / "vl/last.pt"


def answer(capsys):
    """The numbers that evaluate.py has printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def measures(folder):
    return [entry for entry in metrics(folder) if "split" in entry]


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_tenth_of_the_steps_is_warm_up_and_four_times_at_least_it_is_measured():
    stage = SimpleNamespace(samples=[range(1000)], measured=lambda: ["val"])
    for number, steps, warmup, eval_every in ((20, 1000, 100, 50), (2, 100, 10, 25)):
        args = SimpleNamespace(epochs=number, batch_size=20, eval_every=None)
        finetune.schedule(args, stage)
        assert (args.steps, args.warmup, args.eval_every) == (steps, warmup, eval_every)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval", "classify", "probe", "rte"])
def test_evaluation_finds_what_the_run_said_at_its_end(task, start, tmp_path, capsys):
    content = torch.load(start, weights_only=True)
    content["config"]["drop_path"] = 0.1
    torch.save(content, tmp_path / "start.pt")
    run = ["--init", tmp_path / "start.pt", "--batch-size", 32, "--epochs", 1e-9, "--eval-every", 1]
    last = tune(task, tmp_path, *run, *(["--itm-weight", 1] if task == "retrieval" else []))
    val, test = measures(tmp_path)
    assert checkpoint.read(tmp_path / "best.pt").record == val[finetune.TASKS[task].best]
    capsys.readouterr()
    ask = ["--task", task, "--checkpoint", tmp_path / "best.pt"]
    call("evaluate", *ask, *(["--rerank", 3] if task == "retrieval" else []))
    results = answer(capsys)
    assert ("reranked IR@10" in results) == (task == "retrieval")
    if task in ("vqa", "retrieval", "probe"):  # what it was trained on, with the head it has
        call("evaluate", *ask, "--split", "train")
    expected = {name: test.get(name, results[name]) for name in results}
    assert results == pytest.approx(expected, abs=0.01) and results.keys() & test.keys()
    if task in ("classify", "probe"):  # only the probe's features are standardised, and never dropped
        assert last.head["1.bias"].abs().max() > 0  # it started at 0
        assert bool((last.head["0.deviation"] == 1).all()) == (task == "classify")
        assert last.config.drop_path == (0.1 if task == "classify" else 0)


def test_the_best_step_is_kept_when_a_killed_run_resumes(start, tmp_path, monkeypatch):
    """Accuracies 30, 30, 20 at another resolution: the second is the best, and measured at the end."""

    def measure(self, split, device):
        seen.append(self.head[1].weight.detach().clone())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"accuracy": given.pop(0)}

    seen, given, out = [], [30.0, 30.0, 20.0, 0.0], tmp_path / "out"
    monkeypatch.setattr(classify.Classify, "measure", measure)
    run = ["--task", "classify", "--init", start, *BRIEF, "--epochs", 0.08, "--image-size", 24]
    run += ["--eval-every", 1, "--save-every", 2]
    with pytest.raises(KeyboardInterrupt):
        call("finetune", *run, "--out", out)
    call("finetune", "--out", out, "--resume")
    best, last = (checkpoint.read(out / name) for name in ("best.pt", "last.pt"))
    first, second, third, again, tested = seen
    assert torch.equal(third, again) and torch.equal(last.head["1.weight"], again)
    assert best.step == 2 and torch.equal(best.head["1.weight"], second)
    assert torch.equal(tested, second) and not torch.equal(second, third)
    accuracies = [(entry["step"], entry["accuracy"]) for entry in measures(out)]
    assert accuracies == [(1, 30), (2, 30), (3, 20), (2, 0)]


def test_nlvr2_on_two_processes_is_as_on_one_and_has_its_csv(start, processes, tmp_path, capsys):
    for split in ("train", "dev", "test1"):
        nlvr2(tmp_path / "data", split, f"{split}.json")
    run = ["--task", "nlvr2", "--init", start, "--batch-size", 2, "--epochs", 2, "--data", tmp_path / "data"]
    run += ["--eval-every", 1, "--augment", "none"]
    call("finetune", *run, "--out", tmp_path / "one")
    processes(2, call, "finetune", *run, "--out", tmp_path / "two", group=False)
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert len(measures(tmp_path / "one")) == 3

    capsys.readouterr()
    ask = ["--task", "nlvr2", "--checkpoint", tmp_path / "one/last.pt", "--data", tmp_path / "data"]
    call("evaluate", *ask, "--predictions", tmp_path / "test1.csv")
    rows = [line.split(",") for line in (tmp_path / "test1.csv").read_text().splitlines()]
    assert [id for id, _ in rows] == ["test1-5-0-0", "test1-5-1-0"]
    right = [said == label for (_, said), label in zip(rows, ("True", "False"))]
    assert answer(capsys) == {"accuracy": 50 * sum(right), "consistency": 100 * all(right)}


def test_pooler_second_image_and_head_of_a_new_task(start, tmp_path):
    run = ["--init", start, *ONE_STEP, "--lr", 1e-3, "--head-factor", 10]
    before = checkpoint.read(start).tensors
    kept = tune("nlvr2", tmp_path / "kept", *run, "--no-fresh-pooler")
    pooler = kept.tensors["pooler.weight"] - before["pooler.weight"]
    types = kept.tensors["types"][1:] - before["types"][1]  # both start from the first image's
    for moved in (pooler, types):
        assert 0 < moved.abs().max() <= 1.01e-3  # AdamW's first step, and a little decay
    rates = [group["lr"] for group in kept.optimizer["param_groups"]]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    fresh = tune("nlvr2", tmp_path / "fresh", *run, "--fresh-pooler", "--seed", 1).tensors
    assert (fresh["pooler.weight"] - before["pooler.weight"]).abs().max() > 0.03
    assert "itm_head.weight" in kept.tensors.keys() - fresh.keys()  # it reads what the old pooler gave


def test_a_head_keeps_the_order_of_its_choices_and_others_get_a_new_one(tmp_path, capsys):
    """Another task, and other classes, as from ImageNet-22k to ImageNet-1k."""
    tune("classify", tmp_path / "first", *ONE_STEP)
    content = torch.load(tmp_path / "first/last.pt", weights_only=True)
    assert content["config"]["dim"] == 128  # from random weights, --config tiny
    content["extra"]["choices"].reverse()
    torch.save(content, tmp_path / "other.pt")
    run = ["--init", tmp_path / "other.pt", *ONE_STEP]
    for task in ("classify", "probe"):
        found = tune(task, tmp_path / task, *run, "--lr", 1e-4, "--seed", 1)
        moved = (found.head["1.weight"] - content["head"]["1.weight"]).abs().max()
        assert (found.extra == content["extra"]) == (moved < 1e-3) == (task == "classify")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        picture(tmp_path / "data" / name / "1.png")
    new = tune("classify", tmp_path / "new", *run, "--batch-size", 2, "--data", tmp_path / "data")
    assert new.extra == {"choices": ["a", "b"]}
    assert capsys.readouterr().out.count("with a new head") == 3  # the first, the probe's, this one
    trained = SimpleNamespace(extra={"choices": ["dog", "cat"]})
    stage = bare(classify.Classify, None, trained=trained)
    stage.set_choices(["cat", "dog"])
    assert stage.choices == ["dog", "cat"]  # also in the targets


def test_vqa_from_its_files_to_a_submission(start, tmp_path):
    folder = vqa(tmp_path / "data", ids=range(1, 21))  # the answer to all of them is 2
    vqa(folder, "val2014", ids=range(30, 41))
    vqa(folder, "test2015", ids=range(50, 63), annotated=())
    run = ["--init", start, *BRIEF, "--epochs", 1, "--data", folder]
    found = tune("vqa", tmp_path / "out", *run)
    assert found.extra["choices"] == ["2"] and found.args["steps"] == 2
    assert "itm_head.weight" not in found.tensors  # the pooler that it reads is a new one
    assert metrics(tmp_path / "out")[-1]["number"] == 100  # there is only one answer
    ask = ["--task", "vqa", "--checkpoint", tmp_path / "out/last.pt", "--data", folder]
    call("evaluate", *ask, "--predictions", tmp_path / "test.json", "--batch-size", 3)
    submission = [{"question_id": id, "answer": "2"} for id in range(50, 63)]
    assert json.loads((tmp_path / "test.json").read_text()) == submission
    refused(call, "evaluate", *ask)  # nothing to measure, and nothing to write
    assert tune("vqa", tmp_path / "more", *run, "--trainval").args["steps"] == 4


def test_zero_shot_the_class_is_that_of_the_nearest_captions(start, tmp_path, monkeypatch):
    """Weights are the mean vectors of a class's captions, with length 1; names of classes are from a file."""
    for name, colors in (("n1", ("red", "blue")), ("n2", ("green", "white", "black"))):
        for color in colors:
            picture(tmp_path / f"test/{name}/{color}.png", color)
    write_lines(tmp_path / "names.txt", "n1 red circle, scarlet", "n2 blue star", "n3 green ring")
    ask = ["--task", "classify", "--zero-shot", "--checkpoint", start, "--data", tmp_path]
    ask += ["--class-names", tmp_path / "names.txt", "--templates", "a {}", "a small {} above"]
    seen = []
    monkeypatch.setattr(classify.Classify, "results", lambda *found: seen.extend(found))
    call("evaluate", *ask)
    stage, predicted, _ = seen
    assert stage.choices == ["n1", "n2", "n3"]  # the split has none of the third

    model, words, config = checkpoint.load_model(start)
    with torch.no_grad():
        means = []
        for name in ("red circle", "blue star", "green ring"):
            ids, mask = words.encode_all([f"a {name}", f"a small {name} above"])
            means.append(model.embed_text(ids, mask).mean(0))
        weight = torch.stack([mean / mean.norm() for mean in means])
        torch.testing.assert_close(stage.head.weight, weight)
        paths = sorted((tmp_path / "test").rglob("*.png"))
        cosines = model.embed_image(images.read_images(paths, config.image_size)) @ weight.T
    assert predicted == cosines.argmax(1).tolist()
    refused(call, "evaluate", *ask, "a small one", says="no {}")
    write_lines(tmp_path / "names.txt", "n1\tred circle")
    refused(call, "evaluate", *ask, says="class n2")


def test_zero_shot_a_split_by_a_hash_has_all_classes_of_the_folder(start, tmp_path, capsys):
    for i in range(90, 130):
        picture(tmp_path / f"class {i % 6}/{i}.png")
    ask = ["--task", "classify", "--zero-shot", "--checkpoint", start, "--data", tmp_path]
    call("evaluate", *ask, "--split", "val")
    assert "val: 2 images" in (said := capsys.readouterr().out) and "6 classes to choose from" in said


# ---- Mistakes ------------------------------------------------------------------------------------

REFUSED = """
finetune --init vl/last.pt | finetune --task nlvr2 --trainval | finetune --task vqa --trainval
finetune --task vqa --init vl/last.pt --config base | finetune --task vqa --epochs 0
finetune --task vqa --init vl/last.pt --image-size 17 | finetune --task vqa --data absent
finetune --task nlvr2 --vocab absent.txt | finetune --out vl --resume
evaluate --checkpoint image/last.pt | evaluate --checkpoint vl/last.pt --task vqa
evaluate --checkpoint vl/last.pt --rerank -1 | evaluate --task vqa --predictions absent/x.json
evaluate --checkpoint vl/last.pt --predictions x.json | evaluate --task probe --zero-shot --checkpoint vl/last.pt
evaluate --task classify --zero-shot --checkpoint image/last.pt
"""


@pytest.mark.parametrize("words", commands(REFUSED))
def test_flags_that_do_not_fit_are_refused(words, stages, monkeypatch):
    monkeypatch.chdir(stages)
    refused(call, *words.split())
    assert not (stages / "runs").exists()


def test_checkpoints_and_data_that_do_not_fit_are_refused(start, tmp_path):
    folder, out, other = tmp_path / "data", tmp_path / "out", tmp_path / "other.pt"
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        picture(folder / name / "1.png")
    run = [*BRIEF, "--init", start, "--epochs", 1, "--out", out]
    call("finetune", "--task", "classify", *run, "--batch-size", 2, "--data", folder)
    refused(call, "finetune", "--data", "shapes", "--out", out, "--resume")
    ask = ["--task", "classify", "--checkpoint", out / "last.pt", "--data", folder, "--split"]
    refused(call, "evaluate", *ask, "test")
    refused(call, "evaluate", *ask, "val", "--predictions", "x.json")
    (folder / "val/dog/1.png").write_bytes(b"broken")
    refused(call, "evaluate", *ask, "val", error=images.Unreadable)
    picture(folder / "val/bird/1.png")  # a class that the head does not have
    refused(call, "evaluate", *ask, "val")

    content = torch.load(start, weights_only=True)
    del content["model"]["itm_head.weight"], content["model"]["itm_head.bias"]
    torch.save(content, other)
    refused(call, "evaluate", "--checkpoint", other, "--rerank", 4)

    # Answers that are too rare, and none
    refused(call, "finetune", "--task", "vqa", *run, "--data", vqa(tmp_path / "few"))
    refused(call, "finetune", "--task", "vqa", *run, "--data", vqa(tmp_path / "no", annotated=()))
