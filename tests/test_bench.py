"""The step of stage vl is the textbook's, computed faster; FLOPs and memory are counted right."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import RELATIVE, SMALL, call, vl_stage
from torch._dynamo.utils import counters

import bench
import losses
import runtime
import sides
import textbook
from loader import with_counts
from mome import CONFIGS

CPU, COMPILE = runtime.Runtime(), torch.compile


def step(stage):
    """The losses of a batch, then the gradients of all parameters."""
    batch = sides.pairs(SMALL, 5 * losses.world())
    batch["ids"][1, 0] = batch["ids"][0, 0]  # one item
    [batch] = with_counts([{name: rows[losses.rank() :: losses.world()] for name, rows in batch.items()}])
    torch.manual_seed(5)  # the same negatives and drop-path
    values = stage(batch)
    wanted = [weight * values[name] for name, weight in stage.loss_weights.items()]
    inputs = list(stage.parameters())
    return wanted + list(torch.autograd.grad(sum(wanted), inputs, materialize_grads=True))


@pytest.mark.parametrize(
    "names, switches",
    [
        ("itc itm mlm", {"experts": "shared"}),
        ("itc itm mlm", RELATIVE | {"attention": "separate"}),
        ("itc", {}), ("itc mlm", {}), ("itc itm", {}), ("mlm", {"vl_layers": 3}), ("itm mlm", {"vl_layers": 0}),
    ],
)  # fmt: skip
def test_the_fast_step_is_the_textbooks(names, switches):
    stage = vl_stage(names, **switches)
    fast = step(stage)
    stage.__class__ = textbook.Textbook
    for found, expected in zip(fast, step(stage)):
        assert (found - expected).norm() <= 1e-9 * expected.norm().clamp(min=1e-3)


def test_the_fast_step_is_the_textbooks_on_two_processes(processes):
    processes(2, test_the_fast_step_is_the_textbooks, "itc itm mlm", {"negatives": "local"})


def graphs_of(monkeypatch, **flags):
    """Speeds up a stage, which must change nothing → how many graphs were compiled."""
    stage = vl_stage("itc", layers=2, drop_path=0.3)
    plain = step(stage)
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    runtime.speed_up(stage, SimpleNamespace(**flags), CPU)
    torch.testing.assert_close(step(stage), plain, rtol=1e-9, atol=1e-12)
    return counters["stats"]["unique_graphs"]


def test_recomputed_and_compiled_blocks_change_nothing(monkeypatch):
    assert graphs_of(monkeypatch, recompute=True, compile=False) == 0
    alone = graphs_of(monkeypatch, recompute=False, compile=True)
    assert alone > 2  # one is the compiler's test
    assert graphs_of(monkeypatch, recompute=True, compile=True) == alone


def test_without_a_compiler_blocks_run_as_they_are(monkeypatch):
    def no_compiler(*_):
        raise torch._dynamo.exc.TorchDynamoException("there is none")

    stage = vl_stage("itc")
    monkeypatch.setattr(torch, "compile", no_compiler)
    runtime.speed_up(stage, SimpleNamespace(recompute=False, compile=True), CPU)
    assert not any("forward" in vars(block) for block in stage.blocks())


def test_flops_and_memory_by_hand():
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    work = functools.partial(F.scaled_dot_product_attention, q, q, q)
    forward = 2 * 2 * (2 * 3 * 7 * 7 * 8)  # q·k and ·v; backward has five such products
    assert bench.flops(work) == forward
    assert bench.flops(lambda: work().sum().backward()) == 3.5 * forward

    def two_at_once():
        return ((torch.ones(1000, 1000) + 1) * 2)[:500].clone()

    found = bench.tensor_memory(two_at_once, CPU.device)
    assert found == pytest.approx(8, rel=1e-3)  # MB


def test_the_benchmark_prints_tables_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    out, vectors = tmp_path / "bench.json", bench.vectors
    monkeypatch.setitem(CONFIGS, "tiny", replace(SMALL, layers=1))
    monkeypatch.setattr(bench, "vectors", lambda *_: vectors(20, 100, "cpu"))
    monkeypatch.setattr(bench, "matmul_peak", lambda run: 1e12)
    monkeypatch.setattr(bench, "VIEWS", 2)
    monkeypatch.setattr(bench, "PHOTOS", ((64, 48),))
    monkeypatch.setattr(bench, "clear", lambda: None)  # it takes longer than these steps
    flags = ["--config", "tiny", "--batch-size", 2, "--amp", "off", "--repeats", 1, "--out", out]
    flags += ["--only", "step", "positions", "parts", "momo", "operators", "retrieval", "loader"]
    call("bench", *flags)
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert all(title in said for title in found.keys() - {"device", "torch"})
    textbook, ours, recomputed = found["a step of stage vl"]
    assert ours["TFLOP a step"] < textbook["TFLOP a step"]
    assert recomputed["tensors, MB"] < ours["tensors, MB"] < textbook["tensors, MB"]
    apart, together, whole = found["a step in parts"]
    assert apart["TFLOP a step"] < together["TFLOP a step"] and together["tensors, MB"] < whole["tensors, MB"]


def test_what_a_sample_costs(monkeypatch):
    """Per sample, so twice the parameters that train do not count; --recompute keeps less."""
    monkeypatch.setitem(CONFIGS, "tiny", replace(CONFIGS["tiny"], layers=2))
    monkeypatch.setattr(bench, "RUNS", tuple((kind, 32, 16) for kind, _, _ in bench.RUNS))
    monkeypatch.setattr(bench, "clear", lambda: None)  # it takes longer than these steps
    rows = bench.bench_sizes("tiny", "relative", runtime.Runtime())
    assert [row["run"] for row in rows] == ["stage text", "stage vl", "retrieval", "vqa"]
    for row in rows:
        assert 0 < row["with --recompute"] < row["MB a sample"] and row["TFLOP a sample"] > 0
    text, vl, dual, vqa = (row["TFLOP a sample"] for row in rows)
    assert vl > 3 * vqa and vl > 3 * dual  # four pairs are fused, and both are encoded


def test_the_memory_of_a_process_grows_by_that_of_a_step():
    assert bench.peak_memory() > 100  # torch
    assert 0 <= bench.two_steps("tiny", 2, "off", {"recompute": True}) < 1000
