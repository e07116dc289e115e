"""What several test files share: scripts as users run them, small models and worlds, several processes."""

import importlib
import json
import multiprocessing.forkserver
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "stress")]
torch.set_num_threads(1)  # tests are small; threads of several processes would wait for each other
multiprocessing.set_forkserver_preload(["torch._dynamo", "conftest", "finetune"])  # once for all

import checkpoint
import classify
import shapes
import sides
import texts
import train
from mome import Config, VLMo
from runtime import UserError
from stages import VL

# ---- Scripts -------------------------------------------------------------------------------------

SIZE = "--dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8".split()
BRIEF = "--batch-size 8 --warmup 2 --steps 4 --save-every 2 --log-every 1".split()
shapes.SCENES = {"train": 300, "val": 12, "test": 40, "rare": 12}  # of the built-in world
KNOWN = {}  # tokenizers and scenes, made once for all tests that ask for the same


def train_tokenizer_once(corpus, size, train_tokenizer=texts.train_tokenizer):
    key = tuple(corpus()), size
    if key not in KNOWN:
        KNOWN[key] = train_tokenizer(corpus, size)
    return KNOWN[key]


def scene_once(world, i, scene=shapes.World.scene):
    key = world.name, i
    if key not in KNOWN:
        KNOWN[key] = scene(world, i)
    return KNOWN[key]


shapes.World.scene = scene_once


def call(script, *flags, charts=False):
    """Runs a script's main in this process, without what takes long: syncing files to a disk, pictures
    for a linear probe, and, unless they are asked for, charts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "train_tokenizer", train_tokenizer_once)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(classify, "PICTURES", 16)
        if not charts:
            patch.setattr(train, "drawing", SimpleNamespace(curves=lambda runs: None))
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        importlib.import_module(script).main()


def tune(task, out, *flags):
    """Fine-tunes in a folder → the checkpoint of the last step."""
    call("finetune", "--task", task, *flags, "--out", out)
    return checkpoint.read(out / "last.pt")


def refused(function, *arguments, error=UserError, says=None, **more):
    """A call that must fail, in one line."""
    with pytest.raises(error, match=says) as caught:
        function(*arguments, **more)
    assert "\n" not in str(caught.value)


def commands(text):
    """Command lines that stand in lines, or between bars."""
    return re.split(r" \| |\n", text.strip())


def metrics(folder):
    """The entries of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(one, two, rel=1e-3):
    """Two folders have the same entries, up to rounding and the machine's speed."""
    for first, second in zip(metrics(one), metrics(two), strict=True):
        speed = {name: 0 for name in first if name.endswith("_s")}
        assert first.pop("split", None) == second.pop("split", None)
        assert first | speed == pytest.approx(second | speed, rel=rel)


def assert_same_run(one, two):
    """Two folders hold, bit for bit, the same metrics and last.pt."""
    assert_same_metrics(one, two, rel=0)
    one, two = (checkpoint.read(folder / "last.pt") for folder in (one, two))
    for part in ("tensors", "head", "optimizer", "scaler"):
        torch.testing.assert_close(getattr(one, part), getattr(two, part), rtol=0, atol=0)


# ---- Stages --------------------------------------------------------------------------------------


def stage_commands(folder, *flags):
    """Command lines of a few steps of VLMo's four stages, each from the one before, in folders below
    `folder`."""
    starts = {
        "dvae": [*SIZE[-4:], "--codes", 8, "--width", 16],
        "image": [*SIZE, *flags, "--dvae", folder / "dvae/last.pt"],
        "text": ["--init", folder / "image/last.pt"],
        "vl": ["--init", folder / "text/last.pt"],
    }
    for stage, start in starts.items():
        yield [str(word) for word in ("--stage", stage, *start, *BRIEF, "--out", folder / stage)]


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """The folder of these stages, for tests that read it only."""
    folder = tmp_path_factory.mktemp("stages")
    for words in stage_commands(folder):
        call("train", *words, charts=True)
    return folder


# ---- Models --------------------------------------------------------------------------------------

SMALL = Config(
    dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=24
)  # fmt: skip
RELATIVE = {"position": "relative", "layer_scale": 0.1}


@torch.no_grad()
def shaken(module, by=0.1):
    """The module, no parameter of which is left at a symmetric start."""
    for parameter in module.parameters():
        parameter += by * torch.randn_like(parameter)
    return module


def vl_stage(names="itc itm mlm", negatives="global", **switches):
    """Stage vl around a small model in float64."""
    torch.manual_seed(0)
    model = shaken(VLMo(replace(SMALL, **switches))).double()
    weights = {name: sides.ALL[name] for name in names.split()}
    return sides.bare(VL, model, loss_weights=weights, negatives=negatives)


# ---- Processes -----------------------------------------------------------------------------------


def _start(rank, world, port, group, function, arguments, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo")
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def forkserver():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where it finds conftest
        multiprocessing.forkserver.ensure_running()  # it imports while the first tests run


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    def run(world, function, *arguments, group=True):
        """Calls function in `world` processes → their answers. group: in a process group; without,
        the function makes one itself, as a script does."""
        folder = tmp_path_factory.mktemp("processes")
        started = (world, get_free_port(), group, function, arguments, str(folder))
        mp.start_processes(_start, started, nprocs=world, start_method="forkserver")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run


@pytest.fixture
def shared():
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs shared/ next to the checkout")
    return folder
