"""The image tokenizer: shapes, its two losses, the same on several processes."""

import math

import pytest
import torch

import dvae
import losses
from sides import bare

SMALL = dvae.DVAEConfig(grid=3, codes=6, width=8)


def tokenizer():
    """A tokenizer of random weights with several codes, and an image of 8 × 8 cells."""
    torch.manual_seed(0)
    model = dvae.Tokenizer(dvae.DVAEConfig(grid=8, codes=50, width=8))
    model.encoder[-1].bias.data.zero_()
    return model, torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)


def test_codes_and_decoded_pixels_go_with_the_cells_of_the_grid():
    """A cell, here the leftmost of the lowest row, reaches three others to each side."""
    model, image = tokenizer()
    other = image.clone()
    other[:, :, 56:, :8] = 255 - other[:, :, 56:, :8]
    changed = (model(image, 1.0)[2] != model(other, 1.0)[2]).any(-1).view(8, 8)  # of the logits
    assert changed[4:, :4].all() and not changed[:4].any() and not changed[:, 4:].any()

    codes = model.encode(image)
    other = codes.clone()
    other[:, 56] = (other[:, 56] + 1) % 50
    changed = (model.decode(codes) != model.decode(other)).any(1)[0]  # (64, 64)
    assert changed[56:, :8].any() and not changed[:32].any() and not changed[:, 32:].any()


def test_a_certain_draw_is_the_likeliest_code():
    model, image = tokenizer()
    model.encoder[-1].weight.data *= 1e6
    _, reconstruction, logits = model(image, 0.1)
    codes = model.encode(image)
    assert torch.equal(codes, logits.argmax(-1)) and len(codes.unique()) > 2
    torch.testing.assert_close(reconstruction, model.decode(codes))


def test_images_of_any_size_and_kind_are_scaled_to_eight_pixels_a_cell():
    model = dvae.Tokenizer(SMALL)
    for side in (12, 48):
        image = torch.full((2, 3, side, side), 255, dtype=torch.uint8)
        image[:, :, :, side // 2 :] = 0
        pixels = model.pixels(image)
        assert pixels.shape == (2, 3, 24, 24)
        assert pixels[..., :10].eq(1).all() and pixels[..., 14:].eq(-1).all()
        assert torch.equal(model.pixels(pixels), pixels)  # normalised, and of the right size


def test_losses_by_hand():
    """Two cells that choose two of four codes for certain: q(z) = (½, ½, 0, 0), so KL to uniform is
    ln 4 − ln 2. Four cells with a code each: nothing to punish."""
    pixels = torch.zeros(1, 3, 2, 2)
    out = dvae.dvae_losses(pixels, pixels + 0.5, torch.eye(4)[None, :2] * 1e4)
    assert out["reconstruction"].item() == pytest.approx(0.25)
    assert out["kl"].item() == pytest.approx(math.log(2))
    even = dvae.dvae_losses(pixels, pixels, torch.eye(4)[None] * 1e4)
    assert even["kl"].item() == pytest.approx(0, abs=1e-6)
    assert dvae.codebook_use(torch.tensor([5, 5, 0, 0])) == (2, pytest.approx(2.0))


def gradient():
    """Of the use of the codebook, on this process's share of the logits of six images."""
    logits = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0))
    mine = logits.chunk(losses.world())[losses.rank()].requires_grad_()
    dvae.dvae_losses(torch.zeros(1), torch.zeros(1), mine)["kl"].backward()
    return losses.gather(mine.grad) / losses.world()


def test_gradient_equals_that_of_one_process(processes):
    one, two = gradient(), processes(2, gradient)[1]
    torch.testing.assert_close(two, one, atol=1e-7, rtol=1e-5)


def test_the_draw_of_codes_gets_colder_to_a_sixteenth():
    tokenizer, seen = dvae.Tokenizer(dvae.DVAEConfig(2, codes=6, width=8)), []
    tokenizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    stage = bare(dvae.DVAE, tokenizer, steps=4)
    for stage.step in (0, 2, 4):
        stage({"image": torch.zeros(1, 3, 16, 16)})
    assert seen == [1, 1 / 4, 1 / 16]
