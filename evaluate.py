"""Metrics as pure functions, and the evaluation of each task: zero-shot retrieval (Section 3.5, Table 2).

python evaluate.py --task retrieval --checkpoint runs/vl/last.pt [--data DIR] [--split test]
"""

import json

import torch

import data
import losses
import runtime
from mome import Config, VLMo

# ---- Metrics ---------------------------------------------------------------------------------------------------------


def recall(scores, relevant, ks=(1, 5, 10)):
    """Recall@k in percent, rows asking for columns: the share of rows with a relevant column among their k best.

    scores (Q, G) float; relevant (Q, G) bool, at least one a row. An irrelevant column that scores as high as the best
    relevant one stands before it: a model that cannot tell them apart earns nothing by it.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    before = (~(scores < best) & ~relevant).sum(1)  # (Q,); what is not a number counts against, too
    return [100 * (before < k).double().mean().item() for k in ks]


def retrieval_recall(scores, relevant):
    """scores, relevant (images, captions) → {"TR@1", … "IR@10", "mean"}: text retrieval asks for a caption with an
    image, image retrieval for an image with a caption (Table 2)."""
    text, image = recall(scores, relevant), recall(scores.T, relevant.T)
    names = [f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)]
    return dict(zip(names, text + image)) | {"mean": sum(text + image) / 6}


# ---- Retrieval -------------------------------------------------------------------------------------------------------


def shard(count, batch):
    """This process's share of 0 … count−1, in batches. Shares are equally long: the last numbers may come twice."""
    share = -(-count // losses.world())
    first = min(losses.rank() * share, count)
    mine = [min(first + k, count - 1) for k in range(share)]
    return [mine[k : k + batch] for k in range(0, share, batch)]


@torch.no_grad()
def retrieval(model, source, words, device, batch=64):
    """Zero-shot retrieval over a source: all its pictures against all their captions.

    A caption is right for every picture that has it (`source.by_text`), or in Karpathy's splits for its own alone.
    An image that cannot be read raises data.DataError. All processes share the work and return the same numbers.
    """
    training, size = model.training, model.config.image_size
    model.eval()
    captions = [(i, text) for i in range(len(source)) for text in source.captions(i)]
    image, text = [], []
    for numbers in shard(len(source), batch):
        pixels = torch.stack([data.to_tensor(data.resize(data.read_or_refuse(source, i), size)) for i in numbers])
        image.append(model.embed_image(pixels.to(device)))
    for numbers in shard(len(captions), batch):
        ids, mask = (torch.stack(parts) for parts in zip(*(words.encode(captions[n][1])[:2] for n in numbers)))
        T = data.cut(mask)
        text.append(model.embed_text(ids[:, :T].to(device), mask[:, :T].to(device)))
    image = losses.gather(torch.cat(image))[: len(source)]  # (I, D)
    text = losses.gather(torch.cat(text))[: len(captions)]  # (C, D)
    owners = {}
    for i, caption in captions:
        owners.setdefault(caption if source.by_text else i, []).append(i)
    relevant = torch.zeros(len(source), len(captions), dtype=torch.bool)  # (I, C)
    for n, (i, caption) in enumerate(captions):
        relevant[owners[caption if source.by_text else i], n] = True
    model.train(training)
    with torch.autocast(image.device.type, enabled=False):  # rounded scores would tie
        return retrieval_recall(image @ text.T, relevant.to(device))


def table(results):
    """The numbers of retrieval_recall in two lines."""
    row = lambda way: " ".join(f"R@{k} {results[f'{way}@{k}']:5.1f}" for k in (1, 5, 10))
    return f"text retrieval  {row('TR')}\nimage retrieval {row('IR')}   mean of the six {results['mean']:.1f}"


# ---- The command -----------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """A checkpoint of this project → (its content, Config, tokenizer). UserError if it is none."""
    content = runtime.load(path)
    try:
        config = Config(**content["config"])
    except (TypeError, ValueError) as error:
        raise runtime.UserError(f"{path}: its architecture is not one of this version: {error}") from None
    return content, config, data.tokenizer_from_json(content["tokenizer"], path)


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("--task", choices=["retrieval"], default="retrieval")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="any checkpoint of this project")
    parser.add_argument("--data", nargs="+", default=["shapes"], metavar="DIR", help='folders, or "shapes" (default)')
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise runtime.UserError("--batch-size must be at least 1")
    here = runtime.Runtime(args.amp)
    content, config, tokenizer = read_checkpoint(args.checkpoint)
    model = VLMo(config)
    runtime.load_weights(model, content["model"], args.checkpoint)
    model.to(here.device)
    words = data.Words(tokenizer, config.max_text_len)
    source = data.read_sources(args.data, args.split, config.image_size)
    with here.autocast():
        results = retrieval(model, source, words, here.device, args.batch_size)
    captions = sum(len(source.captions(i)) for i in range(len(source)))
    here.print(f"{args.split}: {len(source)} images, {captions} captions\n{table(results)}")
    here.print(json.dumps({name: round(value, 2) for name, value in results.items()}))


if __name__ == "__main__":
    runtime.run(main, data.DataError)
