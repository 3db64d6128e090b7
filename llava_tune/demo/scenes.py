"""Pictures of one shape, drawn by seed, with captions and questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.paths import write_whole

SIZE = 64
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top left": (18, 18), "top right": (46, 18), "bottom left": (18, 46), "bottom right": (46, 46)}


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    color: str
    place: str


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A 64 x 64 RGB picture of the scene, moved and sized a little at random."""
    paper = rng.randint(225, 255)
    image = Image.new("RGB", (SIZE, SIZE), (paper, paper, paper))
    pen = ImageDraw.Draw(image)
    x, y = (c + rng.randint(-4, 4) for c in PLACES[scene.place])
    r = rng.randint(9, 12)
    fill = COLORS[scene.color]
    if scene.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif scene.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill)
    elif scene.shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    else:
        pen.rectangle((x - r, y - 3, x + r, y + 3), fill)
        pen.rectangle((x - 3, y - r, x + 3, y + r), fill)
    return image


def caption(scene: Scene) -> str:
    """One sentence that says all."""
    return f"A {scene.color} {scene.shape} at the {scene.place}."


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, type): one of each, and a yes-or-no one of each that is yes half of the time."""

    def asked(truth: str, of: Iterable[str]) -> tuple[str, str]:
        name = truth if rng.random() < 0.5 else rng.choice([o for o in of if o != truth])
        return name, "yes" if name == truth else "no"

    shape, is_shape = asked(scene.shape, SHAPES)
    color, is_color = asked(scene.color, COLORS)
    place, is_place = asked(scene.place, PLACES)
    return [
        ("What shape is in the image?", scene.shape, "shape"),
        ("What color is the shape?", scene.color, "color"),
        ("Where is the shape?", scene.place, "place"),
        (f"Is it a {shape}?", is_shape, "yes or no"),
        (f"Is the shape {color}?", is_color, "yes or no"),
        (f"Is the shape at the {place}?", is_place, "yes or no"),
    ]


def write_data(folder: Path, *, train: int, test: int, seed: int) -> None:
    """Draw the pictures and write captions.json, train.json and test.json (LLaVA's format) into `folder`."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"captions": [], "train": [], "test": []}
    for i in range(train + test):
        scene = Scene(rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(PLACES)))
        name = f"{i:05d}.png"
        draw(scene, rng).save(folder / "images" / name)
        asked = questions(scene, rng)
        rng.shuffle(asked)
        if i < train:
            files["captions"].append(_record(i, name, [("Describe the image.", caption(scene))]))
            # Two rounds a record: with all, most answers could be read off an earlier round instead of the image.
            for k in range(0, len(asked), 2):
                rounds = [(q, a) for q, a, _ in asked[k : k + 2]]
                files["train"].append(_record(f"{i}-{k}", name, rounds))
        else:
            files["test"] += [_record(f"{i}-{k}", name, [(q, a)], kind) for k, (q, a, kind) in enumerate(asked)]
    for stem, records in files.items():
        write_whole(folder / f"{stem}.json", json.dumps(records, indent=1))


def _record(identity: int | str, image: str, rounds: list[tuple[str, str]], kind: str | None = None) -> dict[str, Any]:
    messages = []
    for k, (question, answer) in enumerate(rounds):
        messages.append({"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}" if k == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    record: dict[str, Any] = {"id": str(identity), "image": image, "conversations": messages}
    return record | ({"type": kind} if kind else {})
