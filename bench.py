"""How fast a step of stage vl is, next to the same step as a textbook has it and next to MoMo's, and
how fast retrieval is. Ratios compare sides that alternate in one run on one machine.

    python bench.py                                   # base, 224 pixels, on this CPU or GPU
    python bench.py --config tiny --amp off           # two minutes
    python bench.py --sizes --config base base_plus large --amp bf16    # memory and work per sample

Shape letters as in losses.py; T text tokens, N patches, S rows of a sequence, H heads.
"""

import dataclasses
import itertools
import json
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn, profiler
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

import momo
import momo_stages
import retrieval
import runtime
import train
from loader import prepare, to_device
from mome import CONFIGS, VLMo, classifier
from runtime import at_least
from stage import Stage
from stages import VL, Text, language_part
from textbook import Textbook
from texts import IGNORE
from vqa import VQA

CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ALL = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}  # the paper's losses, and their weights

# ---- Stages and batches without data -------------------------------------------------------------


def bare(kind, model, **attributes):
    """A stage of this class around a model, without data."""
    stage = kind.__new__(kind)
    Stage.__init__(stage)
    stage.model = model
    for name, value in attributes.items():
        setattr(stage, name, value)
    return stage


def hide(ratio, candidates):
    """round(ratio · their number) of a row's candidates, but one at least. (b, n) → (b, n) bool."""
    place = torch.rand(candidates.shape).masked_fill(~candidates, 2.0).argsort(1).argsort(1)
    return place < (ratio * candidates.sum(1, keepdim=True)).round().clamp(min=1)


def pairs(config, b, ratio=0.15, full=False):
    """b pairs as data.Pairs makes them, with this ratio of tokens and of patches hidden. full: with
    running text; else with captions, the b quantiles of a length of 6 to 40 tokens, 13 on average:
    of 4 captions the longest has 21, of 8 26, of 64 40."""
    torch.manual_seed(0)
    T, S = config.max_text_len, config.image_size
    quantiles = 6 - 7.2 * torch.log1p(-(torch.arange(b) + 0.5) / b)
    lengths = torch.full((b,), T) if full else quantiles.round().clamp(max=40)
    place, lengths = torch.arange(T), lengths[:, None]  # (T,), (b, 1)
    mask = place < lengths  # (b, T)
    text = torch.randint(5, config.vocab_size, (b, T)).masked_fill(~mask, 0)
    words = hide(ratio, (place > 0) & (place < lengths - 1))
    patches = torch.ones(b, (S // config.patch_size) ** 2, dtype=torch.bool)  # (b, N)
    batch = {
        "image": torch.randint(0, 256, (b, 3, S, S), dtype=torch.uint8),
        "text": text,
        "mask": mask,
        "masked": text.masked_fill(words, 4),
        "labels": text.masked_fill(~words, IGNORE),
        "hidden": hide(ratio, patches),
        "ids": torch.arange(2 * b).view(b, 2),
    }
    return batch


def ready(batch, device):
    """A batch as the loader gives it."""
    return to_device(prepare([batch])[0], device)


class Side:
    """One way to compute the step: a stage, its optimizer, its batches, and step(). kind:
    "textbook", "ours", "ours, recomputed", "ours, compiled" or "MoMo"."""

    def __init__(self, kind, name, b, run):
        torch.manual_seed(0)
        self.run, config = run, dataclasses.replace(CONFIGS[name], drop_path=0.0)
        if kind == "MoMo":
            self.stage = momo_stage(name, config)
            config, ratio = self.stage.model.config, momo.RATIO
            batches = pairs(config, b, ratio["pair"]), pairs(config, b, ratio["text"], full=True)
        else:
            stage = Textbook if kind == "textbook" else VL
            self.stage = bare(stage, VLMo(config), loss_weights=ALL, negatives="global")
            batches = (pairs(config, b),)
        prepared = to_device if kind == "textbook" else ready  # a textbook pads texts to full length
        self.batches = [prepared(batch, run.device) for batch in batches]
        self.stage.to(run.device).train()
        train.freeze_unread(self.stage, self.batches, run)
        speed = SimpleNamespace(recompute="recomputed" in kind, compile="compiled" in kind)
        runtime.speed_up(self.stage, speed, run)
        self.optimizer = runtime.adamw(self.stage)

    def step(self):
        with self.run.autocast():
            values = self.stage(*self.batches)
        sum(w * values[name] for name, w in self.stage.loss_weights.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def momo_stage(name, config):
    """Stage momo-vl, with texts of stage momo-text's length."""
    length = momo_stages.MoMoText.recipe.get(name, momo_stages.MoMoText.recipe["base"]).get("max_text_len")
    length = length or config.max_text_len
    config = dataclasses.replace(config, experts="shared", max_text_len=length)
    shape = momo.DECODERS[name]
    decoders = {kind: momo.Decoder(config, shape, kind) for kind in ("pair", "text")}
    stage = bare(momo_stages.MoMoVL, VLMo(config), head=nn.ModuleDict(decoders), negatives="global")
    stage.loss_weights = dict.fromkeys(["cmm mim", "cmm mlm", "itc", "itm", "mlm"], 1.0)
    stage.aligned, stage.normalised = {"itc", "itm"}, False
    return stage


# ---- Time, FLOPs, memory -------------------------------------------------------------------------


def alternate(sides, repeats, device):
    """{name: function} → {name: [seconds]}: each once to warm up, then in turns."""
    for function in sides.values():
        function()
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(a, b):
    """The median of a / b, of times that alternated."""
    return statistics.median(x / y for x, y in zip(a, b))


def matmul_peak(run):
    """The best rate of square matrix products in this precision: FLOP per second."""
    best, dtype = 0.0, run.dtype or torch.float32
    for n in (1024, 2048, 4096) if run.device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, n, n, device=run.device).to(dtype)
        seconds = alternate({"": partial(torch.matmul, a, b)}, 5, run.device)[""]
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
    """Steps of several kinds of Side; ratios are to the first."""
    torch.compiler.reset()
    sides = {kind: Side(kind, name, b, run) for kind in kinds}
    seconds = alternate({kind: side.step for kind, side in sides.items()}, repeats, run.device)
    rows, best = [], matmul_peak(run)
    for kind, side in sides.items():
        median = statistics.median(seconds[kind])
        parameters = sum(p.numel() for p in side.stage.parameters() if p.requires_grad)
        work = flops(sides["ours" if "compiled" in kind else kind].step)  # compiled code hides it
        memory = tensor_memory(side.step, run.device)  # besides parameters and AdamW's averages
        rows.append({
            "side": kind,
            "pairs/s": b / median,
            "spread": (max(seconds[kind]) - min(seconds[kind])) / median,
            f"× {kinds[0]}": median_ratio(seconds[kinds[0]], seconds[kind]),
            "parameters, M": parameters / 1e6,
            "TFLOP a step": work / 1e12,
            "of peak": work / median / best,
            "tensors, MB": memory,
            "days for 204.8 M pairs": PAPER_PAIRS * median / b / 86_400,
        })  # fmt: skip
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
    sides = {"textbook": partial(encode, textbook, *inputs), "ours": partial(encode, model, *inputs)}
    seconds = alternate(sides, repeats, run.device)
    ranking = alternate({"": partial(rank, *vectors(5000, 25_010, run.device))}, 3, run.device)
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


# Runs at the paper's sizes: pixels and tokens
RUNS = (("stage text", 224, 196), ("stage vl", 224, 40), ("retrieval", 384, 40), ("vqa", 480, 40))


def bench_sizes(name, run):
    """What one more sample in the batch costs, with a text of full length: memory of its activations,
    with and without --recompute, and work. Next to it what the parameters that train, their
    gradients and AdamW's averages take, in float32."""
    rows = []
    for kind, size, tokens in RUNS:
        config = dataclasses.replace(CONFIGS[name], image_size=size, max_text_len=tokens)
        row = {"run": kind, "pixels": size, "tokens": tokens}
        for column, recompute in (("MB a sample", False), ("with --recompute", True)):
            stage = stage_of(kind, config).to(run.device).train()
            batches = [training_batch(kind, config, b, run.device) for b in (4, 2)]
            train.freeze_unread(stage, batches[1:], run)
            for p in stage.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(forget)  # so that the peak is of activations
            runtime.speed_up(stage, SimpleNamespace(recompute=recompute, compile=False), run)
            steps = [partial(gradients, stage, batch, run) for batch in batches]
            four, two = (tensor_memory(step, run.device) for step in steps)
            row[column] = (four - two) / 2
            if not recompute:
                parameters = sum(p.numel() for p in stage.parameters() if p.requires_grad)
                row["TFLOP a sample"] = (flops(steps[0]) - flops(steps[1])) / 2e12
        rows.append(row | {"parameters, M": parameters / 1e6, "MB besides": 16 * parameters / 1e6})
    return rows


def stage_of(kind, config):
    """A stage or task, without data."""
    model, head = VLMo(config), nn.Module()
    if kind == "stage text":
        model.requires_grad_(False)
        for module in language_part(model):
            module.requires_grad_(True)
        return bare(Text, model, head=head, loss_weights={"mlm": 1.0})
    if kind == "vqa":
        return bare(VQA, model, head=classifier(config, config.dim, 3129), loss_weights={"loss": 1.0})
    weights = ALL if kind == "stage vl" else {"itc": 1.0}
    return bare(VL, model, head=head, loss_weights=weights, negatives="global")


def training_batch(kind, config, b, device):
    """b pairs with texts of full length."""
    batch = ready(pairs(config, b, full=True), device)
    return batch | {"target": torch.rand(b, 3129, device=device)} if kind == "vqa" else batch


def forget(parameter):
    parameter.grad = None


def gradients(stage, batch, run):
    """Forward and backward pass."""
    with run.autocast():
        values = stage(batch)
    sum(w * values[name] for name, w in stage.loss_weights.items()).backward()


# ---- The command ---------------------------------------------------------------------------------


def jobs(args):
    """What to measure: (title of a table, first columns of its rows, function, its arguments)."""
    listed = []
    if args.sizes:
        for name, amp in itertools.product(args.config, args.amp):
            labels = {"config": name, "amp": amp}
            listed.append(("memory and work of a sample", labels, bench_sizes, name, runtime.Runtime(amp)))
        return listed
    kinds = ["textbook", "ours", "ours, recomputed"]
    if args.compile:
        kinds.append("ours, compiled")
    for name, amp in itertools.product(args.config, args.amp):
        run, labels = runtime.Runtime(amp), {"config": name, "amp": amp}
        batches = args.batch_size or [4, 8]
        if run.device.type == "cuda":
            batches = args.batch_size or [32 if name == "large" else 64]
        listed.append(("retrieval", labels, bench_retrieval, name, run, args.repeats))
        for b in batches:
            rest = name, b, run, args.repeats
            sized = labels | {"batch": b}
            listed.append(("a step of stage vl", sized, bench_step, kinds, *rest))
        rest, sized = (name, batches[0], run, args.repeats), labels | {"batch": batches[0]}
        listed.append(("a step of VLMo and of MoMo", sized, bench_step, ["ours", "MoMo"], *rest))
    return listed


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
    parser.add_argument("--sizes", action="store_true", help="only memory and work of a sample")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="of each side")
    parser.add_argument("--out", metavar="FILE", help="the numbers as JSON")
    args = parser.parse_args()
    if args.out:
        runtime.refuse_output("--out", args.out)
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, medians of {args.repeats}\n")
    found = {"device": device, "torch": torch.__version__}
    for title, labels, measure, *arguments in jobs(args):
        try:
            rows = [labels | row for row in measure(*arguments)]
        except RuntimeError as error:  # too little memory
            rows = [labels | {"failed": runtime.first_line(error)}]
        print(table(title, rows), flush=True)
        found[title] = found.get(title, []) + rows
        if args.out:
            content = json.dumps(found, indent=1).encode()
            runtime.write(args.out, lambda file: file.write(content))


if __name__ == "__main__":
    runtime.run(main)
