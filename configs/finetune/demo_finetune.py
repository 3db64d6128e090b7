"""Demo, stage 2: the captioner of stage 1 learns to answer questions.

    llava-tune finetune demo_finetune --model.init-from work_dirs/demo/pretrain/checkpoint-N

`llava-tune demo` makes the files that this config names (LLAVA_TUNE_DEMO is their folder) and runs this command.
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
        data_path=f"{demo}/data/train.json",
        image_folder=f"{demo}/data/images",
        template="internlm2_chat",
        max_length=256,
        num_workers=0,
    ),
    optimizer=Optimizer(
        learning_rate=7e-4,
        vision_learning_rate=1e-4,
        projector_learning_rate=2e-4,
        weight_decay=0.05,
        warmup_ratio=0.05,
    ),
    training=Training(global_batch_size=32, micro_batch_size=32, epochs=4, save_steps=100_000, logging_steps=10),
    preview=Preview(
        every_steps=250,
        images=(f"{demo}/data/images/00000.png",),
        questions=("What shape is in the image?", "Where is the shape?"),
        max_new_tokens=8,
    ),
    work_dir=f"{demo}/finetune",
)
