"""A step in parts has the losses and gradients of one pass, and the host never waits inside a step."""

import os
import sys
from collections import Counter

import pytest
import torch
from conftest import RELATIVE, vl_stage
from test_losses import batch_of_six
from test_momo import stage_of as momo_stage_of
from test_stages import stage_of
from torch import nn

import losses
import runtime
from classify import Classify, Probe
from dvae import DVAE, DVAEConfig, Tokenizer
from glue import GLUE
from loader import with_counts
from momo_stages import MoMoAll, MoMoImage, MoMoText, MoMoVL
from nlvr2 import NLVR2
from sides import bare
from stages import VL, Image, Text
from vqa import VQA


def chunks(batch, count):
    """A batch in so many parts."""
    names = [name for name in ("image", "text", "mask", "masked", "labels", "ids", "hidden") if name in batch]
    columns = zip(*(batch[name].chunk(count) for name in names))
    return [dict(zip(names, column)) for column in columns]


def share(parts):
    """This process's share of six pairs, in parts that differ in length and in masked words."""
    batches = chunks(batch_of_six(), losses.world() * parts)
    return [(batch,) for batch in with_counts(batches[losses.rank() * parts :][:parts])]


def flat(stage):
    """All gradients, a mean over processes as DDP has it."""
    found = torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])
    return losses.gather(found[None]).mean(0)


def in_parts(stage, parts):
    """The step as the loop computes it: look ahead, then each part by itself."""
    found = Counter()  # sums by name
    for number, batches in enumerate(stage.look_ahead(parts)):
        stage.seed(number)
        values = stage(*batches)
        (sum(values[name] for name in stage.loss_weights) / len(parts)).backward()
        found.update({name: value.detach() / len(parts) for name, value in values.items()})
    return found, flat(stage)


@pytest.mark.parametrize("names", ["itc itm mlm", "itm mlm"])
def test_a_step_in_parts_is_the_step_in_one_pass(names):
    one, expected = in_parts(vl_stage(names=names).train(), share(1))
    many, found = in_parts(vl_stage(names=names).train(), share(3))
    for name in names.split():
        assert abs(one[name] - many[name]) < 1e-9
    assert expected.norm() > 1e-3 and (expected - found).norm() < 1e-9


def test_a_step_in_parts_is_the_step_in_one_pass_on_two_processes(processes):
    processes(2, test_a_step_in_parts_is_the_step_in_one_pass, "itc itm mlm")


def test_gradients_of_the_whole_step_are_in_full_precision_under_autocast():
    stage = vl_stage().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        (first,), (second,) = stage.look_ahead(share(2))
        vectors = [stage.vectors(batch)[:2] for batch in (first, second)]
    image, text = (torch.cat(column).detach().requires_grad_() for column in zip(*vectors))
    whole = {name: torch.cat([first[name], second[name]]) for name in ("image", "text", "mask", "ids")}
    exact = stage.compare(whole, (image, text, stage.model.scale()))["itc"]
    for number, expected in enumerate(torch.autograd.grad(exact, (image, text))):
        found = torch.cat([part["compared"]["gradients"][number] for part in (first, second)]) / 2
        assert found.dtype == torch.float32 and (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", [VL, MoMoVL])
def test_the_second_pass_over_a_part_drops_what_the_first_one_dropped(kind):
    stage, batches = momo_stage_of(kind) if kind is MoMoVL else (vl_stage().train(), share(1)[0])
    for block in stage.model.blocks:
        block.attention_branch.drop = block.expert_branch.drop = 0.5
    seen, real = [], stage.vectors
    stage.vectors = lambda batch: seen.append(real(batch)) or seen[-1]
    for number, batches in enumerate(stage.look_ahead([tuple(batches)] * 2)):
        stage.seed(number)
        stage(*batches)
    for first, second in zip(seen[:2], seen[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(seen[0][0], seen[1][0])  # each part has its own


@pytest.mark.parametrize("kind", [MoMoVL, MoMoAll])
def test_momos_steps_in_parts_are_those_in_one_pass(kind):
    answers = []
    for count in (1, 2):
        stage, batches = momo_stage_of(kind)
        columns = [with_counts(chunks(batch, count)) for batch in batches]
        answers.append(in_parts(stage, list(zip(*columns))))
    (one, expected), (two, found) = answers
    assert all(abs(one[name] - two[name]) < 1e-9 for name in stage.loss_weights)
    assert (expected - found).norm() < 1e-9


def test_what_the_host_knows_of_a_step():
    mask = torch.arange(24) < torch.tensor([3, 9, 5, 4])[:, None]
    labels = torch.full((4, 24), -100)
    labels[0, 1], labels[1, 1], labels[1, 7], labels[3, 2] = 5, 6, 7, 8
    whole = {"mask": mask, "text": mask.long(), "masked": mask.long(), "labels": labels, "ids": torch.eye(4)}
    halves = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    first, second = with_counts(halves)
    assert first["text"].shape == second["mask"].shape == (2, 16)  # 9, in eights
    assert second["ids"].shape == (2, 4)
    assert first["visible"] == (2, 7) and second["visible"] == (3, 5)


def dvae_stage():
    stage = bare(DVAE, Tokenizer(DVAEConfig(grid=2, codes=6, width=8)), steps=9)
    stage.loss_weights = {"reconstruction": 1.0, "kl": 1.0}
    return stage, {"image": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)}


FULL, MIXED, IN_PARTS = (False, 1), (True, 1), (False, 2)  # passes: mixed precision? in how many parts?
CASES = [([FULL, MIXED], dvae_stage)]
CASES += [([FULL, MIXED], momo_stage_of, kind) for kind in (MoMoImage, MoMoText)]
CASES.append(([IN_PARTS, MIXED], momo_stage_of, MoMoAll))  # which begins with MoMoVL's step
for layout, passes in (({}, [FULL]), (RELATIVE, [MIXED])):
    changes = layout | {"drop_path": 0.2}
    CASES.append(([IN_PARTS, MIXED], stage_of, VL, "itc itm mlm", changes))
    CASES.append((passes, stage_of, Image, "mim", changes))
    CASES.append((passes, stage_of, Text, "mlm", changes))
    CASES += [(passes, stage_of, kind, "loss", changes) for kind in (VQA, NLVR2, GLUE, Classify, Probe)]


def step_on(device, passes, build, *arguments):
    """Forward and backward of some passes, then clipping and the optimizer's step, on a device whose
    values nobody can read."""
    stage, batches = build(*arguments)
    stage, batches = stage.float().train(), batches if isinstance(batches, list) else [batches]
    with device.mode():
        device.move(stage)
        optimizer = runtime.adamw(stage)
        for amp, count in passes:
            parts = [tuple(map(device.like, batches)) for _ in range(count)]
            for part in stage.look_ahead(parts):
                with torch.autocast(device.DEVICE, torch.bfloat16, enabled=amp):
                    values = stage(*part)
                sum(values[name] for name in stage.loss_weights).backward()
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def all_steps_on_a_pretend_gpu(folder):
    sys.path.append(folder)
    import pretend_gpu

    for case in CASES[int(os.environ["RANK"]) :: 2]:
        step_on(pretend_gpu, *case)


def test_the_host_never_waits_for_the_device(shared, processes):
    """In processes of their own, because autograd learns of devices when it starts. What an operator does
    inside is not seen: on a GPU, torch.cuda.set_sync_debug_mode("error") tells."""
    processes(2, all_steps_on_a_pretend_gpu, str(shared / "reference"), group=False)
