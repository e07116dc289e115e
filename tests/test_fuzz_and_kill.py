"""A few cases of the commands of stress/ that have many more."""

import contextlib
import io
import warnings

import fuzz
import pytest
from conftest import call


def test_damaged_files_are_read_or_refused_in_one_line():
    with warnings.catch_warnings(action="ignore"):
        outcomes, wrong = fuzz.run(4 * len(fuzz.READERS))
    assert not wrong
    for kind in ("manifest of pairs", "checkpoint", "released file"):
        assert outcomes[kind]["refused"] > 1
    assert sum(found["read"] for found in outcomes.values()) > len(fuzz.READERS)


def kill_one():
    """→ what the command says, and its exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        call("kill", "--kills", 1, "--only", "momo-image")
    return said.getvalue(), end.value.code


def test_killed_runs_go_on_bit_for_bit(processes):
    """In a process of its own, because it forks."""
    [(said, status)] = processes(1, kill_one, group=False)
    assert not status and "1 went on  0 differed" in said
