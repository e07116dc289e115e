"""VQA 2.0: its files, answers, head, loss, metric and submission (Section 4.3, Appendix C).

Shape letters: b local batch, T text tokens, A answers, D dim.
"""

import collections
import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import checkpoint
import shapes
import texts
from data import Absent, Examples, split_by_hash
from mome import classifier
from reading import checked_text, fields, json_lines, malformed, official_records, path_below
from runtime import UserError
from sources import read_splits, task_folder, task_records
from stage import Task, task_flags


class VQA(Task):
    """The fusion encoder, and a classifier of [T_CLS] over A answers."""

    unit = "questions"
    submitted = "JSON for the evaluation server"
    recipe = {  # Appendix C; drop-path, the head's factor, and base_plus as base: released code
        "tiny": dict(epochs=0.32, batch_size=64, lr=5e-4, clip=1.0, save_every=100, fresh_pooler=True),
        "base": dict(epochs=10, batch_size=128, lr=3e-5, head_factor=20.0, image_size=480, drop_path=0.15),
    }
    recipe["large"] = recipe["base"] | dict(lr=1.5e-5)

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("task vqa")
        trainval = "also train on val2014, except for a fiftieth of it, which becomes split val"
        group.add_argument("--trainval", action="store_true", help=trainval)
        task_flags(parser, base)

    def __init__(self, args, config, start, run):
        super().__init__(args, start)
        self.sources = read_sources(args, config.image_size)
        self.words, config = texts.vocabulary(args, config, start, run, self.corpus)
        self.tokenizer = self.words.tokenizer
        self.set_choices(answers_to_learn(args, self.sources) if args.training else None)
        self.model, self.origin = checkpoint.begin(config, start, args.seed, self.fresh(args))
        self.numbers = {answer: k for k, answer in enumerate(self.choices)}
        self.set_head(classifier(config, config.dim, len(self.choices)))
        if args.training:
            train = self.sources["train"]
            self.samples = [Examples(train, self.words, self.target, config.image_size, args)]

    def target(self, question):
        return soft_scores(question.answers, self.numbers)

    def forward(self, batch):
        """batch: image (b, 3, S, S); text, mask (b, T); target (b, A), soft scores. The loss is a
        sum over answers, and a mean over questions."""
        logits, scores = self.predict(batch), batch["target"]
        loss = F.binary_cross_entropy_with_logits(logits, scores, reduction="none")  # (b, A)
        return {"loss": loss.sum(1).mean()}

    def predict(self, batch):
        """→ logits (b, A)."""
        states = self.model.encode_pair(batch["text"], batch["mask"], batch["image"], rows=1)  # (b, 1, D)
        return self.head(self.model.pool(states))

    def say(self, logits):
        """logits (A,) → the five best answers, each with its probability (several can be right)."""
        probabilities, best = logits.sigmoid().topk(min(5, len(logits)))
        return "\n".join(f"{p:6.1%}  {self.choices[k]}" for p, k in zip(probabilities, best))

    def published(self, source):
        return bool(source[0].answers)

    def results(self, predicted, source):
        """VQA 2.0's accuracies."""
        questions = [source[i] for i in range(len(source))]
        return accuracies([self.choices[k] for k in predicted], questions)

    def submission(self, predicted, source):
        """[{"question_id", "answer"}, …] as JSON."""
        pairs = []
        for i, k in enumerate(predicted):
            pairs.append({"question_id": source[i].id, "answer": self.choices[k]})
        return json.dumps(pairs)


# ---- Files ---------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A record of VQA 2.0. The last three are None where they are not published (test2015)."""

    image: str
    text: str
    id: int
    answers: list  # of the ten annotators
    majority: str  # the most frequent answer
    kind: str  # "yes/no", "number" or "other"


class WorldQuestions(shapes.World):
    """Four questions on every scene of the built-in world, with ten annotators who agree."""

    per_scene = shapes.TIMES

    def __getitem__(self, i):
        text, answer, kind = self.question(i)
        return Question(None, text, i, [answer] * 10, answer, kind)

    def image(self, i, view=None):
        return super().image(i // shapes.TIMES)


def read_sources(args, image_size):
    """{split: source} of --data. Training leaves out test2015, whose answers are not published."""
    if not args.training or shapes.asked(args.data):
        if args.training and args.trainval:
            raise UserError("--trainval: the built-in world has no split trainval")
        return read_splits(args.splits, lambda split: read(args.data, split, image_size))
    names = {"train": "trainval", "val": "minival"} if args.trainval else {"train": "train", "val": "val"}
    found = read_splits(list(names), lambda split: read(args.data, names[split], image_size))
    for split, source in found.items():
        if not all(source[i].answers for i in (0, len(source) - 1)):  # trainval joins two files
            raise UserError(f"--data {args.data[0]} has no annotations for split {split}")
    return found


def read(paths, split, image_size):
    """The source of a split: train, val, test, test-dev; of val, minival has a fiftieth of the
    images, and trainval the rest next to train. Absent if there is no such split."""
    if world := WorldQuestions.read(paths, split, image_size):
        return world
    folder = task_folder(paths)
    if split == "trainval":
        rest = itertools.filterfalse(in_minival, questions(folder, "val"))
        return task_records(Question, itertools.chain(questions(folder, "train"), rest), split)
    if split == "minival":
        return task_records(Question, filter(in_minival, questions(folder, "val")), split)
    return task_records(Question, questions(folder, split), split)


def in_minival(question):
    return split_by_hash(os.path.basename(question.image)) == "val"


SUBSETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


def questions(folder, split):
    """Records of a split."""
    if split not in SUBSETS:
        raise Absent(f"VQA 2.0 has no split {split}, but {', '.join(SUBSETS)}, minival, trainval")
    manifest = folder / f"{split}.jsonl"
    if manifest.exists():
        yield from own_questions(manifest)
        return
    subset = SUBSETS[split]
    path = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    if not path.exists():
        raise Absent(f"{path}: no such file; --data takes VQA 2.0's unpacked archives, or {manifest.name}")
    answers_path = folder / f"v2_mscoco_{subset}_annotations.json"
    known = annotations(answers_path) if answers_path.exists() else None
    images = subset.replace("-dev", "")  # those of test2015
    for where, entry in official_records(path, "questions"):
        with malformed(where):
            text, id = entry["question"], entry["question_id"]
            image = os.path.join(folder, images, f"COCO_{images}_{entry['image_id']:012d}.jpg")
            assert isinstance(text, str) and isinstance(id, int), "question and question_id"
            assert known is None or id in known, f"{answers_path.name} has no answers to it"
        yield Question(image, checked_text(text, where), id, *(known[id] if known else (None, None, None)))


def own_questions(path):
    """Records of a manifest: {"image": path below its folder, "question", "answers": [text, …]},
    one per line; in no line answers if they are not known. Fewer than ten are stretched to ten, so
    that an answer counts as in VQA 2.0."""
    without = set()
    for number, (where, entry) in enumerate(json_lines(path)):
        image, text = fields(where, entry, image=str, question=str)
        text = checked_text(text, where)
        file, answers = path_below(path.parent, image, where), entry.get("answers")
        without.add(answers is None)
        if len(without) > 1:
            raise UserError(f"{where}: answers must be in all lines or in none")
        if answers is None:
            yield Question(file, text, number, None, None, None)
            continue
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise UserError(f"{where}: answers must be a list of at least one text")
        [(majority, _)] = collections.Counter(answers).most_common(1)
        if len(answers) < 10:
            answers = [answers[k * len(answers) // 10] for k in range(10)]
        yield Question(file, text, number, answers, majority, "other")


def annotations(path):
    """{question_id: (answers, majority answer, type of the answer)}."""
    known = {}
    for where, entry in official_records(path, "annotations"):
        with malformed(where):
            answers = [answer["answer"] for answer in entry["answers"]]
            majority, kind = entry["multiple_choice_answer"], entry["answer_type"]
            assert answers and all(isinstance(one, str) for one in (*answers, majority, kind)), "texts"
            known[entry["question_id"]] = answers, majority, kind
    return known


# ---- Answers -------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
CONTRACTIONS = """ ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split()
APOSTROPHES = {}  # a contraction that lacks one of its apostrophes → the contraction
for _word in CONTRACTIONS:
    for _at in [match.start() for match in re.finditer("'", _word)]:
        APOSTROPHES[_word[:_at] + _word[_at + 1 :]] = _word


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as VQA 2.0's evaluation compares them: lower case; no articles, no punctuation, no
    periods but in numbers; numbers to ten as digits; contractions with their apostrophes."""
    given = text = " ".join(answer.split())
    joined = re.search(r"\d,\d", given)  # as in "1,000"
    for sign in PUNCTUATION:
        # A sign next to a space, and any sign in a text with such a number, is deleted; elsewhere it
        # becomes a space
        deleted = joined or f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if deleted else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(APOSTROPHES.get(word, word) for word in kept)


def answers_to_learn(args, sources):
    """The frequent answers of the training data; with --trainval those of all data, the usual 3,129.
    Of a manifest and of the built-in world all answers (5,000 questions of the world have every one)."""
    if shapes.asked(args.data):
        world = WorldQuestions("train", 1)
        return answer_vocabulary((world[i].majority for i in range(5000)), often=1)
    used = sources.values() if args.trainval else [sources["train"]]
    majorities = []
    for source in used:
        majorities += [source[i].majority for i in range(len(source))]
    own = Path(args.data[0], "train.jsonl").exists()
    answers = answer_vocabulary(majorities, 1 if own else 9)
    if not answers:
        raise UserError(f"--data {args.data[0]}: no answer comes often enough to be learned")
    return answers


def answer_vocabulary(majorities, often=9):
    """The answers that a model chooses from: the normalised majority answers that come at least so
    often, in the order of their first appearance. Those of train2014 and val2014 that come 9 times
    are the usual 3,129."""
    counts = collections.Counter(map(normalise, majorities))
    return [answer for answer, count in counts.items() if count >= often]


def released_answers(folder):
    """The answers of the released VQA models from a folder of VQA 2.0, in the order of the authors'
    preprocessing: as they come in train2014, then in val2014."""
    majorities = []
    for split in ("train", "val"):
        majorities += [question.majority for question in questions(Path(folder), split)]
    return answer_vocabulary(majority for majority in majorities if majority is not None)


def soft_scores(answers, numbers):
    """The annotators' answers → (A,) float: an answer that n of ten gave scores 0.3 n, at most 1.
    numbers: {answer: its number among A}."""
    scores = torch.zeros(len(numbers))
    for answer in map(normalise, answers):
        if answer in numbers:
            scores[numbers[answer]] += 0.3
    return scores.clamp(max=1)


# ---- The metric ----------------------------------------------------------------------------------


def accuracy(answer, answers):
    """VQA 2.0's accuracy of one answer: min(n / 3, 1), where n of the annotators agree, averaged
    over all the sets that leave one of them out."""
    given = [normalise(other) for other in answers]
    n, total = given.count(normalise(answer)), len(given)
    return (n * min((n - 1) / 3, 1) + (total - n) * min(n / 3, 1)) / total


def accuracies(predicted, questions):
    """Answers to a list of Question → {"accuracy", and of each type of answer its accuracy, and
    that of the best constant answer (of the ten most frequent) to all its questions}, in
    percent."""
    kinds = collections.defaultdict(list)
    for answer, question in zip(predicted, questions):
        kinds[question.kind].append((answer, question))
    out = {"accuracy": mean_accuracy(zip(predicted, questions))}
    for kind, pairs in sorted(kinds.items()):
        same_kind = [question for _, question in pairs]
        frequent = collections.Counter(question.majority for question in same_kind).most_common(10)
        constants = [mean_accuracy((answer, q) for q in same_kind) for answer, _ in frequent]
        out |= {kind: mean_accuracy(pairs), f"{kind}, best constant": max(constants)}
    return out


def mean_accuracy(pairs):
    """(answer, Question) pairs → percent."""
    values = [accuracy(answer, question.answers) for answer, question in pairs]
    return 100 * sum(values) / len(values)
