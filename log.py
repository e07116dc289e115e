"""The log of a run: metrics.jsonl, and the progress bar."""

import collections
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import losses
from reading import read_text
from runtime import UserError, write


class Log:
    """metrics.jsonl and the progress bar, on process 0: means over the steps since the last line,
    and over processes.

    Values stay on the device until a line is written. Resuming after step `done` drops later lines.
    saved: the step of the last checkpoint; 0: there is none. applied: how many updates were made;
    in_a_row: how many fp16 has skipped since.
    """

    def __init__(self, out, args, run, stage, loader, done=0, record=-math.inf):
        self.run, self.stage, self.loader, self.args, self.record = run, stage, loader, args, record
        self.saved, self.applied, self.in_a_row = done, done, 0
        self.bar = tqdm(total=args.steps, initial=done, disable=not run.main, unit="step", mininterval=1)
        self.file = None
        if run.main:
            path = Path(out, "metrics.jsonl")
            kept = ""
            if done and path.exists():  # the test split is measured again at the end
                for line, entry in read_metrics(path):
                    kept += line if entry["step"] <= done and entry.get("split") != "test" else ""
            write(path, lambda file: file.write(kept.encode()))
            self.file = open(path, "a", buffering=1)
        self.restart(done)

    def restart(self, step):
        self.step, self.clock, self.waited = step, time.perf_counter(), self.loader.waited
        self.sums = collections.defaultdict(float)
        self.counts = collections.Counter()
        self.skipped = torch.zeros((), device=self.run.device)

    def add(self, values):
        """Adds the losses of one part of a step: {name: scalar}."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach().float()
            self.counts[name] += 1

    def end_step(self, gradient_norm):
        """Counts a step; under fp16 one whose gradient norm is not finite counts as skipped."""
        if self.args.amp == "fp16":
            finite = gradient_norm.isfinite()
            self.skipped += ~finite
            gradient_norm = gradient_norm.where(finite, 0)
        self.add({"gradient norm": gradient_norm})
        self.bar.update()

    def write(self, step, lr):
        """Writes a line. UserError, on all processes alike, if a loss or parameter is not finite,
        or fp16 has skipped too many steps."""
        # This process's share of each mean, on the device
        means = [total / self.counts[name] for name, total in self.sums.items()]
        size = nn.utils.get_total_norm([p.detach() for p in self.stage.parameters() if p.requires_grad])
        others = [size.float(), self.skipped, means[0].new_tensor(self.loader.unreadable)]
        others.append(means[0].new_tensor(self.loader.waited - self.waited))
        shares = torch.stack([*means, *others]).double() / self.run.world
        # The only wait for the device
        *means, size, skipped, unreadable, waited = losses.over_processes(shares)

        # Under fp16 only some steps have counted
        skipped = round(skipped)
        values, steps = dict(zip(self.sums, means)), step - self.step
        if skipped:
            values["gradient norm"] *= steps / max(steps - skipped, 1)  # skipped steps have added 0

        # A value that is not finite would be in the next checkpoint, too
        for name, value in [*values.items(), ("the norm of all parameters", size)]:
            if not math.isfinite(value):
                advice = "try a lower --lr"
                if self.saved:
                    advice += f", with --resume --allow-changes (last.pt is of step {self.saved})"
                raise UserError(f"{name} is {value} between steps {self.step + 1} and {step}: {advice}")
        self.applied += steps - skipped
        self.in_a_row = self.in_a_row + steps if skipped == steps else 0
        if self.in_a_row >= 100 or (step == self.args.steps and self.applied == 0):
            raise UserError(f"fp16 has skipped {self.in_a_row} updates in a row: use --amp bf16")

        # The line, and the bar
        counts = {"skipped": skipped} if self.args.amp == "fp16" else {}
        rate = {f"{self.stage.unit}_per_s": steps * self.args.batch_size / (time.perf_counter() - self.clock)}
        rate["waited_s"] = round(waited, 3)  # for data, on average over processes
        self.line(step=step, **values, lr=lr, **rate, **counts, unreadable=round(unreadable * self.run.world))
        shown = [*self.stage.loss_weights, "gradient norm"]
        self.bar.set_postfix({name: f"{values[name]:.2f}" for name in shown if name in values}, refresh=False)
        self.restart(step)

    def measure(self, split, step):
        """Measures a split and writes a line. → whether none was better so far, by stage.best."""
        began = time.perf_counter()
        with self.run.autocast():
            results = self.stage.measure(split, self.run.device)
        self.stage.train()
        self.line(step=step, split=split, **results)
        if self.run.main:
            self.bar.write(f"step {step}, split {split}: {in_words(results)}")
        self.clock += time.perf_counter() - began  # the rate is that of training
        improved = self.stage.best is not None and results[self.stage.best] >= self.record
        if improved:
            self.record = results[self.stage.best]
        return improved

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()

    def line(self, **entry):
        """Measures that are not finite, such as a perplexity, become null."""
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            self.file.write(json.dumps(finite) + "\n")


def read_metrics(path):
    """The lines of a metrics.jsonl: [(line, entry), …]."""
    found = []
    for line in read_text(path).splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # a killed run may leave half a line
        try:
            entry = json.loads(line)
            found.append((line, entry | {"step": int(entry["step"])}))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise UserError(f"{path} is damaged: move it away (a run that is resumed begins a new one)") from None
    return found


def in_words(results):
    """{name: number} as one line."""
    shown = []
    for name, value in results.items():
        shown.append(f"{name} {value:.4g}" if value < 1000 else f"{name} {value:.0f}")
    return ", ".join(shown)
