"""The papers' orderings at the scale of a laptop: which parts of VLMo and MoMo matter where pairs are
scarce, and pictures and texts are plentiful.

    python findings.py                          # all runs with three seeds, about 3 hours
    python findings.py --only table5            # only the runs of Table 5
    python findings.py --only table4 --report   # only the tables and pictures, from finished runs

Every run is a command, below. Its folder is runs/findings/NAME-SEED, and NAME-SEED.log has what it
prints. A run that was stopped goes on, and one that is finished stays as it is. Next to them come, of
each table, TABLE.md, TABLE-curves.png, and TABLE-answers.png if its rows answer questions.
"""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import checkpoint
import drawing
import runtime
import shapes
import vqa
from retrieval import retrieval
from runtime import UserError, at_least

# ---- The runs ------------------------------------------------------------------------------------

# Pairs are scarce, with long tails. Pictures and texts by themselves, and tasks, have the whole world
PAIRS = "--data shapes:500 --batch-size 32 --steps 800 --eval-every 200"
VL = f"train.py --stage vl {PAIRS}"
MOMO_VL = f"train.py --stage momo-vl {PAIRS} --init {{momo-text}}"
RUNS = {  # {NAME} in a command is the checkpoint of another run with the same seed
    "dvae": "train.py --stage dvae",
    "image": "train.py --stage image --dvae {dvae} --steps 1600",
    "text": "train.py --stage text --init {image} --steps 1600",
    "scratch": VL,
    "image-vl": VL + " --init {image}",
    "text-vl": VL + " --init {text}",
    "itc": VL + " --init {image} --itm-weight 0 --mlm-weight 0",
    "itc-mlm": VL + " --init {image} --itm-weight 0",
    "itc-itm": VL + " --init {image} --mlm-weight 0",
    "standard": VL + " --init {image} --experts shared",
    "no-vl-experts": VL + " --init {image} --vl-layers 0",
    "local": VL + " --init {image} --negatives local",
    "separate": VL + " --init {image} --attention separate",
    "momo-image": "train.py --stage momo-image",
    "momo-text": "train.py --stage momo-text --init {momo-image}",
    "momo-only-text": "train.py --stage momo-text --init {momo-image} --no-simultaneous",
    "momo-vl": MOMO_VL,
    "momo-only-pairs": MOMO_VL + " --no-simultaneous",
    # As many batches of pairs and of texts, an update for each
    "momo-turns": MOMO_VL + " --no-cmga --steps 1600",
    # As many updates as stages 2 and 3 have together
    "momo-all": f"train.py --stage momo-all {PAIRS} --init {{momo-image}} --steps 1800",
}
PROCESSES = {"local": 4}  # all other runs: 1
BEGINS = "\n$"  # in a log, before what one start of a run prints
TASKS = {  # of a row: NAME+TASK. 600 steps of NLVR2, 400 of the others
    "nlvr2": "finetune.py --task nlvr2 --batch-size 32 --epochs 0.048 --eval-every 0",
    "vqa": "finetune.py --task vqa --batch-size 32 --epochs 0.032 --eval-every 0",
    "rte": "finetune.py --task rte --batch-size 32 --epochs 0.128 --eval-every 0",
    "probe": "finetune.py --task probe --batch-size 32 --epochs 0.128 --eval-every 0",
}
MEASURES = {  # {measure of a row: (the run that it is of, its name in metrics.jsonl)}
    "retrieval": ("{}", "mean"),  # zero-shot: the mean of R@1, R@5 and R@10, both ways
    "rare things": ("{}", "mean"),  # the same, in split rare of the built-in world
    "NLVR2": ("{}+nlvr2", "accuracy"),
    "VQA": ("{}+vqa", "accuracy"),
    "RTE": ("{}+rte", "accuracy"),
    "linear probe": ("{}+probe", "accuracy"),
}


class Table(NamedTuple):
    """A table of a paper."""

    title: str
    rows: dict  # {run: in words}
    measures: list
    orderings: list  # of the paper: (the better row, the worse, the measures on which it is)


PAPER = ["retrieval", "NLVR2"]  # measures of VLMo's ablations; the others are ours
VLMO = ["retrieval", "rare things", "NLVR2", "VQA"]
MOMO = ["retrieval", "rare things", "VQA", "RTE", "linear probe"]
TABLES = {
    "table4": Table(
        "VLMo, Section 4.6 and Table 4: what stage vl starts from",
        {"scratch": "random weights", "image-vl": "stage image", "text-vl": "stages image and text"},
        VLMO,
        [("image-vl", "scratch", PAPER), ("text-vl", "image-vl", PAPER)],
    ),
    "table5": Table(
        "VLMo, Table 5: losses and experts",
        {
            "itc": "ITC",
            "itc-mlm": "ITC, MLM",
            "itc-itm": "ITC, ITM",
            "standard": "standard Transformer",
            "no-vl-experts": "without vision-language experts",
            "image-vl": "VLMo",
        },
        VLMO,
        [("itc-mlm", "itc", PAPER), ("itc-itm", "itc", PAPER)]
        + [("image-vl", row, PAPER) for row in ("itc-mlm", "itc-itm", "standard", "no-vl-experts")],
    ),
    "table6": Table(
        "VLMo, Table 6: where hard negatives come from",
        {"local": "one of four processes", "image-vl": "all processes"},
        VLMO,
        [("image-vl", "local", ["NLVR2"])],
    ),
    "table7": Table(
        "VLMo, Table 7: attention",
        {"separate": "separate", "image-vl": "shared"},
        VLMO,
        [("image-vl", "separate", PAPER)],
    ),
    "momo2": Table(
        "MoMo, Table 6: stage 2",
        {"momo-only-text": "only texts", "momo-text": "texts and images"},
        ["RTE", "linear probe"],
        [("momo-text", "momo-only-text", ["linear probe"])],
    ),
    "momo3": Table(
        "MoMo, Tables 5 and 6: stage 3",
        {
            "momo-all": "stages 2 and 3 in one",
            "momo-only-pairs": "only pairs",
            "momo-turns": "without CMGA",
            "momo-vl": "MoMo",
        },
        MOMO,
        [
            ("momo-vl", "momo-all", ["RTE"]),
            ("momo-all", "momo-vl", ["retrieval", "VQA", "linear probe"]),
            ("momo-vl", "momo-only-pairs", ["RTE", "linear probe"]),
            ("momo-vl", "momo-turns", ["retrieval", "VQA", "RTE", "linear probe"]),
        ],
    ),
}


def command(name):
    """The command of a run."""
    row, _, task = name.partition("+")
    return f"{TASKS[task]} --init {{{row}}}" if task else RUNS[row]


def needs(name):
    """The runs whose checkpoints a run takes."""
    return re.findall(r"{(.+?)}", command(name))


def with_needs(name):
    """A run, after all that it needs."""
    return [*(run for other in needs(name) for run in with_needs(other)), name]


def runs_of(tables):
    """The runs of some tables, each once, and after all that it needs."""
    found = []
    for table in tables:
        for row, measure in itertools.product(table.rows, table.measures):
            found += with_needs(MEASURES[measure][0].format(row))
    return list(dict.fromkeys(found))


# ---- Running them --------------------------------------------------------------------------------


def train_all(names, args):
    """Trains everything, --jobs at a time, each run after what it needs. UserError for the first
    that fails. Whatever ends this, runs that go on are stopped, with a checkpoint."""
    waiting = [(name, seed) for name in names for seed in range(args.seeds)]
    running, finished = {}, set()  # {(name, seed): its process}
    bar = tqdm(total=len(waiting), unit="run")
    try:
        while waiting or running:
            for name, seed in list(waiting):
                ready = finished.issuperset((other, seed) for other in needs(name))
                if ready and len(running) < args.jobs:
                    waiting.remove((name, seed))
                    running[name, seed] = start(name, seed, args)
            for job, process in list(running.items()):
                if process is None or process.poll() is not None:
                    del running[job]
                    check(*job, args, process)
                    finished.add(job)
                    bar.update()
            time.sleep(0.02)
    finally:
        going_on = list(filter(None, running.values()))
        for process in going_on:
            process.terminate()
        for process in going_on:
            process.wait()


def start(name, seed, args):
    """Starts a run, or goes on with it. → its process; None if it is finished."""
    out = folder(name, seed, args)
    log = out.with_suffix(".log")
    # The log begins with all the commands that the run depends on: one that has changed begins again
    head = "".join(f"{command(one)} --seed {seed}\n" for one in with_needs(name))
    begun = log.exists() and log.read_text().startswith(head)
    if begun and result(out):
        return None
    if not begun:
        if out.exists():  # its results are not those of these commands
            out.rename(f"{out}.before-{time.time_ns()}")
        log.write_text(head)
    last = {other: folder(other, seed, args) / "last.pt" for other in needs(name)}
    words = [word.format_map(last) for word in command(name).split()]
    words += ["--seed", str(seed), "--out", str(out), *(["--resume"] if begun else [])]
    return launch(words, PROCESSES.get(name, 1), args.jobs, log)


def launch(words, processes, jobs, log):
    """Starts one of our scripts, whose output is added to a log. → its process."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(__file__).with_name(words[0])
    # Its share of the cores, and no GPU, on which runs would be in each other's way
    threads = str(max(1, runtime.cores() // jobs // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    # In a session of its own: Ctrl-C asks us only, and we ask it to end
    options = dict(env=environment, start_new_session=True)
    with open(log, "a") as file:
        print(BEGINS, *words, file=file, flush=True)
        return subprocess.Popen([*python, script, *words[1:]], stdout=file, stderr=file, **options)


def check(name, seed, args, process):
    """UserError if a run has failed."""
    if process and process.returncode:
        log = folder(name, seed, args).with_suffix(".log")
        _, _, text = log.read_text().rpartition(BEGINS)
        lines = [line for line in text.splitlines() if ": error: " in line]
        said = lines[-1] if lines else f"status {process.returncode}"
        raise UserError(f"{name}, seed {seed}: {said} (full output: {log})")


def folder(name, seed, args):
    return Path(args.out, f"{name}-{seed}")


# ---- What came out -------------------------------------------------------------------------------


def entries(out):
    """The lines of a run's metrics.jsonl, if it has begun."""
    return drawing.entries(out) if (out / "metrics.jsonl").exists() else []


def result(out):
    """What a finished run measured at its end, {name: number}; None if it is not finished."""
    tests = [entry for entry in entries(out) if entry.get("split") == "test"]
    return tests[-1] if tests else None


def values(row, measure, args):
    """A measure of a row, of each seed that is finished."""
    run, name = MEASURES[measure]
    outs = [folder(run.format(row), seed, args) for seed in range(args.seeds)]
    read = rare if measure == "rare things" else result
    return [read(out)[name] for out in outs if result(out)]


def rare(out):
    """Zero-shot retrieval of a finished run in split rare, which is kept in its folder."""
    path = Path(out, "rare.json")
    if not path.exists():
        model, words, config = checkpoint.load_model(Path(out, "last.pt"))
        found = retrieval(model, shapes.World("rare", config.image_size), words, "cpu")
        runtime.write(path, lambda file: file.write(json.dumps(found).encode()))
    return json.loads(path.read_text())


def minutes(row, args):
    """How long a row has trained, with the stages before it: minutes, of each seed that is finished."""
    finished = [seed for seed in range(args.seeds) if result(folder(row, seed, args))]
    return [sum(seconds(folder(name, seed, args)) for name in with_needs(row)) / 60 for seed in finished]


def seconds(out):
    """How long a run takes at its median rate."""
    run, rates = json.loads((out / "config.json").read_text())["args"], []
    for entry in entries(out):
        rates += [rate for name, rate in entry.items() if name.endswith("_per_s")]
    return run["steps"] * run["batch_size"] / statistics.median(rates)


def mean_and_error(numbers):
    """The mean, and its standard error (NaN of a single number)."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    return statistics.mean(numbers), error


def difference(better, worse):
    """The difference of two rows' means, and its standard error."""
    (high, high_error), (low, low_error) = mean_and_error(better), mean_and_error(worse)
    return high - low, (high_error**2 + low_error**2) ** 0.5


def verdict(better, worse):
    """What measures of two rows, each a list by seed, say of the paper's ordering, by two standard
    errors of their difference."""
    gap, error = difference(better, worse)
    if min(len(better), len(worse)) < 2 or abs(gap) <= 2 * error:
        return "not settled"
    return "reproduced" if gap > 0 else "contradicted"


def report(table, args):
    """A table in Markdown: its rows with mean, standard error and the values by seed; and the
    paper's orderings, with a verdict on each measure on which the paper has them."""
    lines = [f"**{table.title}**", "", *header("", *table.measures, "minutes")]
    for row, meaning in table.rows.items():
        columns = [in_short(values(row, measure, args)) for measure in table.measures]
        spent = minutes(row, args)
        lines.append(cells(meaning, *columns, f"{statistics.mean(spent):.1f}" if spent else ""))
    lines += ["", *header("the paper's ordering", *table.measures)]
    for better, worse, measures in table.orderings:
        columns = []
        for measure in table.measures:
            two = values(better, measure, args), values(worse, measure, args)
            gap = "{:+.1f} ± {:.1f}".format(*difference(*two)) if all(two) else ""
            columns.append(f"{verdict(*two)}: {gap}" if gap and measure in measures else gap)
        lines.append(cells(f"{table.rows[better]} > {table.rows[worse]}", *columns))
    return "\n".join(lines) + "\n"


def cells(*texts):
    return f"| {' | '.join(texts)} |"


def header(*texts):
    return cells(*texts), "|---" * len(texts) + "|"


def in_short(numbers):
    """The mean, its standard error, and the numbers."""
    listed = ", ".join(f"{number:.1f}" for number in numbers)
    return "{:.1f} ± {:.1f} ({})".format(*mean_and_error(numbers), listed) if numbers else ""


# ---- Pictures ------------------------------------------------------------------------------------


def curves(rows, args):
    """Losses and measures of rows {run: in words}, means over seeds, as one picture."""
    runs = {}
    for row, meaning in rows.items():
        outs = [folder(row, seed, args) for seed in range(args.seeds)]
        runs[meaning] = [out for out in outs if entries(out)]
    return drawing.curves(runs, only=("itc", "itm accuracy", "mlm", "mean"))  # the mean of recalls


def answers(rows, args, count=10):
    """What the rows {run: in words} answer to the same questions of split test, seed 0, as one picture."""
    found = {}
    for row, meaning in rows.items():
        out = folder(f"{row}+vqa", 0, args)
        if result(out):
            path = out / "answers.json"
            if not path.exists():
                words = ["evaluate.py", "--task", "vqa", "--checkpoint", f"{out}/last.pt", "--predictions", str(path)]
                process = launch(words, 1, args.jobs, out.with_suffix(".log"))
                process.wait()
                check(f"{row}+vqa", 0, args, process)
            found[meaning] = {answer["question_id"]: answer["answer"] for answer in json.loads(path.read_text())}
    if not found:
        return None
    world, tiles = vqa.read(["shapes"], "test", 96), []
    for i in range(0, count * shapes.TIMES, shapes.TIMES):  # one question on each scene
        lines = [world[i].text, f"right: {world[i].majority}"]
        lines += [f"{meaning}: {said[i]}" for meaning, said in found.items()]
        tiles.append(drawing.tile(world.image(i), "\n".join(lines), side=190))
    return drawing.sheet([("", tiles[k : k + 5]) for k in range(0, count, 5)])


def main():
    parser = runtime.Parser(description=__doc__)
    flag, number, usual = parser.add_argument, at_least(1), list(TABLES)
    flag("--only", nargs="+", choices=usual, default=usual, metavar="TABLE", help=", ".join(usual))
    flag("--seeds", type=number, default=3, metavar="N", help="seeds 0 to N − 1")
    flag("--jobs", type=number, default=runtime.cores(), metavar="N", help="runs at a time")
    flag("--report", action="store_true", help="train nothing")
    flag("--out", default="runs/findings", metavar="DIR", help="where the runs go")
    args = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # as Ctrl-C
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if not args.report:
        train_all(runs_of(TABLES[name] for name in args.only), args)
    for name in args.only:
        text = report(TABLES[name], args)
        print(text)
        Path(args.out, f"{name}.md").write_text(text)
        for kind, draw in (("curves", curves), ("answers", answers)):
            if picture := draw(TABLES[name].rows, args):
                picture.save(Path(args.out, f"{name}-{kind}.png"))


if __name__ == "__main__":
    runtime.run(main)
