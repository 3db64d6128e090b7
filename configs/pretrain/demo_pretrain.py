"""Demo, stage 1: a small LLaVA drawn at random learns captions of shapes (everything is trained: nothing is pretrained).

    llava-tune pretrain demo_pretrain

`llava-tune demo` makes the files that this config names (LLAVA_TUNE_DEMO is their folder).
"""

import os

from llava_tune.config import Dataset, LanguageModel, Model, Optimizer, Preview, Projector, Run, Training, VisionTower

demo = os.environ.get("LLAVA_TUNE_DEMO", "work_dirs/demo")

run = Run(
    model=Model(
        llm=LanguageModel(name=f"{demo}/llm", weights="random"),
        vision=VisionTower(name=f"{demo}/vision.json", freeze=False),
        projector=Projector(kind="mlp2x_gelu"),
    ),
    dataset=Dataset(
        data_path=f"{demo}/data/captions.json",
        image_folder=f"{demo}/data/images",
        template="internlm2_chat",
        max_length=128,
        num_workers=0,
    ),
    optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.05, warmup_ratio=0.05),
    training=Training(global_batch_size=16, micro_batch_size=16, epochs=4, save_steps=100_000, logging_steps=10),
    preview=Preview(
        every_steps=250,
        images=(f"{demo}/data/images/00000.png",),
        questions=("Describe the image.",),
        max_new_tokens=16,
    ),
    work_dir=f"{demo}/pretrain",
)
