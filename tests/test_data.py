"""Views of images, masks of patches, samples and their order, the loader, unreadable files."""

import functools
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from files import pictures
from PIL import Image

import data
import images
import nlvr2
import shapes
import sources
import texts
from loader import Loader, collate

# ---- Images --------------------------------------------------------------------------------------


def gradient_image(width=60, height=40):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 6 * y, 100 + x + y], -1).astype(np.uint8))


def test_transparency_shows_white_and_no_image_is_unreadable(tmp_path):
    path, image = tmp_path / "a.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (10, 20, 30, 255))
    image.save(path)
    tensor = images.to_tensor(images.read_image(path))
    assert tensor[:, 2, 1].tolist() == [10, 20, 30] and tensor[:, 0, 0].tolist() == [255] * 3
    Image.new("L", (4, 4), 9).save(tmp_path / "b.png", transparency=9)
    assert images.read_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)
    for content in (b"", b"hello", path.read_bytes()[:40]):
        path.write_bytes(content)
        refused(images.read_image, path, error=images.Unreadable)


def test_images_are_seen_as_a_viewer_shows_them(tmp_path):
    """Turned by their EXIF data; values of 16 bit and floats from black to white."""
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = images.read_image(tmp_path / "turned.png")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)
    image.convert("L").save(tmp_path / "turned.tiff", exif=exif)
    assert images.read_image(tmp_path / "turned.tiff").getpixel((1, 0)) == (76, 76, 76)
    ramp = 500 + 10 * np.arange(12).reshape(3, 4)
    for name, kind in (("a.png", np.uint16), ("b.tiff", np.float32), ("c.tiff", np.int32), ("d.tiff", ">u2")):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / name)
        gray = np.asarray(images.read_image(tmp_path / name))[..., 0]
        np.testing.assert_allclose(gray, 255 * np.arange(12).reshape(3, 4) / 11, atol=1)
    Image.fromarray(np.full((2, 2), np.inf, np.float32)).save(tmp_path / "infinite.tiff")
    refused(images.read_image, tmp_path / "infinite.tiff", error=images.Unreadable)


def test_crops_cover_half_to_all_of_the_picture():
    areas = []
    for seed in range(300):
        crop = images.random_resized_crop(gradient_image(), 32, random.Random(seed))
        width, height, _ = np.ptp(np.asarray(crop), (0, 1)) / (4, 6, 1) + 1  # by its colors
        areas.append(width * height / (60 * 40))
    assert 0.42 < min(areas) < 0.6 and 0.85 < max(areas) <= 1.01
    assert images.augment(Image.new("RGB", (1, 500)), 16, random.Random(0)).size == (16, 16)


def test_training_decodes_large_jpeg_files_smaller_and_evaluation_does_not(tmp_path):
    for size, view, decoded in (
        ((640, 480), 224, (320, 240)),  # the smallest crop has 339 pixels a side, 0.76 of 224 at a half
        ((640, 480), 384, (640, 480)),
        ((2048, 1536), 224, (512, 384)),
        ((600, 60), 32, (300, 30)),  # its own side limits it
    ):
        for ending, found in (("jpg", decoded), ("png", size)):
            path = tmp_path / f"image.{ending}"
            gradient_image().resize(size).save(path)
            assert images.read_image(path, view).size == found and images.read_image(path).size == size
    whole, small = images.read_image(path), images.read_image(tmp_path / "image.jpg", 32)
    views = [images.random_resized_crop(image, 32, random.Random(3)) for image in (whole, small)]
    assert np.abs(np.asarray(views[0], int) - np.asarray(views[1], int)).mean() < 3  # of the same place


def test_a_move_by_whole_pixels_is_exact():
    image = gradient_image(64, 64)
    matrix = (1, 0, 7.0, 0, 1, -3.0)
    how = Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    slow = image.transform((64, 64), *how, fillcolor=images.GRAY)
    assert images.affine(image, c=7.0, f=-3.0).tobytes() == slow.tobytes()
    assert images.moved_by(224, 0.7) == 7 and images.moved_by(48, 0.7) == 1.5


def test_every_operation_does_what_its_name_says():
    image, moved = gradient_image(64, 64), {}
    for name, operation in images.OPERATIONS.items():
        moved[name] = np.asarray(operation(image, 0.7, 1)).astype(int)
    before, turned = np.asarray(image).astype(int), moved["rotate"]
    same = [name for name in moved if np.array_equal(moved[name], before)]
    assert same == ["identity"] and len(moved) == 10
    assert moved["translate-x"][10, 20] == pytest.approx(before[10, 22], abs=1)
    assert moved["translate-y"][20, 10] == pytest.approx(before[22, 10], abs=1)
    assert (turned[0, 0] == 128).all() and np.abs(turned[32, 32] - before[32, 32]).max() < 12
    assert moved["brightness"].mean() > before.mean() and moved["auto-contrast"].max() == 255


def test_randaugment_applies_two_operations_and_flipping_is_asked_for(monkeypatch):
    image, strengths = gradient_image(32, 32), []
    flipped = [images.augment(image, 32, random.Random(i), "none", flip=True) for i in range(50)]
    assert 10 < sum(np.array_equal(view, np.asarray(image)[:, ::-1]) for view in flipped) < 40
    assert images.augment(image, 32, random.Random(1), "none").tobytes() == image.tobytes()
    record = lambda image, *strength: strengths.append(strength) or image
    monkeypatch.setattr(images, "OPERATIONS", {"record": record})
    for seed in range(100):
        images.augment(image, 32, random.Random(seed))
    assert len(strengths) == 200 and set(strengths) == {(0.7, 1), (0.7, -1)}


@pytest.mark.parametrize("side, smallest", [(1, 1), (3, 1), (6, 3), (14, 16)])
def test_blockwise_masks_hide_their_share_in_blocks(side, smallest):
    masks = torch.stack([images.mask_blocks(side, random.Random(seed)) for seed in range(400)])
    assert masks.dtype == torch.bool and masks.shape == (400, side * side)
    assert abs(masks.float().mean().item() - 75 / 196) < 0.015 + 0.02 / side
    assert masks.sum(1).max() <= -(-75 * side * side // 196)
    assert masks.any(0).all() and masks.float().mean(0).max() < 0.85  # no patch never, none always
    # Every hidden patch lies in a hidden rectangle of at least `smallest` patches
    hidden = masks[:100].view(100, side, side)
    covered = torch.zeros_like(hidden)
    for h in range(-(-smallest // side), side + 1):
        w = -(-smallest // h)
        for y, x in np.ndindex(side - h + 1, side - w + 1):
            place = (slice(None), slice(y, y + h), slice(x, x + w))
            covered[place] |= hidden[place].all(2).all(1)[:, None, None]
    assert torch.equal(covered, hidden)


# ---- Samples -------------------------------------------------------------------------------------


class Pictures(list):
    """A source of pictures, each 10 brighter than the last; those of `broken` cannot be read."""

    drawn = True

    def __init__(self, count, broken=(), captions=1):
        texts = [[f"picture {i}", f"number {i}"][:captions] for i in range(count)]
        super().__init__(data.Picture("", texts[i], f"item {i}") for i in range(count))
        self.broken = broken

    def caption_ends(self):
        return np.cumsum([len(picture.captions) for picture in self])

    def corpus(self):
        return (caption for picture in self for caption in picture.captions)

    def image(self, i, view=None):
        if i in self.broken:
            raise images.Unreadable(f"{i}.png cannot be read")
        return Image.new("RGB", (9, 9), (10 * i,) * 3)


@pytest.fixture(scope="module")
def words():
    return texts.Words(texts.train_tokenizer(lambda: ["picture 0 1 2 3 4 5 6 7 8 9"], 60), 24)


def options(**changed):
    """The settings of samples and of the loader, and the process that loads."""
    usual = dict(seed=0, no_flip=False, augment=None, batch_size=12, accumulate=2)
    usual |= dict(workers=0, device=torch.device("cpu"), rank=0, world=1)
    return SimpleNamespace(**usual | changed)


def test_samples_are_a_function_of_seed_epoch_and_index(words):
    world, hide = shapes.World("train", 16), functools.partial(images.mask_blocks, 4)
    assert data.Images(world, 16, options()).augmentation == "none"
    assert not data.Images(world, 16, options(augment="crop")).flip  # left and right matter
    world.drawn = False  # from here on it is treated like a folder

    def pairs(**changed):
        return data.Pairs(world, words, 16, options(**changed), hide)

    first = pairs()[2, 5]
    torch.testing.assert_close(first, pairs()[2, 5], rtol=0, atol=0)
    for other in (pairs()[3, 5], pairs()[2, 6], pairs(seed=1)[2, 5]):
        assert not any(torch.equal(first[name], other[name]) for name in ("image", "hidden"))
    assert len(pairs()) == 2 * len(world)
    for number in (6, 7):
        assert pairs()[0, number]["ids"][0] == data.stable_hash(world[3].item)
    assert data.stable_hash("a") == 2340832890917691671  # the same in every run and process
    assert pairs().augmentation == "randaugment" and pairs(augment="none").augmentation == "none"
    assert pairs().flip and not pairs(no_flip=True).flip and not pairs(augment="none").flip
    assert data.Images(world, 16, options()).augmentation == "crop"


def test_an_epoch_has_every_caption_of_every_picture_once(words, capsys):
    source = Pictures(5, captions=2)
    source[1], source[3] = source[1]._replace(captions=["a"]), source[3]._replace(captions=["b"] * 9)
    pairs = data.Pairs(source, words, 8, options())
    found = Counter(pairs[0, number]["ids"][0].item() for number in range(len(pairs)))
    counts = {data.stable_hash(f"item {i}"): n for i, n in enumerate([2, 1, 2, 9, 2])}
    assert found == counts and len(pairs) == 16
    assert pairs[0, 0]["ids"][1] != pairs[0, 1]["ids"][1]
    same = Pictures(4)
    for i, caption in enumerate(["Number 3", "number 3", "number 3 " + 30 * "1 ", "number 3 " + 40 * "1 "]):
        same[i] = same[i]._replace(captions=[caption])
    same.drawn = False
    pairs = data.Pairs(same, words, 8, options())  # captions that are read alike, also because they are cut
    assert "of 4 texts 2 are cut to 24 tokens, 4 have words that" in capsys.readouterr().err
    a, b, c, d = (pairs[0, number]["ids"][1].item() for number in range(4))
    assert a == b != c == d


def test_examples_have_both_images_the_text_and_the_target_of_a_sample(words):
    source, target = nlvr2.WorldStatements("train", 16), lambda record: torch.tensor(7)
    sample = data.Examples(source, words, target, 16, options())[0, 5]  # not augmented
    assert torch.equal(sample["image"], torch.stack(list(map(images.to_tensor, source.image(5)))))
    assert torch.equal(sample["text"], words.encode(source[5].text)[0]) and sample["target"] == 7


def test_an_epoch_has_every_sample_once_for_any_number_of_processes_and_any_start():
    whole = next(iter(data.shuffled_batches(10, 80, 0, 1, 3)))  # eight epochs in one batch
    for epoch in range(8):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == [(epoch, i) for i in range(10)]
    assert [index for _, index in whole[:10]] != [index for _, index in whole[10:20]]
    for world in (1, 2, 3, 12):
        for start in (0, 5):
            orders = [data.shuffled_batches(10, 12 // world, r, world, 3, start) for r in range(world)]
            assert sum(map(next, orders), []) == whole[12 * start : 12 * start + 12]


def test_an_epoch_shuffles_any_number_of_samples():
    for length in (*range(1, 201), 4099, 10**5 + 3):
        order = data.shuffled(np.arange(length), length, (1, 2))
        assert np.array_equal(np.sort(order), np.arange(length))
    few = data.shuffled(np.array([5, 100_002, 5]), length, (1, 2))
    assert few.tolist() == order[[5, 100_002, 5]].tolist()
    for key in ((1, 3), (2, 2), (2, 1)):
        other = data.shuffled(np.arange(length), length, key)
        assert (other == order).sum() < 10  # of 100,003: one is expected


def test_each_sample_and_pair_of_samples_is_equally_often_at_a_place():
    """Pearson's statistic is at most three standard deviations above its mean."""
    for length in (4, 10, 50):
        orders = [data.shuffled(np.arange(length), length, (0, epoch)) for epoch in range(2000)]
        numbers = np.stack(orders)  # (2000, length)
        singles = np.stack([np.bincount(place, minlength=length) for place in numbers.T])
        pairs = np.bincount(numbers[:, 0] * length + numbers[:, 1], minlength=length**2)
        pairs = np.delete(pairs, np.arange(length) * (length + 1))  # no sample comes twice
        for counts in (singles, pairs):
            expected = counts.mean()
            freedom = (length - 1) ** 2 if counts is singles else len(pairs) - 1
            statistic = ((counts - expected) ** 2 / expected).sum()
            assert statistic < freedom + 3 * (2 * freedom) ** 0.5
    distance = np.abs(np.diff(data.shuffled(np.arange(10**5), 10**5, (0, 0))))
    assert distance.mean() == pytest.approx(10**5 / 3, rel=0.02)


def test_batches_are_the_same_for_any_workers_processes_and_start(words, tmp_path):
    source = sources.pictures([pictures(tmp_path, 14)], "train", 8, captions=True)  # workers share its file
    samples = [data.Pairs(source, words, 8, options()), data.Images(source, 8, options())]
    refused(Loader, samples, options(batch_size=16), options())  # more than there are
    load = lambda start=0, **changed: Loader(samples, options(), options(**changed), start)
    loader, halves = load(), [load(rank=rank, world=2) for rank in (0, 1)]
    workers = Loader(samples, options(workers=2), options(), start=1)
    for step in range(3):
        parts, split = next(loader), list(zip(*map(next, halves)))
        assert [[len(batch["image"]) for batch in part] for part in parts] == [[6, 6]] * 2
        for batches, (first, second) in zip(parts, split):
            for batch, *shares in zip(batches, first, second):
                for name in {"image", "text", "ids"} & batch.keys():
                    assert torch.equal(batch[name], torch.cat([share[name] for share in shares]))
        if step:
            torch.testing.assert_close(next(workers), parts, rtol=0, atol=0)


def test_an_unreadable_image_is_named_once_and_the_next_replaces_it(words, capsys):
    pairs = data.Pairs(Pictures(6, broken=(4, 5)), words, 8, options())
    for epoch in range(2):
        sample = pairs[epoch, 4]
        assert sample["unreadable"] == 2 and (sample["image"] == 0).all()
        assert torch.equal(sample["text"], words.encode("picture 0")[0])
    assert capsys.readouterr().err.count("cannot be read") == 2
    target = lambda picture: torch.tensor(int(picture.item[-1]))
    sample = data.Examples(Pictures(3, broken=[0]), None, target, 8, options())[0, 0]
    assert sample["target"] == 1  # of what replaces it
    gone = data.Images(Pictures(3, broken=range(3)), 8, options())  # a disk that is gone
    assert gone[0, 0]["unreadable"] == data.IN_A_ROW
    assert collate([pairs[0, 0], gone[0, 0]])["unreadable"].tolist() == [data.IN_A_ROW]  # also among others


@pytest.mark.parametrize("read, most", [(100, 10), (2000, 20)])
def test_the_loader_stops_at_too_many_unreadable_images(read, most):
    """More than 10 and more than 1 % are too many, and IN_A_ROW in a row."""
    loader, counts = Loader([], options(), options()), torch.zeros(read, dtype=torch.long)
    counts[:most] = data.IN_A_ROW - 1  # a row of broken files counts once for each sample it replaces
    loader.count(counts)
    assert loader.unreadable == most and loader.read == read
    refused(loader.count, counts[:1])
    refused(Loader([], options(), options()).count, counts[:1] + 1)


def test_evaluation_reads_images_in_order_and_stops_at_an_unreadable_one():
    source = Pictures(9, broken=(7,))
    views = data.pictures(source, [[3, 1], [0, 7]], 4, "cpu")
    assert next(views)[:, :, 0, 3].tolist() == [[30] * 3, [10] * 3]
    refused(next, views, error=images.Unreadable)
    source.image = lambda i: (Pictures.image(source, i), Pictures.image(source, i + 1))
    [pairs] = data.pictures(source, [[0, 2]], 4, "cpu")
    assert pairs[:, :, 0, 0, 0].tolist() == [[0, 10], [20, 30]]
