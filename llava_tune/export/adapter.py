"""The language model's adapter kept apart: the model without it as transformers opens it, and a folder that peft puts on it."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.hf import write_hf
from llava_tune.export.weights import merge_adapters

BASE, ADAPTER = "base", "adapter"


def write_adapter(answerer: Answerer, folder: Path, dtype: torch.dtype) -> None:
    """Fill BASE (see `write_hf`; 4-bit weights as the numbers that they stand for) and ADAPTER. What the vision tower learnt by
    adapters is merged into it. Afterwards the model itself has no adapters.

    Raises:
        InputError: the language model has no adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    llava = answerer.llava
    lora = answerer.run.model.llm.lora
    if not lora.rank:
        raise InputError(
            "the checkpoint's language model has no adapter (model.llm.lora.rank is 0), so none can be kept apart. Use --format hf"
        )
    found = get_peft_model_state_dict(llava.llm, save_embedding_layers=False)
    inside = "model.language_model" if llava.vision is not None else "model"
    weights = {f"base_model.model.{inside}{name.removeprefix('model')}": w.float() for name, w in found.items()}
    adapter = folder / ADAPTER
    adapter.mkdir()
    save_file({name: w.contiguous().clone() for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    config = llava.llm.peft_config["default"]
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.base_model_name_or_path = None
    # By its whole path: the vision tower has layers of the same names.
    config.target_modules = {
        name.rsplit(".lora_A", 1)[0].removeprefix("base_model.model.") for name in weights if ".lora_A" in name
    }
    config.save_pretrained(adapter)
    if llava.vision is not None:
        merge_adapters(llava.vision)
    merge_adapters(llava.llm, add=False)
    (folder / BASE).mkdir()
    write_hf(answerer, folder / BASE, dtype)
    (folder / "README.md").write_text(_CARD)


_CARD = """# A LLaVA and its adapter, kept apart

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER/base")
model = PeftModel.from_pretrained(model, "FOLDER/adapter")
processor = AutoProcessor.from_pretrained("FOLDER/base")
```

(`AutoModelForCausalLM` and `AutoTokenizer` for a model without images.) `gate.json` says how this was compared with the model it was made
from.
"""
