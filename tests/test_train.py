"""The command lines of training, its loop, resumption, and refusals."""

import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import BRIEF, ROOT, SIZE, assert_same_metrics, assert_same_run, call, commands, metrics, refused
from files import pictures, write_lines

import checkpoint
import finetune
import runtime
import show
import train
from texts import SPECIAL


def brief(stage, stages):
    """The flags of a brief run, from "vl --init STAGES/text/last.pt"."""
    return ["--stage", *stage.replace("STAGES", str(stages)).split(), *SIZE, *BRIEF]


# ---- The loop ------------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_metrics_and_its_configuration(stages):
    found, entries = checkpoint.read(stages / "vl/last.pt"), metrics(stages / "vl")
    assert (found.stage, found.step, found.config.dim, found.args["batch_size"]) == ("vl", 4, 32, 8)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 4] and entries[4]["split"] == "test"
    expected = {"itc", "itm", "mlm", "gradient norm", "lr", "scale", "pairs_per_s", "waited_s", "unreadable"}
    assert entries[0].keys() == expected | {"step", "itm accuracy", "negative probability"}
    for stage, last in {"vl": [2 / 3, 1 / 3], "image": [3 / 4, 1 / 4]}.items():  # image: a cosine
        rates = [1e3 * entry["lr"] for entry in metrics(stages / stage)[:4]]
        assert rates == pytest.approx([1 / 2, 1, *last])
    written = json.loads((stages / "vl/config.json").read_text())
    assert written["config"]["vocab_size"] == found.tokenizer.get_vocab_size()


def test_init_starts_from_a_checkpoint_and_an_earlier_run_is_moved_aside(stages, tmp_path, monkeypatch):
    seeds, real = [], runtime.seed_all
    monkeypatch.setattr(runtime, "seed_all", lambda *words: seeds.append(words) or real(*words))
    start = ["--init", stages / "vl/last.pt", "--lr", 0, "--steps", 2, "--batch-size", 8]
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")  # on another disk, say
    for seed in range(3):
        call("train", *start, "--seed", seed, "--out", tmp_path / "out")
        assert seeds[-4:] == [(seed, step, 0, part) for step in (1, 2) for part in (0, -1)]
    before = checkpoint.read(stages / "vl/last.pt")
    for name in ("out", "real.1", "real.2"):
        after = checkpoint.read(tmp_path / name / "last.pt")
        assert after.step == 2 and after.config == before.config
        assert after.tokenizer.to_str() == before.tokenizer.to_str()
        assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())
    assert len({metrics(tmp_path / name)[0]["mlm"] for name in ("out", "real.1", "real.2")}) == 3


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path, monkeypatch):
    """In batches of one pair, too, and with recomputed activations. A run of nothing but skipped
    steps is an error, and saves nothing."""
    real, norms = torch.amp.GradScaler, []
    flags = [*SIZE, *BRIEF, "--batch-size", 1, "--recompute", "--amp", "fp16", "--clip", 0.01]
    for power in (5, 10):
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(real, init_scale=2.0**power))
        call("train", *flags, "--steps", 1, "--out", tmp_path / str(power))
        found = checkpoint.read(tmp_path / str(power) / "last.pt")
        assert found.scaler["scale"] == 2.0**power
        norms.append(metrics(tmp_path / str(power))[0]["gradient norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    moments = found.optimizer["state"].values()
    norm = sum(moment["exp_avg"].square().sum() for moment in moments).sqrt()
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)  # 1 − β₁ of the gradient: unscaled, then clipped

    lower = functools.partial(real, init_scale=2.0**40, backoff_factor=2.0**-35)
    monkeypatch.setattr(torch.amp, "GradScaler", lower)
    call("train", *flags, "--steps", 2, "--out", tmp_path / "first")
    lines = metrics(tmp_path / "first")
    assert [line["skipped"] for line in lines[:2]] == [1, 0] and lines[0]["gradient norm"] == 0
    assert checkpoint.read(tmp_path / "first/last.pt").scaler["scale"] == 2.0**5
    refused(call, "train", *flags, "--steps", 1, "--out", tmp_path / "all")
    assert not (tmp_path / "all/last.pt").exists()


# ---- Resumption, and many processes --------------------------------------------------------------


def ending(step, number, rank=0):
    """The learning rate, but at this step process `rank` gets a signal, or dies (None)."""

    def rate(now, *rest, real=runtime.learning_rate):
        if now == step and int(os.environ.get("RANK", 0)) == rank:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return real(now, *rest)

    return rate


def train_until(step, number, rank, *flags):
    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, runtime.Stopped)) as ended:
        patch.setattr(runtime, "learning_rate", ending(step, number, rank))
        call("train", *flags)
    assert getattr(ended.value, "number", None) == number


CUT = """
image --dvae STAGES/dvae/last.pt --eval-every 2 | vl --init STAGES/text/last.pt
momo-text --no-cmga --amp fp16
"""
CUTS = [(stage, None, 4, 2) for stage in commands(CUT)]  # killed, after the checkpoint of step 2
CUTS.append(("vl --init STAGES/text/last.pt", signal.SIGTERM, 3, 3))


@pytest.mark.parametrize("stage, number, step, saved", CUTS)
def test_a_run_that_is_cut_resumes_bit_for_bit_with_no_other_flag(stage, number, step, saved, stages, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*brief(stage, stages), "--steps", 5, "--drop-path", 0.2, "--accumulate", 2]
    call("train", *flags, "--out", whole)
    train_until(step, number, 0, *flags, "--out", parts, "--resume")  # nothing is there yet to be resumed
    assert checkpoint.read(parts / "last.pt").step == saved and metrics(parts)[-1]["step"] == 3
    call("train", "--out", parts, "--resume")
    assert_same_run(whole, parts)


def test_one_of_two_processes_gets_a_signal_both_stop_and_torchrun_resumes(processes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*SIZE, *BRIEF, "--save-every", 100, "--steps", 6, "--keep-previous", "--accumulate", 2]
    flags += ["--drop-path", 0.2, "--data", pictures(tmp_path / "data"), "--out"]
    processes(2, call, "train", *flags, whole, group=False)
    processes(2, train_until, 3, signal.SIGTERM, 1, *flags, parts, group=False)
    assert checkpoint.read(parts / "last.pt").step == 3
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    answer = subprocess.run([*torchrun, "train.py", "--out", parts, "--resume"], **options, timeout=300)
    assert answer.stdout.count("resuming after step 3") == 1, answer.stderr  # process 0 speaks
    assert_same_run(whole, parts)
    assert checkpoint.read(parts / "previous.pt").step == 3


def interrupted(folder):
    """train.py as python runs it, with Ctrl-C in its second step."""
    sys.stderr = open(folder / "stderr", "w")
    runtime.learning_rate = ending(2, signal.SIGINT)
    sys.argv = ["train.py", *SIZE, *BRIEF, "--out", str(folder / "out")]
    runtime.run(train.main)


def test_a_stopped_script_has_its_line_and_status(processes, tmp_path):
    """As a user sees it: the bar is closed before the line."""
    with pytest.raises(mp.ProcessExitedException) as end:
        processes(1, interrupted, tmp_path, group=False)
    assert end.value.exit_code == 130 and checkpoint.read(tmp_path / "out/last.pt").step == 2
    said = f"stopped after step 2: --resume --out {tmp_path / 'out'} goes on"
    assert (tmp_path / "stderr").read_text().endswith(f"\ntrain.py: {said}\n")


def test_a_resumed_run_changes_only_what_it_is_allowed_to(tmp_path):
    """Flags, and how many samples the data have."""
    folder, out = pictures(tmp_path / "data", count=8), tmp_path / "out"
    run = ["--out", out, "--resume"]
    call("train", *SIZE, *BRIEF, "--data", folder, "--negatives", "local", "--out", out)
    for flags in (["--lr", 1e-4], ["--steps", 6], ["--batch-size", 4], ["--seed", 1]):
        refused(call, "train", *run, *flags, says=flags[0])
    for _ in range(2):
        call("train", *run, "--log-every", 2, "--vocab-size", 512)  # which it was at most
    pictures(folder, count=9)
    refused(call, "train", *run, says=r"samples \[16\] → \[18\]")
    assert len(metrics(out)) == 4
    call("train", *run, "--steps", 6, "--lr", 1e-4, "--allow-changes")
    now = json.loads((out / "config.json").read_text())
    assert now["args"]["lr"] == 1e-4
    assert [entry["step"] for entry in metrics(out)] == [1, 2, 3, 4, 5, 6]
    content = torch.load(out / "last.pt", weights_only=True)
    content["args"]["processes"] = 2  # whose negatives were others
    torch.save(content, out / "last.pt")
    refused(call, "train", *run, says="processes 2 → 1")


def test_a_run_without_a_checkpoint_is_resumed_by_its_own_command_only(tmp_path):
    out = tmp_path / "out"
    whole = ["--out", out, "--resume", *SIZE, *BRIEF]
    call("train", *whole, "--negatives", "local")
    (out / "last.pt").unlink()  # as if it had been killed before
    refused(call, "train", *whole, says=r"repeat the whole command of its run \(--negatives local → global\)")
    call("train", *whole, "--negatives", "local", "--log-every", 2)
    assert checkpoint.read(out / "last.pt").step == 4


# Negatives for ITM are drawn, so it is left out. In stage momo-text the modalities take turns, and only
# the texts have a split val
AS_ONE = """
image --dvae STAGES/dvae/last.pt | vl --itm-weight 0 | momo-text --no-cmga --texts DATA/texts.txt --eval-every 4
"""


@pytest.mark.parametrize("stage", commands(AS_ONE))
def test_two_processes_in_two_parts_train_and_measure_as_one(stage, stages, processes, tmp_path):
    folder = pictures(tmp_path / "data", count=16)
    pictures(folder, count=5, split="test")
    (folder / "7.png").write_bytes(b"broken")
    write_lines(folder / "texts.txt", *(f"{i} is followed by {i + 1}" for i in range(400)))
    flags = [*brief(stage.replace("DATA", str(folder)), stages), "--data", folder]
    call("train", *flags, "--out", tmp_path / "one")
    processes(2, call, "train", *flags, "--accumulate", 2, "--out", tmp_path / "two", group=False)
    entries = metrics(tmp_path / "one")
    assert entries[-1]["split"] == "test" and entries[3]["unreadable"] == 2  # in two epochs
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    if "momo" in stage:
        assert [entry.keys() & {"mlm", "mim"} for entry in entries[:4]] == [{"mim"}, {"mlm"}] * 2
        assert "error" in entries[-1]


# ---- Flags ---------------------------------------------------------------------------------------

RECIPES = {  # the papers', which give tasks in epochs; base_plus: the released code's; --config tiny is ours
    "--stage image --config base": "batch_size 2048, steps 500_000, warmup 6250, lr 1.5e-3, max_text_len 40",
    "--stage text --config base_plus": "batch_size 1024, steps 500_000, warmup 2500, lr 2e-4, max_text_len 196",
    "--stage text --config large": "batch_size 1024, steps 200_000, warmup 2500, lr 2e-4, max_text_len 196",
    "--stage vl --config base": "batch_size 1024, steps 200_000, warmup 2500, lr 2e-4, max_text_len 40",
    "--stage vl --config base_plus": "batch_size 1024, steps 200_000, warmup 2500, lr 1e-4, max_text_len 40",
    "--stage vl --config large": "batch_size 1024, steps 200_000, warmup 2500, lr 5e-5, max_text_len 40",
    "--stage text": "batch_size 64, steps 1000, warmup 75, lr 1e-3, max_text_len 48",
    "--task vqa --config base": "batch_size 128, epochs 10, lr 3e-5, image_size 480",
    "--task vqa --config large": "batch_size 128, epochs 10, lr 1.5e-5, image_size 480",
    "--task nlvr2 --config base": "batch_size 128, epochs 10, lr 5e-5, image_size 384",
    "--task nlvr2 --config large": "batch_size 128, epochs 10, lr 3e-5, image_size 384",
    "--task retrieval --config base": "batch_size 2048, epochs 20, lr 2e-5, image_size 384",
    "--task retrieval --config large": "batch_size 2048, epochs 10, lr 1e-5, image_size 384",
    "--task flickr30k --config base": "batch_size 2048, epochs 40, lr 1e-5, image_size 384",
}


@pytest.mark.parametrize("flags", RECIPES)
def test_recipes(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    option, stages = ("--task", finetune.TASKS) if "--task" in flags else ("--stage", train.STAGES)
    _, args, config, _ = train.parse(stages, option, None, None)
    for setting in RECIPES[flags].split(", "):
        name, value = setting.split()
        assert float(value) == vars(config).get(name, getattr(args, name, None)), name


def test_each_command_has_help(capsys):
    commands = ["weights", "bench", "findings", *(f"show {command}" for command in show.COMMANDS)]
    commands += [f"train --stage {stage}" for stage in train.STAGES]
    for script in ("finetune", "evaluate"):
        commands += [f"{script} --task {task}" for task in finetune.TASKS]
    for command in commands:
        with pytest.raises(SystemExit, match="^0$"):
            call(*command.split(), "--help")
        assert ("--resume" in capsys.readouterr().out) == command.startswith(("train", "finetune")), command


REFUSED = """
--batch-size 0 | --batch-size 8 --accumulate 3 | --lr nan | --itc-weight 0 --eval-every 1
--heads 5 | --vl-layers 9 | --vocab absent.txt | --stage image --itc-weight 1
--itc-weight 0 --itm-weight 0 --mlm-weight 0
--data absent | --data vl/config.json | --data vl | --out vl/config.json/below | --out vl/config.json
--stage dvae --recompute | --stage dvae --init image/last.pt | --stage image | --stage image --dvae absent.pt
--stage image --dvae image/last.pt | --stage image --dvae dvae/last.pt --patch-size 4
--stage text | --stage text --init shared.pt | --stage text --init image/last.pt --max-text-len 2
--stage text --init image/last.pt --data image | --init absent.pt | --init dvae/last.pt
--init vl/last.pt --dim 64 | --init vl/last.pt --config base | --init vl/last.pt --vocab-size 9
--init vl/last.pt --vocab vocab.txt | --stage text --out vl --resume
--out vl --resume --steps 1 --allow-changes | --out vl --resume --mlm-weight 0
--out image --resume --dvae other.pt --allow-changes
--stage momo-text --texts absent.txt | --stage momo-text --no-simultaneous --no-cmga
--stage momo-text --no-simultaneous --data vl | --stage momo-vl --no-simultaneous --texts vl
--stage momo-image --init vl/last.pt | --stage momo-all --no-simultaneous | --stage momo-all --images vl
"""


@pytest.fixture(scope="module")
def filled(stages, tmp_path_factory):
    """A folder with runs of the stages, and files that do not fit them."""
    folder = tmp_path_factory.mktemp("refused") / "runs"
    shutil.copytree(stages, folder)
    shutil.copy(folder / "dvae/last.pt", folder / "other.pt")
    content = torch.load(folder / "image/last.pt", weights_only=True)
    content["config"]["experts"] = "shared"
    torch.save(content, folder / "shared.pt")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, "red"]))
    return folder


@pytest.mark.parametrize("flags", commands(REFUSED))
def test_what_does_not_fit_is_refused_before_anything_is_written(flags, filled, monkeypatch):
    monkeypatch.chdir(filled)
    run = [*SIZE[-4:], *BRIEF, "--out", "new", *flags.split()]
    refused(call, "train", *run)
    assert not Path("new").exists()


@pytest.mark.parametrize("script", ["train", "finetune", "evaluate", "weights", "bench", "findings"])
def test_a_mistake_is_one_line_and_exit_status_2(script, monkeypatch, capsys):
    """The scripts as python runs them, except that os._exit, which ends a process, raises."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--wrong"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"{script}.py: error") and said.count("\n") == 1
