"""What the documents say of the files, and the programs in them."""

import json
import re

import torch
from conftest import ROOT
from files import karpathy, write_lines
from PIL import Image


def program(name):
    """The Python program in a document."""
    return re.search(r"```python\n(.+?)```", (ROOT / name).read_text(), re.DOTALL)[1]


def test_the_readme_is_short_and_names_every_file_with_its_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    named = {}
    for files, lines in re.findall(r"^\| (`.+?) \| ([\d, ]+) \|", text, re.MULTILINE):
        named |= dict(zip(re.findall(r"`(\w+\.py)`", files), map(int, lines.split(", ")), strict=True))
    counted = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert named == counted
    count = sum(named[name] for name in ("mome.py", "relative.py", "losses.py"))
    assert f"losses are {count} lines" in text.replace("\n", " ")


def test_the_paper_map_names_what_is_there():
    listed = re.findall(r"`(\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", (ROOT / "README.md").read_text())
    assert len(listed) > 10
    for file, names in listed:
        for name in re.findall(r"(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), f"{file}: {name}"


def test_the_documents_name_files_that_are_there_and_pictures_are_small():
    size = 0
    for document in ("README.md", "RECIPES.md", "RESULTS.md", "DEVIATIONS.md"):
        text = (ROOT / document).read_text()
        for name in re.findall(r"\]\((?!http)(.+?)\)", text) + re.findall(r"`(docs/\S+?)`", text):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\((docs/.+?\.png)\)", (ROOT / "README.md").read_text()):
        size += (ROOT / name).stat().st_size
    assert size < 300_000


def test_the_readme_s_program_runs(stages, tmp_path, monkeypatch):
    (tmp_path / "coco.pt").symlink_to(stages / "vl/last.pt")
    for name in ("dog.jpg", "cat.jpg"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(program("README.md"), names)
    assert names["cosine"].shape == (2, 2)
    torch.testing.assert_close(names["cosine"][0], names["cosine"][1])  # of equal pictures


def test_the_recipe_s_program_makes_a_manifest_of_visual_genome(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures, regions = [], []
    for number, coco, flickr in ((1, None, None), (2, 77, None), (3, None, 88), (4, None, 89)):
        url = f"https://x/VG_100K_2/{number}.jpg"
        pictures.append({"image_id": number, "url": url, "coco_id": coco, "flickr_id": flickr})
        regions.append({"id": number, "regions": [{"phrase": text} for text in (" a dog ", "a dog", "")]})
    write_lines(tmp_path / "vg/image_data.json", pictures)
    write_lines(tmp_path / "vg/region_descriptions.json", regions)
    karpathy(tmp_path / "coco", {"cocoid": 77, "split": "test"}, {"cocoid": 78, "split": "train"})
    held = ({"filename": f"{id}.jpg", "split": split} for id, split in ((88, "val"), (89, "train")))
    karpathy(tmp_path / "f30k", *held, name="flickr30k")
    exec(program("RECIPES.md"), {})
    lines = (tmp_path / "vg/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"image": f"VG_100K_2/{k}.jpg", "captions": ["a dog"]} for k in (1, 2, 3, 4)
    ]
    assert (tmp_path / "exclude.txt").read_text() == "2.jpg\n3.jpg\n"
