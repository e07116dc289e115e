"""Views of images, masks of patches, samples and their order, the loader, unreadable files."""

import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, max_pool2d, pad

import data
import losses
import nlvr2
import runtime
import shapes
import texts

# ---- Images --------------------------------------------------------------------------------------


def gradient_image(width=60, height=40):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 6 * y, 100 + x + y], -1).astype(np.uint8))


def test_transparency_shows_white_and_no_image_is_unreadable(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    tensor = data.to_tensor(data.read_image(tmp_path / "a.png"))
    assert tensor.shape == (3, 4, 4) and tensor.dtype == torch.uint8
    assert tensor[:, 2, 1].tolist() == [10, 20, 30] and tensor[:, 0, 0].tolist() == [255] * 3
    for content in (b"", b"hello", (tmp_path / "a.png").read_bytes()[:40]):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(data.Unreadable, match="broken.png"):
            data.read_image(tmp_path / "broken.png")


def test_crops_cover_half_to_all_of_the_picture():
    areas = []
    for seed in range(300):
        crop = data.random_resized_crop(gradient_image(), 32, random.Random(seed))
        width, height, _ = np.ptp(np.asarray(crop), (0, 1)) / (4, 6, 1) + 1  # by its colors
        areas.append(width * height / (60 * 40))
    assert 0.42 < min(areas) < 0.6 and 0.85 < max(areas) <= 1.01
    for size in [(1, 1), (1, 500), (500, 1)]:
        assert data.augment(Image.new("RGB", size), 16, random.Random(0)).size == (16, 16)


def test_every_operation_does_what_its_name_says():
    image, moved = gradient_image(64, 64), {}
    for name, operation in data.OPERATIONS.items():
        moved[name] = np.asarray(operation(image, 0.7, 1)).astype(int)
    before, turned = np.asarray(image).astype(int), moved["rotate"]
    same = [name for name in moved if np.array_equal(moved[name], before)]
    assert same == ["identity"] and len(moved) == 10
    assert moved["translate-x"][10, 20] == pytest.approx(before[10, 22], abs=1)
    assert moved["translate-y"][20, 10] == pytest.approx(before[22, 10], abs=1)
    assert (moved["translate-x"][:, -1] == 128).all() and (moved["translate-y"][-1] == 128).all()
    assert (turned[0, 0] == 128).all() and np.abs(turned[32, 32] - before[32, 32]).max() < 12
    assert moved["brightness"].mean() > before.mean() and moved["auto-contrast"].max() == 255


def test_randaugment_applies_two_operations_and_flipping_is_asked_for(monkeypatch):
    image, called = gradient_image(32, 32), []
    flipped = [data.augment(image, 32, random.Random(i), "none", flip=True) for i in range(50)]
    assert 10 < sum(np.array_equal(view, np.asarray(image)[:, ::-1]) for view in flipped) < 40
    assert data.augment(image, 32, random.Random(1), "none").tobytes() == image.tobytes()
    record = lambda name, image, *strength: called.append((name, *strength)) or image
    operations = {name: functools.partial(record, name) for name in "abc"}
    monkeypatch.setattr(data, "OPERATIONS", operations)
    for seed in range(100):
        data.rand_augment(image, random.Random(seed))
    assert len(called) == 200
    assert set(called) == {(name, 0.7, sign) for name in "abc" for sign in (-1, 1)}


@pytest.mark.parametrize("side, smallest", [(1, 1), (3, 1), (6, 3), (14, 16), (24, 47)])
def test_blockwise_masks_hide_their_share_in_blocks(side, smallest):
    masks = torch.stack([data.mask_blocks(side, random.Random(seed)) for seed in range(400)])
    assert masks.dtype == torch.bool and masks.shape == (400, side * side)
    assert abs(masks.float().mean().item() - 75 / 196) < 0.015 + 0.02 / side
    assert masks.sum(1).max() <= -(-75 * side * side // 196)
    assert masks.any(0).all() and masks.float().mean(0).max() < 0.85  # no patch never, none always
    # Every hidden patch lies in a hidden rectangle of at least `smallest` patches
    heights = range(-(-smallest // side), min(side, smallest) + 1)
    hidden = masks[:100].view(100, 1, side, side).float()
    covered = torch.zeros_like(hidden)
    for h, w in [(h, -(-smallest // h)) for h in heights]:
        whole = (avg_pool2d(hidden, (h, w), stride=1) > 1 - 1e-6).float()
        spread = max_pool2d(pad(whole, (w - 1, w - 1, h - 1, h - 1)), (h, w), stride=1)
        covered = torch.maximum(covered, spread)
    assert torch.equal(covered, hidden)


# ---- Samples -------------------------------------------------------------------------------------


class Pictures(list):
    """A source of pictures, each 10 brighter than the last; those of `broken` cannot be read."""

    def __init__(self, count, broken=()):
        super().__init__(data.Picture("", [f"picture {i}"], f"item {i}") for i in range(count))
        self.broken = broken

    def image(self, i):
        if i in self.broken:
            raise data.Unreadable(f"{i}.png cannot be read")
        return Image.new("RGB", (9, 9), (10 * i,) * 3)


@pytest.fixture(scope="module")
def words():
    captions = ["picture 0 1 2 3 4 5 6 7 8 9", *shapes.World("train", 0).corpus()]
    return texts.Words(texts.train_tokenizer(captions, 120), 24)


def options(**changed):
    """The settings of samples and of the loader, and the process that loads."""
    usual = dict(seed=0, flip=False, augment=None, data=["shapes"], batch_size=12, accumulate=2)
    usual |= dict(workers=0, device=torch.device("cpu"), rank=0, world=1)
    return SimpleNamespace(**usual | changed)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_samples_are_a_function_of_seed_epoch_and_index(words):
    world, hide = shapes.World("train", 16), functools.partial(data.mask_blocks, 4)

    def pairs(**changed):
        settings = options(data=["folder"], flip=True, **changed)
        return data.Pairs(world, words, 16, settings, hide)

    first = pairs()[2, 5]
    assert same(first, pairs()[2, 5]) and first["image"].shape == (3, 16, 16)
    for other in (pairs()[3, 5], pairs()[2, 6], pairs(seed=1)[2, 5]):
        assert not torch.equal(first["image"], other["image"])
        assert not torch.equal(first["hidden"], other["hidden"])
    items, captions = zip(*[pairs()[epoch, 3]["ids"].tolist() for epoch in range(20)])
    assert len(set(items)) == 1 and len(set(captions)) == 2  # the two ways to say it
    assert set(captions) == set(map(data.stable_hash, world[3].captions))
    assert data.stable_hash("a") == 2340832890917691671  # the same in every run and process
    assert data.Images(world, 16, options()).augmentation == "none"  # in the built-in world
    assert data.Images(world, 16, options(data=["folder"])).augmentation == "crop"
    assert pairs().augmentation == "randaugment" and pairs(augment="none").augmentation == "none"


def test_examples_have_the_images_text_and_target_of_a_sample(words):
    source, target = nlvr2.WorldStatements("train", 16), lambda record: torch.tensor(7)
    sample = data.Examples(source, words, target, 16, options())[0, 5]
    assert torch.equal(sample["image"], torch.stack(list(map(data.to_tensor, source.image(5)))))
    assert torch.equal(sample["text"], words.encode(source[5].text)[0]) and sample["target"] == 7


def test_an_epoch_has_every_sample_once_for_any_number_of_processes_and_any_start():
    def stream(world, batches, start=0):
        orders = [iter(data.Order(10, 12 // world, r, world, 3, start)) for r in range(world)]
        return [sum((next(order) for order in orders), []) for _ in range(batches)]

    whole = stream(1, 7)
    for world in (1, 2, 3, 12):
        for start in range(4):
            assert stream(world, 3, start) == whole[start : start + 3]
    flat = sum(whole, [])
    assert [epoch for epoch, _ in flat] == [k // 10 for k in range(84)]
    for epoch in range(8):
        assert sorted(index for e, index in flat if e == epoch) == list(range(10))
    assert [index for _, index in flat[:10]] != [index for _, index in flat[10:20]]


def test_batches_are_the_same_for_any_workers_processes_and_start(words):
    pairs = data.Pairs(Pictures(10), words, 8, options())
    samples = [pairs, data.Images(Pictures(7), 8, options())]
    load = lambda start=0, **changed: data.Loader(samples, options(), options(**changed), start)
    loader, halves = load(), [load(rank=rank, world=2) for rank in (0, 1)]
    workers = data.Loader(samples, options(workers=2), options(), start=1)
    for step in range(3):
        batches = next(loader)
        assert [len(batch["image"]) for batch in batches] == [6, 6]
        for batch, *parts in zip(batches, *map(next, halves)):
            assert same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})
        if step:
            assert all(map(same, next(workers), batches))


def test_an_unreadable_image_is_named_once_and_the_next_replaces_it(words, capsys):
    pairs = data.Pairs(Pictures(6, broken=(4, 5)), words, 8, options())
    for epoch in range(2):
        sample = pairs[epoch, 4]
        assert sample["unreadable"] == 2 and (sample["image"] == 0).all()
        assert torch.equal(sample["text"], words.encode("picture 0")[0])
    said = capsys.readouterr().err
    assert said.count("4.png cannot be read") == said.count("5.png cannot be read") == 1
    gone = data.Images(Pictures(3, broken=range(3)), 8, options())  # a disk that is gone
    with pytest.raises(runtime.UserError):
        next(data.Loader([gone], options(), options()))


def test_the_loader_counts_and_stops():
    for read, unreadable, passes in [
        (100, [1] * 10, True),
        (100, [1] * 11, False),  # more than 10, and more than 1 %
        (100, [6, 5], False),
        (2000, [1] * 20, True),  # 1 %
        (2000, [1] * 21, False),
        (20_000, [data.IN_A_ROW - 1], True),
        (20_000, [data.IN_A_ROW], False),
    ]:
        counts = torch.zeros(read, dtype=torch.long)
        counts[: len(unreadable)] = torch.tensor(unreadable)
        loader = data.Loader([], options(), options())
        if passes:
            assert loader.on_device({"unreadable": counts, "x": counts}).keys() == {"x"}
        else:
            with pytest.raises(runtime.UserError):
                loader.on_device({"unreadable": counts})
        assert loader.unreadable == sum(unreadable) and loader.read == read


def test_evaluation_reads_images_in_order_and_stops_at_an_unreadable_one():
    source = Pictures(9, broken=(7,))
    views = data.pictures(source, [[3, 1], [8], [0, 7]], 4, "cpu")
    assert next(views)[:, :, 0, 3].tolist() == [[30] * 3, [10] * 3]
    assert next(views).shape == (1, 3, 4, 4)
    with pytest.raises(data.Unreadable):
        next(views)
    read = source.image
    source.image = lambda i: (read(i), read(i + 1))
    assert next(data.pictures(source, [[0, 2]], 4, "cpu"))[1, :, 0, 0, 0].tolist() == [20, 30]


def test_processes_share_what_an_evaluation_reads(monkeypatch):
    shares = [[[0, 1], [2]], [[3, 4], [5]], [[6, 6], [6]]]  # equally long
    samples = [[[0, 3], [6]], [[1, 4]], [[2, 5]]]  # each once
    monkeypatch.setattr(losses, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(losses, "rank", lambda: rank)
        assert data.shard(7, 2) == shares[rank] and data.sample_batches(7, 2) == samples[rank]
