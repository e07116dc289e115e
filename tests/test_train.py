"""The command lines of training, its loop, resumption, and refusals."""

import json
import math
import os
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import (
    BRIEF, ROOT, SIZE, assert_close_metrics, call, command, main_of, metrics, pictures, repeatable
)  # fmt: skip

import checkpoint
import data
import evaluate
import finetune
import losses
import runtime
import train
from runtime import UserError
from texts import SPECIAL, Words

VL_RUN = [*SIZE, *BRIEF]  # stage vl is the default

pytestmark = pytest.mark.usefixtures("small_world")


def assert_same_bits(one, two):
    """Two folders hold the same checkpoint: model, head, and optimizer."""
    one, two = (checkpoint.read(folder / "last.pt") for folder in (one, two))
    pairs = [(one.tensors, two.tensors), (one.head, two.head)]
    pairs += zip(one.optimizer["state"].values(), two.optimizer["state"].values(), strict=True)
    for first, second in pairs:
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- The loop ------------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_metrics_and_its_configuration(stages, monkeypatch, capsys):
    found, entries = checkpoint.read(stages / "vl/last.pt"), metrics(stages / "vl")
    assert (found.stage, found.step, found.config.dim, found.args["batch_size"]) == ("vl", 4, 32, 8)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 4]
    expected = {"itc", "itm", "mlm", "gradient norm", "lr", "scale", "pairs_per_s", "unreadable"}
    assert entries[0].keys() == expected | {"step"}
    assert [entry["lr"] for entry in entries[:4]] == pytest.approx([5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])
    written = json.loads((stages / "vl/config.json").read_text())
    assert written["config"]["vocab_size"] == found.tokenizer.get_vocab_size()

    # evaluate.py finds the same numbers
    call(monkeypatch, evaluate, "--checkpoint", stages / "vl/last.pt")
    results = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    measured = {name: entries[4][name] for name in results}
    assert entries[4]["split"] == "test" and results == pytest.approx(measured, abs=0.01)


def test_the_seed_decides_every_bit_for_any_number_of_workers(tmp_path, monkeypatch):
    for name, flags in {"a": [], "b": ["--workers", 2], "c": ["--seed", 1]}.items():
        call(monkeypatch, train, *VL_RUN, "--drop-path", 0.2, *flags, "--out", tmp_path / name)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert repeatable(tmp_path / "a") == repeatable(tmp_path / "b")
    assert metrics(tmp_path / "a")[3]["itc"] != metrics(tmp_path / "c")[3]["itc"]


def test_init_starts_from_a_checkpoint_and_an_earlier_run_is_moved_aside(
    stages, tmp_path, monkeypatch
):
    start = ["--init", stages / "vl/last.pt", "--lr", 0, "--steps", 1, "--batch-size", 8]
    for _ in range(3):
        call(monkeypatch, train, *start, "--out", tmp_path / "out")
    before = checkpoint.read(stages / "vl/last.pt")
    for name in ("out", "out.1", "out.2"):
        after = checkpoint.read(tmp_path / name / "last.pt")
        assert after.step == 1 and after.config == before.config
        assert after.tokenizer.to_str() == before.tokenizer.to_str()
        assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())


def test_accumulated_passes_give_the_mean_of_their_gradients(tmp_path, monkeypatch):
    """MLM has no negatives, and one masked token per text makes the mean of means the mean."""

    def mask_second(self, ids, rng):
        return ids, torch.where(torch.arange(len(ids)) == 1, ids, -100)

    monkeypatch.setattr(Words, "mask_words", mask_second)
    flags = [*VL_RUN, "--steps", 1, "--itc-weight", 0, "--itm-weight", 0]
    for passes in (1, 2):
        call(monkeypatch, train, *flags, "--accumulate", passes, "--out", tmp_path / str(passes))
    assert_close_metrics(tmp_path / "1", tmp_path / "2", rel=1e-5)


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path, monkeypatch):
    """In batches of one pair, too, and with recomputed activations."""
    real, norms = torch.amp.GradScaler, []
    flags = [*VL_RUN, "--batch-size", 1, "--recompute", "--steps", 1, "--amp", "fp16"]
    for power, left in ((5, 5), (10, 10), (40, 39)):

        def scaler(device, enabled, power=power):
            return real(device, init_scale=2.0**power, enabled=enabled)

        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        call(monkeypatch, train, *flags, "--out", tmp_path / str(power))
        found = checkpoint.read(tmp_path / str(power) / "last.pt")
        assert found.scaler["scale"] == 2.0**left
        moved = [moments["exp_avg"].any() for moments in found.optimizer["state"].values()]
        assert any(moved) == (power == left)
        norms.append(metrics(tmp_path / str(power))[0]["gradient norm"])
    assert norms == [pytest.approx(norms[1], rel=0.01), norms[1], None]


def test_unreadable_images_are_counted_in_training_and_refused_in_evaluation(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "data")
    pictures(folder, split="val")
    (folder / "2.png").write_bytes(b"broken")
    flags = [*VL_RUN, "--steps", 6, "--eval-every", 6, "--data", folder, "--out", tmp_path / "out"]
    with pytest.raises(data.Unreadable):  # when split val is measured
        call(monkeypatch, train, *flags)
    assert metrics(tmp_path / "out")[-1]["unreadable"] == 8  # 48 samples are 8 epochs


# ---- Resumption, which is a property of the loop -------------------------------------------------


class Killed(Exception):
    pass


def starts(stages):
    """{stage: the flags that start a brief run of it}."""
    return {
        "image": [*SIZE, "--dvae", stages / "dvae/last.pt", "--drop-path", 0.2],
        "text": ["--init", stages / "image/last.pt", "--drop-path", 0.2],
        "vl": ["--init", stages / "text/last.pt", "--accumulate", 2],
        "momo-vl": [*SIZE, "--no-cmga", "--drop-path", 0.2],
    }


@pytest.mark.parametrize("stage", ["image", "text", "vl", "momo-vl"])
def test_a_killed_run_resumes_bit_for_bit_with_no_other_flag(stage, stages, tmp_path, monkeypatch):
    flags = ["--stage", stage, *starts(stages)[stage], *BRIEF, "--steps", 5]
    call(monkeypatch, train, *flags, "--out", tmp_path / "whole")
    real, ended, out = runtime.Log.end_step, [], tmp_path / "out"

    def dies(self, gradient_norm):  # in step 4, after the checkpoint of step 2 and the line of 3
        ended.append(gradient_norm)
        if len(ended) == 4:
            raise Killed
        real(self, gradient_norm)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime.Log, "end_step", dies)
        call(patch, train, *flags, "--out", out, "--resume")  # nothing is there yet
    assert checkpoint.read(out / "last.pt").step == 2 and len(metrics(out)) == 3
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a line that the kill cut off
    call(monkeypatch, train, "--out", out, "--resume")
    assert_same_bits(tmp_path / "whole", out)
    assert repeatable(tmp_path / "whole") == repeatable(out)


def saves_apart(aside, *flags):
    """A run whose checkpoint of step 2 is also kept elsewhere."""
    real = checkpoint.save

    def save(path, stage, args, run, step, *rest):
        real(path, stage, args, run, step, *rest)
        if step == 2 and run.main:
            shutil.copy(path, aside)

    checkpoint.save = save
    main_of("train", *flags)


def test_torchrun_resumes_bit_for_bit_with_all_losses_in_several_passes(processes, tmp_path):
    """torchrun goes on from what two processes had saved at step 2, and ends with the same bits."""
    first, second = tmp_path / "a", tmp_path / "b"
    second.mkdir()
    folder = pictures(tmp_path / "data")
    pictures(folder, split="test")
    flags = [*VL_RUN, "--accumulate", 2, "--data", folder, "--out", first]
    processes(2, saves_apart, second, *flags, group=False)
    answer = command("train.py", "--out", second, "--resume", processes=2)
    assert answer.stdout.count("resuming after step 2") == 1, answer.stderr  # process 0 speaks
    assert_same_bits(first, second)
    assert repeatable(first)[2:] == repeatable(second)


# ---- Two processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["image", "text", "vl"])
def test_two_processes_train_and_measure_as_one(stage, stages, processes, tmp_path, monkeypatch):
    source = pictures(tmp_path / "data", count=16)
    pictures(source, count=5, split="test")
    if stage == "text":
        source = tmp_path / "a.txt"
        source.write_text("\n".join(f"a red circle, number {i}, and {i + 1}" for i in range(400)))
    flags = ["--stage", stage, *starts(stages)[stage], *BRIEF, "--data", source, "--drop-path", 0]
    flags += ["--itm-weight", 0] if stage == "vl" else []  # its negatives are drawn
    call(monkeypatch, train, *flags, "--out", tmp_path / "one")
    processes(2, main_of, "train", *flags, "--out", tmp_path / "two", group=False)
    assert metrics(tmp_path / "one")[-1]["split"] == "test"
    assert_close_metrics(tmp_path / "one", tmp_path / "two")


def not_finite_on_one(flags):
    real = losses.itc_loss
    losses.itc_loss = lambda *parts: real(*parts) * (math.nan if losses.rank() == 1 else 1)
    try:
        main_of("train", *flags)
    except UserError as error:
        return str(error)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(processes, tmp_path):
    flags = [*VL_RUN, "--log-every", 3, "--data", pictures(tmp_path / "data")]
    for said in processes(2, not_finite_on_one, [*flags, "--out", tmp_path / "out"], group=False):
        assert "itc is nan" in said
    assert not (tmp_path / "out/last.pt").exists()


# ---- Flags ---------------------------------------------------------------------------------------

STAGES_WITH = {  # a flag: the stages that have it
    "--codes": "dvae",
    "--dvae": "image",
    "--mlm-weight": "vl",
    "--itc-weight": "vl momo-vl",
    "--experts": "image text vl",
    "--no-cmga": "momo-text momo-vl",
    "--vocab": "text vl momo-text momo-vl",
    "--flip": "dvae image vl momo-image momo-text momo-vl",
}


def test_help_shows_the_flags_of_a_stage_and_others_are_refused(monkeypatch, capsys):
    for stage in train.STAGES:
        with pytest.raises(SystemExit):
            call(monkeypatch, train, "--stage", stage, "--help")
        said = capsys.readouterr().out
        shown = re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE)
        assert {"--steps", "--data", "--resume"} <= set(shown)
        for flag, names in STAGES_WITH.items():
            assert (flag in shown) == (stage in names.split()), (stage, flag)
            if flag not in shown:
                with pytest.raises(UserError, match="unrecognized"):
                    call(monkeypatch, train, "--stage", stage, flag, 1)
        if stage == "text":
            for flag, value in {"--steps": 1000, "--warmup": 75, "--max-text-len": 48}.items():
                assert re.search(rf"(?ms)^  {flag} .*?default: (\d+)", said)[1] == str(value)


REFUSED = """
--batch-size 0 | --batch-size 8 --accumulate 3 | --eval-every -1 | --itc-weight 0 --eval-every 1
--lr nan | --clip -1 | --itc-weight -1 | --itc-weight 0 --itm-weight 0 --mlm-weight 0
--steps many | --heads 5 | --vl-layers 9 | --config huge | --vocab absent.txt | --init absent.pt
--data absent | --data README.md | --data tests | --out README.md/below | --stage text
--stage image | --stage image --dvae absent.pt | --stage image --data README.md
--stage dvae --kl-weight nan | --stage dvae --codes 1
"""


@pytest.mark.parametrize("flags", re.split(r" \| |\n", REFUSED.strip()))
def test_what_does_not_fit_is_refused_before_anything_is_written(flags, tmp_path, monkeypatch):
    usual = [*SIZE[-4:], *BRIEF, "--out", tmp_path / "out"]
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError):
        call(monkeypatch, train, *usual, *flags.split())
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_fit_are_refused(stages, tmp_path, monkeypatch):
    dvae, image, vl = (stages / name / "last.pt" for name in ("dvae", "image", "vl"))

    def changed(name, path, **changes):
        (tmp_path / name).mkdir()
        content = torch.load(path, weights_only=True)
        torch.save(content | changes, tmp_path / name / "last.pt")
        return tmp_path / name / "last.pt"

    config = torch.load(image, weights_only=True)["config"]
    shared = changed("shared", image, config=config | {"experts": "shared"})
    other, again, out = changed("dvae", dvae), changed("image", image), changed("out", vl).parent
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "red"]))
    for flags in [
        ["--init", vl, "--dim", 64],
        ["--init", vl, "--config", "base"],
        ["--init", vl, "--vocab-size", 9],
        ["--init", vl, "--vocab", tmp_path / "vocab.txt"],
        ["--init", dvae],
        ["--stage", "image", *SIZE, "--dvae", image],
        ["--stage", "image", *SIZE, "--dvae", dvae, "--patch-size", 4],  # 2 × 2 codes for 4 × 4
        ["--stage", "dvae", "--init", image],
        ["--stage", "text", "--init", shared],
        ["--stage", "text", "--init", image, "--max-text-len", 2],
        ["--stage", "text", "--init", image, "--data", stages],  # no *.txt below
        ["--stage", "text", "--out", out, "--resume"],  # a run of stage vl
        ["--out", out, "--resume", "--mlm-weight", 0],
        ["--out", out, "--resume", "--steps", 1],
        ["--out", again.parent, "--resume", "--dvae", other],
    ]:
        with pytest.raises(UserError):
            call(monkeypatch, train, "--batch-size", 8, "--out", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()
    for script, flags in {
        evaluate: ["--checkpoint", image],  # has not learned ITC
        finetune: ["--out", out, "--resume"],
    }.items():
        with pytest.raises(UserError):
            call(monkeypatch, script, *flags)


@pytest.mark.parametrize(
    "words",
    [
        "train.py --config huge",
        "finetune.py --task vqa --init absent.pt",
        "evaluate.py --checkpoint README.md",
        "weights.py README.md --out absent/x.pt",
        "bench.py --repeats 0",
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2_for_every_script(words, monkeypatch, capsys):
    """The scripts as python runs them, except that os._exit, which ends a process, raises."""
    script, *flags = words.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"{script}: error: ") and said.count("\n") == 1


def test_a_mistake_under_torchrun_is_told_and_writes_nothing(tmp_path):
    answer = command("train.py", *VL_RUN, "--batch-size", 7, "--out", tmp_path / "x", processes=2)
    assert answer.returncode != 0 and "train.py: error: --batch-size 7" in answer.stderr
    assert 'train.py", line' not in answer.stderr  # a traceback of torchrun's, none of ours
    assert not (tmp_path / "x").exists()
