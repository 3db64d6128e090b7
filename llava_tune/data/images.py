"""Image files to pixel tensors, as CLIP's preprocessing does it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from llava_tune.config import VisionTower
from llava_tune.data.sources.refs import open_reference
from llava_tune.model.shape import image_size, vision_config

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 178_956_970
"""A larger image is refused before it is decoded (Pillow's own limit for a decompression bomb)."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class BadImage(ValueError):
    """An image that can't be used; the message says why."""


@contextmanager
def opened(folder: Path, reference: str) -> Iterator[Image.Image]:
    """An image by its reference (`sources.refs`), not decoded yet; for as long as the block lasts.

    Raises:
        BadImage: missing, outside the folder, not an image, or too large; or decoding it in the block fails.
    """
    try:
        file = open_reference(folder, reference)
        if isinstance(file, Path) and not file.is_file():  # opening a pipe would wait for ever
            raise BadImage("not a file" if file.exists() else "no such file")
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("no such file") from None
    except (ValueError, OSError, KeyError, StopIteration) as error:
        raise BadImage(str(error)) from error
    with _decoding(file) as image:
        yield image


@contextmanager
def _decoding(file: BinaryIO | Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the same
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                yield image
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError) as error:
        raise BadImage(f"can't be decoded: {error}") from error


@dataclass(frozen=True)
class ImageTransform:
    """From a file to float32 [3, size, size], normalised.

    Bit for bit what transformers' CLIPImageProcessor makes of it (with torchvision, its default), so that an export sees what was
    trained on. The shorter side is resized to `size` (bicubic) and the centre is cut out; with `pad_to_square` the image is first
    padded with the mean colour, so that nothing of it is cut off (LLaVA-1.5). With `scaled_decoding` a large JPEG is decoded at a half, a
    quarter or an eighth of its size: several times faster, and no longer bit for bit the same.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    pad_to_square: bool = False
    scaled_decoding: bool = False

    def load(self, folder: Path, relative: str) -> Tensor:
        """
        Raises:
            BadImage: missing, outside the folder, not an image, truncated, or too large.
        """
        with opened(folder, relative) as image:
            return self(image)

    def open(self, path: Path) -> Tensor:
        """The same for a path that is trusted."""
        with _decoding(path) as image:
            return self(image)

    def __call__(self, image: Image.Image) -> Tensor:
        import torch

        if not self.size:
            raise BadImage("the model has no vision tower (model.vision is None)")
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        if self.scaled_decoding:  # JPEG only; still twice as large as needed, so that the resize has what to average
            image.draft(image.mode, (2 * self.size, 2 * self.size))
        rgb = self._square(image.convert("RGB"))
        short = min(rgb.size)
        width, height = (self.size if s == short else int(self.size * s / short) for s in rgb.size)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
        pixels = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = pixels[:, top : top + self.size, left : left + self.size].float()
        mean, std = (255 * torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def _square(self, image: Image.Image) -> Image.Image:
        if not self.pad_to_square or image.width == image.height:
            return image
        side = max(image.size)
        red, green, blue = (int(255 * m) for m in self.mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def image_transform(vision: VisionTower | None, pad_to_square: bool, scaled_decoding: bool = False) -> ImageTransform:
    """The preprocessing that goes with a tower: of its config or its pretrained tag, else OpenAI's; of size 0 without one.

    Raises:
        InputError: see `vision_config`.
    """
    if vision is None:
        return ImageTransform(0)
    config = vision_config(vision)
    known = dict(config.get("preprocess_cfg", {}))
    if not known and vision.pretrained is not None and not vision.name.endswith(".json"):
        import open_clip

        known = open_clip.get_pretrained_cfg(vision.name, vision.pretrained)
    red, green, blue = known.get("mean", OPENAI_MEAN)
    std_red, std_green, std_blue = known.get("std", OPENAI_STD)
    mean, std = (red, green, blue), (std_red, std_green, std_blue)
    return ImageTransform(image_size(config), mean, std, pad_to_square, scaled_decoding)
