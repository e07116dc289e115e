"""The command lines, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import runtime
import train

ROOT = Path(__file__).parent.parent
SMALL = "--dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8 --batch-size 8 --warmup 2 --log-every 50".split()
SMALL += ["--steps", "100", "--drop-path", "0.1"]


def call(monkeypatch, script, *flags):
    """A script's main in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, flags)])
    script.main()


def command(*words, processes=1, **environment):
    """A script in a process of its own, or several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable, *(launcher if processes > 1 else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*start, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def refused(answer, says):
    """Exit status 2 and one line that says it."""
    assert answer.returncode == 2, answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], answer.stderr


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [
        {name: entry[name] for name in ("itc", "itm", "mlm", "gradient norm")}
        for entry in metrics(folder)
        if "itc" in entry
    ]


def pictures(folder, count=6, split="train"):
    folder.mkdir(exist_ok=True)
    with open(folder / f"{split}.jsonl", "w") as file:
        for i in range(count):
            Image.new("RGB", (20, 20), (40 * i, 255 - 40 * i, 100)).save(folder / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "captions": [f"picture number {i}", "a color"]}) + "\n")
    return folder


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run of 100 steps: its folder."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        call(patch, train, *SMALL, "--out", out)
    return out


def test_a_run_leaves_a_checkpoint_metrics_and_its_configuration(run):
    content = runtime.load(run / "last.pt")
    assert content["step"] == 100 and content["config"]["dim"] == 32 and content["args"]["batch_size"] == 8
    entries = metrics(run)
    assert (
        [entry["step"] for entry in entries] == [50, 100, 100]
        and entries[-1]["split"] == "test"
        and "TR@1" in entries[-1]
    )
    assert {"itc", "itm", "mlm", "gradient norm", "lr", "scale", "pairs_per_s", "unreadable"} <= entries[0].keys()
    assert json.loads((run / "config.json").read_text())["config"]["vocab_size"] == content["config"]["vocab_size"]


def test_the_same_seed_gives_the_same_bits_for_any_number_of_workers(run, tmp_path, monkeypatch):
    call(monkeypatch, train, *SMALL, "--out", tmp_path, "--workers", 2)
    first, again = runtime.load(run / "last.pt")["model"], runtime.load(tmp_path / "last.pt")["model"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert losses_of(run) == losses_of(tmp_path)


def test_another_seed_gives_other_losses(tmp_path, monkeypatch):
    flags = [*SMALL, "--steps", 2, "--log-every", 2]
    for seed in (0, 1):
        call(monkeypatch, train, *flags, "--out", tmp_path / str(seed), "--seed", seed)
    assert losses_of(tmp_path / "0") != losses_of(tmp_path / "1")


class Killed(Exception):
    pass


def test_resuming_a_killed_run_gives_the_same_bits(run, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--out", tmp_path, "--save-every", 30]
    real, calls = data.Pairs.__getitem__, []

    def dies(self, key):
        calls.append(key)
        if len(calls) > 8 * 50:  # in step 51; the checkpoint is of step 30
            raise Killed
        return real(self, key)

    monkeypatch.setattr(data.Pairs, "__getitem__", dies)
    with pytest.raises(Killed):
        call(monkeypatch, train, *flags)
    monkeypatch.setattr(data.Pairs, "__getitem__", real)
    assert runtime.load(tmp_path / "last.pt")["step"] == 30
    call(monkeypatch, train, *flags, "--resume")
    assert "resuming after step 30\n" in capsys.readouterr().out
    whole, resumed = runtime.load(run / "last.pt"), runtime.load(tmp_path / "last.pt")
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    for number, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(state[name], resumed["optimizer"]["state"][number][name]) for name in state)
    assert [entry["step"] for entry in metrics(tmp_path)] == [30, 50, 60, 90, 100, 100]


def test_a_second_run_in_the_same_folder_moves_the_first_aside(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for _ in range(3):
        call(monkeypatch, train, *SMALL, "--steps", 1, "--out", out)
    assert all((tmp_path / name / "last.pt").exists() for name in ("out", "out.1", "out.2"))
    assert "moved to" in capsys.readouterr().out


def test_init_starts_from_a_checkpoint(run, tmp_path, monkeypatch):
    call(
        monkeypatch,
        train,
        "--init",
        run / "last.pt",
        *SMALL[-6:],
        "--batch-size",
        8,
        "--lr",
        0,
        "--steps",
        1,
        "--out",
        tmp_path,
    )
    before, after = runtime.load(run / "last.pt"), runtime.load(tmp_path / "last.pt")
    assert after["step"] == 1 and all(
        torch.equal(before["model"][name], after["model"][name]) for name in before["model"]
    )
    assert after["tokenizer"] == before["tokenizer"] and after["config"] == before["config"]


def test_accumulated_passes_give_the_mean_of_their_gradients(tmp_path, monkeypatch):
    """MLM alone has no negatives, and equal counts make the mean of means the mean: same step, in one pass or two."""
    flags = [*SMALL, "--steps", 1, "--itc-weight", 0, "--itm-weight", 0, "--log-every", 1, "--clip", 0]
    same = lambda self, ids, words, rng: (ids, torch.where(torch.arange(len(ids)) == 1, ids, data.IGNORE))
    monkeypatch.setattr(data.Words, "mask_words", same)
    for passes in (1, 2):
        call(monkeypatch, train, *flags, "--accumulate", passes, "--out", tmp_path / str(passes))
    once, twice = (metrics(tmp_path / name)[0] for name in ("1", "2"))
    for name in ("mlm", "gradient norm"):
        assert once[name] == pytest.approx(twice[name], rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        "--itm-weight 0 --mlm-weight 0",
        "--itc-weight 0",
        "--negatives local --experts shared --vl-layers 0",
        "--position relative --layer-scale 0.1 --attention separate --drop-path 0.2",
        "--batch-size 1 --amp bf16 --workers 1",
    ],
)
def test_every_variant_trains(flags, tmp_path, monkeypatch):
    call(monkeypatch, train, *SMALL, "--steps", 2, "--out", tmp_path, *flags.split())
    assert runtime.load(tmp_path / "last.pt")["step"] == 2


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path, monkeypatch):
    call(monkeypatch, train, *SMALL, "--steps", 1, "--out", tmp_path / "a", "--amp", "fp16")
    scaler = runtime.load(tmp_path / "a" / "last.pt")["scaler"]
    assert scaler["scale"] == 65536.0
    initial = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: initial(device, init_scale=2.0**40, enabled=enabled)
    )
    call(monkeypatch, train, *SMALL, "--steps", 1, "--out", tmp_path / "b", "--amp", "fp16")
    content = runtime.load(tmp_path / "b" / "last.pt")
    assert content["scaler"]["scale"] == 2.0**39
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in content["optimizer"]["state"].values())


def test_torchrun_with_two_processes_sees_the_same_data_and_ends_with_one_answer(tmp_path):
    flags = [*SMALL, "--steps", 2, "--log-every", 1, "--itm-weight", 0, "--drop-path", 0]  # no draws
    for processes in (1, 2):
        answer = command("train.py", "--stage", "vl", *flags, "--out", tmp_path / str(processes), processes=processes)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count("zero-shot retrieval") == 1
    alone, both = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for one, two in zip(alone[:2], both[:2]):
        assert all(one[name] == pytest.approx(two[name], rel=1e-4) for name in ("itc", "mlm", "gradient norm"))
    assert alone[2]["mean"] == pytest.approx(both[2]["mean"], abs=0.2)


def test_torchrun_trains_with_all_losses_in_several_passes_and_resumes(tmp_path):
    flags = [*SMALL, "--stage", "vl", "--accumulate", 2, "--save-every", 2, "--log-every", 1, "--out"]
    assert command("train.py", *flags, tmp_path / "a", "--steps", 4, processes=2).returncode == 0
    assert command("train.py", *flags, tmp_path / "b", "--steps", 4, processes=2).returncode == 0
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") and len(losses_of(tmp_path / "a")) == 4
    answer = command("train.py", *flags, tmp_path / "b", "--steps", 5, "--resume", processes=2)
    assert "resuming after step 4 with other flags: steps 4 → 5" in answer.stdout, answer.stderr
    assert [entry["step"] for entry in metrics(tmp_path / "b")] == [1, 2, 3, 4, 4, 5, 5]


def test_eval_every_watches_the_val_split(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "data")
    pictures(folder, split="val")
    call(monkeypatch, train, *SMALL, "--steps", 2, "--eval-every", 1, "--data", folder, "--out", tmp_path / "out")
    assert [(entry["step"], entry["split"]) for entry in metrics(tmp_path / "out") if "split" in entry] == [
        (1, "val"),
        (2, "val"),
    ]


def test_evaluate_reports_any_checkpoint(run):
    answer = command("evaluate.py", "--task", "retrieval", "--checkpoint", run / "last.pt")
    assert answer.returncode == 0 and "500 images, 1000 captions" in answer.stdout
    results = json.loads(answer.stdout.strip().splitlines()[-1])
    expected = metrics(run)[-1]
    assert results["TR@1"] == pytest.approx(expected["TR@1"], abs=0.01) and results["mean"] == pytest.approx(
        expected["mean"], abs=0.01
    )


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_exit_status_2(run, tmp_path):
    nothing = tmp_path / "nothing"
    refused(command("train.py", "--config", "huge"), "invalid choice: 'huge'")
    refused(command("train.py", "--data", nothing), "no such folder")
    (tmp_path / "x.pt").write_text("no checkpoint")
    refused(command("evaluate.py", "--checkpoint", tmp_path / "x.pt"), "not a checkpoint of this project")
    answer = command("train.py", *SMALL, "--batch-size", 7, "--out", nothing, processes=2)
    assert answer.returncode != 0 and "error: --batch-size 7 is not divisible by 2 processes" in answer.stderr
    assert 'train.py", line' not in answer.stderr and not nothing.exists()  # a traceback of torchrun's, none of ours


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--batch-size 0", "must be at least 1"),
        ("--batch-size 8 --accumulate 3", "not divisible by 1 processes × 3 passes"),
        ("--eval-every -1", "must not be negative"),
        ("--lr nan", "must be finite and not negative"),
        ("--clip -1", "must be finite and not negative"),
        ("--itc-weight -1", "must be finite and not negative"),
        ("--itc-weight 0 --itm-weight 0 --mlm-weight 0", "must not all be 0"),
        ("--steps many", "invalid int value: 'many'"),
        ("--heads 5", "multiple of heads"),
        ("--vl-layers 9", "vl_layers must be in 0"),
        ("--vocab absent.txt", "absent.txt cannot be read"),
        ("--init absent.pt", "absent.pt: no such file"),
        ("--data absent", "absent: no such folder"),
    ],
)
def test_numbers_and_files_that_do_not_fit_are_refused(flags, says, tmp_path, monkeypatch):
    with pytest.raises((runtime.UserError, data.DataError), match=says):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(runtime.UserError, match="is of another shape: .* there and .* here"):
        call(monkeypatch, train, *SMALL, "--dim", 64, "--init", run / "last.pt", "--out", tmp_path / "out")


def test_a_checkpoint_that_does_not_fit_the_run_is_refused(run, tmp_path, monkeypatch):
    content = runtime.load(run / "last.pt")
    runtime.save(tmp_path / "last.pt", content)
    with pytest.raises(runtime.UserError, match="no run that can be continued like this"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path, "--resume", "--mlm-weight", 0)
    runtime.save(tmp_path / "other.pt", content | {"config": content["config"] | {"rotary": True}})
    with pytest.raises(runtime.UserError, match="not one of this version: .*rotary"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "out", "--init", tmp_path / "other.pt")
    with pytest.raises(runtime.UserError, match="--vocab does not go with --init"):
        call(monkeypatch, train, "--out", tmp_path / "out", "--init", run / "last.pt", "--vocab", "vocab.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(runtime.UserError, match="--out .*file: File exists"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "file")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path, monkeypatch):
    real = train.VisionLanguageStage.forward

    def breaks(self, batch):
        out = real(self, batch)
        breaks.calls += 1
        return out | {"itm": out["itm"] * (torch.nan if breaks.calls == 3 else 1)}

    breaks.calls = 0
    monkeypatch.setattr(train.VisionLanguageStage, "forward", breaks)
    with pytest.raises(runtime.UserError, match="stage vl, step 3: itm is nan"):
        call(monkeypatch, train, *SMALL, "--steps", 9, "--log-every", 5, "--save-every", 4, "--out", tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path):
    folder = pictures(tmp_path / "data")
    script = tmp_path / "broken.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import data, losses, runtime, train\n"
        "real = losses.itc_loss\n"
        "losses.itc_loss = lambda *a: real(*a) * (float('nan') if os.environ['RANK'] == '1' else 1)\n"
        "runtime.run(train.main, data.DataError)\n"
    )
    answer = command(script, *SMALL, "--steps", 50, "--data", folder, "--out", tmp_path / "out", processes=2)
    assert answer.returncode != 0 and "step 1: itc is nan" in answer.stderr
    assert not (tmp_path / "out" / "last.pt").exists()


def test_corrupt_images_are_counted_and_named_once_in_training_and_an_error_in_evaluation(
    tmp_path, monkeypatch, capsys
):
    folder = pictures(tmp_path / "data")
    pictures(folder, split="test")
    (folder / "2.png").write_bytes(b"broken")
    with pytest.raises(data.DataError, match="2.png cannot be read"):  # the run's last act, the test split
        call(monkeypatch, train, *SMALL, "--steps", 6, "--data", folder, "--out", tmp_path / "out")
    assert metrics(tmp_path / "out")[-1]["unreadable"] == 1 and (tmp_path / "out" / "last.pt").exists()
    assert capsys.readouterr().out.count("2.png") == 1


def test_too_many_corrupt_images_stop_the_run(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "data", count=20)
    for i in range(15):
        (folder / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(data.DataError, match="11 images could not be read, more than 10"):
        unreadable = train.Unreadable(20)
        for i in range(15):
            unreadable.check({"image": 0, "unreadable": [f"{i}.png", f"{i}.png"]})
    with pytest.raises(data.DataError, match="images could not be read, more than 10"):
        call(monkeypatch, train, *SMALL, "--steps", 6, "--data", folder, "--out", tmp_path / "out")
