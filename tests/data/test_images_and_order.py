"""Preprocessing equals transformers'; bad images are told apart; the order is a pure function."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_tune.data.images import OPENAI_MEAN, BadImage, ImageTransform
from llava_tune.data.order import BatchOrder, Epoch, Share


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (100, 64), (63, 200), (336, 336), (37, 41), (640, 427)])
def test_preprocessing_equals_transformers(size: tuple[int, int], pad: bool) -> None:
    """Bit for bit, so that an exported model sees in any other program what it was trained on."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    settings = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    theirs = LlavaImageProcessor(do_pad=True, **settings) if pad else CLIPImageProcessor(**settings)
    image = noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImageTransform(64, pad_to_square=pad)(image), expected)


def test_preprocessing_is_close_to_open_clips() -> None:
    """open_clip resizes with Pillow, which rounds elsewhere: at most two of 256 levels."""
    from open_clip.transform import image_transform

    image = noise(80, 100)
    difference = ImageTransform(64)(image) - image_transform(64, is_train=False)(image)
    assert difference.abs().max() < 2 / 256 / 0.26


def test_scaled_decoding_reads_a_large_jpeg_at_less_than_its_size(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    smooth.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    smooth.resize((100, 75), Image.Resampling.BICUBIC).save(tmp_path / "small.jpg")
    scaled = ImageTransform(64, scaled_decoding=True)
    with Image.open(tmp_path / "large.jpg") as image:
        found = scaled(image)
        assert image.size == (200, 150)  # an eighth, still more than twice 64
    whole = ImageTransform(64).load(tmp_path, "large.jpg")
    assert not torch.equal(found, whole) and (found - whole).abs().mean() < 0.02
    assert torch.equal(scaled.load(tmp_path, "small.jpg"), ImageTransform(64).load(tmp_path, "small.jpg"))


def test_padding_to_a_square_keeps_everything() -> None:
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    tensor = ImageTransform(50, pad_to_square=True)(image)
    expected = torch.tensor([int(255 * m) / 255 for m in OPENAI_MEAN])
    padded = (tensor[:, 3, 25] * torch.tensor(ImageTransform(50).std)) + torch.tensor(OPENAI_MEAN)
    assert torch.allclose(padded, expected, atol=1e-5)
    assert (tensor[0, 25] > 1.5).all()


def test_bad_images_say_why(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    (tmp_path / "whole.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "outside").symlink_to("/etc")
    Image.new("1", (15_000, 15_000)).save(tmp_path / "bomb.png")
    transform = ImageTransform(32)
    assert transform.load(tmp_path, "whole.jpg").shape == (3, 32, 32)
    for name, why in {
        "cut.jpg": "can't be decoded",
        "empty.jpg": "can't be decoded",
        "text.jpg": "can't be decoded",
        "none.jpg": "no such file",
        "../x.jpg": "leaves the image folder",
        "outside/passwd": "leaves the image folder",
        "/etc/passwd": "absolute",
        "a\0b": "null byte",
        "bomb.png": "pixels",
    }.items():
        with pytest.raises(BadImage, match=why):
            transform.load(tmp_path, name)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1"])
def test_other_kinds_of_images_are_read(tmp_path: Path, mode: str) -> None:
    suffix = "tiff" if mode in ("CMYK", "I;16") else "png"
    Image.new(mode, (40, 50)).save(tmp_path / f"x.{suffix}")
    assert ImageTransform(32).load(tmp_path, f"x.{suffix}").shape == (3, 32, 32)


def order(lengths: np.ndarray, rank: int, ranks: int, micro: int, start: int = 0, steps: int = 40) -> list[list[int]]:
    return list(
        BatchOrder(
            lengths, seed=5, global_batch_size=8, micro_batch_size=micro, group_by_length=True, rank=rank, world_size=ranks,
            start_step=start, total_steps=steps,
        )
    )  # fmt: skip


def test_global_batches_do_not_depend_on_ranks_or_micro_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 100).astype(np.int32)

    def steps(ranks: int, micro: int, start: int = 0) -> list[set[int]]:
        per_rank = [order(lengths, r, ranks, micro, start) for r in range(ranks)]
        accumulation = 8 // (ranks * micro)
        count = len(per_rank[0]) // accumulation
        return [
            {i for rank in per_rank for batch in rank[s * accumulation : (s + 1) * accumulation] for i in batch}
            for s in range(count)
        ]

    reference = steps(1, 8)
    assert len(reference) == 40
    for ranks, micro in ((1, 1), (2, 2), (4, 1), (8, 1)):
        assert steps(ranks, micro) == reference
    assert steps(2, 2, start=17) == reference[17:]


def epoch_order(lengths: np.ndarray, epoch: int, seed: int, batch: int, group: bool) -> np.ndarray:
    shares = [Share(0, len(lengths), len(lengths))]
    found = Epoch(lengths, shares, epoch=epoch, seed=seed, global_batch_size=batch, group_by_length=group)
    return np.stack([found[i] for i in range(len(found))])


def test_an_epoch_has_every_sample_and_little_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 1, 5000).astype(np.int32) + 1
    batches = epoch_order(lengths, 0, 1, 16, True)
    assert set(batches.flat) == set(range(5000))
    assert batches.size - 5000 < 16
    assert not np.array_equal(batches, epoch_order(lengths, 1, 1, 16, True))
    padded = sum(lengths[b].max() * 16 for b in batches)
    naive = sum(lengths[b].max() * 16 for b in epoch_order(lengths, 0, 1, 16, False))
    assert 1 - lengths[batches].sum() / padded < 0.15 < 0.4 < 1 - lengths[batches].sum() / naive


def test_padding_is_isolated_and_never_supervised() -> None:
    from llava_tune.data import Collator, TokenizedSample

    rng = random.Random(0)
    samples = []
    for n in (5, 9):
        ids = np.array([rng.randrange(5, 90) for _ in range(n)], np.int32)
        samples.append(TokenizedSample("x", ids, ids.copy(), []))
    batch = Collator(4, 8)(samples)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0, 0], list(range(9))]
    assert (batch["labels"][0, 5:] == -100).all()
    assert (batch["labels"][:, 0] == -100).all()
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


def test_samples_are_shuffled_by_seed_and_epoch() -> None:
    lengths = np.full(64, 7, np.int32)

    def flat(epoch: int, seed: int) -> list[int]:
        return epoch_order(lengths, epoch, seed, 8, False).flatten().tolist()

    # Batches hold other samples, not the same ones in another order.
    together = [{frozenset(flat(e, s)[i : i + 8]) for i in range(0, 64, 8)} for e, s in ((0, 1), (1, 1), (0, 2))]
    assert not together[0] & together[1]
    assert not together[0] & together[2]
    assert flat(0, 1) == flat(0, 1)


@pytest.mark.parametrize("times", [1, 2])
def test_packed_epochs_follow_one_another_and_a_late_start_is_the_same(times: int) -> None:
    """How many packs an epoch has is counted without making it; a run that starts late must come to the same epochs."""
    lengths = np.random.default_rng(5).integers(3, 200, 500).astype(np.int32)
    shares = [Share(0, 300, 300 * times), Share(300, 500, 200)]

    def order(start: int) -> BatchOrder:
        return BatchOrder(
            lengths, shares=shares, seed=1, global_batch_size=4, micro_batch_size=4, group_by_length=False, pack_length=256,
            start_step=start, total_steps=200,
        )  # fmt: skip

    whole = dict(order(0).steps())
    per_epoch = order(0).steps_per_epoch
    assert per_epoch == len(order(0).epoch(0)) == len(order(0).epoch(1))
    for step in (1, per_epoch - 1, per_epoch, 2 * per_epoch + 3):
        assert dict(order(step).steps()) == {k: v for k, v in whole.items() if k >= step}
    for epoch in (0, 1):
        packs = [pack for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for pack in whole[step]]
        rows = [row for pack in dict.fromkeys(packs) for row in pack]  # type: ignore[union-attr]
        assert sorted(set(rows)) == list(range(500))
        assert all(lengths[list(pack)].sum() <= 256 for pack in packs)  # type: ignore[arg-type]
    assert whole[0] != whole[per_epoch]
