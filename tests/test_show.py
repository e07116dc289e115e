"""show.py on own files and on the built-in world: what it prints, writes, keeps and refuses."""

import functools
import re

import numpy as np
import pytest
import torch
from conftest import SIZE, call, commands, refused, tune
from files import pictures, write_lines
from PIL import Image

import checkpoint
import drawing
import images
import inside
from mome import VLMo


@pytest.fixture(scope="session")
def trained(stages, tmp_path_factory):
    """Checkpoints of all kinds by their folder: stages, tasks, MoMo."""
    folder = tmp_path_factory.mktemp("trained")
    run = ["--init", stages / "vl/last.pt", "--batch-size", 8, "--epochs", 1e-9, "--eval-every", 0]
    for task in ("vqa", "nlvr2"):
        tune(task, folder / task, *run)
    brief = ["--batch-size", 8, "--steps", 1, "--out"]
    call("train", "--stage", "momo-image", *SIZE, *brief, folder / "momo-image")
    start = ["--init", folder / "momo-image/last.pt", "--max-text-len", 24]
    call("train", "--stage", "momo-vl", *start, *brief, folder / "momo-vl")
    for name in ("image", "text", "vl"):
        (folder / name).symlink_to(stages / name)
    (folder / "no-words").mkdir()
    content = torch.load(stages / "vl/last.pt", weights_only=True)
    torch.save(content | {"tokenizer": None}, folder / "no-words/last.pt")
    return folder


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with own files, in which show.py runs: four plain images, and texts."""
    folder = tmp_path / "own"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (30, 20), color).save(folder / f"{i}.png")
    write_lines(tmp_path / "texts.txt", "a red circle", "", "a blue star")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inside, "pointing_game", functools.partial(inside.pointing_game, count=5))
    return tmp_path


COMMANDS = """
search --checkpoint vl | search --checkpoint vl --images own --text red blue --rerank 3
search --checkpoint vl --images own --image own/1.png | match --checkpoint vl
search --checkpoint vl --image own/1.png --texts texts.txt
search --checkpoint vl --image own/1.png --texts texts.txt --rerank 2 --best 1
match --checkpoint vl --image own/0.png --text red blue | ask --checkpoint vqa
ask --checkpoint vqa --image own/0.png --question what? | compare --checkpoint nlvr2
compare --checkpoint nlvr2 --images own/0.png own/1.png --statement red. | attend --checkpoint vl
attend --checkpoint vl --image own/0.png --text red --layers 1 2 --heads 2 | attend --checkpoint vl --relevance
attend --checkpoint momo-vl | masked --checkpoint image | masked --checkpoint image --image own/0.png
masked --checkpoint text | masked --checkpoint vl --image own/0.png --text red | masked --checkpoint momo-image
masked --checkpoint momo-vl | curve runs/vl runs/image | curve runs/vl/metrics.jsonl --only itc
"""


def run(trained, command, *more):
    """Runs a command line in which checkpoints and runs are named by their folder."""
    texts = {"EMPTY": "", "LONG": "word " * 10_000, "LATIN": "caf\udce9"}  # of a terminal in Latin-1
    words = [texts.get(word, word) for word in command.replace("runs/", f"{trained}/").split()] + [*more]
    for k, word in enumerate(words):
        if word == "--checkpoint":
            words[k + 1] = trained / words[k + 1] / "last.pt"
    call("show", *words)


@pytest.mark.parametrize("command", commands(COMMANDS))
def test_every_command_prints_and_draws(command, trained, own, capsys):
    run(trained, command)
    out = capsys.readouterr().out.splitlines()
    name = command.split()[0]
    assert f"{name}.png" in out and (name == "curve" or len(out) > 1 or "image" in command)
    with Image.open(f"{name}.png") as picture:
        assert picture.width > 100 and picture.height > 100 and len(picture.getcolors(2**20)) > 5


def test_the_vectors_of_a_folder_are_kept_until_something_changes(trained, own, capsys):
    def search():
        run(trained, "search --checkpoint vl --images own --text red --out found/a.png")
        return capsys.readouterr().out

    (own / "found").mkdir()
    (own / "own/broken.png").write_bytes(b"no image")
    first = search()
    assert "5 of 5 images are new" in first and "broken.png cannot be read" in first
    assert len(re.findall(r"own/\d.png", first)) == 4
    assert first.count("broken") == 1
    again = search()
    assert again == first[first.index("red\n") :]
    Image.new("RGB", (9, 9), "yellow").save(own / "own/2.png")
    assert "1 of 5 images are new" in search()
    (trained / "vl/last.pt").touch()
    assert "5 of 5 images are new" in search()
    (own / "found/a.vectors.npz").write_bytes(b"no archive")
    refused(search)


def test_the_best_of_a_folder_are_those_of_a_dot_product(trained, own, capsys, monkeypatch):
    """Also the vectors that embed writes, and the order in which --rerank puts them."""

    def contradict(self, text, mask, image):
        """Logits of matching that put the best last."""
        cosines = (self.embed_image(image) * self.embed_text(text, mask)).sum(1)
        return torch.stack([50 * cosines, 0 * cosines], dim=1)

    monkeypatch.setattr(VLMo, "match", contradict)
    model, words, config = checkpoint.load_model(trained / "vl/last.pt")
    assert not model.training
    image = images.read_images([own / f"own/{i}.png" for i in range(4)], config.image_size)
    ids, mask = words.encode_all(["a red circle"])
    with torch.no_grad():
        scores = model.embed_image(image) @ model.embed_text(ids, mask)[0]
        logits = model.match(ids.expand(4, -1), mask.expand(4, -1), image)
    by_both = model.scale().detach() * scores + logits[:, 1] - logits[:, 0]
    two = torch.where(scores >= scores.topk(2).values[1], 1000 + by_both, scores)  # before the others
    for flags, order in (("", scores), ("--rerank 4", by_both), ("--rerank 2", two)):
        command = f"search --checkpoint vl --images own {flags}"
        run(trained, command, "--text", "a red circle")
        out = capsys.readouterr().out
        found = re.findall(r"own/(\d).png", out)
        assert list(map(int, found)) == order.argsort(descending=True).tolist()
        assert out.count("match") == int(flags[-1:] or 0)  # only the best K are matched
    run(trained, "embed --checkpoint vl --images own --texts texts.txt --out v.npz")
    with np.load("v.npz") as file:
        found = file["image_vectors"] @ file["text_vectors"][0]
        np.testing.assert_allclose(found, scores, atol=1e-5)
        assert list(file["images"]) == [f"own/{i}.png" for i in range(4)]
        assert list(file["texts"]) == ["a red circle", "a blue star"]


def test_known_right_pictures_are_framed(trained, own, capsys):
    pictures(own / "known", split="test")
    command = "search --checkpoint vl --images known --best 6"
    run(trained, command, "--text", "picture number 2")
    out = capsys.readouterr().out
    assert out.count("(right)") == 1 and "known/2.png  (right)" in out
    with Image.open("search.png") as picture:
        assert drawing.GREEN in [color for _, color in picture.getcolors(2**20)]
    write_lines(own / "known/test.jsonl", {"image": "0.png", "captions": ["word " * 500]})
    run(trained, command)  # only typed texts must be read whole


def test_probabilities_are_those_of_the_heads(trained, own, capsys):
    """Of a match, of answers, of a statement."""
    model, words, config = checkpoint.load_model(trained / "vl/last.pt")
    image = images.read_images(["own/0.png"], config.image_size)
    ids, mask = words.encode_all(["red"])
    with torch.no_grad():
        cosine = (model.embed_image(image) @ model.embed_text(ids, mask).T).item()
        probability = model.match(ids, mask, image).softmax(1)[0, 1].item()
    run(trained, "match --checkpoint vl --image own/0.png --text red")
    assert capsys.readouterr().out.startswith(f"ITC {cosine:6.3f}   ITM {probability:6.1%}   red")

    run(trained, "ask --checkpoint vqa --image own/0.png --question what?")
    answers = re.findall(r"([\d.]+)%  (\w+)", capsys.readouterr().out)
    assert len(answers) == 5
    assert sorted(map(float, dict(answers)), reverse=True) == [float(p) for p, _ in answers]
    run(trained, "compare --checkpoint nlvr2 --images own/0.png own/1.png --statement red.")
    assert re.search(r"(5|6|7|8|9|10)\d.\d% (true|false)", capsys.readouterr().out)


REFUSED = """
search --checkpoint vl --images absent --text a | search --checkpoint absent | search --checkpoint image
search --checkpoint vl --images empty --text a | search --checkpoint vl --images own
search --checkpoint vl --images own --image own/0.png --rerank 2 | search --checkpoint vl --texts texts.txt
search --checkpoint vl --image own/0.png --texts empty.txt | search --checkpoint vl --image texts.txt
search --checkpoint vl --images own --texts texts.txt | search --checkpoint vl --out absent/a.png
match --checkpoint vl --image own/0.png | match --checkpoint no-words | match --checkpoint vl --text EMPTY
match --checkpoint vl --text LONG | match --checkpoint vl --text LATIN
match --checkpoint vl --text 日本語 | curve runs/vl --only split
ask --checkpoint vl | ask --checkpoint vqa --image own/0.png | compare --checkpoint vqa
attend --checkpoint vl --layers 3 | attend --checkpoint vl --relevance --heads 1
attend --checkpoint momo-vl --relevance | masked --checkpoint momo-vl --image own/0.png
curve absent | curve texts.txt | curve runs/vl --only itc nothing | nothing
"""


@pytest.mark.parametrize("command", commands(REFUSED))
def test_what_does_not_fit_is_refused(command, trained, own):
    (own / "empty").mkdir()
    (own / "empty.txt").write_text("\n")
    refused(run, trained, command)


def test_a_model_loaded_from_python_has_only_what_was_learned(trained):
    model, words, _ = checkpoint.load_model(trained / "image/last.pt")
    assert words is None
    refused(model.embed_image, torch.zeros(1, 3, 16, 16), error=AttributeError)
    refused(checkpoint.load_model, trained / "image/last.pt", ["itc_image"])


def test_a_run_ends_with_pictures(stages):
    for name in ("vl/curve.png", "vl/retrieval.png", "dvae/reconstructions.png", "image/curve.png"):
        with Image.open(stages / name) as picture:
            assert picture.width > 100
