"""Optimizer groups, schedule, seeds, files, the log."""

import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import RELATIVE, metrics, refused
from torch import nn

import log
import losses
import runtime
import train
from mome import CONFIGS, VLMo
from sides import bare
from stage import Stage


@pytest.mark.parametrize("switches", [{}, RELATIVE])
def test_groups_hold_every_trainable_parameter_once_and_only_matrices_decay(switches):
    model, head = VLMo(replace(CONFIGS["tiny"], **switches)), nn.Linear(3, 2)
    model.mlm_head.requires_grad_(False)
    groups = runtime.adamw(bare(Stage, model, head=head, head_factor=20.0)).param_groups
    kinds = [(group["factor"], group["weight_decay"]) for group in groups]
    assert kinds == [(20.0, 0.01), (20.0, 0.0), (1.0, 0.01), (1.0, 0.0)]
    weight, bias, decaying, plain = (group["params"] for group in groups)
    assert weight == [head.weight] and bias == [head.bias]
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    assert len(decaying + plain) == len(names) and names.keys() == {*decaying, *plain}
    tables = {"relative_table"} if switches else {"text_position", "image_position"}
    assert {names[p] for p in plain if p.ndim > 1} == {"types"} | tables
    assert all(p.ndim > 1 for p in decaying)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [runtime.learning_rate(step, steps=10, warmup=4, peak=8.0) for step in range(1, 12)]
    assert rates == pytest.approx([2, 4, 6, 8, 48 / 7, 40 / 7, 32 / 7, 24 / 7, 16 / 7, 8 / 7, 0])
    assert runtime.learning_rate(1, steps=1, warmup=0, peak=1.0) == 1.0
    wave = [runtime.learning_rate(step, 11, 4, 8.0, decay="cosine") for step in range(1, 13)]
    assert wave[:4] == rates[:4] and wave[7] == pytest.approx(4.0) and wave[11] == 0.0
    assert wave[5] == pytest.approx(4 * (1 + 2**-0.5))  # a quarter of the way: 4·(1 + cos 45°)


def test_seeds_differ_by_every_word():
    draws = set()
    for words in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1), (1, 0)]:
        runtime.seed_all(*words)
        draws.add(torch.rand(1).item())
    assert len(draws) == 6


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    path = tmp_path / "file"
    runtime.write(path, lambda file: file.write(b"old"))
    monkeypatch.setattr(os, "fsync", full)
    refused(runtime.write, path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def log_in(folder, done=0, amp="off"):
    """A Log of a run that takes 8 samples per step."""
    args = SimpleNamespace(steps=40, batch_size=8, amp=amp)
    stage = bare(Stage, nn.Module(), loss_weights={"itc": 1.0})
    return log.Log(folder, args, runtime.Runtime(), stage, SimpleNamespace(unreadable=3, waited=0.0), done)


def test_lines_are_means_per_name_over_the_parts_that_have_it(tmp_path, monkeypatch):
    """As with --no-cmga, where the modalities take turns."""
    seconds = iter(range(100))  # one from call to call
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(seconds))
    log = log_in(tmp_path)
    for name, value in (("itc", 1.0), ("mim", 10.0), ("itc", 2.0), ("itc", 6.0)):
        log.add({name: torch.tensor(value)})  # two parts of each of two steps
    for norm in (0.5, 1.5):
        log.end_step(torch.tensor(norm))
    log.write(2, lr=0.25)
    log.add({"itc": torch.tensor(7.0)})
    log.end_step(torch.tensor(2.0))
    log.write(3, lr=0.5)
    log.close()
    first = {"step": 2, "itc": 3.0, "mim": 10.0, "gradient norm": 1.0, "lr": 0.25}
    second = {"step": 3, "itc": 7.0, "gradient norm": 2.0, "lr": 0.5}
    assert metrics(tmp_path) == [
        first | {"pairs_per_s": 16.0, "waited_s": 0.0, "unreadable": 3},
        second | {"pairs_per_s": 8.0, "waited_s": 0.0, "unreadable": 3},
    ]


def test_what_is_not_finite_ends_the_run_and_a_skipped_fp16_step_does_not(tmp_path):
    for amp, name in (("off", "itc"), ("off", "gradient norm"), ("fp16", "itc")):
        log = log_in(tmp_path, amp=amp)
        log.add({"itc": torch.tensor(1.0)} | {name: torch.tensor(torch.inf)})
        refused(log.write, 1, lr=0.1)
    log = log_in(tmp_path)
    log.add({"itc": torch.tensor(1.0)})
    with mock.patch.object(losses, "over_processes", return_value=[torch.nan, 1.0, 0.0, 0.0, 0.0]):
        refused(log.write, 1, lr=0.1)  # it is not finite on another process
    log = log_in(tmp_path, done=20)
    log.stage.register_parameter("weight", nn.Parameter(torch.tensor([1.0, torch.nan])))
    log.add({"itc": torch.tensor(1.0)})
    refused(log.write, 21, lr=0.1, says="last.pt is of step 20")
    log = log_in(tmp_path, amp="fp16")
    for norm in (3.0, torch.inf, 5.0):
        log.end_step(torch.tensor(norm))
    log.write(3, lr=0.1)
    [entry] = metrics(tmp_path)
    assert entry["gradient norm"] == pytest.approx(4) and entry["skipped"] == 1
    for _ in range(100):
        log.end_step(torch.tensor(torch.nan))
    refused(log.write, 103, lr=0.1)
    log = log_in(tmp_path, done=39, amp="fp16")  # a resumed run may skip its last step
    log.end_step(torch.tensor(torch.inf))
    log.write(40, lr=0.1)


def test_a_resumed_run_drops_later_lines_and_that_of_the_test_split(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 10}', '{"step": 20}', '{"step": 20, "split": "val"}']
    dropped = ['{"step": 30}', '{"step": 20, "split": "test"}', '{"step": 4']  # the last is cut off
    path.write_text("\n".join(kept + dropped))
    log_in(tmp_path, done=20).line(step=30, itc=0.5)
    assert path.read_text().splitlines() == [*kept, '{"step": 30, "itc": 0.5}']

    # A damaged one is refused before anything is cut
    path.write_text(damaged := '{"step": 1}\n{"ste\n{"step": 3}\n')
    refused(log_in, tmp_path, done=3)
    assert path.read_text() == damaged


@pytest.mark.parametrize(
    "error, status, says",
    [
        (IsADirectoryError(21, "Is a directory", "a/folder"), 2, "a/folder"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "--recompute"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 TB"), 2, "--recompute"),
        (runtime.Stopped(signal.SIGINT, "stopped after step 3"), 130, "stopped after step 3"),
    ],
)
def test_what_ends_a_script_is_one_line_and_an_exit_status(error, status, says, monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=str(status)):
        runtime.run(mock.Mock(side_effect=error))
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="another"):
        runtime.run(mock.Mock(side_effect=RuntimeError("another")))


def test_a_process_without_its_rank_does_not_wait(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    refused(runtime.Runtime, says="torchrun")


def ask_process_0():
    run = runtime.Runtime()
    assert run.from_main(lambda: run.rank) == 0
    refused(run.from_main, lambda: runtime.refuse_output("--out", "absent/x"), says="no file")
    start = SimpleNamespace(step=run.rank, resumed=True)
    with mock.patch.object(runtime, "Runtime", return_value=run):
        refused(train.start_runtime, SimpleNamespace(amp="off", out="x"), start, says="all nodes")


def test_all_processes_have_the_answer_or_the_error_of_the_first(processes):
    processes(2, ask_process_0, group=False)


def terminate(_):
    os.kill(os.getpid(), signal.SIGTERM)
    return os.getpgrp()


def test_no_signal_to_all_processes_ends_a_loader_before_the_run():
    loader = torch.utils.data.DataLoader(range(2), collate_fn=terminate, **runtime.workers("cpu", 1))
    assert os.getpgrp() not in list(loader)


def test_a_second_signal_ends_a_run_at_once_unless_torchrun_has_sent_it(monkeypatch):
    ends = []
    monkeypatch.setattr(runtime.os, "_exit", ends.append)
    signals = runtime.Signals(runtime.Runtime())
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # from torchrun, which has got the first
        assert signals.asked() == signal.SIGINT and not ends
        signals.since -= runtime.IMPATIENT
        signal.raise_signal(signal.SIGINT)
        assert ends == [130]
    finally:
        signals.close()
