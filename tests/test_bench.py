"""The step of stage vl is the textbook's, computed faster: recomputed, compiled, on any number of
processes."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import bare, call
from torch._dynamo.utils import counters

import bench
import losses
import runtime
from mome import Config, VLMo
from stages import VL

SMALL = Config(dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50)
ALL = Config(
    dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=24
)  # fmt: skip
ALL = bench.ALL


def batch_of(config, lengths, seed=0):
    """Pairs as data.Loader gives them; two of them share an item."""
    g = torch.Generator().manual_seed(seed)
    b, T, S = len(lengths), config.max_text_len, config.image_size
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    text = torch.randint(5, config.vocab_size, (b, T), generator=g).masked_fill(~mask, 0)
    masked, labels = text.clone(), torch.full((b, T), -100)
    masked[:, 2], labels[:, 2] = 4, text[:, 2]
    ids = torch.stack([torch.tensor([0, *range(b - 1)]), torch.arange(b) + 100], dim=1)
    image = torch.randint(0, 256, (b, 3, S, S), generator=g, dtype=torch.uint8)
    return {"image": image, "text": text, "mask": mask, "masked": masked, "labels": labels, "ids": ids}


def vl(kind=VL, used=ALL, negatives="global", **switches):
    """A stage around a small model, the same for each class."""
    torch.manual_seed(0)
    return bare(kind, VLMo(replace(SMALL, **switches)), loss_weights=used, negatives=negatives)


def step(stage, batch):
    """Losses and gradients; that of a parameter which no loss reads is 0."""
    torch.manual_seed(5)  # the same negatives
    stage.zero_grad()
    values = stage(batch)
    sum(weight * values[name] for name, weight in stage.loss_weights.items()).backward()
    return values, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in stage.named_parameters()
    }


@pytest.mark.parametrize(
    "switches, used, negatives",
    [
        ({}, ALL, "local"), ({"experts": "shared"}, ALL, "global"),
        ({"vl_layers": 0}, ALL, "global"), ({"vl_layers": 3}, ALL, "global"),
        ({"position": "relative", "layer_scale": 0.1}, ALL, "global"),
        ({"position": "relative", "attention": "separate"}, ALL, "global"),
        ({}, {"itc": 1.0}, "global"), ({}, {"itc": 1.0, "mlm": 1.0}, "global"),
        ({}, {"mlm": 1.0}, "global"), ({"vl_layers": 0}, {"itm": 1.0, "mlm": 1.0}, "global"),
    ],
)  # fmt: skip
def test_the_fast_step_is_the_textbooks(switches, used, negatives):
    compare(switches, used, negatives)


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_the_fast_step_is_the_textbooks_on_two_processes(negatives, processes):
    processes(2, compare, {}, ALL, negatives)


def compare(switches, used, negatives):
    fast = vl(VL, used, negatives, **switches).double()
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and the relative table, too
    slow = vl(bench.Textbook, used, negatives, **switches).double()
    slow.load_state_dict(fast.state_dict())
    batch = batch_of(SMALL, [9, 3, 14, 6, 11], seed=losses.rank())
    batch["ids"][:, 1] += 100 * losses.rank()  # other captions, of the same items
    fast_values, fast_grads = step(fast, batch)
    slow_values, slow_grads = step(slow, batch)
    for name in used:
        assert fast_values[name].item() == pytest.approx(slow_values[name].item(), rel=1e-9)
    for name, grad in slow_grads.items():
        assert (fast_grads[name] - grad).norm() <= 1e-9 * grad.norm().clamp(min=1e-3), name


def test_recomputed_activations_change_nothing():
    stage, batch = vl(drop_path=0.3), batch_of(SMALL, [9, 3, 14, 6, 11])
    values, grads = step(stage, batch)
    runtime.speed_up(stage, SimpleNamespace(recompute=True, compile=False), None)
    values_again, grads_again = step(stage, batch)
    assert all(torch.equal(values[name], values_again[name]) for name in values)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


# ---- Compiled blocks -----------------------------------------------------------------------------


def test_without_a_compiler_the_blocks_run_as_they_are(monkeypatch, capsys):
    def absent(function):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand where it was looked for")

    monkeypatch.setattr(torch, "compile", absent)
    blocks = VLMo(SMALL).blocks
    runtime.compile_blocks(blocks, runtime.Runtime())
    assert capsys.readouterr().out.count("\n") == 1 and blocks[0]._compiled_call_impl is None


def test_nothing_is_compiled_after_the_first_batches(monkeypatch):
    """Whatever the captions' lengths; with drop-path, whose rate differs from block to block."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = vl(layers=2, drop_path=0.3), vl(layers=2, drop_path=0.3)
    torch._dynamo.reset()
    counters.clear()
    runtime.compile_blocks(compiled.blocks(), runtime.Runtime())
    graphs = []
    for longest in (7, 22, 12, 24, 5):
        batch = batch_of(SMALL, [longest, 3, longest - 2, 5, 4], seed=longest)
        values, expected = step(compiled, batch)[0], step(plain, batch)[0]
        assert all(torch.allclose(values[name], expected[name]) for name in ALL)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 1 < graphs[0] < graphs[2] and len(set(graphs[2:])) == 1, graphs  # one is the compiler's


# ---- The benchmark -------------------------------------------------------------------------------


def test_the_exchange_sends_at_most_its_bound_on_average():
    [two, many] = bench.bench_exchange([2, 64])
    assert 0 < two["mean"] <= two["most"] and two["mean"] < two["gathering all images"]
    assert two["mean"] < many["mean"] < many["bound"] == two["bound"]


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    out, vectors = tmp_path / "bench.json", bench.vectors
    monkeypatch.setattr(bench, "vectors", lambda *_: vectors(20, 100, "cpu"))
    flags = ["--batch-size", 2, "--amp", "off", "--repeats", 1, "--out", out]
    call(monkeypatch, bench, "--config", "tiny", *flags)
    found, text = json.loads(out.read_text()), capsys.readouterr().out
    sides = {row["side"]: row for row in found["a step of stage vl"]}
    assert sides["ours"]["TFLOP a step"] < sides["textbook"]["TFLOP a step"]
    assert all(0 < row["of peak"] for row in sides.values())
    assert all(title in text for title in found if title not in ("device", "torch"))
    [encoder, _] = found["MoMo's encoder, forward and backward"]
    assert 0 < encoder["activations, visible / all"] < 0.5
