"""VQA 2.0: answers and their accuracy by hand, the published files, the built-in world's questions."""

from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from files import picture, vqa, write_lines

import data
import shapes
import vqa as task
from sides import bare
from vqa import Question


@pytest.mark.parametrize(
    "answer, means",
    [
        ("a dog.", "dog"), ("The dog", "dog"), ("Two", "2"), ("none", "0"), ("red?", "red"),
        ("3.5", "3.5"), ("1,000", "1000"), ("yes, sir", "yes sir"), ("black/white", "black white"),
        ("isnt", "isn't"), ("dont know", "don't know"), ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"), ("'ows'at", "'ow's'at"), ("well", "well"), ("a.m.", "am"),
        (" on\tthe\n table ", "on table"), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_compared_as_vqa_does(answer, means):
    assert task.normalise(answer) == means


def test_the_model_learns_answers_that_come_nine_times():
    majorities = ["Yes"] * 5 + ["yes."] * 4 + ["no"] * 12 + ["two"] * 8 + ["a cat"] * 9
    assert task.answer_vocabulary(majorities) == ["yes", "no", "cat"]


def test_the_loss_is_a_sum_over_answers_and_a_mean_over_questions(monkeypatch):
    logits, scores = torch.randn(3, 4), torch.rand(3, 4)
    monkeypatch.setattr(task.VQA, "predict", lambda self, batch: logits)
    p = logits.sigmoid()
    expected = -(scores * p.log() + (1 - scores) * (1 - p).log()).sum() / 3
    torch.testing.assert_close(bare(task.VQA, None)({"target": scores})["loss"], expected)


@pytest.mark.parametrize("n, score, accuracy", [(0, 0, 0), (1, 0.3, 0.3), (2, 0.6, 0.6), (4, 1, 1)])
def test_scores_and_accuracy_of_an_answer_that_n_of_ten_gave(n, score, accuracy):
    """Accuracy of 2: in two of the ten sets without one annotator 1/3, in the others 2/3."""
    answers = ["A dog", "dog.", "the dog", "dog"][:n] + ["cat"] * (10 - n)
    assert task.accuracy("a dog", answers) == pytest.approx(accuracy)
    scores = task.soft_scores(answers, {"bird": 0, "dog": 1, "cat": 2})
    torch.testing.assert_close(scores, torch.tensor([0, score, 1.0]))


def test_accuracies_by_type_next_to_the_best_constant():
    given = [("yes", "yes/no"), ("yes", "yes/no"), ("no", "yes/no"), ("2", "number")]
    questions = [Question(None, "?", 0, [answer] * 10, answer, kind) for answer, kind in given]
    results = task.accuracies(["yes", "no", "no", "two"], questions)
    assert results == pytest.approx({
        "accuracy": 75,
        "yes/no": 200 / 3, "yes/no, best constant": 200 / 3,
        "number": 100, "number, best constant": 100,
    })  # fmt: skip


def test_files_are_read_as_downloaded(tmp_path):
    source = task.read([vqa(tmp_path)], "train", 8)
    file = str(tmp_path / "train2014" / "COCO_train2014_000000000012.jpg")
    assert source[1] == Question(file, "What is 2?", 2, ["two"] * 10, "2", "number")
    assert len(source) == 3 and source.image(0).size == (8, 8)
    assert next(iter(source.corpus())) == "What is 1?"
    for split in ("val", "valid"):  # not there, and not known
        refused(task.read, [tmp_path], split, 8, error=data.Absent)

    # Without answers, and on images that have another name
    vqa(tmp_path, "test2015", ids=(4, 5), annotated=())
    name = "v2_OpenEnded_mscoco_test{}2015_questions.json"
    (tmp_path / name.format("")).rename(tmp_path / name.format("-dev"))
    question = task.read([tmp_path], "test-dev", 8)[1]
    assert question.image.endswith("test2015/COCO_test2015_000000000015.jpg")
    assert question.answers is None


def test_trainval_and_minival_share_no_image_and_lose_none(tmp_path):
    vqa(vqa(tmp_path), "val2014", ids=range(100, 400))
    args = SimpleNamespace(data=[str(tmp_path)], training=True, splits=data.SPLITS, trainval=True)
    found = task.read_sources(args, 8)
    most, few = ([record.image for record in found[split]] for split in ("train", "val"))
    assert len(most) + len(few) == 303 and 0 < len(few) < 20 and set(most).isdisjoint(few)


def test_a_manifest_of_own_questions(tmp_path):
    picture(tmp_path / "below/a.png")
    lines = [
        {"image": "below/a.png", "question": "What is it?", "answers": ["a dog", "dog", "a dog"]},
        {"image": "below/a.png", "question": "Is it red?", "answers": ["yes"]},
    ]
    write_lines(tmp_path / "train.jsonl", *lines)
    source = task.read([tmp_path], "train", 8)
    file = str(tmp_path / "below/a.png")
    ten = ["a dog"] * 4 + ["dog"] * 3 + ["a dog"] * 3  # an answer counts as in VQA 2.0
    assert source[0] == Question(file, "What is it?", 0, ten, "a dog", "other")
    assert source[1].answers == ["yes"] * 10 and task.accuracy("Yes.", source[1].answers) == 1
    args = SimpleNamespace(data=[str(tmp_path)], trainval=False)
    assert task.answers_to_learn(args, {"train": source}) == ["dog", "yes"]  # each came once
    for line in lines:
        del line["answers"]
    write_lines(tmp_path / "train.jsonl", *lines)
    assert task.read([tmp_path], "train", 8)[1].answers is None


def test_ten_scenes_have_the_answers_of_the_whole_world():
    args = SimpleNamespace(data=["shapes:10"], trainval=False)
    answers = task.answers_to_learn(args, {"train": task.read(args.data, "train", 16)})
    assert {"yes", "no", *"0123", *shapes.COLORS, *shapes.SHAPES, *shapes.SIZES} == set(answers)


def test_the_world_asks_four_questions_about_each_scene():
    source = task.WorldQuestions("test", 32, count=300)
    assert len(source) == 1200 and source[9].answers == [source[9].majority] * 10
    assert source.image(7).tobytes() == source.image(4).tobytes() != source.image(8).tobytes()
