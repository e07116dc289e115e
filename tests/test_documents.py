"""What README.md says of the files."""

import re

from conftest import ROOT


def test_the_readme_is_short_and_names_every_file_with_its_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    named = {}
    for files, lines in re.findall(r"^\| (`.+?) \| ([\d, ]+) \|", text, re.MULTILINE):
        named |= dict(zip(re.findall(r"`(\w+\.py)`", files), map(int, lines.split(", ")), strict=True))
    counted = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert named == counted
