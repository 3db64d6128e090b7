"""Stage 2 of easy-VQA: the captioner of stage 1 learns to answer the questions.

llava-tune finetune benchmarks/easy_vqa/finetune.py --model.init-from work_dirs/easy_vqa/pretrain/checkpoint-N
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
        data_path=f"{folder}/train.json",
        image_folder="../shared/data/easy_vqa/images",
        template="internlm2_chat",
        max_length=128,
        num_workers=0,
    ),
    optimizer=Optimizer(learning_rate=7e-4, vision_learning_rate=3e-4, weight_decay=0.05, warmup_ratio=0.05),
    training=Training(global_batch_size=32, micro_batch_size=32, epochs=4, save_steps=5000, logging_steps=10),
    work_dir=f"{folder}/finetune",
)
