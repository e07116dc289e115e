"""The command lines, as a user types them."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import losses
import runtime
import train

ROOT = Path(__file__).parent.parent
SMALL = "--dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8 --batch-size 8 --warmup 2 --log-every 50".split()
SMALL += ["--steps", "100", "--drop-path", "0.1"]


KNOWN = {}


def vocabulary(captions, size, train_tokenizer=data.train_tokenizer):
    """Trained once for all the tests that ask for the same."""
    key = tuple(captions), size
    if key not in KNOWN:
        KNOWN[key] = train_tokenizer(captions, size)
    return KNOWN[key]


def call(monkeypatch, script, *flags):
    """A script's main in this process."""
    monkeypatch.setattr(data, "train_tokenizer", vocabulary)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, flags)])
    script.main()


def main_of(script, *flags):
    """A script's main, in one of several processes: `processes(2, main_of, "train", …, group=False)`."""
    sys.argv = [f"{script}.py", *map(str, flags)]
    importlib.import_module(script).main()


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


def test_another_seed_gives_other_losses(small_world, tmp_path, monkeypatch):
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


def test_a_second_run_in_the_same_folder_moves_the_first_aside(small_world, tmp_path, monkeypatch, capsys):
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


def test_accumulated_passes_give_the_mean_of_their_gradients(small_world, tmp_path, monkeypatch):
    """MLM alone has no negatives, and equal counts make the mean of means the mean: same step, in one pass or two."""
    flags = [*SMALL, "--steps", 1, "--itc-weight", 0, "--itm-weight", 0, "--log-every", 1, "--clip", 0]
    same = lambda self, ids, rng: (ids, torch.where(torch.arange(len(ids)) == 1, ids, data.IGNORE))
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
        "--recompute --drop-path 0.2",
    ],
)
def test_every_variant_trains(flags, small_world, tmp_path, monkeypatch):
    call(monkeypatch, train, *SMALL, "--steps", 2, "--out", tmp_path, *flags.split())
    assert runtime.load(tmp_path / "last.pt")["step"] == 2


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(small_world, tmp_path, monkeypatch):
    real, contents = torch.amp.GradScaler, {}
    for power in (10, 40):
        scaler = lambda device, enabled: real(device, init_scale=2.0**power, enabled=enabled)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        call(monkeypatch, train, *SMALL, "--steps", 1, "--out", tmp_path / str(power), "--amp", "fp16")
        contents[power] = runtime.load(tmp_path / str(power) / "last.pt")
    assert contents[10]["scaler"]["scale"] == 2.0**10 and contents[40]["scaler"]["scale"] == 2.0**39
    assert any(state["exp_avg"].any() for state in contents[10]["optimizer"]["state"].values())
    skipped = contents[40]["optimizer"]["state"].values()
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in skipped)


def test_two_processes_see_the_same_data_and_end_with_one_answer(processes, tmp_path, monkeypatch):
    flags = [*SMALL, "--steps", 2, "--log-every", 1, "--itm-weight", 0, "--drop-path", 0]  # no draws
    call(monkeypatch, train, *flags, "--out", tmp_path / "1")
    processes(2, main_of, "train", "--stage", "vl", *flags, "--out", tmp_path / "2", group=False)
    alone, both = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for one, two in zip(alone[:2], both[:2]):
        assert all(one[name] == pytest.approx(two[name], rel=1e-4) for name in ("itc", "mlm", "gradient norm"))
    assert alone[2]["mean"] == pytest.approx(both[2]["mean"], abs=0.2)


def saves_apart(aside, *flags):
    """A run whose checkpoint of step 2 is also kept elsewhere."""
    real = runtime.save

    def save(path, content):
        real(path, content)
        if content["step"] == 2:
            shutil.copy(path, aside)

    runtime.save = save
    main_of("train", *flags)


def test_torchrun_trains_with_all_losses_in_several_passes_and_resumes_exactly(processes, tmp_path):
    """torchrun goes on from what two processes had saved at step 2, and ends with the same losses."""
    (tmp_path / "b").mkdir()
    flags = [*SMALL, "--stage", "vl", "--accumulate", 2, "--save-every", 2, "--log-every", 1, "--steps", 4, "--out"]
    processes(2, saves_apart, tmp_path / "b", *flags, tmp_path / "a", group=False)
    answer = command("train.py", *flags, tmp_path / "b", "--resume", processes=2)
    assert "resuming after step 2" in answer.stdout, answer.stderr
    assert answer.stdout.count("split test: TR@1") == 1
    assert losses_of(tmp_path / "a")[2:] == losses_of(tmp_path / "b") and len(losses_of(tmp_path / "b")) == 2


def test_eval_every_watches_the_val_split(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "data")
    pictures(folder, split="val")
    call(monkeypatch, train, *SMALL, "--steps", 2, "--eval-every", 1, "--data", folder, "--out", tmp_path / "out")
    assert [(entry["step"], entry["split"]) for entry in metrics(tmp_path / "out") if "split" in entry] == [
        (1, "val"),
        (2, "val"),
    ]


def test_evaluate_reports_any_checkpoint(run, monkeypatch, capsys):
    call(monkeypatch, train.evaluate, "--task", "retrieval", "--checkpoint", run / "last.pt")
    said = capsys.readouterr().out
    assert "500 images, 1000 captions" in said
    results = json.loads(said.strip().splitlines()[-1])
    expected = metrics(run)[-1]
    assert results["TR@1"] == pytest.approx(expected["TR@1"], abs=0.01) and results["mean"] == pytest.approx(
        expected["mean"], abs=0.01
    )


# ---- The stages before -----------------------------------------------------------------------------------------------

BRIEF = "--batch-size 8 --warmup 2 --log-every 1 --steps 4 --save-every 2".split()
FIRST = [*BRIEF, *"--stage image --dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8".split()]


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setitem(data.SPLITS, "train", 300)
    monkeypatch.setitem(data.SPLITS, "test", 40)
    monkeypatch.setitem(train.TINY, "dvae", train.TINY["dvae"] | {"steps": 4, "codes": 8, "batch_size": 7})


def chained(folder, monkeypatch, *flags):
    """A few steps of each stage, each from the one before."""
    call(monkeypatch, train, *FIRST, *flags, "--out", folder / "image")
    call(monkeypatch, train, *BRIEF, "--stage", "text", "--init", folder / "image/last.pt", "--out", folder / "text")
    call(monkeypatch, train, *BRIEF, "--stage", "vl", "--init", folder / "text/last.pt", "--out", folder / "vl")
    return {stage: runtime.load(folder / stage / "last.pt") for stage in ("image-dvae", "image", "text", "vl")}


@pytest.mark.parametrize("flags", ["", "--position relative --layer-scale 0.1 --text-reach 60 --attention separate"])
def test_stages_follow_each_other(flags, small_world, tmp_path, monkeypatch, capsys):
    files, said = chained(tmp_path, monkeypatch, *flags.split()), capsys.readouterr().out
    assert "no --dvae: one is trained first" in said and (tmp_path / "image-dvae/reconstructions-test.png").exists()
    text_attention = "blocks.*.attention.language, " * ("separate" in flags)  # stays frozen: copied again for stage vl
    assert [line.split(" M  ")[1] for line in said.splitlines() if line.startswith("  copied")] == [
        f"{text_attention}blocks.*.experts.language, blocks.*.experts.vl",
        f"{text_attention}blocks.*.experts.vl",
    ]
    assert "  learns: types, " + ("relative_table" if flags else "text_position") + ", words, text_norm, blocks" in said
    image, text, vl = (files[stage]["model"] for stage in ("image", "text", "vl"))
    assert not any(name.startswith(("words", "mlm_head", "itc_")) or ".language." in name for name in image)
    assert (
        not any(name.startswith(("itc_", "pooler")) or ".vl." in name for name in text) and "mlm_head.0.weight" in text
    )
    assert files["image"]["head"].keys() == {"mask_embedding", "classifier.weight", "classifier.bias"}
    assert files["text"]["head"] == {} and files["text"]["config"]["max_text_len"] == 48
    assert vl.keys() == train.VLMo(train.Config(**files["vl"]["config"])).state_dict().keys()
    assert files["vl"]["tokenizer"] == files["text"]["tokenizer"] and files["image"]["tokenizer"] is None
    for name, tensor in image.items():  # stage text keeps all of it, but for what both modalities share
        if name not in ("types", "relative_table", "norm.weight", "norm.bias"):
            assert torch.equal(tensor, text[name]), name
    assert torch.equal(image["types"][1:], text["types"][1:]) and not torch.equal(image["types"][0], text["types"][0])
    if "relative" in flags:
        patches = (2 * 2 - 1) ** 2 + 3  # the image's rows of the table
        assert torch.equal(image["relative_table"][:patches], text["relative_table"][:patches])
        assert not torch.equal(image["relative_table"], text["relative_table"])


def test_each_stage_measures_itself_beside_plain_guesses(small_world, tmp_path, monkeypatch):
    chained(tmp_path, monkeypatch)
    last = {stage: metrics(tmp_path / stage)[-1] for stage in ("image-dvae", "image", "text", "vl")}
    assert all(entry["split"] == "test" for entry in last.values())
    assert {"codes", "perplexity", "error"} <= last["image-dvae"].keys() and last["image-dvae"]["codes"] <= 8
    assert {"accuracy", "perplexity", "nearest visible", "most frequent", "masked"} <= last["image"].keys()
    assert {"accuracy", "perplexity", "unigram accuracy", "unigram perplexity"} <= last["text"].keys()
    assert {"codes", "reconstruction", "kl", "images_per_s"} <= metrics(tmp_path / "image-dvae")[0].keys()
    assert "mim" in metrics(tmp_path / "image")[0] and "texts_per_s" in metrics(tmp_path / "text")[0]


@pytest.mark.parametrize("stage", ["dvae", "image", "text"])
def test_every_stage_resumes_bit_for_bit(stage, small_world, tmp_path, monkeypatch):
    if stage == "text":
        call(monkeypatch, train, *FIRST, "--out", tmp_path / "before", "--steps", 1)
        flags = [*BRIEF, "--stage", "text", "--init", tmp_path / "before/last.pt"]
    else:
        flags = [*FIRST, "--drop-path", 0.2] if stage == "image" else [*BRIEF, "--stage", "dvae", "--image-size", 16]
    call(monkeypatch, train, *flags, "--out", tmp_path / "whole")
    real = runtime.save

    def dies(path, content):
        real(path, content)
        if content["step"] == 2:
            raise Killed

    monkeypatch.setattr(runtime, "save", dies)
    for _ in range(2 if stage == "image" else 1):  # stage image dies twice: its dVAE is trained and saved first
        with pytest.raises(Killed):
            call(monkeypatch, train, *flags, "--out", tmp_path / "out", "--resume")
    call(monkeypatch, train, *flags, "--out", tmp_path / "out", "--resume")
    whole, resumed = (runtime.load(tmp_path / name / "last.pt") for name in ("whole", "out"))
    for part in ("model", "head"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
    if stage == "image":
        assert all(torch.equal(t, resumed["dvae"]["model"][name]) for name, t in whole["dvae"]["model"].items())
    strip = lambda folder: [{k: v for k, v in entry.items() if not k.endswith("per_s")} for entry in metrics(folder)]
    assert strip(tmp_path / "whole") == strip(tmp_path / "out")


def test_two_processes_train_stages_image_and_text_as_one_does(processes, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", count=16)
    pictures(folder, count=5, split="test")
    (tmp_path / "a.txt").write_text("\n".join(f"number {i} is followed by number {i + 1}" for i in range(400)))
    own = ["--data", folder, "--batch-size", 8, "--warmup", 2, "--log-every", 1, "--steps", 3]
    dvae_flags = ["--stage", "dvae", *own, "--image-size", 16, "--codes", 8, "--out", tmp_path / "dvae"]
    call(monkeypatch, train, *dvae_flags)
    flags = {"image": [*FIRST, *own, "--dvae", tmp_path / "dvae/last.pt"]}
    flags["text"] = [*BRIEF, "--stage", "text", "--data", tmp_path / "a.txt", "--init", tmp_path / "image/last.pt"]
    for stage in ("image", "text"):
        call(monkeypatch, train, *flags[stage], "--out", tmp_path / stage)
        processes(2, main_of, "train", *flags[stage], "--out", tmp_path / f"{stage}-2", group=False)
        one, two = metrics(tmp_path / stage), metrics(tmp_path / f"{stage}-2")
        assert len(one) == len(two) and one[-1]["split"] == two[-1]["split"] == "test"
        for first, second in zip(one, two):
            exact = {
                name: value for name, value in first.items() if name not in ("split", "images_per_s", "texts_per_s")
            }
            assert {name: second[name] for name in exact} == pytest.approx(exact, rel=1e-3)


def trained(stage, batch, steps=3):
    """What a stage's optimizer does to a model: (before, after) of every tensor, and whether it was trainable."""
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    optimizer = runtime.optimizer(stage, 0.05, (0.9, 0.98))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        sum(stage(batch)[name] for name in stage.weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stage.model.state_dict()
    for name, parameter in stage.model.named_parameters():
        assert (id(parameter) in held) == parameter.requires_grad == (not torch.equal(before[name], after[name])), name
        assert parameter.requires_grad or parameter.grad is None, name
    return before, after


VARIANTS = [{}, {"position": "relative", "layer_scale": 0.1}, {"attention": "separate"}, {"vl_layers": 0}]


@pytest.mark.parametrize("switches", VARIANTS)
def test_stage_text_trains_the_language_part_and_nothing_else(switches):
    torch.manual_seed(0)
    small = dict(dim=24, layers=2, heads=2, vl_layers=1, image_size=16, patch_size=8, vocab_size=30, max_text_len=9)
    model = train.VLMo(train.Config(**small | switches)).train()
    image = torch.rand(2, 3, 16, 16)
    features = lambda: features_before_the_norm(model, image)
    kept = features()
    text = torch.randint(5, 30, (4, 9))
    labels = torch.where(torch.rand(4, 9) < 0.3, text, data.IGNORE)
    batch = {"masked": text, "labels": labels, "mask": torch.arange(9) < torch.tensor([[9], [9], [7], [5]])}
    before, after = trained(train.TextStage(model), batch)
    moved = {train.weights.group(name) for name in before if not torch.equal(before[name], after[name])}
    positions = "relative_table" if switches.get("position") else "text_position"
    assert moved == {"words", "text_norm", "types", "norm", "mlm_head", "blocks.*.experts.language", positions}
    assert torch.equal(features(), kept)  # not a bit of an image's features has changed


def features_before_the_norm(model, image):
    """(B, 1+N, D) after the last block."""
    norm, model.norm = model.norm, torch.nn.Identity()
    with torch.no_grad():
        features = model.encode_image(image)
    model.norm = norm
    return features


@pytest.mark.parametrize("switches", [*VARIANTS, {"experts": "shared"}])
def test_stage_image_trains_the_path_of_images_and_nothing_else(switches):
    torch.manual_seed(0)
    small = dict(dim=24, layers=2, heads=2, vl_layers=1, image_size=16, patch_size=4, vocab_size=30, max_text_len=9)
    model = train.VLMo(train.Config(**small | switches)).train()
    tokenizer = train.dvae.DVAE(train.dvae.DVAEConfig(grid=4, codes=6, width=8))
    batch = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), "hidden": torch.rand(4, 16) < 0.4}
    stage = train.ImageStage(model, train.MIMHead(model.config, 6), tokenizer)
    before, after = trained(stage, batch)
    groups = train.weights.groups(before)
    moved = {
        group
        for group in groups
        if group in {train.weights.group(name) for name in before if not torch.equal(before[name], after[name])}
    }
    expert, position = (
        "shared" if switches.get("experts") else "vision",
        "relative_table" if switches.get("position") else "image_position",
    )
    attention = {"blocks.*.attention.shared", "blocks.*.attention.vision"} & set(groups)
    branches = {"blocks.*.attention_branch", "blocks.*.expert_branch"} & set(groups)
    path = {"patches", "image_cls", "types", "norm", "blocks.*.norm", position, f"blocks.*.experts.{expert}"}
    assert moved == path | attention | branches and all(p.grad is None for p in tokenizer.parameters())


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_exit_status_2(tmp_path):
    (tmp_path / "x.pt").write_text("no checkpoint")
    with ThreadPoolExecutor() as pool:  # each waits for its process
        flag = pool.submit(command, "train.py", "--config", "huge")
        task = pool.submit(command, "finetune.py", "--init", "absent.pt")
        file = pool.submit(command, "evaluate.py", "--checkpoint", tmp_path / "x.pt")
        nothing = tmp_path / "nothing"
        two = pool.submit(command, "train.py", *SMALL, "--batch-size", 7, "--out", nothing, processes=2)
    refused(flag.result(), "invalid choice: 'huge'")
    refused(task.result(), "--task")
    refused(file.result(), "not a checkpoint of this project")
    said = two.result().stderr
    assert two.result().returncode != 0 and "error: --batch-size 7 is not divisible by 2 processes" in said
    assert 'train.py", line' not in said and not nothing.exists()  # a traceback of torchrun's, none of ours


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
        ("--itc-weight 0 --eval-every 1", "something that this run learns to measure on it"),
        ("--vl-layers 9", "vl_layers must be in 0"),
        ("--vocab absent.txt", "absent.txt cannot be read"),
        ("--init absent.pt", "absent.pt: no such file"),
        ("--codes 8", "--codes is of stage dvae and image, not of vl"),
        ("--stage image --kl-weight nan", "must be finite and not negative"),
        ("--stage image --itm-weight 0", "--itm-weight is of stage vl, not of image"),
        ("--stage text --augment crop", "--augment: this run has nothing that it could apply to"),
        ("--stage text", "stage text keeps the attention of stage image: name its checkpoint with --init"),
        ("--stage image --data README.md", "README.md: is a file; this stage takes images in a folder"),
        ("--data tests", "tests: has no captions"),
        ("--stage image --dvae x.pt --codes 8", "they do not go with --dvae"),
        ("--stage image --dvae x.pt --kl-weight 0.1", "they do not go with --dvae"),
        ("--stage image --codes 1", "--codes must be at least 2"),
        ("--data absent", "absent: no such folder"),
    ],
)
def test_numbers_and_files_that_do_not_fit_are_refused(flags, says, tmp_path, monkeypatch):
    with pytest.raises((runtime.UserError, data.DataError), match=says):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(runtime.UserError, match="last.pt has dim 32, and this run 64: leave the flags"):
        call(monkeypatch, train, *SMALL, "--dim", 64, "--init", run / "last.pt", "--out", tmp_path / "out")


def test_a_checkpoint_that_does_not_fit_the_run_is_refused(run, tmp_path, monkeypatch):
    content = runtime.load(run / "last.pt")
    runtime.save(tmp_path / "last.pt", content)
    with pytest.raises(runtime.UserError, match="no run that can be continued like this"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path, "--resume", "--mlm-weight", 0)
    runtime.save(tmp_path / "other.pt", content | {"config": content["config"] | {"rotary": True}})
    with pytest.raises(runtime.UserError, match="not one of this version: .*rotary"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "out", "--init", tmp_path / "other.pt")
    (tmp_path / "vocab.txt").write_text("\n".join([*data.SPECIAL, "red"]))
    with pytest.raises(runtime.UserError, match="vocab.txt is not the vocabulary that .*last.pt was trained with"):
        call(
            monkeypatch, train, "--out", tmp_path / "out", "--init", run / "last.pt", "--vocab", tmp_path / "vocab.txt"
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(runtime.UserError, match="--out .*file: File exists"):
        call(monkeypatch, train, *SMALL, "--out", tmp_path / "file")


def test_checkpoints_of_the_wrong_stage_are_refused(run, small_world, tmp_path, monkeypatch):
    call(monkeypatch, train, *FIRST, "--steps", 1, "--out", tmp_path / "image")
    tokenizer, image, out = tmp_path / "image-dvae/last.pt", tmp_path / "image/last.pt", ["--out", tmp_path / "out"]
    shared, other = runtime.load(image), runtime.load(tokenizer)
    runtime.save(tmp_path / "other.pt", other | {"model": {name: t + 1 for name, t in other["model"].items()}})
    (tmp_path / "image-2").mkdir()
    runtime.save(tmp_path / "image-2" / "last.pt", shared | {"step": 4})
    runtime.save(tmp_path / "shared.pt", shared | {"config": shared["config"] | {"experts": "shared"}})
    for flags, says in [
        ([*FIRST, "--dvae", image], "last.pt holds a model of stage image, where a dVAE is needed"),
        ([*FIRST, "--dvae", tokenizer, "--patch-size", 4], "2 × 2 codes an image, the model 4 × 4 patches"),
        ([*BRIEF, "--init", tokenizer], "last.pt holds a dVAE, where a model is needed"),
        ([*BRIEF, "--init", image, "--config", "base"], "has dim 32, and this run 768"),
        ([*BRIEF, "--stage", "text", "--init", image, "--data", tmp_path], r"there is no \*.txt below"),
        ([*BRIEF, "--stage", "text", "--init", tmp_path / "shared.pt"], "--experts shared has none"),
        ([*BRIEF, "--out", tmp_path / "image", "--resume"], "is of stage image: give stage vl another --out"),
        ([*BRIEF, "--stage", "image", "--init", image, "--codes", 9], "--codes: .* was trained with 8"),
        ([*FIRST, "--out", tmp_path / "image", "--resume", "--dvae", tmp_path / "other.pt"], "is not the one that"),
        ([*FIRST, "--steps", 1, "--out", tmp_path / "image-2", "--resume"], "is of step 4: --steps 1 lies behind it"),
        ([*BRIEF, "--stage", "text", "--init", image, "--max-text-len", 2], "at least 3"),
        ([*BRIEF, "--init", run / "last.pt", "--vocab-size", 9], "--vocab-size: .* which stays"),
    ]:
        with pytest.raises((runtime.UserError, data.DataError), match=says):
            call(monkeypatch, train, *out, *flags)
    assert not (tmp_path / "out").exists()
    with pytest.raises(runtime.UserError, match=r"stage image\) never learned ITC, which retrieval needs"):
        call(monkeypatch, train.evaluate, "--checkpoint", image)


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


def not_finite_on_one(flags):
    real = losses.itc_loss
    losses.itc_loss = lambda *parts: real(*parts) * (math.nan if losses.rank() == 1 else 1)
    try:
        main_of("train", *flags)
    except runtime.UserError as error:
        return str(error)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(processes, tmp_path):
    flags = [*SMALL, "--steps", 50, "--data", pictures(tmp_path / "data"), "--out", tmp_path / "out"]
    for said in processes(2, not_finite_on_one, flags, group=False):
        assert "step 1: itc is nan" in said
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
    assert capsys.readouterr().out.count("2.png cannot be read") == 1


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
