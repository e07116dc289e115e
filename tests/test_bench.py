"""The step of train.py is the textbook's, computed faster."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train import call
from torch._dynamo.utils import counters

import bench
import losses
import runtime
import train
from mome import Config, VLMo

SMALL = Config(dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=24)
ALL = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}


def batch_of(config, lengths, seed=0):
    """Pairs as data.collate gives them; two of them share an item."""
    g = torch.Generator().manual_seed(seed)
    b, T = len(lengths), config.max_text_len
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    text = torch.randint(5, config.vocab_size, (b, T), generator=g).masked_fill(~mask, 0)
    masked, labels = text.clone(), torch.full((b, T), -100)
    masked[:, 2], labels[:, 2] = 4, text[:, 2]
    ids = torch.stack([torch.tensor([0, *range(b - 1)]), torch.arange(b) + 100], dim=1)
    image = torch.randint(0, 256, (b, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8)
    return {"image": image, "text": text, "mask": mask, "masked": masked, "labels": labels, "ids": ids}


def step(stage, batch):
    """Losses and gradients."""
    torch.manual_seed(5)  # the same negatives
    stage.model.zero_grad(set_to_none=True)
    values = stage(batch)
    sum(weight * values[name] for name, weight in stage.weights.items()).backward()
    return values, {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "switches, used, negatives",
    [
        ({}, ALL, "global"), ({}, ALL, "local"), ({"position": "relative", "layer_scale": 0.1}, ALL, "global"),
        ({"experts": "shared"}, ALL, "global"), ({"vl_layers": 0}, ALL, "global"), ({"vl_layers": 3}, ALL, "global"),
        ({"attention": "separate"}, ALL, "global"), ({"position": "relative", "attention": "separate"}, ALL, "global"),
        ({}, {"itc": 1.0}, "global"), ({}, {"itc": 1.0, "itm": 1.0}, "global"),
        ({}, {"itc": 1.0, "mlm": 1.0}, "global"), ({}, {"mlm": 1.0}, "global"),
        ({"vl_layers": 0}, {"itm": 1.0, "mlm": 1.0}, "global"),
    ],
)  # fmt: skip
def test_the_fast_step_is_the_textbooks(switches, used, negatives):
    compare(switches, used, negatives)


def test_the_fast_step_is_the_textbooks_on_two_processes(processes):
    processes(2, compare_both_ways)


def compare_both_ways():
    for negatives in ("global", "local"):
        compare({}, ALL, negatives)


def compare(switches, used, negatives):
    torch.manual_seed(0)
    model = VLMo(replace(SMALL, **switches)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and the relative table, too
    batch = batch_of(model.config, [9, 3, 14, 6, 11], seed=losses.rank())
    batch["ids"][:, 1] += 100 * losses.rank()  # other captions, of the same items
    fast, fast_grads = step(train.VisionLanguageStage(model, used, negatives), batch)
    slow, slow_grads = step(bench.Textbook(model, used, negatives), batch)
    for name in used:
        assert fast[name].item() == pytest.approx(slow[name].item(), rel=1e-9)
    assert fast_grads.keys() == slow_grads.keys()
    for name, grad in slow_grads.items():
        assert (fast_grads[name] - grad).norm() <= 1e-9 * grad.norm().clamp(min=1e-3), name


def test_recomputed_activations_change_nothing():
    torch.manual_seed(0)
    model, batch = VLMo(replace(SMALL, drop_path=0.3)), batch_of(SMALL, [9, 3, 14, 6, 11])
    stage = train.VisionLanguageStage(model, ALL)
    values, grads = step(stage, batch)
    train.recompute(model)
    again, once_more = step(stage, batch)
    assert all(torch.equal(values[name], again[name]) for name in values) and grads.keys() == once_more.keys()
    assert all(torch.equal(grads[name], once_more[name]) for name in grads)


def test_the_exchange_sends_less_than_its_bound_and_than_gathering_all_images():
    row = bench.bench_exchange(2)
    assert 0 < row["mean"] < row["bound"] and row["mean"] <= row["most"]
    assert row["mean"] < row["gathering all images"]


def test_without_a_compiler_the_blocks_run_as_they_are(monkeypatch, capsys):
    def absent(function):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand where it was looked for")

    monkeypatch.setattr(torch, "compile", absent)
    train.compile_blocks(VLMo(SMALL), runtime.Runtime())
    [line] = capsys.readouterr().out.splitlines()
    assert "there is no compiler (no compiler), the blocks run as they are" in line


def test_nothing_is_compiled_anew_after_the_first_batches(monkeypatch):
    """Whatever the captions' lengths; with drop-path, whose rate differs from block to block."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # graphs, without C++
    torch.manual_seed(0)
    config = replace(SMALL, layers=2, drop_path=0.3)
    plain, compiled = (train.VisionLanguageStage(VLMo(config), ALL) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    counters.clear()
    train.compile_blocks(compiled.model, runtime.Runtime())
    graphs = []
    for longest in (7, 22, 12, 24, 16, 5, 19):
        batch = batch_of(SMALL, [longest, 3, longest - 2, 5, 4], seed=longest)
        values, expected = step(compiled, batch)[0], step(plain, batch)[0]
        assert all(torch.allclose(values[name], expected[name]) for name in ALL)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 1 < graphs[0] < graphs[2] and len(set(graphs[2:])) == 1, graphs  # the first is the compiler's own test


def compiled_and_not():
    """In a process of its own: the losses and gradients of DDP, with and without compiled blocks, for three batches."""
    torch._inductor.config.fallback_random = True  # the same dropped paths
    found, here = [], SimpleNamespace(device=torch.device("cpu"), print=print)
    for compiled in (False, True):
        torch.manual_seed(0)
        stage = train.VisionLanguageStage(VLMo(replace(SMALL, layers=2, drop_path=0.3)), ALL)
        if compiled:
            train.compile_blocks(stage.model, here)
        wrapped, rows = torch.nn.parallel.DistributedDataParallel(stage), []
        for longest in (7, 22, 12):
            torch.manual_seed(5 + losses.rank())
            stage.zero_grad()
            values = wrapped(batch_of(SMALL, [longest, 3, 5], seed=longest + losses.rank()))
            sum(values[name] for name in ALL).backward()
            rows.append(torch.cat([torch.stack([values[name].detach() for name in ALL]), *gradients(stage)]))
        found.append(torch.stack(rows))
    assert any(hasattr(block, "_compiled_call_impl") and block._compiled_call_impl for block in stage.model.blocks)
    return torch.stack(found)


def gradients(stage):
    return [p.grad.flatten() for p in stage.parameters() if p.requires_grad]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_on_two_processes(processes):
    for plain, compiled in processes(2, compiled_and_not):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    flags = ["--batch-size", 2, "--amp", "off", "--repeats", 1, "--processes", "--out", out]
    call(monkeypatch, bench, "--config", "tiny", *flags)
    found, text = json.loads(out.read_text()), capsys.readouterr().out
    sides = {row["side"]: row for row in found["a step of stage vl"]}
    assert sides["here"]["TFLOP a step"] < sides["textbook"]["TFLOP a step"] and "5,000 × 25,010 ranked, s" in text
    assert all(0 < row["of peak"] for row in sides.values())
