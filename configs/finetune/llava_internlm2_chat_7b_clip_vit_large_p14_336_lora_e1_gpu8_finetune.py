"""Stage 2: fine-tune the projector in full and InternLM2-Chat-7B with LoRA on LLaVA-665K.

    NPROC_PER_NODE=8 llava-tune finetune \
        llava_internlm2_chat_7b_clip_vit_large_p14_336_lora_e1_gpu8_finetune --deepspeed deepspeed_zero2

The hyper-parameters of LLaVA-1.5 (arXiv:2310.03744): global batch 128, learning rate 2e-4 (adapters) and 2e-5
(projector), cosine, warmup 3 %, one epoch. Set --model.init-from to the checkpoint of stage 1. Data: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
"""

from llava_tune.config import Dataset, LanguageModel, Lora, Model, Optimizer, Projector, Run, Training, VisionTower

data_root = "data/llava_data"

run = Run(
    model=Model(
        llm=LanguageModel(
            name="internlm/internlm2-chat-7b",
            freeze=True,
            lora=Lora(rank=128, alpha=256, dropout=0.05),
        ),
        vision=VisionTower(name="ViT-L-14-336-quickgelu", pretrained="openai", freeze=True),
        projector=Projector(kind="mlp2x_gelu"),
        init_from="work_dirs/llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain/checkpoint-2181",
    ),
    dataset=Dataset(
        data_path=f"{data_root}/LLaVA-Instruct/llava_v1_5_mix665k.json",
        image_folder=f"{data_root}/images",
        template="internlm2_chat",
        max_length=2048,
        pad_image_to_square=True,
        offline_processed_text_folder=None,  # set to a folder that `llava-tune prepare` wrote
        num_workers=4,
    ),
    optimizer=Optimizer(
        learning_rate=2e-4, projector_learning_rate=2e-5, weight_decay=0.0, warmup_ratio=0.03, schedule="cosine"
    ),
    training=Training(
        global_batch_size=128, micro_batch_size=16, epochs=1, gradient_checkpointing=True, save_steps=1000
    ),
)
