"""Attention and relevance of words, the pointing game, and what is filled in."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, shaken

import inside
import momo
import shapes
from mome import MIMHead, VLMo
from texts import Words, train_tokenizer

CAPTION = "a small red circle above a large blue star"


def model_of(position="absolute"):
    torch.manual_seed(0)
    config = replace(SMALL, layers=2, heads=2, max_text_len=12, vocab_size=60, position=position)
    return shaken(VLMo(config), 0.3).eval()


@pytest.fixture(scope="module")
def words():
    return Words(train_tokenizer(lambda: [CAPTION] * 20, 60), 12)


def pair(words):
    text, mask = words.encode_all([CAPTION, "a star"])
    return text, mask, torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_attention_that_is_caught_is_that_of_the_fused_kernel(position, words):
    model, inputs = model_of(position), pair(words)
    with torch.no_grad():
        expected = model.encode_pair(*inputs)
        with inside.attention_of(model) as caught:
            torch.testing.assert_close(model.encode_pair(*inputs), expected)
        assert len(caught) == 2 and torch.equal(model.encode_pair(*inputs), expected)
    T = inputs[0].shape[1]
    for layer in caught:
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:3]))
        assert (layer[..., :T].amax((1, 2)) > 0).equal(inputs[1])  # padding is never read
    maps = inside.attention_maps(model, *inputs, [1], [0])
    assert maps.shape == (2, T, 16) and torch.equal(maps, caught[1][:, 0, :T, T + 1 :])


def test_relevance_is_attention_times_gradient_followed_through_the_layers(words):
    """A word at a time, head by head, with the products written out."""
    model, (text, mask, image) = model_of(), pair(words)
    text, mask, image = text[0], mask[0], image[0]
    found = inside.relevance_maps(model, words, text, mask, image)
    for positions in words.words(text):
        masked = text.clone()
        masked[positions] = words.mask
        with inside.attention_of(model) as caught:
            states = model.encode_pair(masked[None], mask[None], image[None])[0]
        logits = model.mlm_head(states[positions])
        gradients = torch.autograd.grad(sum(logits[k, text[p]] for k, p in enumerate(positions)), caught)
        R = torch.eye(len(states))
        for attention, gradient in zip(caught, gradients):
            heads = [(attention[0, h] * gradient[0, h]).clamp(min=0) for h in range(2)]
            R = R + (sum(heads) / 2) @ R
        expected = R[positions, len(text) + 1 :].mean(0).detach()
        for position in positions:
            torch.testing.assert_close(found[position], expected)


def test_maps_that_point_at_things_win_the_game_and_others_lose(words):
    """The first thing is red, the second blue: a map of one of them is right for its own words."""
    words = Words(train_tokenizer(shapes.World("test", 0).corpus, 200), 24)
    config = replace(SMALL, image_size=48)
    world = shapes.World("test", 48)
    things = [inside.patches_inside(world.places(i), config).float() for i in range(10)]  # (things, N) each

    def play(weights, words=words):
        def maps(text, mask, image):
            return next(weights).expand(text.shape[1], -1)

        return inside.pointing_game(maps, words, config, "cpu", count=10)

    found = play(patches[0] for patches in things)
    assert found["color"] == pytest.approx(100 * 10 / sum(map(len, things))) and found["any thing"] == 100
    lost = play(torch.eye(144)[0] for _ in range(10))
    assert lost["all"] == lost["any thing"] == 0
    assert lost["chance"] == pytest.approx(100 * torch.cat(things).mean().item())
    stranger = Words(train_tokenizer(lambda: ["собака"], 60), 24)  # knows none of the words
    assert play((patches[0] for patches in things), stranger) == {}


@pytest.mark.parametrize("normalised", [False, True])
def test_a_perfect_prediction_of_momo_is_the_image_and_what_is_hidden_is_gray(normalised, monkeypatch):
    """In the units of training, normalised per patch or not."""
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    hidden = torch.arange(16)[None] % 4 > 0
    at = hidden.flatten().nonzero()[:, 0]
    values = momo.patch_values(image, at, 4, normalised)
    monkeypatch.setattr(momo, "reconstruct", lambda model, decoder, batch: (values, None))
    decoders = torch.nn.ModuleDict({"image": torch.nn.Identity()})
    monkeypatch.setattr(momo, "read_decoders", lambda start, config: decoders)
    start = SimpleNamespace(extra={}, args={"normalise_pixels": normalised})
    assert torch.equal(inside.reconstructed(start, model_of(), image, hidden), image)
    gray = inside.with_patches(image, hidden, 0.0)
    assert momo.patch_values(gray, at, 4).abs().max() < 0.01


def test_stage_image_fills_in_the_likeliest_codes_in_the_place_of_each(monkeypatch):
    model, decoded, hidden = model_of(), [], torch.arange(16)[None] % 3 == 0
    head, image = shaken(MIMHead(model.config, 8)), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    tokenizer = inside.dvae.Tokenizer(inside.dvae.DVAEConfig(grid=4, codes=8, width=8))
    monkeypatch.setattr(tokenizer, "decode", lambda codes: decoded.append(codes) or torch.zeros(1, 3, 4, 4))
    monkeypatch.setattr(inside.dvae, "build", lambda kept: tokenizer)
    start = SimpleNamespace(extra={"dvae": None}, path="x.pt", head=head.state_dict())
    with torch.no_grad():
        inside.reconstructed(start, model, image, hidden)
        rows = model.encode_image(image, masked=hidden, mask_embedding=head.mask_embedding)[0]
        codes = head(rows[1:]).argmax(1)  # row 0 is [I_CLS]
    assert torch.equal(decoded[0], torch.where(hidden, codes, tokenizer.encode(image)))


@pytest.mark.parametrize(
    "stage, args, known",
    [
        ("momo-image", {}, "image"), ("momo-text", {}, "image text"), ("momo-text", {"no_simultaneous": True}, "text"),
        ("momo-vl", {}, "image pair text"), ("momo-vl", {"no_simultaneous": True}, "image pair"),
        ("momo-all", {}, "image pair text"), ("text", {}, "text"), ("vl", {}, "pair text"),
        ("vl", {"mlm_weight": 0}, ""), ("vqa", {}, ""),
    ],
)  # fmt: skip
def test_a_checkpoint_fills_in_what_its_stage_has_learned(stage, args, known):
    start = SimpleNamespace(stage=stage, args=args, extra={}, tensors=["mlm_head.0.weight"])
    assert inside.fills_in(start) == set(known.split())


def test_guesses_are_the_likeliest_words_in_the_place_of_each(words):
    """Of a VLMo, next to an image and without."""
    model, (text, mask, image) = model_of(), pair(words)
    start = SimpleNamespace(stage="vl")
    text, mask = text[0], mask[0]
    with torch.no_grad():
        for seen in (None, image[:1]):
            found = inside.guesses(start, model, words, text, mask, seen)
            assert " ".join(word for word, _, _ in found) == CAPTION
            for positions, (_, guess, probability) in zip(words.words(text), found):
                masked = text.clone()
                masked[positions] = words.mask
                inputs = (masked[None], mask[None])
                states = model.encode_text(*inputs) if seen is None else model.encode_pair(*inputs, seen)
                best = model.mlm_head(states[0, positions]).softmax(1).max(1)
                assert guess == words.tokenizer.decode(best.indices.tolist())
                assert probability == pytest.approx(math.prod(best.values.tolist()), rel=1e-4)
