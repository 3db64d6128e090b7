"""The vision tower against transformers' CLIP, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_tune.config import VisionTower
from llava_tune.errors import InputError
from llava_tune.model.tokens import image_tokens
from llava_tune.model.vision import build_vision

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 4, "width": 64, "patch_size": 14},
}


def write(path: Path, config: object) -> str:
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    # open_clip's heads are 64 wide by default
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=1, image_size=56, patch_size=14, hidden_act="quick_gelu"
    )  # fmt: skip
    model = CLIPVisionModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_features_equal_transformers_clip(
    tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = build_vision(VisionTower(name=write(tmp_path / "v.json", SMALL), pretrained=str(clip_folder)))
    pixels = torch.randn(3, 3, 56, 56)
    theirs = CLIPVisionModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = tower.eval()(pixels)
    difference = (expected - found).abs().max().item()
    with capsys.disabled():
        print(f"\nvision features, max abs difference from transformers' CLIPVisionModel: {difference:.1e}")
    assert found.shape == (3, 16, 64)
    assert difference < 1e-4


def test_every_weight_gets_a_gradient(tmp_path: Path) -> None:
    for config in (
        SMALL,
        {
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": 64,
                "timm_model_name": "test_convnext2",
                "timm_pool": "",
                "timm_proj": "linear",
            },
        },
    ):
        vision = VisionTower(name=write(tmp_path / "v.json", config), freeze=False)
        tower = build_vision(vision)
        size = config["vision_cfg"]["image_size"]  # type: ignore[index]
        out = tower(torch.randn(2, 3, size, size))
        out.square().sum().backward()
        assert [n for n, p in tower.named_parameters() if p.grad is None] == []
        assert out.shape[1] == tower.tokens == image_tokens(vision)


def test_siglip_from_timm_has_all_its_patches(tmp_path: Path) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    }
    vision = VisionTower(name=write(tmp_path / "v.json", config))
    assert build_vision(vision)(torch.randn(1, 3, 32, 32)).shape[1] == image_tokens(vision) == 4


def test_large_clip_has_576_tokens_without_building_it() -> None:
    assert image_tokens(VisionTower(name="ViT-L-14-336-quickgelu", pretrained="openai")) == 576


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        (VisionTower(name="ViT-L-14-336", pretrained="openai"), "ViT-L-14-336-quickgelu"),
        (VisionTower(name="ViT-L-14-363"), "Near names: ViT-L-14"),
        (VisionTower(name="RN50"), "no patch tokens"),
        (VisionTower(name="/nowhere.json"), "no such file"),
    ],
)
def test_wrong_towers_are_refused(vision: VisionTower, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        image_tokens(vision)


def test_patches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 60}}  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"not a multiple of patch_size 14, so the patches don't fit\. Use 56 or 70"):
        image_tokens(VisionTower(name=write(tmp_path / "v.json", config)))


def test_weights_of_another_activation_or_shape_are_refused(tmp_path: Path, clip_folder: Path) -> None:
    gelu = write(tmp_path / "gelu.json", {**SMALL, "quick_gelu": False})
    with pytest.raises(InputError, match="quick_gelu"):
        build_vision(VisionTower(name=gelu, pretrained=str(clip_folder)))
    wide = write(tmp_path / "wide.json", {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "width": 128}})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="width"):
        build_vision(VisionTower(name=wide, pretrained=str(clip_folder)))
    with pytest.raises(InputError, match="no such file, no Hugging Face CLIP folder, and no open_clip tag"):
        build_vision(VisionTower(name=wide, pretrained="opanai"))


def test_an_open_clip_file_is_read(tmp_path: Path) -> None:
    import open_clip

    name = write(
        tmp_path / "v.json",
        {**SMALL, "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 1, "layers": 1}},
    )
    open_clip.add_model_config(tmp_path / "v.json")
    whole = open_clip.create_model("v")
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    tower = build_vision(VisionTower(name=name, pretrained=str(tmp_path / "weights.pt")))
    expected = whole.visual.state_dict()
    for key, value in tower.visual.state_dict().items():
        assert torch.equal(value, expected[key])
    assert not [k for k in tower.state_dict() if "text" in k or "token_embedding" in k]
