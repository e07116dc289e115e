"""Optimizer groups, schedule, seeds, checkpoints, metrics."""

import json
import os
from dataclasses import replace

import pytest
import torch

import runtime
from mome import CONFIGS, VLMo


@pytest.mark.parametrize("switches", [{}, {"position": "relative", "layer_scale": 0.1}])
def test_groups_hold_every_trainable_parameter_once_and_only_matrices_decay(switches):
    model = VLMo(replace(CONFIGS["tiny"], **switches))
    model.mlm_head.requires_grad_(False)
    optimizer = runtime.optimizer(model, weight_decay=0.01, betas=(0.9, 0.98))
    decaying, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert not decaying & plain
    assert decaying | plain == {id(p) for p in model.parameters() if p.requires_grad}
    kinds = {name.split(".")[-1] for name, p in model.named_parameters() if id(p) in plain}
    relative = {"relative_table", "gamma"} if switches else {"text_position", "image_position"}
    assert kinds == {"bias", "weight", "image_cls", "types", "logit_scale"} | relative
    assert all(p.ndim == 1 for name, p in model.named_parameters() if id(p) in plain and name.endswith("weight"))
    assert id(model.words.weight) in decaying and id(model.patches.weight) in decaying


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [runtime.learning_rate(step, steps=10, warmup=4, peak=8.0) for step in range(1, 12)]
    assert rates == pytest.approx([2, 4, 6, 8, 48 / 7, 40 / 7, 32 / 7, 24 / 7, 16 / 7, 8 / 7, 0])
    assert runtime.learning_rate(1, steps=1, warmup=0, peak=1.0) == 1.0
    wave = [runtime.learning_rate(step, steps=11, warmup=4, peak=8.0, decay="cosine") for step in range(1, 13)]
    assert wave[:4] == rates[:4] and wave[7] == pytest.approx(4.0) and wave[11] == 0.0  # half way down, and at the end
    assert wave[5] == pytest.approx(4 * (1 + 2**-0.5))  # a quarter of the way: 4·(1 + cos 45°)


def test_seeds_differ_by_every_word():
    draws = set()
    for words in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1), (1, 0)]:
        runtime.seed_all(*words)
        draws.add(torch.rand(1).item())
    assert len(draws) == 6


def test_mean_without_other_processes_is_the_value(monkeypatch):
    assert runtime.Runtime().mean(torch.tensor([[1.0, 2.0]])) == [[1.0, 2.0]]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    content = {"stage": "vl", "step": 1, "args": {}, "config": {}, "model": {"w": torch.arange(3.0)}, "tokenizer": ""}
    runtime.save(path, content)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runtime.UserError, match="could not be written.*No space left"):
        runtime.save(path, content | {"model": {"w": torch.zeros(3)}})
    assert torch.equal(runtime.load(path)["model"]["w"], torch.arange(3.0))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(runtime.UserError, match="x.pt"):
        runtime.load(tmp_path / "x.pt")


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(runtime.UserError, match="it has no args, config, model, stage, step, tokenizer"):
        runtime.load(path)
    runtime.save(
        path, {"stage": "vl", "step": 1, "args": {}, "config": {}, "model": {"w": torch.zeros(1000)}, "tokenizer": ""}
    )
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(runtime.UserError, match="damaged"):
        runtime.load(path)
    with pytest.raises(runtime.UserError, match="no such file"):
        runtime.load(tmp_path / "absent.pt")


def test_any_damage_to_a_checkpoint_is_refused_or_harmless(tmp_path):
    path = tmp_path / "x.pt"
    runtime.save(
        path,
        {
            "stage": "vl",
            "step": 1,
            "args": {},
            "config": {"dim": 4},
            "model": {"w": torch.arange(8.0)},
            "tokenizer": "{}",
        },
    )
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            runtime.load(path)
        except runtime.UserError:
            pass


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"config": Code(), "model": {}, "tokenizer": ""}, tmp_path / "x.pt")
    with pytest.raises(runtime.UserError):
        runtime.load(tmp_path / "x.pt")
    assert not (tmp_path / "was here").exists()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    metrics = runtime.Metrics(tmp_path, main=True, step=0)
    for step in (10, 20, 30):
        metrics.write(step=step, itc=1.0)
    runtime.Metrics(tmp_path, main=False, step=0).write(step=40)  # another process writes nothing
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # killed while writing
    runtime.Metrics(tmp_path, main=True, step=20).write(step=30, itc=0.5, norm=float("inf"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "itc": 1.0}, {"step": 20, "itc": 1.0}, {"step": 30, "itc": 0.5, "norm": None}]
    damaged = '{"step": 1}\n{"ste\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(runtime.UserError, match="metrics.jsonl is damaged: move it away"):
        runtime.Metrics(tmp_path, main=True, step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == damaged


def test_what_the_system_refuses_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys):
    status = []
    monkeypatch.setattr(runtime.os, "_exit", status.append)
    runtime.run(lambda: open(tmp_path, "w"))
    line = capsys.readouterr().err
    assert status == [2] and line.count("\n") == 1 and f"Is a directory: '{tmp_path}'" in line
