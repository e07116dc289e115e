"""How fast a step of stage vl is, beside the same step as a textbook has it, and beside MoMo's; what MoMo's encoder
saves; what negatives cost between processes; how fast retrieval is. Ratios of sides that alternate in one run on one
machine.

    python bench.py                                   # base, 224 pixels, on this machine's processor or GPU
    python bench.py --config tiny --amp off           # two minutes

Shape letters as in losses.py.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, profiler
from torch.utils import flop_counter

import data
import evaluate
import losses
import momo
import runtime
import train
from mome import CONFIGS, Router, VLMo, unit

ALL = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}

# ---- The textbook's step ---------------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """The VL step the obvious way: the same parameters and the same losses, but every pass on its own, its text padded
    to full length, all rows through all of every layer, the vocabulary head on every token, attention written out, and
    the images of all processes gathered. What train.VisionLanguageStage is measured against, and must equal."""

    def __init__(self, model, losses_used, negatives="global"):
        super().__init__()
        self.model, self.weights, self.negatives = model, losses_used, negatives
        for module in train.untrained(model, *losses_used):
            module.requires_grad_(False)

    def forward(self, batch):
        image, text, mask = batch["image"], batch["text"], batch["mask"]
        same, out = losses.same_pairs(batch["ids"]), {}  # (b, B)
        i2t = t2i = torch.zeros(same.shape, device=same.device)
        if "itc" in self.weights:
            vectors = self.embed_image(image), self.embed_text(text, mask)
            i2t, t2i = losses.similarities(*vectors, self.model.scale())
            out["itc"] = losses.itc_loss(i2t, t2i, same)
        if "mlm" in self.weights:
            hidden = self.encode("pair", batch["masked"], mask, image)[:, : text.shape[1]]  # (b, T, D)
            logits, labels = self.model.mlm_head(hidden), batch["labels"]  # (b, T, V), (b, T)
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=data.IGNORE)
            out["mlm"] = losses.global_mean(total, (labels != data.IGNORE).sum())
        if "itm" in self.weights:
            candidate = losses.candidates(same, self.negatives)
            wrong_image, image_found = losses.draw_negatives(t2i, candidate)
            wrong_text, text_found = losses.draw_negatives(i2t, candidate)
            images, texts, masks = losses.gather(image), losses.gather(text), losses.gather(mask.long()).bool()
            matched = self.itm_logits(text, mask, image)
            with_image = self.itm_logits(text, mask, images[wrong_image])
            with_text = self.itm_logits(texts[wrong_text], masks[wrong_text], image)
            logits = torch.cat([matched, with_image, with_text])  # (3b, 2)
            found = torch.cat([torch.ones_like(image_found), image_found, text_found])
            out["itm"] = losses.itm_loss(logits, torch.arange(len(logits), device=same.device) < len(image), found)
        return out | {"scale": self.model.scale().detach()}

    def embed_image(self, image):
        return unit(self.model.itc_image(self.encode("image", image=image)[:, 0]))

    def embed_text(self, text, mask):
        return unit(self.model.itc_text(self.encode("text", text, mask)[:, 0]))

    def itm_logits(self, text, mask, image):
        return self.model.itm_head(self.model.pool(self.encode("pair", text, mask, image)))

    def encode(self, kind, text=None, mask=None, image=None):
        """Every row of an input through every layer → (b, S, D) after the final norm."""
        model = self.model
        parts = [] if text is None else [model.embed_words(text)]
        parts += [] if image is None else [model.embed_patches(image, 1)]
        x, T = torch.cat(parts, dim=1), 0 if text is None else text.shape[1]
        keys = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # (b, S)
        keys[:, :T] = True if mask is None else mask
        bias = [0.0] * len(model.blocks)
        if model.config.position == "relative":
            bias = list(model._relative_bias(kind, T, None))
        for block, layer_bias in zip(model.blocks, bias):
            x = x + block.attention_branch(attention(block.attention, block.norm(x), kind, T, keys, layer_bias))
            experts = {name: feed_forward(expert) for name, expert in block.experts.items()}
            x = x + block.expert_branch(Router.forward(experts, x, kind, T))
        return model.norm(x)


def attention(layer, x, kind, T, keys, bias):
    """softmax(q·k/√(D/H) + bias)·v, as it is written. keys (b, S) bool, True = may be read."""
    split = lambda y: y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # (b, S, D) → (b, H, S, D/H)
    q, k, v = split(layer.query(x, kind, T)), split(layer.key(x, kind, T)), split(layer.value(x, kind, T))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (b, H, S, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
    scores = scores.masked_fill(~keys[:, None, None], -math.inf).softmax(-1).to(v.dtype)
    return layer.out((scores @ v).transpose(1, 2).flatten(2), kind, T)


def feed_forward(expert):
    """FC2(GELU(FC1(LN(x)))), as it is written."""
    return lambda x: expert.fc2(F.gelu(expert.fc1(expert.norm(x))))


# ---- Measuring -------------------------------------------------------------------------------------------------------


def configuration(name, image_size=None):
    """The Config of this name, at another resolution if one is given, without drop-path."""
    return dataclasses.replace(CONFIGS[name], image_size=image_size or CONFIGS[name].image_size, drop_path=0.0)


def pairs(config, b, device):
    """b pairs as the loaders give them, with b quantiles of a length of 6 to 40 tokens, 13 on average: of 4 pairs the
    longest has 21, of 8 26, of 64 40."""
    g = torch.Generator().manual_seed(0)
    T, lengths = config.max_text_len, 6 - 7.2 * torch.log1p(-(torch.arange(b) + 0.5) / b)
    lengths = lengths.round().long().clamp(max=40)  # (b,)
    mask = torch.arange(T) < lengths[:, None]
    text = torch.randint(5, config.vocab_size, (b, T), generator=g).masked_fill(~mask, 0)
    hidden = mask & (torch.rand(b, T, generator=g) < 0.15)
    hidden[:, 2] = True
    ids = torch.stack([torch.arange(b), torch.arange(b) + b], dim=1)
    image = torch.randint(0, 256, (b, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8)
    batch = {"image": image, "text": text, "mask": mask, "masked": text.masked_fill(hidden, 4), "ids": ids}
    batch["labels"] = text.masked_fill(~hidden, data.IGNORE)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def documents(config, b, device):
    """b rows of running text, as the loaders pack it: every one full."""
    text = torch.randint(5, config.vocab_size, (b, config.max_text_len), generator=torch.Generator().manual_seed(1))
    return {"text": text.to(device), "mask": torch.ones_like(text, dtype=torch.bool, device=device)}


def hide(batch, config, modality):
    """The batch as MoMo's loaders give it: tokens and patches are hidden at this modality's ratio."""
    rng, labels = random.Random(0), torch.full_like(batch["text"], data.IGNORE)
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
        at = momo.hide(momo.RATIO[modality], rng, range(1, length - 1))
        labels[row, at] = batch["text"][row, at]
    batch = batch | {"masked": batch["text"].masked_fill(labels != data.IGNORE, 4), "labels": labels}
    if modality == "pair":
        patches = (config.image_size // config.patch_size) ** 2
        hidden = torch.stack([momo.hide_patches(momo.RATIO[modality], patches, rng) for _ in labels])
        batch["hidden"] = hidden.to(labels.device)
    return batch


class Side:
    """One way to compute the step: a model, its optimizer, a batch, and step()."""

    def __init__(self, kind, name, image_size, b, here):
        """kind: "textbook", "here", "MoMo", …; name: of a Config."""
        torch.manual_seed(0)
        config = configuration(name, image_size)
        if kind == "MoMo":
            length = train.recipe("text", name, "momo")["max_text_len"]
            config = dataclasses.replace(config, experts="shared", max_text_len=length)
        model, self.here, self.batch = VLMo(config), here, pairs(config, b, here.device)
        if kind == "MoMo":
            aligned = train.VisionLanguageStage(model, {"itc": 1.0, "itm": 1.0})
            self.stage = momo.Stage(model, momo.MODALITIES["vl"], momo.DECODERS[name], aligned)
            beside = hide(documents(config, b, here.device), config, "text")
            self.batch = hide(self.batch, config, "pair") | {momo.BESIDE + key: beside[key] for key in beside}
        else:
            self.stage = (Textbook if kind == "textbook" else train.VisionLanguageStage)(model, ALL)
        self.stage.to(here.device).train()
        if "recomputed" in kind:
            train.recompute(self.stage)
        if "compiled" in kind:
            train.compile_blocks(self.stage, here)
        self.optimizer = runtime.optimizer(self.stage, 0.01, (0.9, 0.98))
        self.parameters = sum(p.numel() for p in self.stage.parameters() if p.requires_grad)
        self.frozen = sum(p.numel() for p in self.stage.parameters() if not p.requires_grad)

    def step(self):
        with self.here.autocast():
            values = self.stage(self.batch)
        sum(weight * values[name] for name, weight in self.stage.weights.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inspect(self):
        """The FLOPs of a step's matrix products, those of attention included; and which of the kernels of
        scaled_dot_product_attention run in it."""
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        more = {
            forward: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
            backward: lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
        }
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=more)
        with profiler.profile() as profile, counter:
            self.step()
        prefix = "aten::_scaled_dot_product_"
        ran = {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}
        kernels = sorted(name.removesuffix("_for_cpu") for name in ran if "backward" not in name)
        return counter.get_total_flops(), " ".join(kernels) or "written out"


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(sides, repeats, device):
    """{name: function} → {name: [seconds]}: each once to warm up, then in turns."""
    for function in sides.values():
        function()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            synchronise(device)
            began = time.perf_counter()
            function()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def matmul_peak(here):
    """The best rate of square matrix products in this precision: FLOP a second."""
    best, dtype = 0.0, here.dtype or torch.float32
    for n in (1024, 2048, 4096) if here.device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=here.device).to(dtype) for _ in range(2))
        seconds = alternate({"": lambda: a @ b}, 5, here.device)[""]
        best = max(best, 2 * n**3 / min(seconds))
    return best


def step_memory(kind, name, image_size, b, amp):
    """Bytes that a step needs at its peak above parameters and optimizer state: those of its tensors, and those that
    the process holds for them, of which an allocator cannot use every one."""
    here = runtime.Runtime(amp)
    before = in_use(here.device)
    side = Side(kind, name, image_size, b, here)
    side.step()  # the optimizer's state is there from now on
    held = 12 * side.parameters + 4 * side.frozen  # fp32: the parameters, and AdamW's two averages
    in_all = peak(side.step, here.device) - before - held
    return tensor_peak(side.step, here.device), in_all


def ranking_memory(device):
    """Bytes above the features that ranking a thousand images and a million texts needs."""
    image, text = torch.randn(1000, 768, device=device), torch.randn(1_000_000, 768, device=device)
    relevant = torch.stack([torch.arange(len(text)) % 1000, torch.arange(len(text))]).to(device)
    before = in_use(device)
    return peak(lambda: rank(image, text, relevant), device) - before


def in_use(device):
    """Bytes of this process on the device."""
    return torch.cuda.memory_reserved() if device.type == "cuda" else resident("VmRSS")


def peak(work, device):
    """The most that is in use while it works."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_reserved()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    work()
    return resident("VmHWM")


def tensor_peak(work, device):
    """The most bytes that tensors which are born while it works hold at once."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profiler.profile(profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def resident(name):
    """Of /proc/self/status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


class Failed(Exception):
    """A measurement that did not end well, and why: it ran out of memory, say."""


def in_a_process(measure, *arguments):
    """measure(*arguments) in a process of its own, whose memory starts empty. Failed where it fails."""
    spawned = torch.multiprocessing.get_context("spawn")
    out = spawned.SimpleQueue()
    child = spawned.Process(target=put, args=(out, measure, arguments))
    child.start()
    child.join()
    if child.exitcode:
        raise Failed(f"exit code {child.exitcode}")
    answer, reason = out.get()
    if reason:
        raise Failed(reason)
    return answer


def put(out, measure, arguments):
    try:
        out.put((measure(*arguments), None))
    except (RuntimeError, OSError) as error:  # too little memory; no /proc
        out.put((None, f"{type(error).__name__}: {runtime.first_line(error)}"))


# ---- The tables ------------------------------------------------------------------------------------------------------


def bench_step(args, kinds, name, amp, b):
    """Rows of a step's numbers, one for each kind of Side; ratios are to the first. Memory that cannot be measured
    stays empty."""
    of = (name, args.image_size, b, amp)
    seconds, counted, parameters, best = in_a_process(step_times, kinds, *of, args.repeats)
    rows = []
    for kind in kinds:
        (work, kernels), median = counted[kind], statistics.median(seconds[kind])
        try:
            in_tensors, in_all = (size / 1e6 for size in in_a_process(step_memory, kind, *of))
        except Failed:
            in_tensors = in_all = None
        rows.append({
            "config": name, "batch": b, "amp": amp, "side": kind,
            "pairs/s": b / median,
            "spread": (max(seconds[kind]) - min(seconds[kind])) / median,
            f"× {kinds[0]}": statistics.median(a / b for a, b in zip(seconds[kinds[0]], seconds[kind])),
            "parameters, M": parameters[kind] / 1e6,
            "TFLOP a step": work / 1e12,
            "of peak": work / median / best,
            "tensors, MB": in_tensors,
            "memory, MB": in_all,
            "attention": kernels,
            "days for 204.8 M pairs": PAPER_PAIRS * median / b / 86_400,
        })  # fmt: skip
    return rows


def step_times(kinds, name, image_size, b, amp, repeats):
    """For each kind: [seconds a step], what inspect() says, parameters; and the best rate of matrix products."""
    here = runtime.Runtime(amp)
    sides = {kind: Side(kind, name, image_size, b, here) for kind in kinds}
    counted = {kind: sides["here" if "compiled" in kind else kind].inspect() for kind in kinds}  # compiled code hides
    seconds = alternate({kind: side.step for kind, side in sides.items()}, repeats, here.device)
    return seconds, counted, {kind: side.parameters for kind, side in sides.items()}, matmul_peak(here)


PAPER_PAIRS = 200_000 * 1024  # steps × batch of the paper's base model (Section 4.1)


def bench_visible(args, name, amp, b):
    """Rows of MoMo's encoder, forward and backward, on all rows and on the visible quarter of images, and of pairs."""
    here = runtime.Runtime(amp)
    config = dataclasses.replace(configuration(name, args.image_size), experts="shared")
    torch.manual_seed(0)
    model, batch = VLMo(config).to(here.device), hide(pairs(config, b, here.device), config, "pair")
    patches = F.pad(~batch["hidden"], (1, 0), value=True)
    words = batch["mask"] & (batch["labels"] == data.IGNORE)
    rows = {"image": (model.embed_patches(batch["image"], 1), patches)}
    rows["pair"] = (torch.cat([model.embed_words(batch["text"]), rows["image"][0]], 1), torch.cat([words, patches], 1))
    everything = {"image": torch.ones_like(patches), "pair": F.pad(batch["mask"], (0, patches.shape[1]), value=True)}
    found = []
    for modality, (x, visible) in rows.items():
        x = x.detach()

        def encode(seen):
            with here.autocast():
                return momo.encode_visible(model, x, seen)[0]

        sides = {"all": everything[modality], "visible": visible}
        seconds = alternate(
            {side: lambda seen=seen: encode(seen).sum().backward() for side, seen in sides.items()},
            args.repeats, here.device,
        )  # fmt: skip
        all_kept, kept = (saved(lambda seen=seen: encode(seen), model) for seen in sides.values())
        found.append({
            "config": name, "amp": amp, "batch": b, "rows of": modality,
            "active parameters, M": sum(p.numel() for p in momo.active(model)[modality]) / 1e6,
            "all, s": statistics.median(seconds["all"]), "visible, s": statistics.median(seconds["visible"]),
            "time, visible / all": statistics.median(v / a for v, a in zip(seconds["visible"], seconds["all"])),
            "activations of all, MB": all_kept / 1e6, "activations, visible / all": kept / all_kept,
        })  # fmt: skip
    return found


def saved(work, model):
    """Bytes that a forward pass keeps for its backward pass, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = work()  # what is kept stays alive until here, so that no address serves twice
    return sum(kept.values())


def bench_exchange(world):
    """What the negatives of a step cost a process, measured on gloo."""
    spawned = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe, spawned.Manager() as manager:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        sent = manager.list()
        try:
            torch.multiprocessing.spawn(exchanged, args=(world, port, sent), nprocs=world)
        except torch.multiprocessing.ProcessException as error:
            raise Failed(runtime.first_line(error)) from None
        return traffic(world, sum(sent) / world, max(sent))


def exchanged(rank, world, port, sent):
    """In a process of its own: appends the bytes that it sends to others in the exchanges of a step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    real, own = dist.all_to_all_single, []

    def counted(received, send, received_counts, send_counts):
        own.append((sum(send_counts) - send_counts[rank]) * send[:1].numel() * send.element_size())
        return real(received, send, received_counts, send_counts)

    dist.all_to_all_single = counted
    torch.manual_seed(rank)
    scores = 10 * torch.rand(PAIRS, world * PAIRS)
    candidate = losses.candidates(losses.same_pairs(torch.arange(PAIRS)[:, None] + rank * PAIRS), "global")
    for x in (torch.zeros(PAIRS, *PIXELS, dtype=torch.uint8), torch.zeros(PAIRS, *TOKENS, dtype=torch.int64)):
        losses.exchange(x, losses.draw_negatives(scores, candidate)[0])
    sent.append(sum(own))
    dist.destroy_process_group()


PAIRS, PIXELS, TOKENS = 16, (3, 224, 224), (2, 40)  # of a process; an image as uint8; ids and mask of a text as int64


def traffic(world, mean, most):
    """A row of the table, in MB. The bound of the mean: a process receives at most an image and a text for each of its
    pairs, whatever W, and on average it sends what it receives."""
    image, text = math.prod(PIXELS) / 1e6, 8 * math.prod(TOKENS) / 1e6
    row = {"W": world, "mean": mean and mean / 1e6, "most": most and most / 1e6, "bound": PAIRS * (image + text)}
    return row | {"gathering all images": (world - 1) * PAIRS * image}


def bench_retrieval(args, name, amp):
    """A row of encoding pictures with five captions each, and ranking as many as COCO 5K has."""
    here = runtime.Runtime(amp)
    config = configuration(name, args.image_size)
    torch.manual_seed(0)
    model = VLMo(config).to(here.device).eval()
    image, captions = pairs(config, 16, here.device)["image"], pairs(config, 80, "cpu")
    mixed = torch.randperm(80)
    text, mask, plain = captions["text"][mixed], captions["mask"][mixed], Textbook(model, ALL)

    @torch.no_grad()
    def textbook():
        with here.autocast():
            plain.embed_image(image)
            for part in torch.arange(80).split(16):
                plain.embed_text(text[part].to(here.device), mask[part].to(here.device))

    @torch.no_grad()
    def fast():
        with here.autocast():
            model.embed_image(image)
            evaluate.embed_texts(model, text, mask, here.device, batch=16)

    seconds = alternate({"textbook": textbook, "here": fast}, args.repeats, here.device)
    image, text = torch.randn(5000, 768, device=here.device), torch.randn(25_010, 768, device=here.device)
    relevant = torch.stack([torch.arange(25_010) % 5000, torch.arange(25_010)]).to(here.device)
    ranking = statistics.median(alternate({"": lambda: rank(image, text, relevant)}, 3, here.device)[""])
    return [{
        "config": name, "amp": amp, "pictures with 5 captions encoded/s": 16 / statistics.median(seconds["here"]),
        "× textbook": statistics.median(a / b for a, b in zip(seconds["textbook"], seconds["here"])),
        "5,000 × 25,010 ranked, s": ranking,
        "1,000 × 1,000,000 above the features, MB": in_a_process(ranking_memory, here.device) / 1e6,
    }]  # fmt: skip


def rank(image, text, relevant):
    """Both ways."""
    return evaluate.search(image, text, relevant), evaluate.search(text, image, relevant.flip(0))


def table(title, rows):
    """Rows of one kind as text."""
    show = lambda value: f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
    lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join([title, *("  ".join(map(str.rjust, line, widths)) for line in lines)]) + "\n"


def main():
    here = runtime.Runtime()
    gpu = here.device.type == "cuda"
    parser = runtime.Parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=list(CONFIGS), default=["base"], help="[base]")
    parser.add_argument("--image-size", type=int, metavar="S", help="[the config's]")
    parser.add_argument("--batch-size", nargs="+", type=int, metavar="B", help="[4 8; a GPU's: 64, of large 32]")
    parser.add_argument(
        "--amp", nargs="+", choices=["off", "bf16", "fp16"], default=["bf16"] if gpu else ["off", "bf16"],
        help="[off bf16; a GPU's: bf16]",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="a compiled side, too")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each side [3]")
    parser.add_argument(
        "--processes", nargs="*", type=int, default=[2, 4, 8], metavar="W", help="of the exchange [2 4 8]"
    )
    parser.add_argument("--out", metavar="FILE", help="the numbers as JSON")
    args = parser.parse_args()
    if min(args.repeats, *(args.batch_size or [1])) < 1 or min(args.processes, default=2) < 2:
        raise runtime.UserError("--repeats and --batch-size must be at least 1, --processes at least 2")
    for name in args.config:
        configuration(name, args.image_size)
    reason = args.compile and train.no_compiler(here)
    if reason:
        raise runtime.UserError(f"--compile: {reason}")
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, medians of {args.repeats}\n")
    found = {"device": device, "torch": torch.__version__}
    kinds = ["textbook", "here", "here, recomputed"] + ["here, compiled"] * args.compile

    def show(title, measure, **labels):
        """Prints a table as soon as its rows are measured, and keeps it; or why they could not be."""
        try:
            rows = measure()
        except Failed as failed:
            rows = [labels | {"failed": str(failed)}]
        found[title] = found.get(title, []) + rows
        print(table(title, rows), flush=True)
        if args.out:
            runtime.write(args.out, lambda file: file.write(json.dumps(found, indent=1).encode()))

    def negatives():
        worlds = (64, 1024)  # too many to start: the bounds alone
        return [*map(bench_exchange, args.processes), *(traffic(world, None, None) for world in worlds)]

    show("sent by a process for the negatives of 16 pairs, MB", negatives)
    for name, amp in itertools.product(args.config, args.amp):
        batches = args.batch_size or ([32 if name == "large" else 64] if gpu else [4, 8])
        of, b, pair = {"config": name, "amp": amp}, batches[0], ["here", "MoMo"]
        show("retrieval", lambda: in_a_process(bench_retrieval, args, name, amp), **of)
        show("MoMo's encoder, forward and backward", lambda: in_a_process(bench_visible, args, name, amp, b), **of)
        for batch in batches:
            show("a step of stage vl", lambda: bench_step(args, kinds, name, amp, batch), **of, batch=batch)
        show("a step of VLMo and of MoMo", lambda: bench_step(args, pair, name, amp, b), **of, batch=b)


if __name__ == "__main__":
    runtime.run(main, ValueError)  # of a Config
