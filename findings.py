"""The papers' orderings at the scale of a laptop: which parts of VLMo and MoMo matter where pairs are
scarce, and pictures and texts are plentiful.

    python findings.py                          # all runs with three seeds
    python findings.py --only table5            # what one of the tables needs
    python findings.py --only table4 --report   # the tables of what there is, without training

Every run is a command, below. Its folder is runs/findings/NAME-SEED, and what it prints goes to
NAME-SEED.log. A run that was stopped goes on, and one that is finished stays as it is. At the end
table.md, curves.png and answers.png are written next to them.
"""

import collections
import json
import os
import statistics
import string
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import drawing
import runtime
import shapes
import vqa
from log import read_metrics
from runtime import UserError, at_least

# ---- What is run ---------------------------------------------------------------------------------

# Pairs are scarce, with long tails; pictures and texts by themselves, and the tasks, have the whole world
PAIRS = "--data shapes:500 --batch-size 32 --steps 800 --eval-every 200"
VL = f"train.py --stage vl {PAIRS}"
MOMO_VL, MOMO_ALL = f"train.py --stage momo-vl {PAIRS}", f"train.py --stage momo-all {PAIRS}"
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
    "momo-text-alone": "train.py --stage momo-text --init {momo-image} --no-simultaneous",
    "momo-vl": MOMO_VL + " --init {momo-text}",
    "momo-vl-alone": MOMO_VL + " --init {momo-text} --no-simultaneous",
    "momo-turns": MOMO_VL + " --init {momo-text} --no-cmga --steps 1600",  # the same batches
    "momo-all": MOMO_ALL + " --init {momo-image}",
}
PROCESSES = {"local": 4}  # of others 1
TASKS = {  # of a row: NAME+TASK
    "nlvr2": "finetune.py --task nlvr2 --batch-size 32 --epochs 0.048 --eval-every 0",  # 600 steps
    "vqa": "finetune.py --task vqa --batch-size 32 --epochs 0.032 --eval-every 0",  # 400
    "rte": "finetune.py --task rte --batch-size 32 --epochs 0.128 --eval-every 0",  # 400
    "probe": "finetune.py --task probe --batch-size 32 --epochs 0.128 --eval-every 0",  # 400
}
MEASURES = {  # {measure: (the task after which it is taken, or "": the run itself; its name in metrics.jsonl)}
    "retrieval": ("", "mean"),  # zero-shot: the mean of R@1, 5 and 10, both ways
    "NLVR2": ("nlvr2", "accuracy"),
    "VQA": ("vqa", "accuracy"),
    "RTE": ("rte", "accuracy"),
    "linear probe": ("probe", "accuracy"),
}


class Table(NamedTuple):
    """A table of a paper: its rows {run: in words}, what is measured, and the paper's orderings, each a
    (better, worse) pair of rows."""

    title: str
    rows: dict
    measures: list
    claims: list


TABLES = {
    "table4": Table(
        "VLMo, Table 4: what stage vl starts from",
        {"scratch": "random weights", "image-vl": "stage image", "text-vl": "stages image and text"},
        ["retrieval", "NLVR2", "VQA"],
        [("image-vl", "scratch"), ("text-vl", "image-vl")],
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
        ["retrieval", "NLVR2", "VQA"],
        [
            ("itc-mlm", "itc"),
            ("itc-itm", "itc"),
            ("image-vl", "itc-mlm"),
            ("image-vl", "itc-itm"),
            ("image-vl", "standard"),
            ("image-vl", "no-vl-experts"),
        ],
    ),
    "table6": Table(
        "VLMo, Table 6: where hard negatives come from",
        {"local": "one of four processes", "image-vl": "all processes"},
        ["retrieval", "NLVR2", "VQA"],
        [("image-vl", "local")],
    ),
    "table7": Table(
        "VLMo, Table 7: attention",
        {"separate": "separate", "image-vl": "shared"},
        ["retrieval", "NLVR2", "VQA"],
        [("image-vl", "separate")],
    ),
    "momo-stage2": Table(
        "MoMo, Table 6: stage 2",
        {"momo-text-alone": "only texts", "momo-text": "simultaneous training"},
        ["RTE", "linear probe"],
        [("momo-text", "momo-text-alone")],
    ),
    "momo-stage3": Table(
        "MoMo, Tables 5 and 6: stage 3",
        {
            "momo-all": "stages 2 and 3 combined",
            "momo-vl-alone": "only pairs",
            "momo-turns": "without CMGA",
            "momo-vl": "MoMo",
        },
        ["retrieval", "VQA", "RTE", "linear probe"],
        [("momo-vl", "momo-all"), ("momo-vl", "momo-vl-alone"), ("momo-vl", "momo-turns")],
    ),
}

# ---- The order of runs ---------------------------------------------------------------------------


def command(name):
    """The command of a run."""
    row, _, task = name.partition("+")
    return f"{TASKS[task]} --init {{{row}}}" if task else RUNS[row]


def origins(name):
    """The runs whose checkpoints a run takes."""
    return [field for _, field, _, _ in string.Formatter().parse(command(name)) if field]


def with_origins(name):
    """A run, after all that it needs."""
    return [*(before for origin in origins(name) for before in with_origins(origin)), name]


def measured_run(row, measure):
    """The run that a measure of a row is taken from."""
    task, _ = MEASURES[measure]
    return f"{row}+{task}" if task else row


def needed(tables):
    """The runs of some tables, each once, and after all that it needs."""
    names = [measured_run(row, measure) for table in tables for row in table.rows for measure in table.measures]
    return list(dict.fromkeys(one for name in names for one in with_origins(name)))


def train_all(names, args):
    """Runs everything, --jobs at a time, each after what it needs. UserError with the last line of the
    first run that fails."""
    waiting = [(name, seed) for name in names for seed in range(args.seeds)]
    running, finished = {}, set()
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(waiting), unit="run") as bar:
        while waiting or running:
            ready = [job for job in waiting if finished.issuperset((origin, job[1]) for origin in origins(job[0]))]
            for job in ready[: args.jobs - len(running)]:
                running[pool.submit(train_one, *job, args)] = job
                waiting.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished.add(running.pop(future))
                future.result()
                bar.update()


def train_one(name, seed, args):
    """One run, unless it is finished."""
    out, log = folder(name, seed, args), Path(f"{folder(name, seed, args)}.log")
    last = {origin: folder(origin, seed, args) / "last.pt" for origin in origins(name)}
    words = [word.format_map(last) for word in command(name).split()] + ["--seed", str(seed), "--out", str(out)]
    begun = log.exists() and log.read_text().split("\n")[0] == " ".join(words)  # by the same command
    if begun and result(out):
        return
    if not begun:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" ".join(words) + "\n")
    with open(log, "a") as file:
        launch(words + ["--resume"] * begun, PROCESSES.get(name, 1), args.jobs, file)
    if not result(out):
        raise UserError(f"{name}, seed {seed}: {log.read_text().splitlines()[-1]} (all that it says is in {log})")


def launch(words, processes, jobs, log):
    """Starts a script of ours, and waits for its end."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    script = Path(__file__).with_name(words[0])
    threads = {"OMP_NUM_THREADS": str(max(1, runtime.cores() // jobs // processes))}
    subprocess.run([*python, script, *words[1:]], stdout=log, stderr=log, env=os.environ | threads)


def folder(name, seed, args):
    return Path(args.out, f"{name}-{seed}")


# ---- What came out -------------------------------------------------------------------------------


def entries(out):
    """The lines of a run's metrics.jsonl."""
    path = Path(out, "metrics.jsonl")
    return [entry for _, entry in read_metrics(path)] if path.exists() else []


def result(out):
    """What a finished run measured at its end, {name: number}; None if it is not finished."""
    tests = [entry for entry in entries(out) if entry.get("split") == "test"]
    return tests[-1] if tests else None


def values(row, measure, args):
    """A measure of a row, by seed, as far as runs are finished."""
    found = [result(folder(measured_run(row, measure), seed, args)) for seed in range(args.seeds)]
    return [one[MEASURES[measure][1]] for one in found if one]


def minutes(row, args):
    """How long a row's own stage trained, by seed, as far as runs are finished: minutes on one core."""
    found = []
    for out in [folder(row, seed, args) for seed in range(args.seeds)]:
        if result(out):
            run = json.loads((out / "config.json").read_text())["args"]
            rates = [rate for entry in entries(out) for name, rate in entry.items() if name.endswith("_per_s")]
            found.append(run["steps"] * run["batch_size"] / statistics.harmonic_mean(rates) / 60)
    return found


def mean_and_error(numbers):
    """The mean, and its standard error (0 of a single number)."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    return statistics.mean(numbers), error


def verdict(better, worse):
    """What measures of two rows, each a list by seed, say of the paper's ordering: the difference, its
    standard error, and whether it is beyond two of them."""
    (high, high_error), (low, low_error) = mean_and_error(better), mean_and_error(worse)
    difference, error = high - low, (high_error**2 + low_error**2) ** 0.5
    said = "not settled"
    if min(len(better), len(worse)) > 1 and abs(difference) > 2 * error:
        said = "reproduced" if difference > 0 else "contradicted"
    return f"{said}: {difference:+.1f} ± {error:.1f}"


def report(table, args):
    """A table in Markdown: its rows with mean and standard error, and the paper's orderings with a verdict
    on each measure."""
    lines = ["", f"**{table.title}**", "", *header("", *table.measures, "minutes")]
    for row, meaning in table.rows.items():
        columns = [values(row, measure, args) for measure in table.measures] + [minutes(row, args)]
        lines.append(cells(meaning, *map(in_short, columns)))
    lines += ["", *header("the paper's ordering", *table.measures)]
    for better, worse in table.claims:
        verdicts = []
        for measure in table.measures:
            high, low = values(better, measure, args), values(worse, measure, args)
            verdicts.append(verdict(high, low) if high and low else "")
        lines.append(cells(f"{table.rows[better]} > {table.rows[worse]}", *verdicts))
    return "\n".join(lines) + "\n"


def cells(*texts):
    return f"| {' | '.join(texts)} |"


def header(*texts):
    return cells(*texts), "|---" * len(texts) + "|"


def in_short(numbers):
    if not numbers:
        return ""
    mean, error = mean_and_error(numbers)
    return f"{mean:.1f} ± {error:.1f}" if len(numbers) > 1 else f"{mean:.1f}"


# ---- Pictures ------------------------------------------------------------------------------------

CURVES = {  # {name in metrics.jsonl: title}
    "itc": "contrast (ITC)",
    "itm accuracy": "accuracy of matching (ITM)",
    "mlm": "masked words (MLM)",
    "mean": "retrieval, split val",
}


def curves(rows, args):
    """Losses and measures of rows {run: in words}, means over seeds, as one picture."""
    panels = {}
    for row, meaning in rows.items():
        points = collections.defaultdict(list)  # {(title, step): values by seed}
        for seed in range(args.seeds):
            for entry in entries(folder(row, seed, args)):
                for name in CURVES.keys() & entry.keys():
                    if entry.get("split") != "test":
                        points[CURVES[name], entry["step"]].append(entry[name])
        for (title, step), found in sorted(points.items()):
            panels.setdefault(title, {}).setdefault(meaning, []).append((step, statistics.mean(found)))
    return drawing.chart(panels, list(rows.values()), columns=2) if panels else None


def answers(rows, args, count=10):
    """What the rows {run: in words} answer to the same questions of split test, seed 0, as one picture."""
    said = {}
    for row, meaning in rows.items():
        out = folder(f"{row}+vqa", 0, args)
        if result(out):
            predictions = out / "answers.json"
            with open(f"{out}.log", "a") as log:
                words = f"evaluate.py --task vqa --checkpoint {out}/last.pt --predictions {predictions}"
                launch(words.split(), 1, args.jobs, log)
            said[meaning] = {one["question_id"]: one["answer"] for one in json.loads(predictions.read_text())}
    if not said:
        return None
    world, tiles = vqa.read(["shapes"], "test", 96), []
    for i in range(0, count * shapes.TIMES, shapes.TIMES):  # one question on each scene
        lines = [world[i].text, f"right: {world[i].majority}", *(f"{row}: {one[i]}" for row, one in said.items())]
        tiles.append(drawing.tile(world.image(i), "\n".join(lines), side=190))
    return drawing.sheet([("", tiles[k : k + 5]) for k in range(0, count, 5)])


def main():
    parser = runtime.Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    add("--seeds", type=at_least(1), default=3, help="0, 1, …")
    add("--jobs", type=at_least(1), default=runtime.cores(), help="runs at a time, which share the cores")
    add("--report", action="store_true", help="train nothing")
    add("--out", default="runs/findings", metavar="DIR", help="where the runs go")
    args = parser.parse_args()
    tables = {name: TABLES[name] for name in args.only}
    if not args.report:
        train_all(needed(tables.values()), args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    text = "".join(report(table, args) for table in tables.values())
    Path(args.out, "table.md").write_text(text)
    print(text)
    for name, table in tables.items():
        for kind, draw in (("curves", curves), ("answers", answers)):
            if picture := draw(table.rows, args):
                picture.save(Path(args.out, f"{name}-{kind}.png"))


if __name__ == "__main__":
    runtime.run(main)
