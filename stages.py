"""VLMo's stages of pre-training: image, text, vision-language (Sections 3.3 and 3.4, Appendix B).

Shape letters: b local batch, W processes, B = W·b global batch, T text tokens, N patches, D dim, K
codes, M masked tokens.
"""

import functools
import math
import random

import torch
import torch.nn.functional as F

import checkpoint
import data
import dvae
import losses
import sources
import texts
from images import mask_blocks
from loader import to_device, with_counts
from mome import MIMHead
from retrieval import retrieval, retrieval_sheet
from runtime import UserError, seed_all
from stage import Stage, config_flags, masked_words, percent, perplexity, weight_flag

# ---- Stage image ---------------------------------------------------------------------------------


class Image(Stage):
    """Masked image modeling: predicts the visual tokens of hidden patches (Section 3.4, as in
    BEiT). What an image passes through is trained: patch embedding, attention, vision experts."""

    unit, betas, weight_decay, decay = "images", (0.9, 0.999), 0.05, "cosine"
    recipe = {
        "tiny": dict(batch_size=64, steps=600, warmup=60, lr=1e-3, clip=1.0, save_every=100),
        # BEiT's paper: 800 epochs of ImageNet-1k, 10 of them warm-up
        "base": dict(batch_size=2048, steps=500_000, warmup=6250, lr=1.5e-3, clip=3.0),
    }

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("stage image")
        usual = "the tokenizer (default: the one --init was trained with, or runs/dvae/last.pt)"
        group.add_argument("--dvae", metavar="FILE", help=usual)
        data.flags(parser, images="crop")
        config_flags(parser, base)

    def __init__(self, args, config, start, run):
        super().__init__()
        self.side, self.loss_weights = config.image_size // config.patch_size, {"mim": 1.0}
        self.sources = sources.read_pictures(args, config.image_size)
        self.model, self.origin = checkpoint.begin(config, start, args.seed)
        self.tokenizer = start.tokenizer if start else None  # of an earlier stage with text

        # A checkpoint of this stage holds its own tokenizer of images, and a head for its codes
        keeps = start and "dvae" in start.extra and (start.resumed or not args.dvae)
        if keeps and start.resumed and args.dvae != start.args["dvae"]:
            raise UserError(f"--dvae: {start.path} must keep the dVAE it was trained with")
        kept = start.extra["dvae"] if keeps else dvae.read(args.dvae or "runs/dvae/last.pt")
        self.dvae = dvae.build(kept)
        if self.dvae.config.grid != self.side:
            sizes = f"--image-size {config.image_size} --patch-size {config.patch_size}"
            found = f"{self.dvae.config.grid} codes per side, not {self.side}"
            raise UserError(f"the dVAE has {found}: train one with {sizes}")
        self.extra = {"dvae": kept}

        seed_all(args.seed, 1)
        self.head = MIMHead(config, self.dvae.config.codes)
        if keeps:
            checkpoint.load_exactly(self.head, start.head, start.path)
        self.samples = [data.Images(self.sources["train"], config.image_size, args, hide=self.hide)]

    def hide(self, rng):
        return mask_blocks(self.side, rng)

    def forward(self, batch):
        """batch: image (b, 3, S, S), hidden (b, N) bool, and what loader.with_counts adds."""
        logits, codes = self.predict(batch)
        labels = codes.flatten()[batch["hidden_at"]]  # (M,)
        return {"mim": losses.masked_token_loss(logits, labels, batch["hidden_count"])}

    def predict(self, batch):
        """→ logits (M, K) of the hidden patches, codes (b, N) of all."""
        image, embedding = batch["image"], self.head.mask_embedding
        codes = self.dvae.encode(image)
        out = self.model.encode_image(image, masked=batch["hidden"], mask_embedding=embedding)
        return self.head(out[:, 1:].flatten(0, 1)[batch["hidden_at"]]), codes

    @torch.no_grad()
    def measure(self, split, device):
        """The model's accuracy (in percent) and perplexity on hidden visual tokens, and the
        accuracy of two guesses: the most frequent of all hidden codes, and the code of the nearest
        visible patch."""
        self.eval()
        source = self.sources[split]
        found = torch.zeros(3, dtype=torch.float64, device=device)  # right, nearest, loss
        used = torch.zeros(self.dvae.config.codes, dtype=torch.float64, device=device)
        shares = data.sample_batches(len(source))
        views = data.pictures(source, shares, self.model.config.image_size, device)
        for numbers, image in zip(shares, views):
            # The same patches are hidden at each measurement
            hidden = torch.stack([self.hide(random.Random(f"mask {i}")) for i in numbers])
            [batch] = with_counts([{"hidden": hidden}])
            batch = to_device(batch, device) | {"image": image}
            logits, codes = self.predict(batch)

            # The model's guesses, and those from the nearest visible patch
            hidden = batch["hidden"]  # (n, N)
            labels, nearest = codes[hidden], nearest_visible(codes, hidden)[hidden]  # (M,)
            right, near = (logits.argmax(1) == labels).sum(), (nearest == labels).sum()
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            found += torch.stack([right, near, loss])
            used += torch.bincount(labels, minlength=len(used))
        right, nearest, loss, *used = losses.over_processes(torch.cat([found, used]))
        masked = sum(used)
        return {
            "accuracy": percent(right, masked),
            "perplexity": perplexity(loss, masked),
            "nearest visible": percent(nearest, masked),
            "most frequent": percent(max(used), masked),
            "masked": round(masked),
        }


def nearest_visible(codes, hidden):
    """For each patch the code of the nearest visible one (the first of equals).
    codes, hidden (n, N) → (n, N)."""
    n, N = codes.shape
    place = torch.arange(N, device=codes.device)
    grid = torch.stack([place // math.isqrt(N), place % math.isqrt(N)], dim=1).float()  # (N, 2)
    distance = torch.cdist(grid, grid).expand(n, N, N)
    distance = distance.masked_fill(hidden[:, None], torch.inf)  # (n, N, N)
    return codes.gather(1, distance.argmin(2))


# ---- Stage text ----------------------------------------------------------------------------------

FRESH = "experts that --init lacks start from random weights, as released, not from the vision expert"


class Text(Stage):
    """Masked language modeling on text only: the language experts are trained, the matrices of
    attention and the vision experts of stage image stay as they are (Section 3.4)."""

    unit = "texts"
    recipe = {
        "tiny": dict(batch_size=64, steps=1000, warmup=75, lr=1e-3, clip=1.0, save_every=100, max_text_len=48),
        "base": dict(batch_size=1024, steps=500_000, warmup=2500, lr=2e-4, max_text_len=196),  # Appendix B
    }
    recipe["large"] = recipe["base"] | dict(steps=200_000)

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("stage text")
        group.add_argument("--fresh-experts", action="store_true", help=FRESH)
        data.flags(parser, text=True)
        config_flags(parser, base)

    def __init__(self, args, config, start, run):
        super().__init__()
        if not start:
            raise UserError("stage text keeps the attention of stage image: name its file with --init")
        if config.experts == "shared":
            raise UserError("stage text trains language experts; --experts shared has none")
        self.loss_weights = {"mlm": 1.0}
        corpus = functools.partial(texts.corpus, args.data)
        self.words, config = texts.vocabulary(args, config, start, run, corpus)
        self.tokenizer = self.words.tokenizer
        self.model, self.origin = checkpoint.begin(config, start, args.seed, copies=not args.fresh_experts)
        self.model.requires_grad_(False)
        for module in language_part(self.model):
            module.requires_grad_(True)
        self.sources = texts.packed(args.data, self.words, args.seed)
        self.samples = [self.sources["train"]]

    def forward(self, batch):
        """batch: masked, labels (b, T) int64, mask (b, T) bool, and what loader.with_counts adds."""
        logits = self.predict(batch)
        return {"mlm": losses.masked_token_loss(logits, batch["masked_labels"], batch["masked_count"])}

    def predict(self, batch):
        """→ logits (M, V) of the masked tokens."""
        out = self.model.encode_text(batch["masked"], batch["mask"])  # (b, T, D)
        return self.model.mlm_head(out.flatten(0, 1)[batch["masked_at"]])

    def measure(self, split, device):
        self.eval()
        return masked_words(self.predict, self.sources[split], self.sources["train"], device)


def language_part(model):
    """The modules and parameters that stage text trains, as released. (Texts do not read the image
    rows of `types` and of the table: with a zero gradient and no weight decay these rows stay.)"""
    yield from (model.words, model.text_norm, model.types, model.norm, model.mlm_head)
    yield model.text_position if model.config.position == "absolute" else model.relative_table
    yield from (block.experts["language"] for block in model.blocks)


# ---- Stage vl ------------------------------------------------------------------------------------


class VL(Stage):
    """Contrast, matching and masked language modeling on image-text pairs (Section 3.3)."""

    of_pairs = {"itc", "itm", "mlm"}  # the losses of forward; MoMo's "mlm" is of plain texts
    recipe = {
        "tiny": dict(batch_size=64, steps=750, warmup=75, lr=1e-3, clip=1.0, save_every=100, max_text_len=24),
        "base": dict(batch_size=1024, steps=200_000, warmup=2500, lr=2e-4, max_text_len=40),  # Section 4.1
    }
    recipe["base_plus"] = recipe["base"] | dict(lr=1e-4)  # released code
    recipe["large"] = recipe["base"] | dict(lr=5e-5)  # Section 4.1

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("stage vl")
        weight_flag(group, "itc", 1.0)
        weight_flag(group, "itm", 1.0)
        weight_flag(group, "mlm", 0.25)
        negatives = "where hard negatives come from: all processes, or this one (Table 6)"
        group.add_argument("--negatives", choices=["global", "local"], default="global", help=negatives)
        group.add_argument("--fresh-experts", action="store_true", help=FRESH)
        data.flags(parser, images="randaugment", text=True)
        config_flags(parser, base)

    def __init__(self, args, config, start, run):
        super().__init__()
        weights = {"itc": args.itc_weight, "itm": args.itm_weight, "mlm": args.mlm_weight}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.loss_weights:
            raise UserError("--itc-weight, --itm-weight and --mlm-weight must not all be 0")
        self.negatives = args.negatives
        self.sources = sources.read_pictures(args, config.image_size, captions=True)
        self.words, config = texts.vocabulary(args, config, start, run, self.corpus)
        self.tokenizer = self.words.tokenizer
        self.model, self.origin = checkpoint.begin(config, start, args.seed, copies=not args.fresh_experts)
        if args.training:
            self.samples = [data.Pairs(self.sources["train"], self.words, config.image_size, args)]

    def measured(self):
        return super().measured() if "itc" in self.loss_weights else []  # only ITC can retrieve

    def note(self, args, run):
        """From how many samples a pair must be told apart."""
        hard = args.batch_size if self.negatives == "global" else args.batch_size // run.world
        contrast = f", {args.batch_size} candidates for contrast" if "itc" in self.loss_weights else ""
        return contrast + (f", {hard} for hard negatives" if "itm" in self.loss_weights else "")

    def forward(self, batch):
        """batch: image (b, 3, S, S); text, masked, labels (b, T) int64; mask (b, T) bool; ids (b, 2)
        int64, as data.Pairs makes them, and what loader.with_counts adds. → {name: scalar}, those of
        the losses in of_pairs that have a weight, and what is logged besides, 1/σ among it."""
        image, text, mask = batch["image"], batch["text"], batch["mask"]
        b, T = text.shape
        out, pairs = {}, []
        wanted = self.loss_weights.keys() & self.of_pairs

        # Image-text contrast: Eq. (3) and (4), and hard negatives. Of a step in parts, look_ahead has
        # compared all pairs
        vectors = self.vectors(batch) if "itc" in wanted else None
        compared = batch["compared"] if "compared" in batch else self.compare(batch, vectors)
        if "itc" in wanted:
            out["itc"], out["scale"] = compared["itc"], vectors[2].detach()
        if "gradients" in compared:  # GradCache: adds 0, whose gradient by x is that of the whole step
            for gradient, x in zip(compared["gradients"], vectors):
                out["itc"] = out["itc"] + (gradient * (x - x.detach())).sum()

        # Pairs for the fusion encoder: masked pairs for MLM; for ITM matched pairs, and each with a
        # wrong image and a wrong text
        if "mlm" in wanted:
            pairs += [(batch["masked"], mask, image)]
        if "itm" in wanted:
            pairs += [(text, mask, image), (text, mask, compared["wrong image"])]
            pairs += [(compared["wrong text"], compared["wrong mask"], image)]
        if not pairs:
            return out

        # All of them in one pass, with texts as long as the longest
        longest = pairs[-1][0].shape[1]  # the wrong texts are as long as the longest of all processes
        text = torch.cat([F.pad(text, (0, longest - text.shape[1])) for text, _, _ in pairs])
        mask = torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for _, mask, _ in pairs])
        image = torch.cat([image for _, _, image in pairs])  # (n, 3, S, S), n = b, 3b or 4b
        states = self.model.encode_pair(text, mask, image, rows=longest)  # (n, longest, D)

        # Masked language modeling on the first b pairs, image-text matching on the last 3b
        if "mlm" in wanted:
            logits = self.model.mlm_head(states[:b, :T].flatten(0, 1)[batch["masked_at"]])  # (M, V)
            out["mlm"] = losses.masked_token_loss(logits, batch["masked_labels"], batch["masked_count"])
        if "itm" in wanted:
            logits = self.model.itm_head(self.model.pool(states[-3 * b :]))  # (3b, 2)
            matched = torch.arange(3 * b, device=logits.device) < b
            exist = torch.cat([matched[:b], compared["image exists"], compared["text exists"]])
            out["itm"] = losses.itm_loss(logits, matched, exist, compared["count"])
            right = (logits.argmax(1) == matched) & exist
            out["itm accuracy"] = right.sum() / exist.sum()
            out["negative probability"] = compared["probability"].mean()
        return out

    def vectors(self, batch):
        """→ image vectors, text vectors (b, D), and 1/σ."""
        image = self.model.embed_image(batch["image"])
        return image, self.model.embed_text(batch["text"], batch["mask"]), self.model.scale()

    def compare(self, batch, vectors):
        """Compares the pairs of all processes: computes the loss of Eq. (4), draws for each pair a wrong
        image and a wrong text (its hard negatives) among all pairs, and fetches them from their owners.

        vectors: as above, of all pairs of this process, or None: all are equally similar. → "itc", the
        loss; "wrong image" (b, 3, S, S), "wrong text", "wrong mask" (b, T), True = real token, with T
        the longest of all processes; "image exists", "text exists" (b,) bool, False where a pair has no
        negative; "probability" (b,), with which they were drawn; "count": how many pairs ITM has.
        """
        if not {"itc", "itm"} & self.loss_weights.keys():
            return {}
        out, same = {}, losses.same_pairs(batch["ids"])  # (b, B): the same picture or caption, no negatives
        i2t = t2i = torch.zeros(same.shape, device=same.device)
        if vectors:
            i2t, t2i = losses.similarities(*vectors)  # (b, B) each
            out["itc"] = losses.itc_loss(i2t, t2i, same)
        if "itm" in self.loss_weights:
            self.seed()
            candidate = losses.candidates(same, self.negatives)  # (b, B) bool
            drawn_image, p_image, out["image exists"] = losses.draw_negatives(t2i, candidate)  # (b,) each
            drawn_text, p_text, out["text exists"] = losses.draw_negatives(i2t, candidate)
            out["probability"] = (p_image + p_text) / 2
            out["count"] = len(same) + out["image exists"].sum() + out["text exists"].sum()
            out["wrong image"] = losses.exchange(batch["image"], drawn_image)
            both = torch.stack([batch["text"], batch["mask"].long()], dim=1)  # (b, 2, T)
            out["wrong text"], wrong_mask = losses.exchange(losses.pad_alike(both), drawn_text).unbind(1)
            out["wrong mask"] = wrong_mask.bool()
        return out

    def look_ahead(self, parts):
        """Compares the pairs of all parts of a step, as GradCache does: contrast and negatives are
        those of one pass, in the memory of a part. The vectors that this takes are computed without
        gradients; forward computes them again with the same drop-path, and gives them the gradients
        found here."""
        if len(parts) == 1 or not {"itc", "itm"} & self.loss_weights.keys():
            return parts
        pairs = [batches[0] for batches in parts]
        vectors = gradients = None
        whole = {name: torch.cat([batch[name] for batch in pairs]) for name in ("image", "text", "mask", "ids")}
        if "itc" in self.loss_weights:
            images, texts = [], []
            for number, batch in enumerate(pairs):
                self.seed(number)
                with torch.no_grad():
                    image, text, scale = self.vectors(batch)
                images.append(image)
                texts.append(text)
            vectors = [x.requires_grad_() for x in (torch.cat(images), torch.cat(texts), scale)]
        compared = self.compare(whole, vectors)
        if "itc" in self.loss_weights:
            with torch.autocast(whole["ids"].device.type, enabled=False):
                gradients = torch.autograd.grad(compared["itc"], vectors)

        # Each part gets its rows. The loop divides by the number of parts: that is undone for vectors, each
        # of which is in one part, and right for 1/σ, which is in all
        out = []
        for number, (batch, *others) in enumerate(parts):
            b = len(batch["ids"])
            rows = slice(number * b, number * b + b)
            ahead = {name: x[rows] if x.dim() else x.detach() for name, x in compared.items()}
            if gradients:
                image, text, scale = gradients
                ahead["gradients"] = [len(parts) * image[rows], len(parts) * text[rows], scale]
            if "count" in ahead:
                ahead["count"] = ahead["count"] / len(parts)
            out.append((batch | {"compared": ahead}, *others))
        return out

    def measure(self, split, device):
        """Zero-shot retrieval."""
        return retrieval(self.model, self.sources[split], self.words, device)

    def draw(self, device):
        """The best pictures for some captions."""
        source = self.sources[self.measured()[-1]]
        return {"retrieval.png": retrieval_sheet(self.model, source, self.words, device)}
