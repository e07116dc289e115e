"""The image tokenizer: shapes, its two losses, the same on several processes."""

import math

import pytest
import torch
import torch.distributed as dist

import dvae
import losses

SMALL = dvae.DVAEConfig(grid=3, codes=6, width=8)


def test_codes_go_with_the_cells_of_the_grid():
    torch.manual_seed(0)
    model = dvae.Tokenizer(dvae.DVAEConfig(grid=8, codes=50, width=8))
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    codes = model.encode(image)
    assert codes.shape == (1, 64) and codes.dtype == torch.int64
    other = image.clone()
    other[:, :, 56:, :8] = 255 - other[:, :, 56:, :8]  # the leftmost cell of the lowest row
    logits, other_logits = model(image, 1.0)[2], model(other, 1.0)[2]
    changed = (logits != other_logits).any(-1).view(8, 8)  # a cell sees three to each side
    assert changed[4:, :4].all() and not changed[:4].any() and not changed[:, 4:].any()
    assert torch.equal(logits.argmax(-1), codes)
    decoded = model.decode(codes)
    assert decoded.shape == (1, 3, 64, 64) and not decoded.equal(model.decode(codes.flip(1)))


def test_images_of_any_size_and_kind_are_scaled_to_eight_pixels_a_cell():
    model = dvae.Tokenizer(SMALL)
    image = torch.full((2, 3, 48, 48), 255, dtype=torch.uint8)
    image[:, :, :, 24:] = 0
    pixels = model.pixels(image)
    assert pixels.shape == (2, 3, 24, 24)
    assert pixels[..., :10].eq(1).all() and pixels[..., 14:].eq(-1).all()
    assert torch.equal(model.pixels(pixels), pixels)  # normalised already, and of the right size


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
    assert [dvae.temperature(progress) for progress in (0, 0.5, 1)] == [1, 1 / 4, 1 / 16]


def gradient():
    """Of both losses on this process's share of six fixed images."""
    torch.manual_seed(0)
    model = dvae.Tokenizer(SMALL).double()
    mine = (torch.rand(6, 3, 24, 24).double() * 2 - 1).chunk(losses.world())[losses.rank()]
    logits = model.encoder(mine).flatten(2).transpose(1, 2)
    reconstruction = model._decode(logits.softmax(-1) @ model.codebook.weight)  # without the draw
    out = dvae.dvae_losses(mine, reconstruction, logits)
    (out["reconstruction"] + out["kl"]).backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    if losses.world() > 1:
        dist.all_reduce(flat)
    return flat / losses.world()


def test_gradient_equals_that_of_one_process(processes):
    one, both = gradient(), processes(2, gradient)[0]
    assert (one - both).norm() <= 1e-6 * one.norm()  # the losses are in float32


def test_training_reconstructs_and_uses_the_codebook():
    torch.manual_seed(0)
    model, palette, errors = dvae.Tokenizer(SMALL), torch.rand(4, 3) * 2 - 1, []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        cells = palette[torch.randint(4, (16, 3, 3))].permute(0, 3, 1, 2)  # (16, 3, G, G)
        image = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
        out = dvae.dvae_losses(*model(image, dvae.temperature(step / 150)))
        (out["reconstruction"] + 0.01 * out["kl"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(out["reconstruction"].item())
    codes = model.encode(image)
    serving, _ = dvae.codebook_use(torch.bincount(codes.flatten(), minlength=6))
    assert serving >= 4 and (model.decode(codes) - image).square().mean() < 0.3 * errors[0]


@pytest.mark.parametrize("fields", [{"grid": 0}, {"codes": 1}, {"width": 0}])
def test_sizes_that_are_none_are_refused(fields):
    with pytest.raises(ValueError):
        dvae.DVAEConfig(**{"grid": 2} | fields)
