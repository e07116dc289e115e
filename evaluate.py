"""Evaluates a checkpoint on a task (Sections 3.5, 4.3–4.5). Any number of processes gives the same
answer.

    python evaluate.py --task retrieval --checkpoint runs/vl/last.pt --rerank 16
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --predictions FILE
    torchrun --nproc_per_node=8 evaluate.py --task nlvr2 --checkpoint runs/nlvr2/best.pt --data DIR
"""

import json

import checkpoint
import runtime
from finetune import TASKS
from log import in_words
from runtime import at_least


def parse():
    """The flags, read in two steps: first the task. → its class, args"""
    first = runtime.Parser(add_help=False)
    first.add_argument("--task", dest="stage", choices=list(TASKS), default="retrieval")
    chosen, _ = first.parse_known_args()
    Task = TASKS[chosen.stage]

    parser = runtime.Parser(parents=[first], description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--data", nargs="+", default=["shapes"], metavar="DIR", help="shapes: the built-in world"
    )
    splits = "train, val, test; the built-in world: also rare; VQA 2.0: also test-dev, minival; "
    splits += "MNLI: also val-mismatched, test-mismatched"
    parser.add_argument("--split", default="test", help=splits)
    parser.add_argument("--vocab", metavar="FILE", help="for a checkpoint imported without one")
    parser.add_argument("--batch-size", type=at_least(1), default=64)
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    parser.set_defaults(training=False, seed=0, head_factor=1.0, predictions=None, exclude=None)
    Task.evaluation_flags(parser)
    args = parser.parse_args()
    if args.predictions:
        runtime.refuse_output("--predictions", args.predictions)
    args.splits = [args.split]
    return Task, args


def main():
    Task, args = parse()
    start = checkpoint.read(args.checkpoint)
    Task.check(start, args)
    run = runtime.Runtime(args.amp)
    stage = Task(args, start.config, start, run).to(run.device).eval()
    with run.autocast():
        results = stage.evaluate(args, run)
    if results:
        run.print(in_words(results))
        run.print(json.dumps({name: round(value, 2) for name, value in results.items()}))


if __name__ == "__main__":
    runtime.run(main)
