"""Fine-tuning on the paper's tasks (Section 3.5, Figure 3; Sections 4.3–4.5, Appendices C and D).

    python finetune.py --task vqa --init runs/vl/last.pt         # the built-in world
    python finetune.py --task vqa --help                         # the flags of a task
    torchrun --nproc_per_node=8 finetune.py --task nlvr2 --init runs/vl/last.pt --data nlvr2

The flags and the loop are those of train.py.
"""

import math

import data
import glue
import runtime
import train
from classify import Classify, Probe
from nlvr2 import NLVR2
from retrieval import retrieval
from stage import config_flags, weight_flag
from stages import VL
from vqa import VQA


class Retrieval(VL):
    """Retrieval of captions and pictures: contrast, or with --itm-weight matching, too, for
    --rerank. The recipe is COCO's."""

    best = "mean"
    recipe = {  # Appendix D; drop-path and base_plus: released code
        "tiny": dict(epochs=0.32, batch_size=64, lr=2.5e-4, clip=1.0, save_every=100),
        "base": dict(epochs=20, batch_size=2048, lr=2e-5, image_size=384, drop_path=0.2),
    }
    # The released 3,000 steps are 16.3 epochs of 566,747 captions
    recipe["base_plus"] = recipe["base"] | dict(epochs=16.3, batch_size=3072, lr=3e-5)
    recipe["large"] = recipe["base"] | dict(epochs=10, lr=1e-5)

    @staticmethod
    def flags(parser, base):
        weight_flag(parser.add_argument_group("task retrieval"), "itm", 0.0)
        parser.set_defaults(itc_weight=1.0, mlm_weight=0.0, negatives="global", fresh_experts=False)
        data.flags(parser, images="randaugment", text=True)
        config_flags(parser, base, ("image_size", "max_text_len", "drop_path"))

    @staticmethod
    def evaluation_flags(parser):
        parser.set_defaults(itc_weight=1.0, itm_weight=0.0, mlm_weight=0.0, negatives="global")
        parser.set_defaults(fresh_experts=False)
        best = "sort each query's K best again, with the matching head"
        parser.add_argument("--rerank", type=runtime.at_least(0), default=0, metavar="K", help=best)

    @staticmethod
    def check(start, args):
        start.require(["itc_image", "itc_text"] + (["itm_head"] if args.rerank else []))

    def note(self, args, run):
        stale = not args.itm_weight and self.origin.get("itm_head") == "taken"
        warning = "; --itm-weight is 0: the matching head does not follow (for --rerank)"
        return super().note(args, run) + (warning if stale else "")

    def evaluate(self, args, run):
        source = self.sources[args.split]
        run.print(f"{args.split}: {len(source)} images, {source.caption_ends()[-1]} captions")
        return retrieval(self.model, source, self.words, run.device, args.batch_size, args.rerank)


class Flickr30K(Retrieval):
    """Retrieval with Flickr30K's recipe. The released models start from COCO's fine-tuned ones."""

    recipe = {"tiny": Retrieval.recipe["tiny"]}  # marked as those above
    recipe["base"] = Retrieval.recipe["base"] | dict(epochs=40, lr=1e-5, drop_path=0.15)
    # The released 1,500 steps are 31.8 epochs of 145,000 captions
    recipe["base_plus"] = Retrieval.recipe["base_plus"] | dict(epochs=31.8)
    recipe["large"] = recipe["base"] | dict(drop_path=0.2)


TASKS = {
    "vqa": VQA,
    "nlvr2": NLVR2,
    "retrieval": Retrieval,
    "flickr30k": Flickr30K,
    "classify": Classify,
    "probe": Probe,
    **dict.fromkeys(glue.TASKS, glue.GLUE),
}


def schedule(args, stage):
    """Sets steps, warm-up, and how often to measure, from --epochs."""
    samples = len(stage.samples[0])
    args.steps = max(1, round(args.epochs * samples / args.batch_size))
    args.warmup = round(0.1 * args.steps)
    if args.eval_every is None:  # per epoch, four times at least
        args.eval_every = math.ceil(min(samples / args.batch_size, args.steps / 4))
        if "val" not in stage.measured():
            args.eval_every = 0


def main():
    Task, args, config, start = train.parse(TASKS, "--task", None, __doc__)
    run = train.start_runtime(args, start)
    stage = Task(args, config, start, run)
    schedule(args, stage)
    train.train(stage, args, run, start)


if __name__ == "__main__":
    runtime.run(main)
