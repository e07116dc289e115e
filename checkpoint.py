"""Checkpoints: what the file holds, saving and reading it, resuming a run, and beginning another
model from it.

Tensors come in *groups*, which are learned, saved and taken as a whole: a module of the trunk or a
head by its name; of the blocks, one modality's experts, or the norms, …, of all layers together
("blocks.*.experts.language"). What a stage has not learned of OPTIONAL is not in its checkpoint, so
that a later stage knows what must start in another way.
"""

import collections
import dataclasses
import itertools
import json
import pickle
import shutil
import struct
import textwrap
import zipfile
import zlib
from pathlib import Path

import torch

import runtime
from mome import Config, VLMo
from positions import fitted
from reading import malformed, parse_json, read_text
from runtime import UserError
from texts import Words, tokenizer_from_json

MODALITIES = ("shared", "vision", "language", "vl")

# What a file may lack, because its stage did not learn it. The rest of the trunk is in every file.
OPTIONAL = {
    "words", "text_norm", "text_position", "itc_image", "itc_text", "logit_scale", "pooler", "itm_head", "mlm_head",
    "blocks.*.experts.language", "blocks.*.experts.vl", "blocks.*.attention.language",
}  # fmt: skip


def group(name):
    """The group of a tensor by its name in the state dict."""
    first, *rest = name.split(".")
    if first != "blocks":
        return first
    modality = [part for part in rest if part in MODALITIES]
    return ".".join(["blocks.*", rest[1], *modality])


def groups(names):
    """Names of tensors → their groups, each once, in order."""
    return list(dict.fromkeys(map(group, names)))


def trainable(model):
    """The groups that train now."""
    return groups(name for name, p in model.named_parameters() if p.requires_grad)


# ---- The file ------------------------------------------------------------------------------------

# Settings that do not change what a resumed run learns (another number of processes or parts: but for
# rounding, drop-path, the draw of negatives, and the dVAE's draw of codes and use of its codebook)
HARMLESS = {"out", "save_every", "log_every", "eval_every", "keep_previous", "workers", "compile", "recompute"}
HARMLESS |= {"processes", "accumulate"}

DAMAGED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError)
DAMAGED += (pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error)  # what broken files raise


class Checkpoint:
    """A checkpoint in memory. UserError if the content is not one of this project and version.

    stage: the stage or task that wrote it. step, args: of its run, see settings(). config: a
    Config, or of stage dvae the fields of its own. tensors, head: of the model and of what later
    stages leave behind. tokenizer: or None. extra: what the stage keeps besides, such as the
    answers of VQA. resumed: whether the run goes on, or another one begins from it.
    """

    def __init__(self, path, content, resumed=False):
        self.path, self.resumed = Path(path), resumed
        try:
            self.stage, self.step, self.args = content["stage"], content["step"], content["args"]
            self.tensors, self.head, self.extra = content["model"], content["head"], content["extra"]
            self.config = content["config"] if self.stage == "dvae" else Config(**content["config"])
            self.record = content.get("record")
            self.optimizer, self.scaler = content.get("optimizer"), content.get("scaler")
            pieces = content["tokenizer"]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a checkpoint of this project and version: {error}") from None
        self.tokenizer = tokenizer_from_json(pieces, path) if pieces else None
        self.words_embedded = len(self.tensors.get("words.weight", ()))  # 0: no words have been learned

    def require(self, names):
        """UserError if one of these groups has not been learned."""
        if self.stage == "dvae":
            raise UserError(f"{self.path} is a tokenizer of images (stage dvae), no VLMo")
        for name in names:
            if name not in groups(self.tensors):
                raise UserError(f"{self.path} (stage {self.stage}) has not learned {name}")

    def require_vocabulary(self):
        """UserError if it has learned words that it does not know."""
        if self.words_embedded and not self.tokenizer:
            raise UserError(f"{self.path} was imported without its vocabulary: import it again, with --vocab")

    def restore(self, stage, args, run, optimizer, scaler):
        """Puts optimizer and scaler where the checkpoint left them. UserError for other settings."""
        factors = [group["factor"] for group in optimizer.param_groups]
        try:
            assert all(stage.origin.get(name, "taken") == "taken" for name in trainable(stage.model))
            optimizer.load_state_dict(self.optimizer)
            if self.scaler and scaler.is_enabled():
                scaler.load_state_dict(self.scaler)
        except (AssertionError, KeyError, ValueError, TypeError, AttributeError):
            advice = "resume with the flags that it was trained with, or start from it with --init"
            raise UserError(f"{self.path} holds no run that can be continued like this: {advice}") from None
        # load_state_dict has brought back the old --head-factor; this run may have another
        for group, factor in zip(optimizer.param_groups, factors):
            group["factor"] = factor
        if args.steps < self.step:
            raise UserError(f"{self.path} is at step {self.step}, beyond --steps {args.steps}")
        changed = changes(self.args, settings(stage, args, run)["args"])
        told = ", ".join(changed.values())
        # Local negatives depend on how many pairs each process has
        harmless = HARMLESS - {"processes"} if stage.negatives == "local" else HARMLESS
        if changed.keys() - harmless and not args.allow_changes:
            advice = "change them back, or give --allow-changes"
            raise UserError(f"{self.path} was trained with other settings ({told}): {advice}")
        run.print(f"resuming after step {self.step}{f' with other settings: {told}' if told else ''}")

    def give(self, stage, run):
        """Gives a stage the tensors of another step of its own run."""
        stage.model.load_state_dict(stage.model.state_dict() | self.tensors)
        stage.head.load_state_dict(self.head)
        run.print(f"{self.path} is from step {self.step}, the best on split val")

    def release(self):
        """Forgets the tensors: the model has them, or copies of them."""
        self.tensors = self.head = self.extra = self.optimizer = None


def load(path, mmap=False):
    """What torch.save wrote to a file. UserError if the file is missing, has changed since, or
    holds more than tensors and plain values: reading other objects could run any code.

    Its archive has a CRC of each part, which torch.load does not look at. mmap: maps the file into
    memory instead of copying it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist, or is a folder")
    archived = zipfile.is_zipfile(path)  # until PyTorch 1.6 it was another format
    try:
        if archived:
            with zipfile.ZipFile(path) as archive:
                packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
                if packed or archive.testzip():  # what is packed cannot be mapped
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and archived)
    except DAMAGED:
        previous = Path(path).with_name("previous.pt")
        advice = f"; {previous} is the one before it" if previous.exists() else ""
        raise UserError(f"{path} is damaged, or holds more than tensors{advice}") from None


def read(path, resumed=False):
    """The checkpoint in a file. UserError if it cannot be loaded, or is none of this project."""
    return Checkpoint(path, load(path), resumed)


def save(path, stage, args, run, step, record, optimizer=None, scaler=None):
    """Writes a checkpoint, on process 0: settings, what was learned, what a resumed run needs."""
    if not run.main:
        return
    # Groups that train, that were learned before, and that every file has
    kept = set(groups(stage.model.state_dict())) - OPTIONAL
    kept.update(trainable(stage.model))
    kept.update(name for name, how in stage.origin.items() if how in ("taken", "resampled"))
    content = settings(stage, args, run) | {
        "step": step,
        "record": record,
        "model": {name: t for name, t in stage.model.state_dict().items() if group(name) in kept},
        "head": stage.head.state_dict(),
        "tokenizer": stage.tokenizer.to_str() if stage.tokenizer else None,
        "extra": stage.extra,
    }
    if optimizer:
        content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    if args.keep_previous and path.name == "last.pt" and path.exists():
        shutil.copyfile(path, path.with_name("previous.pt"))
    runtime.write(path, lambda file: torch.save(content, file))


def settings(stage, args, run):
    """What a run is, for last.pt and config.json. Among its args are the number of processes, and
    how many samples each data set has."""
    config = dataclasses.asdict(stage.model.config)
    given = vars(args)
    actual = {name: value for name, value in config.items() if name in given}  # vocab_size follows the data
    counts = {"processes": run.world, "samples": [len(data_set) for data_set in stage.samples]}
    return {"stage": args.stage, "args": given | actual | counts, "config": config}


def changes(before, now):
    """{name: "--name old → new"} of args of settings() that differ."""
    found = {}
    for name, new in now.items():
        old = before.get(name, new)
        if new != old and name not in ("resume", "allow_changes"):
            flag = name if name in ("processes", "samples") else f"--{name.replace('_', '-')}"
            found[name] = f"{flag} {old} → {new}"
    return found


def refuse_another_run(path, now):
    """UserError if the run of a config.json was begun with other settings than `now`."""
    if path.exists():
        with malformed(path):
            changed = changes(parse_json(read_text(path), path)["args"], now)
        if told := ", ".join(changed[name] for name in changed if name not in HARMLESS):
            raise UserError(f"{path.parent} has no last.pt yet: repeat the whole command of its run ({told})")


def prepare(stage, args, run, resumed):
    """Makes the folder of a run, and writes config.json. An earlier run in it is moved aside,
    unless it is resumed. → its path. UserError, before that, if there is nothing to measure, or
    nothing to resume but a run with other settings, which was killed before its first last.pt."""
    if args.eval_every and "val" not in stage.measured():
        raise UserError("--eval-every needs a val split, and something that can be measured on it")
    out = Path(args.out)
    written = json.dumps(settings(stage, args, run), indent=2) + "\n"
    if args.resume and not resumed:
        run.from_main(lambda: refuse_another_run(out / "config.json", json.loads(written)["args"]))
    if not run.main:
        return out
    if not resumed and (out / "last.pt").exists():
        names = (Path(f"{out.resolve()}.{n}") for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        out.resolve().rename(aside)
        run.print(f"{out} held a run: moved to {aside.name} next to it (--resume would have continued it)")
    out.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link
    runtime.write(out / "config.json", lambda file: file.write(written.encode()))
    return out


# ---- Beginning another model ---------------------------------------------------------------------

# Fields that must be equal: no tensor can be converted between their values (LayerScale: with or
# without).
FIXED = ("dim", "layers", "heads", "patch_size", "position", "layer_scale")


def begin(config, start, seed, fresh=(), copies=True):
    """A model of this Config with what a checkpoint has learned, except groups in `fresh` → VLMo,
    origin.

    copies: whether experts that it lacks start from the vision experts, or from random weights;
    attention always starts from the image's. origin: {group: how it came}, empty without a
    checkpoint (see fit).
    """
    runtime.seed_all(seed)
    model = VLMo(config)
    if start is None:
        return model, {}
    tensors = {name: tensor for name, tensor in start.tensors.items() if group(name) not in fresh}
    return model, fit(model, tensors, start.config, start.path, copies)


def fit(model, tensors, config, path, copies=True):
    """Gives the model what another checkpoint learned (its tensors, not copies of them, and its
    Config) → {group: how}.

    how is "taken"; "resampled", for positions at another resolution or text length; "converted",
    for vision experts that become shared ones, or shared attention that becomes that of the image,
    or the reverse; "copied", for experts (and separate attention) of language and vl that the file
    lacks, which start from the vision ones (Table 4); or "fresh", left as they are. UserError where
    the architectures differ, or the file lacks or has a tensor that it should not.
    """
    # Architectures between which no tensor can be converted
    old, new = dataclasses.asdict(config), dataclasses.asdict(model.config)
    for name in FIXED:
        both_scaled = name == "layer_scale" and old[name] and new[name]
        if old[name] != new[name] and not both_scaled:
            advice = "leave out the flags of the architecture, or start from another file"
            raise UserError(f"{path} has {name} {old[name]}, and this run {new[name]}: {advice}")

    # Each tensor of the model from that of the file, or from the vision expert's, or as it is
    own, how, state = model.state_dict(), {}, {}
    renamed = counterparts(tensors, own)
    converted = renamed.keys() - tensors.keys()
    tensors = renamed
    present = set(groups(tensors))
    for name, tensor in own.items():
        # What a language or vl tensor starts from
        vision = name.replace(".language.", ".vision.").replace(".vl.", ".vision.")
        if name in tensors:
            state[name], same = fitted(name, tensors[name], config, tensor, model.config)
            how[group(name)] = "taken" if same else "resampled"
            if name in converted:
                how[group(name)] = "converted"
        elif group(name) in present or group(name) not in OPTIONAL:
            raise UserError(f"{path} lacks {name}")
        elif vision in tensors and (copies or ".attention." in name):
            state[name] = tensor if tensor.is_meta else tensors[vision].clone()  # meta: see weights.build
            how[group(name)] = "copied"
        else:
            state[name] = tensor
            how[group(name)] = "fresh"
        if state[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}")

    # And nothing of the file may be left over
    for name in tensors:
        if name not in own:
            differ = "is --vl-layers, --experts or --attention another?"
            raise UserError(f"{path} has {name}, and this model does not: {differ}")
    model.load_state_dict(state, assign=True)
    return how


def load_model(path, needs=()):
    """A checkpoint to use from Python, a path or what read() has read → its VLMo in eval mode, its
    Words (None if it has learned no words), its Config.

    needs: what must have been learned, such as "itc_image", "itc_text", "itm_head"; UserError if
    something has not. Heads and embeddings that have not been learned are left out, so that to use
    one is an AttributeError, not a random number.
    """
    start = path if isinstance(path, Checkpoint) else read(path)
    start.require(needs)
    start.require_vocabulary()
    model, origin = begin(start.config, start, seed=0)
    for name, how in origin.items():
        if how == "fresh" and not name.startswith("blocks"):
            delattr(model, name)
    words = Words(start.tokenizer, start.config.max_text_len) if start.words_embedded else None
    return model.eval(), words, start.config


def counterparts(tensors, own):
    """A file's tensors by the names of a model, which may have as shared what the file has for
    vision, or the reverse (Tables 5 and 7)."""
    renamed = {}
    for name, tensor in tensors.items():
        names = name, name.replace(".vision.", ".shared."), name.replace(".shared.", ".vision.")
        known = [one for one in names if one in own]
        renamed[known[0] if known else name] = tensor
    return renamed


def load_exactly(module, tensors, path):
    """Loads a state dict of exactly this module's names and shapes; UserError for any other."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            in_file, in_model = found.get(name, "missing"), wanted.get(name, "missing")
            raise UserError(f"{path}: {name} is {in_file} in the file and {in_model} in the model")
    module.load_state_dict(tensors)


def with_sizes(origin, model):
    """{group: how} → {group: (how, number of parameters)}."""
    parameters = collections.Counter()
    for name, tensor in model.state_dict().items():
        parameters[group(name)] += tensor.numel()
    return {name: (how, parameters[name]) for name, how in origin.items()}


def report(rows):
    """{name: (how, number of parameters)} as a table for the user."""
    lines = []
    for what in dict.fromkeys(how for how, _ in rows.values()):
        names = [name for name, (how, _) in rows.items() if how == what]
        start = f"  {what:9} {sum(rows[name][1] for name in names) / 1e6:6.1f} M  "
        lines += textwrap.wrap(", ".join(names), 118, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)
