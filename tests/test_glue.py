"""GLUE: metrics worked out by hand, the official files, samples, predictions."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, call, refused, tune
from files import write_lines

import data
import glue
import shapes
import texts
from mome import VLMo
from sides import bare


def test_metrics_by_hand():
    predicted, right = [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]
    assert glue.accuracy(predicted, right) == pytest.approx(50)
    assert glue.f1(predicted, right) == pytest.approx(40)  # precision 1/3, recall 1/2
    # Matthews: (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    assert glue.pearson(predicted, right) == pytest.approx(100 * (1 * 2 - 2 * 1) / (3 * 2 * 4 * 3) ** 0.5)
    assert glue.pearson([1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(100 / 3**0.5)
    assert glue.pearson([1.0, 2.0, 4.0], [10.0, 8.0, 4.0]) == pytest.approx(-100)
    assert glue.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1, 3.5, 2]
    assert glue.spearman([1.0, 2.0, 9.0], [0.1, 5.0, 5.1]) == pytest.approx(100)
    assert glue.pearson([0, 0, 0], [0, 1, 0]) == glue.f1([0, 0], [0, 0]) == 0


HEADERS = {  # of the official files, and the columns of texts and label
    "CoLA": ("source label mark sentence", "sentence", "label"),
    "SST-2": ("sentence label", "sentence", "label"),
    "MRPC": ("Quality #1_ID #2_ID #1_String #2_String", "#1_String #2_String", "Quality"),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "question1 question2", "is_duplicate"),
    "STS-B": ("index genre filename year old_index source1 source2 sentence1 sentence2 score",
              "sentence1 sentence2", "score"),
    "MNLI": ("index promptID pairID sentence1 sentence2 label1 gold_label",
             "sentence1 sentence2", "gold_label"),
    "QNLI": ("index question sentence label", "question sentence", "label"),
    "RTE": ("index sentence1 sentence2 label", "sentence1 sentence2", "label"),
}  # fmt: skip
NAMES = {task.folder: name for name, task in glue.TASKS.items()}


def write(folder, task, file, labels):
    """A file of a task: line i has texts "i first", "i second" and a label; None: the column is not there."""
    header, columns, [label] = map(str.split, HEADERS[task])
    if labels[0] is None:
        header.remove(label)
    lines = ["\t".join(header).replace("#1_", "#1 ").replace("#2_", "#2 ")]
    for i, value in enumerate(labels):
        row = dict.fromkeys(header, "x") | {label: value}
        row |= zip(columns, (f'{i} "first', f'{i} "second'))
        lines.append("\t".join(row[name] for name in header))
    if task == "CoLA" and "test" not in file:
        lines = lines[1:]
    if task == "MRPC":  # as its train and dev begin
        lines[0] = "\ufeff" + lines[0]
    write_lines(folder / task / file, *lines)


@pytest.mark.parametrize("task", HEADERS)
def test_official_files_are_read(task, tmp_path, capsys):
    kind = glue.TASKS[NAMES[task]]
    labels = kind.labels or ["3.200", "0.5"]
    write(tmp_path, task, kind.files["val"], labels)
    write(tmp_path, task, kind.files["test"], [None, None])
    for name in ("val", "test"):
        with open(tmp_path / task / kind.files[name], "a") as file:
            file.write("a line that is cut off\n")
    source, test = (glue.read(kind, [str(tmp_path)], name) for name in ("val", "test"))
    count = len(HEADERS[task][1].split())
    for i, label in enumerate(labels):
        assert source[i] == ([f'{i} "first', f'{i} "second'][:count], label)
    assert len(source) == len(labels) and test[0].label is None
    assert len(test) == 3  # a submission has a line for each
    stage = SimpleNamespace(choices=kind.labels)
    target = [glue.GLUE.target(stage, source[i]).item() for i in range(len(source))]
    assert target == pytest.approx(list(range(len(labels))) if kind.labels else [3.2, 0.5])
    assert f"1 of {len(labels) + 1} samples are left out" in capsys.readouterr().err
    refused(glue.read, kind, [str(tmp_path)], "train", error=data.Absent)
    write_lines(tmp_path / task / kind.files["test"], "index\ttext")  # of another task
    refused(glue.read, kind, [str(tmp_path)], "test", says=f"has no column {kind.columns[0]}")
    write(tmp_path, task, kind.files["val"], [*labels, "x" * 200_000])  # more than csv reads
    refused(glue.read, kind, [str(tmp_path)], "val", says=f"{kind.files['val']}, line")
    if not kind.labels:
        write(tmp_path, task, kind.files["val"], ["many"])
        refused(glue.read, kind, [str(tmp_path)], "val", says="line 2: .*many")


def test_two_texts_have_a_separator_and_the_longer_is_cut():
    words = texts.Words(texts.train_tokenizer(lambda: ["a b c d e f g h"], 40), 9)
    ids = {letter: words.tokenizer.token_to_id(letter) for letter in "abcdefgh"}
    found, mask = words.encode("a b", "c d e f g h")
    wanted = [words.cls, ids["a"], ids["b"], words.sep, *(ids[x] for x in "cdef"), words.sep]
    assert found.tolist() == wanted and mask.all()
    assert words.encode("a", "b")[0].tolist()[:5] == [words.cls, ids["a"], words.sep, ids["b"], words.sep]


def test_a_caption_follows_from_another_in_half_of_the_cases():
    world, follow = glue.WorldEntailment("train", 1, count=2000), 0
    for i in range(2000):
        (premise, claim), label = world[i]
        scene = world.scene(i)
        assert premise in shapes.describe(scene)
        things = scene["things"]
        pairs = [(a, b) for k, a in enumerate(things) for b in things[k + 1 :]]
        right = [shapes.describe({"layout": scene["layout"], "things": list(pair)}) for pair in pairs]
        assert (claim in sum(right, [])) == (label == "entailment")
        follow += label == "entailment"
    assert 900 < follow < 1100


@pytest.mark.parametrize("name", ["sts-b", "mnli"])
def test_from_official_files_to_a_submission(name, stages, tmp_path, monkeypatch, capsys):
    kind = glue.TASKS[name]
    labels = (kind.labels or ["1.5", "4.0"]) * 12
    for file in set(kind.files.values()):
        write(tmp_path, kind.folder, file, labels[:6] if "test" not in file else [None] * 5)
    run, out = ["--data", tmp_path, "--batch-size", 6], tmp_path / "out"
    start = ["--init", stages / "vl/last.pt"] if name == "sts-b" else []  # else a new vocabulary
    assert tune(name, out, *run, *start, "--epochs", 4, "--max-text-len", 44).extra["choices"] == kind.labels
    again = tune(name, tmp_path / "again", *run, "--init", out / "last.pt", "--epochs", 1e-9)
    assert again.config.max_text_len == 44  # it keeps its own
    ask = ["--task", name, "--checkpoint", out / "best.pt", "--data", tmp_path]
    call("evaluate", *ask, "--split", "val")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == kind.metrics.keys()
    call("evaluate", *ask, "--predictions", tmp_path / "answers.tsv")
    header, *lines = (tmp_path / "answers.tsv").read_text().splitlines()
    assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == list("01234")
    said = [line.split("\t")[1] for line in lines]
    assert all(answer in kind.labels if kind.labels else float(answer) for answer in said)
    refused(call, "evaluate", *ask, "--split", "test")  # nothing to measure, and nothing to write


def test_submitted_scores_are_between_0_and_5():
    stage = bare(glue.GLUE, VLMo(SMALL), choices=[])
    assert stage.submission([5.07, -0.01, 2.5], None) == "index\tprediction\n0\t5.0\n1\t0.0\n2\t2.5\n"


@pytest.mark.parametrize("choices, target", [([], [1.0, 4.5]), (["no", "yes"], [0, 1])])
def test_the_loss_of_a_number_is_its_squared_error_and_of_a_class_cross_entropy(choices, target):
    stage = bare(glue.GLUE, VLMo(SMALL), head=torch.nn.Linear(24, max(1, len(choices))), choices=choices)
    text, target = torch.randint(5, 50, (2, 7)), torch.tensor(target)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    logits = stage.head(stage.model.encode_text(text, mask)[:, 0])
    expected = (logits[:, 0] - target).square().mean()
    if choices:
        expected = -logits.log_softmax(1)[[0, 1], target].mean()
    torch.testing.assert_close(stage({"text": text, "mask": mask, "target": target})["loss"], expected)
