"""Fine-tuning and the evaluation of its checkpoints, as a user types them."""

import json

import pytest
import torch
from test_data import nlvr2, picture, vqa
from test_train import call, main_of, metrics, pictures

import data
import evaluate
import finetune
import losses
import runtime
import train
from mome import CONFIGS, VLMo

SMALL = "--dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8 --batch-size 8 --warmup 1 --steps 2".split()
BRIEF = ["--batch-size", "8", "--log-every", "5"]
STEPS = {"vqa": 400_000, "nlvr2": 400_000, "retrieval": 200_000, "classify": 100_000}


def epochs(task, steps):
    """The part of an epoch of the built-in world that has so many steps of 8."""
    return ["--epochs", repr(8 * steps / STEPS[task])]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of stage vl."""
    out = tmp_path_factory.mktemp("vl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SPLITS", {"train": 100_000, "val": 10, "test": 10})
        call(patch, train, *SMALL, "--out", out)
    return out / "last.pt"


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(finetune, "STANDARDISED", 64)
    monkeypatch.setattr(data, "SPLITS", {"train": 100_000, "val": 10, "test": 10})


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, flags, result",
    [
        ("vqa", [], "accuracy"), ("nlvr2", ["--image-size", "24"], "consistency"), ("retrieval", [], "TR@1"),
        ("retrieval", ["--itm-weight", "1"], "mean"), ("classify", [], "accuracy"),
        ("classify", ["--linear-probe"], "accuracy"),
    ],
)  # fmt: skip
def test_every_task_is_learned_resumed_and_evaluated(
    task, flags, result, start, small_world, tmp_path, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = ["--task", task, "--init", start, *BRIEF, *epochs(task, 10), *flags, "--eval-every", 4]
    call(monkeypatch, finetune, *run, "--out", whole)
    measured = [entry for entry in metrics(whole) if "split" in entry]
    assert [(entry["step"], entry["split"]) for entry in measured] == [
        (4, "val"),
        (8, "val"),
        (10, "val"),
        (10, "test"),
    ]
    best = runtime.load(whole / "best.pt")
    record = max(entry[best_of(task)] for entry in measured[:3])
    assert best["record"] == record and best["step"] in [e["step"] for e in measured[:3] if e[best_of(task)] == record]

    for dies_in, dies_at in ((data.Pairs if task == "retrieval" else data.Examples, 8 * 7), (evaluate.Views, 10 + 4)):
        real, calls = dies_in.__getitem__, []

        def dies(self, key):
            calls.append(key)
            if len(calls) > dies_at:  # in step 8; then, resumed, in the middle of the measurement after it
                raise Killed
            return real(self, key)

        monkeypatch.setattr(dies_in, "__getitem__", dies)
        with pytest.raises(Killed):
            call(monkeypatch, finetune, *run, "--out", parts, "--save-every", 4, "--resume")
        monkeypatch.setattr(dies_in, "__getitem__", real)
    call(monkeypatch, finetune, *run, "--out", parts, "--save-every", 4, "--resume")
    assert [entry for entry in metrics(parts) if "split" in entry] == measured
    for name in ("last.pt", "best.pt"):
        one, other = runtime.load(whole / name), runtime.load(parts / name)
        for part in ("model", "head"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    capsys.readouterr()
    call(monkeypatch, evaluate, "--task", task, "--checkpoint", whole / "best.pt")
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer[result] == pytest.approx(
        measured[-1][result], abs=0.01
    )  # that of the best, as the run said at its end


class Killed(Exception):
    pass


def best_of(task):
    return "mean" if task == "retrieval" else "accuracy"


def test_what_a_task_reads_learns_and_nothing_else(start, small_world, tmp_path, monkeypatch):
    before = runtime.load(start)["model"]
    moved = {}
    for task, flags in {
        "vqa": [],
        "nlvr2": ["--seed", "1"],
        "retrieval": [],
        "classify": [],
        "probe": ["--linear-probe"],
    }.items():
        name = "classify" if task == "probe" else task
        run = ["--task", name, "--init", start, *BRIEF, *epochs(name, 2), *flags]
        call(monkeypatch, finetune, *run, "--out", tmp_path / task)
        if task in ("classify", "probe"):
            head = runtime.load(tmp_path / task / "last.pt")["head"]
            assert head["1.bias"].abs().max() > 0  # it started at zero
            assert bool((head["0.deviation"] == 1).all()) == (task == "classify")  # of the features
        after = runtime.load(tmp_path / task / "last.pt")["model"]
        moved[task] = {train.weights.group(key) for key in after if not torch.equal(after[key], before[key])}
        if task == "nlvr2":  # the tiny model's pooler starts anew
            assert (after["pooler.weight"] - before["pooler.weight"]).abs().max() > 0.03
    expert = "blocks.*.experts.{}".format
    trunk = {"patches", "image_cls", "types", "image_position", "norm", "blocks.*.norm", "blocks.*.attention.shared"}
    text = {"words", "text_norm", "text_position", expert("language"), expert("vision")}
    assert moved["vqa"] == moved["nlvr2"] == trunk | text | {"pooler", expert("vl")}
    assert moved["retrieval"] == trunk | text | {"itc_image", "itc_text", "logit_scale"}
    assert moved["classify"] == trunk | {expert("vision")} and moved["probe"] == set()


def test_the_second_image_and_the_pooler_start_as_they_were_and_the_head_has_its_own_learning_rate(
    start, small_world, tmp_path, monkeypatch
):
    run = ["--task", "nlvr2", "--init", start, *BRIEF, *epochs("nlvr2", 1), "--lr", "1e-3", "--head-factor", "10"]
    call(monkeypatch, finetune, *run, "--no-fresh-pooler", "--out", tmp_path)
    content, before = runtime.load(tmp_path / "last.pt"), runtime.load(start)["model"]
    after = content["model"]
    for step in (after["types"][1:] - before["types"][1], after["pooler.weight"] - before["pooler.weight"]):
        assert 0 < step.abs().max() <= 1.01e-3  # AdamW's first step: its learning rate, and a little decay
    assert [group["lr"] for group in content["optimizer"]["param_groups"]] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])


def test_two_processes_fine_tune_as_one(start, processes, tmp_path, monkeypatch):
    run = ["--task", "nlvr2", "--init", start, *BRIEF, "--eval-every", "1"]
    folder = nlvr2(tmp_path / "data", "train", "train.json")
    nlvr2(nlvr2(folder, "dev", "dev.json"), "test1", "test1.json")
    run += ["--data", folder, "--epochs", "8", "--augment", "none"]
    call(monkeypatch, finetune, *run, "--out", tmp_path / "one")
    processes(2, main_of, "finetune", *run, "--out", tmp_path / "two", group=False)
    results = lambda name: [entry for entry in metrics(tmp_path / name) if "split" in entry]
    assert results("one") == results("two") and len(results("one")) == 3
    for name in ("last.pt", "best.pt"):
        one, two = (runtime.load(tmp_path / folder / name) for folder in ("one", "two"))
        for part in ("model", "head"):
            assert all(torch.allclose(one[part][key], two[part][key], atol=1e-5) for key in one[part])


def standardised():
    """Numbers of a linear probe from this process's part of eight pictures, and the features of all, standardised."""
    torch.manual_seed(0)
    task = evaluate.Classifier(VLMo(CONFIGS["tiny"]), 3)
    stage = finetune.TaskStage(task, None, linear_probe=True)
    image = torch.randint(0, 256, (8, 3, 48, 48), generator=torch.Generator().manual_seed(1)).byte()
    own = image.chunk(losses.world())[losses.rank()]
    finetune.standardise(stage, range(8), [{"image": part, "unreadable": []} for part in own.split(2)], "cpu")
    with torch.no_grad():
        features = task.head[0](task.features({"image": image}))
    return torch.cat([task.head[0].mean[None], task.head[0].deviation[None], features])


def test_features_of_a_linear_probe_have_mean_0_and_variance_1(processes):
    found = standardised()
    torch.testing.assert_close(found[2:].mean(0), torch.zeros(128), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2:].var(0, correction=0), torch.ones(128), atol=1e-3, rtol=0)
    for other in processes(2, standardised):
        torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-4)


def test_a_linear_probe_begins_with_a_head_of_its_own(start, small_world, tmp_path, monkeypatch):
    run = ["--task", "classify", *BRIEF, *epochs("classify", 1)]
    call(monkeypatch, finetune, *run, "--init", start, "--out", tmp_path / "whole")
    last = tmp_path / "whole" / "last.pt"
    call(monkeypatch, finetune, *run, "--init", last, "--linear-probe", "--seed", 1, "--out", tmp_path / "probe")
    before, after = (runtime.load(path)["head"] for path in (last, tmp_path / "probe" / "last.pt"))
    assert (before["0.deviation"] == 1).all() and (after["0.deviation"] != 1).all()
    assert (after["1.weight"] - before["1.weight"]).abs().max() > 0.02  # not a step away from it


def test_what_is_measured_at_the_end_is_the_best(start, small_world, tmp_path, monkeypatch):
    """Accuracies 10, 30, 20: the checkpoint of the second measurement is kept, and measured on test."""
    given, seen = iter([10.0, 30.0, 20.0, 0.0]), []

    def measured(task, *rest):
        seen.append(task.head[1].weight.clone())
        return {"accuracy": next(given)}, None

    monkeypatch.setitem(evaluate.TASKS, "classify", (evaluate.Classifier, measured))
    run = ["--task", "classify", "--init", start, *BRIEF, *epochs("classify", 3), "--eval-every", 1]
    call(monkeypatch, finetune, *run, "--out", tmp_path)
    best, last = runtime.load(tmp_path / "best.pt"), runtime.load(tmp_path / "last.pt")
    assert best["step"] == 2 and torch.equal(best["head"]["1.weight"], seen[1]) and torch.equal(seen[3], seen[1])
    assert torch.equal(last["head"]["1.weight"], seen[2]) and not torch.equal(seen[2], seen[1])


def test_random_weights_can_be_fine_tuned(small_world, tmp_path, monkeypatch):
    call(monkeypatch, finetune, "--task", "vqa", *BRIEF, *epochs("vqa", 1), "--out", tmp_path)
    content = runtime.load(tmp_path / "last.pt")
    assert content["config"]["dim"] == 128 and len(content["choices"]) == 22 and content["tokenizer"]


def test_the_answers_of_a_head_keep_their_order(small_world, tmp_path, monkeypatch):
    run = ["--task", "vqa", *BRIEF, *epochs("vqa", 1)]
    call(monkeypatch, finetune, *run, "--out", tmp_path / "first")
    content = runtime.load(tmp_path / "first" / "last.pt")
    content["choices"] = content["choices"][::-1]
    runtime.save(tmp_path / "other.pt", content)
    call(monkeypatch, finetune, *run, "--init", tmp_path / "other.pt", "--out", tmp_path / "second")
    assert runtime.load(tmp_path / "second" / "last.pt")["choices"] == content["choices"]


# ---- Official formats ------------------------------------------------------------------------------------------------


def test_vqa_from_its_files_to_a_submission(start, tmp_path, monkeypatch):
    folder = vqa(tmp_path / "data", ids=range(1, 21))  # to all of them the answer is 2
    vqa(folder, "val2014", ids=range(30, 41))
    vqa(folder, "test2015", ids=range(50, 63), annotated=())
    run = ["--task", "vqa", "--init", start, *BRIEF, "--epochs", "1", "--data", folder, "--out", tmp_path / "out"]
    call(monkeypatch, finetune, *run)
    assert runtime.load(tmp_path / "out" / "last.pt")["choices"] == ["2"]
    assert metrics(tmp_path / "out")[-1]["number"] == 100  # there is but one answer
    ask = ["--task", "vqa", "--checkpoint", tmp_path / "out" / "last.pt", "--data", folder]
    call(monkeypatch, evaluate, *ask, "--split", "test", "--predictions", tmp_path / "test.json", "--batch-size", 3)
    submission = json.loads((tmp_path / "test.json").read_text())
    assert submission == [{"question_id": id, "answer": "2"} for id in range(50, 63)]
    with pytest.raises(runtime.UserError, match="split test has no published answers: --predictions"):
        call(monkeypatch, evaluate, *ask)
    call(monkeypatch, finetune, *run, "--trainval", "--out", tmp_path / "more")
    count = lambda folder: json.loads((tmp_path / folder / "config.json").read_text())["args"]["steps"]
    assert count("out") == 2 and count("more") == 4  # 20 questions, and 31, less those that are watched


def test_nlvr2_writes_what_metrics_py_reads(start, tmp_path, monkeypatch, capsys):
    folder = nlvr2(nlvr2(tmp_path / "data", "train", "train.json"), "test1", "test1.json")
    run = ["--task", "nlvr2", "--init", start, *BRIEF, "--epochs", "4", "--data", folder, "--out", tmp_path / "out"]
    call(monkeypatch, finetune, *run)
    capsys.readouterr()
    call(
        monkeypatch, evaluate, "--task", "nlvr2", "--checkpoint", tmp_path / "out" / "last.pt", "--data", folder,
        "--predictions", tmp_path / "test1.csv",
    )  # fmt: skip
    rows = [line.split(",") for line in (tmp_path / "test1.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["test1-5-0-0", "test1-5-1-0"] and {row[1] for row in rows} <= {"True", "False"}
    right = [row[1] == label for row, label in zip(rows, ("True", "False"))]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == {"accuracy": 50 * sum(right), "consistency": 100 * all(right)}


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_head_is_refused(start, monkeypatch):
    with pytest.raises(runtime.UserError, match="has no head for task vqa: fine-tune it first: finetune.py --task vqa"):
        call(monkeypatch, evaluate, "--task", "vqa", "--checkpoint", start)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--task retrieval --head-factor 3", "--head-factor is of task vqa and nlvr2 and classify, not of retrieval"),
        ("--task vqa --itm-weight 1", "--itm-weight is of task retrieval"),
        ("--task vqa --linear-probe", "--linear-probe is of task classify"),
        ("--task vqa --trainval", "--data must name its folder"),
        ("--task vqa --config base", "--config is of a run without --init"),
        ("--task vqa --epochs 0", "--epochs must be more than 0"),
        ("--task vqa --epochs nan", "--epochs must be more than 0"),
        ("--task vqa --lr inf", "--lr and --clip must be finite"),
        ("--task vqa --batch-size 0", "--batch-size, --accumulate"),
        ("--task vqa --eval-every -1", "must not be negative"),
        ("--task vqa --image-size 17", "image_size one of patch_size"),
        ("--task vqa --data absent", "absent: no such folder"),
        ("--task retrieval --data absent", "absent: no such folder"),
        ("--task nlvr2 --vocab absent.txt", "absent.txt cannot be read"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, says, start, tmp_path, monkeypatch):
    with pytest.raises((runtime.UserError, data.DataError), match=says):
        call(monkeypatch, finetune, "--init", start, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_checkpoints_and_data_that_do_not_fit_are_refused(start, small_world, tmp_path, monkeypatch):
    run = ["--task", "classify", "--init", start, *BRIEF, "--epochs", "1", "--out", tmp_path / "out"]
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / "data" / split / name / "1.png")
    call(monkeypatch, finetune, *run, "--data", tmp_path / "data")
    last = tmp_path / "out" / "last.pt"
    with pytest.raises(runtime.UserError, match="trained with other answers or classes"):
        call(monkeypatch, finetune, *run, *epochs("classify", 1), "--resume")
    ask = ["--task", "classify", "--checkpoint", last, "--data", tmp_path / "data", "--split"]
    with pytest.raises(data.DataError, match="split test is empty"):
        call(monkeypatch, evaluate, *ask, "test")
    (tmp_path / "data" / "val" / "dog" / "1.png").write_bytes(b"broken")
    with pytest.raises(data.DataError, match="dog/1.png cannot be read"):
        call(monkeypatch, evaluate, *ask, "val")
    picture(tmp_path / "data" / "val" / "bird" / "1.png")
    with pytest.raises(data.DataError, match="class bird is none of those"):
        call(monkeypatch, evaluate, *ask, "val")
    content = runtime.load(last)
    runtime.save(tmp_path / "three.pt", content | {"choices": ["bird", "cat", "dog"]})
    with pytest.raises(runtime.UserError, match="three.pt has 3 answers or classes and a head for 2"):
        call(monkeypatch, evaluate, "--task", "classify", "--checkpoint", tmp_path / "three.pt")
    content = runtime.load(start)
    tensors = {name: tensor for name, tensor in content["model"].items() if not name.startswith("itm_head")}
    runtime.save(tmp_path / "itc.pt", content | {"model": tensors})
    for flags, says in [
        (["--task", "vqa", "--rerank", "4"], "--rerank is of task retrieval"),
        (["--predictions", "x.json"], "--predictions of vqa and nlvr2"),
        (["--task", "vqa", "--split", "dev", "--checkpoint", last], "no head for task vqa"),
        (["--task", "classify", "--split", "dev"], "there is no split dev, but train, val, test"),
        (["--rerank", "-1"], "--rerank not negative"),
        (["--task", "vqa", "--predictions", tmp_path / "no" / "x.json"], "x.json: no such folder"),
        (
            ["--rerank", "4", "--checkpoint", tmp_path / "itc.pt"],
            "itc.pt .stage vl. never learned ITM, which --rerank needs",
        ),
    ]:
        with pytest.raises((runtime.UserError, data.DataError), match=says):
            call(monkeypatch, evaluate, "--checkpoint", last, *flags)


def test_answers_too_rare_and_questions_without_answers_are_refused(start, tmp_path, monkeypatch):
    run = ["--task", "vqa", "--init", start, *BRIEF, "--epochs", "1", "--out", tmp_path / "out"]
    with pytest.raises(runtime.UserError, match="no answer comes often enough"):
        call(monkeypatch, finetune, *run, "--data", vqa(tmp_path / "few"))
    with pytest.raises(runtime.UserError, match="no annotations beside the questions"):
        call(monkeypatch, finetune, *run, "--data", vqa(tmp_path / "none", annotated=()))


def test_retrieval_reranks_with_a_head_that_learned_itm(start, small_world, tmp_path, monkeypatch, capsys):
    folder = pictures(pictures(tmp_path / "data"), split="test")
    run = ["--task", "retrieval", "--init", start, *BRIEF, "--batch-size", "2", "--epochs", "1", "--data", folder]
    call(monkeypatch, finetune, *run, "--itm-weight", "1", "--out", tmp_path / "out")
    assert {"itc", "itm"} <= metrics(tmp_path / "out")[0].keys()
    capsys.readouterr()
    call(monkeypatch, evaluate, "--checkpoint", tmp_path / "out" / "last.pt", "--data", folder, "--rerank", 3)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "reranked IR@10" in results and results["TR@10"] == 100
