"""A few cases of fuzz.py and of kill.py, which are commands for many more."""

import os
import subprocess
import sys
import warnings

import fuzz
from conftest import ROOT


def test_damaged_files_are_read_or_refused_in_one_line():
    with warnings.catch_warnings(action="ignore"):
        outcomes, wrong = fuzz.run(4 * len(fuzz.READERS))
    assert not wrong
    for kind in ("manifest of pairs", "checkpoint", "released file"):
        assert outcomes[kind]["refused"] > 1
    assert sum(found["read"] for found in outcomes.values()) > len(fuzz.READERS)


def test_killed_runs_go_on_bit_for_bit():
    command = [sys.executable, "tests/kill.py", "--kills", "1", "--only", "momo-image"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "1 went on  0 differed" in answer.stdout
