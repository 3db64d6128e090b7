"""Stage 1 of easy-VQA: a small LLaVA drawn at random learns captions made from the answers.

llava-tune pretrain benchmarks/easy_vqa/pretrain.py
"""

import os

from llava_tune.config import Dataset, LanguageModel, Model, Optimizer, Projector, Run, Training, VisionTower

folder = os.environ.get("EASY_VQA", "work_dirs/easy_vqa")

run = Run(
    model=Model(
        llm=LanguageModel(name=f"{folder}/llm", weights="random"),
        vision=VisionTower(name=f"{folder}/vision.json", freeze=False),
        projector=Projector(kind="mlp2x_gelu"),
    ),
    dataset=Dataset(
        data_path=f"{folder}/captions.json",
        image_folder="../shared/data/easy_vqa/images",
        template="internlm2_chat",
        max_length=128,
        num_workers=0,
    ),
    optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.05, warmup_ratio=0.05),
    training=Training(global_batch_size=16, micro_batch_size=16, epochs=20, save_steps=5000, logging_steps=10),
    work_dir=f"{folder}/pretrain",
)
