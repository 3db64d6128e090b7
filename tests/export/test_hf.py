"""An export computes, in transformers alone, what we compute; and the gate sees when it doesn't."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_tune.evaluate.answer import Answerer
from llava_tune.export.gate import Report, ask_folder, ask_ours, compare, conversations, write_pictures
from llava_tune.export.weights import merge_adapters
from tests.conftest import Finished, Small, losses, wrong_input
from tests.export.conftest import tower, trained
from tests.train.test_coco import write_internlm2

pytestmark = pytest.mark.timeout(400)


def report_of(folder: Path) -> Report:
    facts = json.loads((folder / "gate.json").read_text())
    return Report(**{name: facts[name] for name in Report.__annotations__})


def test_quick_gelu_clip_and_llama(clip: Path, exported: Path, cli: Callable[..., Finished], tmp_path: Path) -> None:
    report = report_of(exported)
    assert report.failures() == [] and report.questions == 7 and report.logits < 1e-3
    assert report.greedy[0] == report.greedy[1] > 7
    assert cli("export", clip, tmp_path / "bf16").code == 0
    assert json.loads((tmp_path / "bf16/gate.json").read_text())["weights"] == "bfloat16"
    assert {str(w.dtype) for w in load_file(tmp_path / "bf16/model.safetensors").values()} == {"torch.bfloat16"}
    assert report_of(tmp_path / "bf16").failures() == []


def test_a_pipeline_that_never_saw_us_gives_our_answers(
    clip: Path, exported: Path, small: Small, tmp_path: Path
) -> None:
    images = sorted(small.images.iterdir())[:3]
    program = tmp_path / "ask.py"
    program.write_text(
        "import json, sys\nfrom transformers import pipeline\n"
        "ask = pipeline('image-text-to-text', model=sys.argv[1], dtype='float32')\nfound = []\n"
        "for image in sys.argv[2:]:\n"
        "    said = [{'role': 'user', 'content': [{'type': 'image', 'path': image}, {'type': 'text', 'text': 'What is this?'}]}]\n"
        "    found.append(ask(text=said, max_new_tokens=20, return_full_text=False)[0]['generated_text'])\n"
        "assert not any(name.startswith('llava_tune') for name in sys.modules)\nprint(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, program, exported, *images], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    theirs = [text.strip() for text in json.loads(done.stdout.splitlines()[-1])]
    answerer = Answerer(clip)
    assert theirs == [answerer.ask("What is this?", [image], 20) for image in images]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_internlm2_with_dora_and_a_linear_projector(
    internlm2_dora: Path, cli: Callable[..., Finished], tmp_path: Path, dtype: str
) -> None:
    """92,544 ids: the image token is number 92,544, and the vocabulary grows."""
    done = cli("export", internlm2_dora, tmp_path / "hf", "--dtype", dtype)
    assert done.code == 0, done.err
    assert report_of(tmp_path / "hf").failures() == []
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["image_token_index"] == 92544 and config["text_config"]["vocab_size"] % 64 == 0
    assert config["text_config"]["model_type"] == "llama" and config["vision_config"]["hidden_act"] == "gelu"


def test_qlora_is_exported_as_what_it_computed(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(small.folder / "llm")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(small.folder / "llm").save_pretrained(tmp_path / "lm")
    tower(tmp_path, quick_gelu=True)
    changes = (
        "v = replace(v, name=tower)\n"
        f"l = LanguageModel(name={str(tmp_path / 'lm')!r}, freeze=True, quantization='nf4', lora=Lora(rank=4, dropout=0.0))"
    )
    checkpoint = trained(small, cli, tmp_path, changes)
    done = cli("export", checkpoint, tmp_path / "hf", "--dtype", "fp32")
    assert done.code == 0, done.err
    assert report_of(tmp_path / "hf").failures() == []


def test_qlora_of_internlm2_on_text_saves_merges_and_evaluates(
    shared: Path, internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    """The Alpaca recipe in small, on this CPU; the merged model is opened as a causal language model."""
    pytest.importorskip("bitsandbytes")
    write_internlm2(tmp_path / "lm")
    config = tmp_path / "alpaca.py"
    config.write_text(
        "from llava_tune.config import *\nrun = Run(\n"
        f"    model=Model(llm=LanguageModel(name={str(tmp_path / 'lm')!r}, tokenizer={str(internlm2_tokenizer)!r}, freeze=True,\n"
        "        quantization='nf4', lora=Lora(rank=8, alpha=16)), vision=None),\n"
        f"    dataset=Dataset(data_path={str(shared / 'alpaca/alpaca_en_demo.json')!r}, max_length=256, num_workers=0),\n"
        "    optimizer=Optimizer(learning_rate=1e-2, warmup_ratio=0.0),\n"
        "    training=Training(global_batch_size=2, max_steps=8, save_steps=100, packing=True))\n"
    )
    done = cli("finetune", config, "--work-dir", tmp_path / "run")
    assert done.code == 0, done.err
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.05
    exported = cli("export", tmp_path / "run/checkpoint-8", tmp_path / "hf", "--dtype", "fp32")
    assert exported.code == 0, exported.err
    assert report_of(tmp_path / "hf").failures() == []
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    questions = tmp_path / "q.json"
    questions.write_text(
        json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]}])
    )
    evaluated = cli("evaluate", tmp_path / "run/checkpoint-8", "--data", questions, "--max-new-tokens", "4")
    assert evaluated.code == 0 and "accuracy" in evaluated.out, evaluated.err


@pytest.mark.slow
def test_siglip_and_padding_to_a_square(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    changes = (
        "v = replace(v, name='ViT-B-16-SigLIP', freeze=True)\nd = replace(d, pad_image_to_square=True, max_length=256)"
    )
    checkpoint = trained(small, cli, tmp_path, changes, "--training.micro-batch-size", "1")
    done = cli("export", checkpoint, tmp_path / "hf", "--dtype", "fp32")
    assert done.code == 0, done.err
    assert report_of(tmp_path / "hf").failures() == []
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    pytest.importorskip("xllamacpp")
    done = cli("export", checkpoint, tmp_path / "gguf", "--format", "gguf", "--dtype", "fp32")
    assert done.code == 0, done.err
    gate = json.loads((tmp_path / "gguf/gate.json").read_text())
    assert gate["class_token"] is None and gate["logprobs"] < 0.01 and gate["greedy"][1] > 7


def test_the_gate_fails_when_anything_is_wrong(clip: Path, exported: Path, tmp_path: Path) -> None:
    asked = conversations(write_pictures(tmp_path))[:1]
    answerer = Answerer(clip)
    ours = [ask_ours(answerer, one) for one in asked]

    def failures(change: Callable[[Path], None]) -> str:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        change(folder)
        image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
        found = compare(ours, ask_folder(folder, asked, tmp_path), image_id, answerer.layout.stop_ids)
        return "; ".join(found.failures())

    def permute(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        name = "language_model.model.layers.1.self_attn.q_proj.weight"
        weights[name] = weights[name][torch.randperm(len(weights[name]))].contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def shift(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("user\\n", "uses\\n"))

    def repaint(folder: Path) -> None:
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        config["image_processor"]["image_mean"][0] += 0.01
        path.write_text(json.dumps(config))
        (folder / "preprocessor_config.json").unlink()

    def other_id(folder: Path) -> None:
        path = folder / "tokenizer.json"
        backend = json.loads(path.read_text())
        vocabulary = backend["model"]["vocab"]
        names = {number: piece for piece, number in vocabulary.items()}
        one = next(names[i] for i in reversed(ours[0].ids.tolist()) if i in names and i > 10)
        other = names[300]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(backend))

    assert failures(lambda folder: None) == ""
    assert "the logits differ by" in failures(permute)
    assert "other token ids" in failures(shift)
    assert "other token ids" in failures(other_id)
    assert "preprocessing differs by 0.037" in failures(repaint)


def test_large_weights_are_written_in_shards_that_transformers_opens(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from transformers import AutoModelForImageTextToText

    from llava_tune.export.hf import save_weights

    split = huggingface_hub.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        huggingface_hub,
        "split_torch_state_dict_into_shards",
        lambda state, max_shard_size: split(state, max_shard_size="200KB"),
    )
    weights = load_file(exported / "model.safetensors")
    shutil.copytree(exported, tmp_path / "s", ignore=shutil.ignore_patterns("*.safetensors"))
    save_weights(weights, tmp_path / "s", torch.float32)
    assert len(list((tmp_path / "s").glob("model-0*.safetensors"))) > 3
    whole, parts = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (exported, tmp_path / "s"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_merged_computes_the_same(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    tower(tmp_path, quick_gelu=True)
    lora = "lora=Lora(rank=4, alpha=64, dropout=0.0, variant='rslora')"
    changes = f"v = replace(v, name=tower, freeze=True, {lora})\nl = replace(l, freeze=True, {lora})"
    answerer = Answerer(trained(small, cli, tmp_path, changes))
    asked = conversations(write_pictures(tmp_path))[0]
    before = ask_ours(answerer, asked).logits
    merge_adapters(answerer.llava)
    assert not any("lora" in name for name in answerer.llava.state_dict())
    after = ask_ours(answerer, asked).logits
    assert np.abs(before - after).max() < 1e-4


def test_what_can_not_be_exported_is_refused(
    small: Small, clip: Path, exported: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    assert "is there already" in wrong_input(cli("export", clip, exported))
    assert "no such file" in wrong_input(cli("export", clip, tmp_path / "x", "--image", tmp_path / "none.jpg"))
    assert "not a llava-tune checkpoint" in wrong_input(cli("export", tmp_path, tmp_path / "x"))
    convolutions = trained(small, cli, tmp_path, "")
    assert "can't be exported: timm's MambaOut is no plain ViT" in wrong_input(
        cli("export", convolutions, tmp_path / "x")
    )
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))
