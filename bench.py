"""How fast a step of stage vl is, next to the same step as a textbook has it, with relative positions,
in parts, and as MoMo's; how fast retrieval and the loader are. Ratios compare sides that alternate in
one run on one machine; one side at a time is in memory.

    python bench.py                                   # base, 224 pixels, on this CPU or GPU
    python bench.py --config tiny --amp off           # two minutes
    python bench.py --only loader                     # one of the tables
    python bench.py --only sizes --config base base_plus large --amp bf16   # memory and work per sample

Shape letters as in losses.py; T text tokens, N patches, S rows of a sequence, H heads.
"""

import dataclasses
import gc
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import profiler
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

import images
import retrieval
import runtime
from mome import CONFIGS, VLMo
from runtime import at_least
from sides import Side, bare, pairs
from textbook import Textbook

CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# ---- Time, FLOPs, memory -------------------------------------------------------------------------


def alternate(sides, repeats, device):
    """{name: make} → {name: [seconds]}, in turns: make() → a function, which runs once to warm up,
    then against the clock, and is gone before the next side is made."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, make in sides.items():
            work = make()
            work()
            wait()
            began = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - began)
            del work
            clear()
    return seconds


def clear():
    """Frees sides that are gone; compiled and recomputed ones hold themselves."""
    torch.compiler.reset()
    gc.collect()


def median_ratio(a, b):
    """The median of a / b, of times that alternated."""
    return statistics.median(x / y for x, y in zip(a, b))


def matmul_peak(run):
    """The best rate of square matrix products in this precision: FLOP per second."""
    best, dtype = 0.0, run.dtype or torch.float32
    for n in (1024, 2048, 4096) if run.device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, n, n, device=run.device).to(dtype)
        seconds = alternate({"": lambda: partial(torch.matmul, a, b)}, 5, run.device)[""]
        best = max(best, 2 * n**3 / min(seconds))
    return best


def flops(work):
    """FLOPs of matrix products, those of attention included."""
    flop_registry.setdefault(CPU_FORWARD, sdpa_flop)  # torch knows only the kernels of GPUs
    flop_registry.setdefault(CPU_BACKWARD, sdpa_backward_flop)
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def tensor_memory(work, device):
    """MB that tensors hold at most while it works, besides those from before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 1e6


# ---- The tables: each function measures rows of one ----------------------------------------------

PAPER_PAIRS = 200_000 * 1024  # steps × batch of the paper's base model (Section 4.1)


def bench_step(kinds, name, b, run, repeats):
    """Steps of several kinds, {name: arguments of Side}; ratios are to the first."""
    makers = {kind: partial(Side, name, b, run, **arguments) for kind, arguments in kinds.items()}
    seconds = alternate(makers, repeats, run.device)

    # Memory and FLOPs of each, one at a time
    rows, best, first = [], matmul_peak(run), next(iter(kinds))
    for kind, arguments in kinds.items():
        median = statistics.median(seconds[kind])
        side = makers[kind]()
        side()  # AdamW makes its averages
        memory = tensor_memory(side, run.device)
        if arguments.get("compile"):  # compiled code hides its FLOPs
            del side
            clear()
            side = Side(name, b, run, **arguments | {"compile": False})
        work = flops(side)
        rows.append({
            "side": kind,
            "pairs/s": b / median,
            "spread": (max(seconds[kind]) - min(seconds[kind])) / median,
            f"× {first}": median_ratio(seconds[first], seconds[kind]),
            "parameters, M": sum(p.numel() for p in side.trained()) / 1e6,
            "TFLOP a step": work / 1e12,
            "of peak": work / median / best,
            "tensors, MB": memory,  # besides parameters and AdamW's averages
            "days for 204.8 M pairs": PAPER_PAIRS * median / b / 86_400,
        })  # fmt: skip
        del side
        clear()
    return rows


def bench_process(kinds, name, b, amp):
    """Memory that a process holds at most in its second step, each kind of Side in a process of its own."""
    rows, first = [], None
    for kind, arguments in kinds.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = pool.apply(two_steps, (name, b, amp, arguments))
        first = first or held
        rows.append({"side": kind, "process, MB": held, f"÷ {next(iter(kinds))}": held / first})
    return rows


def two_steps(name, b, amp, arguments):
    """→ MB of this process at its peak, besides those of a process that has only imported torch."""
    before = peak_memory()
    side = Side(name, b, runtime.Runtime(amp), **arguments)
    side()
    side()
    return peak_memory() - before


def peak_memory():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3  # MB; Linux counts in KB


def bench_operators(name, b, run):
    """The share of each operator in the time of a step, the largest first, and how often it runs."""
    side = Side(name, b, run)
    side()
    with profiler.profile() as profile:
        side()
    total = sum(event.self_cpu_time_total for event in profile.key_averages())
    rows = []
    for event in sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]:
        share = event.self_cpu_time_total / total
        rows.append({"operator": event.key.removeprefix("aten::"), "share": share, "calls": event.count})
    return rows


def bench_retrieval(name, run, repeats):
    """Encoding images with five captions each, and ranking as many as COCO 5K has, both ways."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[name], drop_path=0.0)
    model = VLMo(config).to(run.device).eval()
    image, captions = pairs(config, 16)["image"].to(run.device), pairs(config, 80)
    mixed = torch.randperm(80)
    textbook = bare(Textbook, model)
    inputs = image, captions["text"][mixed], captions["mask"][mixed], run
    sides = {"textbook": lambda: partial(encode, textbook, *inputs), "ours": lambda: partial(encode, model, *inputs)}
    seconds = alternate(sides, repeats, run.device)
    ranking = alternate({"": lambda: partial(rank, *vectors(5000, 25_010, run.device))}, 3, run.device)
    million = partial(rank, *vectors(1000, 10**6, run.device))
    row = {"images with 5 captions encoded/s": 16 / statistics.median(seconds["ours"])}
    row["× textbook"] = median_ratio(seconds["textbook"], seconds["ours"])
    row["5,000 × 25,010 ranked, s"] = statistics.median(ranking[""])
    row["1,000 × 1,000,000 above the features, MB"] = tensor_memory(million, run.device)
    return [row]


@torch.no_grad()
def encode(model, image, text, mask, run):
    with run.autocast():
        model.embed_image(image)
        if isinstance(model, Textbook):
            model.embed_text(text.to(run.device), mask.to(run.device))
        else:
            retrieval.embed_texts(model, text, mask, run.device, batch=16)


def vectors(images, captions, device):
    """Random vectors of images and captions, and which belong together."""
    image, text = torch.randn(images, 768, device=device), torch.randn(captions, 768, device=device)
    relevant = torch.stack([torch.arange(captions) % images, torch.arange(captions)])
    return image, text, relevant.to(device)


def rank(image, text, relevant):
    retrieval.search(image, text, relevant)
    retrieval.search(text, image, relevant.flip(0))


# Files of the loader's table
PHOTOS, VIEWS = ((640, 480), (2048, 1536)), 100


def bench_loader(repeats):
    """Training views that one process makes of JPEG files, 224 pixels with RandAugment, next to a
    plain loader, which decodes and resizes every pixel."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in PHOTOS:
            path = Path(folder, f"{width}.jpg")
            photo(width, height).save(path, quality=90)
            sides = {"plain": lambda: partial(views, path, plain_view), "ours": lambda: partial(views, path, view)}
            seconds = alternate(sides, repeats, torch.device("cpu"))
            rate = VIEWS / statistics.median(seconds["ours"])
            ratio = median_ratio(seconds["plain"], seconds["ours"])
            rows.append({"file": f"{width} × {height}", "views/s": rate, "× plain": ratio})
    return rows


def views(path, make):
    for seed in range(VIEWS):
        images.to_tensor(make(path, random.Random(seed)))


def view(path, rng):
    return images.augment(images.read_image(path, 224), 224, rng)


def plain_view(path, rng):
    image = images.read_image(path)
    return images.rand_augment(images.resize(image, 224, box=images.crop_box(*image.size, rng)), rng)


def photo(width, height):
    """Noise of all scales, as strong as in photographs."""
    rng, total, cells = np.random.default_rng(0), 0.0, 4
    while cells < width:
        noise = rng.uniform(0, 255, (cells * height // width, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total = total + np.asarray(layer, dtype=np.float64) / cells**0.8
        cells *= 2
    low, high = total.min(), total.max()
    return Image.fromarray(np.uint8(255 * (total - low) / (high - low)))


# Runs at the paper's sizes: pixels and tokens
RUNS = (("stage text", 224, 196), ("stage vl", 224, 40), ("retrieval", 384, 40), ("vqa", 480, 40))
H100 = 0.4 * 989  # TFLOP/s of matrix products in bf16, at 40 % of its peak


def bench_sizes(name, position, run):
    """What one more sample in the batch costs, with a text of full length: memory of its
    activations, with and without --recompute, and work. Next to it what the parameters that train,
    their gradients and AdamW's averages take, in float32, and how many samples an H100 wants."""
    rows = []
    for kind, size, tokens in RUNS:
        clear()
        drop_path = CONFIGS[name].drop_path
        fields = dict(image_size=size, max_text_len=tokens, position=position, drop_path=drop_path)
        row, memory, work = {"run": kind, "pixels": size, "tokens": tokens}, {}, {}
        for column, recompute in (("MB a sample", False), ("with --recompute", True)):
            for b in (4, 2):
                side = Side(name, b, run, kind, full=True, recompute=recompute, **fields)
                for p in side.trained():
                    p.register_post_accumulate_grad_hook(forget)  # so that the peak is of activations
                memory[b] = tensor_memory(side.backward, run.device)
                if not recompute:
                    parameters, work[b] = sum(p.numel() for p in side.trained()), flops(side.backward)
                del side
            row[column] = (memory[4] - memory[2]) / 2
        more = (work[4] - work[2]) / 2e12
        besides = {"parameters, M": parameters / 1e6, "MB besides": 16 * parameters / 1e6}
        rows.append(row | {"TFLOP a sample": more, "samples/s, H100 at 40 %": H100 / more} | besides)
    return rows


def forget(parameter):
    parameter.grad = None


# ---- The command ---------------------------------------------------------------------------------


STEP = {
    "textbook": dict(kind="textbook"),
    "ours": {},
    "ours, recomputed": dict(recompute=True),
}
POSITIONS = {"absolute": {}, "relative": dict(position="relative")}
PARTS = {"4 parts apart": dict(parts=4, ahead=False), "4 parts together": dict(parts=4), "1 part": {}}
MODELS = {"VLMo": {}, "MoMo": dict(kind="momo")}
TABLES = ("step", "positions", "parts", "momo", "process", "operators", "retrieval", "loader", "sizes")


def jobs(args):
    """All that can be measured: (table, its title, first columns of its rows, function, its arguments)."""
    yield "loader", "training views of JPEG files", {}, bench_loader, args.repeats
    for name, amp in itertools.product(args.config, args.amp):
        run, labels = runtime.Runtime(amp), {"config": name, "amp": amp}
        cpu, rest = run.device.type == "cpu", (run, args.repeats)
        batches = args.batch_size or ([4, 8] if cpu else [32 if name == "large" else 64])
        step = STEP | ({"ours, compiled": dict(compile=True)} if args.compile else {})
        for b in batches:
            yield "step", "a step of stage vl", labels | {"batch": b}, bench_step, step, name, b, *rest
        b, twice = batches[0], 4 * -(-batches[0] // 2)  # about twice as many, in four parts
        first = labels | {"batch": b}
        yield "positions", "absolute and relative positions", first, bench_step, POSITIONS, name, b, *rest
        yield "momo", "a step of VLMo and of MoMo", first, bench_step, MODELS, name, b, *rest
        yield "parts", "a step in parts", labels | {"batch": twice}, bench_step, PARTS, name, twice, *rest
        if cpu and sys.platform == "linux":
            kinds = STEP | {"ours, relative": POSITIONS["relative"]}
            yield "process", "memory of the process", first, bench_process, kinds, name, b, amp
        if cpu:
            yield "operators", "operators of a step", first, bench_operators, name, b, run
        yield "retrieval", "retrieval", labels, bench_retrieval, name, *rest
        for position in POSITIONS:
            sized = labels | {"position": position}
            yield "sizes", "memory and work of a sample", sized, bench_sizes, name, position, run


def table(title, rows):
    """Rows with the same columns, as text."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join([title, *("  ".join(map(str.rjust, line, widths)) for line in lines), ""])


def main():
    gpu = torch.cuda.is_available()
    parser = runtime.Parser(description=__doc__)
    parser.add_argument("--config", nargs="+", choices=list(CONFIGS), default=["base"])
    sizes = "(default: 4 8; on a GPU 64, of large 32)"
    parser.add_argument("--batch-size", nargs="+", type=at_least(1), metavar="B", help=sizes)
    amp = ["bf16"] if gpu else ["off", "bf16"]
    parser.add_argument("--amp", nargs="+", choices=["off", "bf16", "fp16"], default=amp)
    parser.add_argument("--compile", action="store_true", help="a compiled side, too")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES[:-1], help="these tables")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="timings per side")
    parser.add_argument("--out", metavar="FILE", help="the numbers as JSON")
    args = parser.parse_args()
    if args.out:
        runtime.refuse_output("--out", args.out)
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, medians of {args.repeats}\n")
    found = {"device": device, "torch": torch.__version__}
    for name, title, labels, measure, *arguments in jobs(args):
        if name not in args.only:
            continue
        try:
            rows = [labels | row for row in measure(*arguments)]
        except RuntimeError as error:  # too little memory
            rows = [labels | {"failed": runtime.first_line(error)}]
        print(table(title, rows), flush=True)
        found[title] = found.get(title, []) + rows
        if args.out:
            Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    runtime.run(main)
