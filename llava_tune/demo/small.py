"""A small LLaVA's parts, written as files that a config names: a tokenizer trained on the data, a Llama shape, a tower."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llava_tune.data.records import parse_record
from llava_tune.paths import whole_folder, write_whole

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def texts_of(files: Iterable[Path]) -> list[str]:
    """Every text of LLaVA JSON files, and what the chat template adds."""
    texts = ["user\n", "assistant\n", "system\n"]
    for path in files:
        for k, raw in enumerate(json.loads(path.read_text())):
            for question, answer in parse_record(raw, str(k)).rounds:
                texts += [question, answer]
    return texts


def write_language_model(
    folder: Path, texts: list[str], *, vocab_size: int = 512, width: int = 128, layers: int = 3, heads: int = 4
) -> None:
    """A folder with a byte-level BPE tokenizer trained on `texts` and a Llama config of that size, without weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *CHAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(CHAT_TOKENS),
    )
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=width
        ** -0.5,  # the default 0.02 suits wide models; a narrow one learns nothing for long with it
    )
    if folder.is_dir():
        return
    with whole_folder(folder) as beside:
        tokenizer.save_pretrained(beside)
        config.save_pretrained(beside)


def write_vision_tower(
    path: Path, *, image_size: int = 64, timm_model: str | None = "test_mambaout", patch_size: int = 8
) -> None:
    """An open_clip model config of a small tower: convolutions learn shapes from few images sooner than a plain ViT; with None, a ViT
    as CLIP has, of that patch size, which transformers can open, too."""
    by_timm = {"timm_model_name": timm_model, "timm_pool": "", "timm_proj": "linear"}
    plain = {"layers": 6, "width": 128, "patch_size": patch_size, "head_width": 32}
    config = {
        "embed_dim": 64,
        "quick_gelu": timm_model is None,
        "vision_cfg": {"image_size": image_size, **(plain if timm_model is None else by_timm)},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    write_whole(path, json.dumps(config, indent=1))
