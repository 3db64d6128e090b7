"""Stage 1: train the projector of CLIP-ViT-L/14-336 + InternLM2-Chat-7B on LLaVA-558K.

    NPROC_PER_NODE=8 llava-tune pretrain \
        llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain --deepspeed deepspeed_zero2

The hyper-parameters of LLaVA-1.5 (arXiv:2310.03744): global batch 256, learning rate 1e-3, cosine, warmup 3 %, one
epoch. Data: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
"""

from llava_tune.config import Dataset, LanguageModel, Model, Optimizer, Projector, Run, Training, VisionTower

data_root = "data/llava_data"

run = Run(
    model=Model(
        llm=LanguageModel(name="internlm/internlm2-chat-7b", freeze=True),
        vision=VisionTower(name="ViT-L-14-336-quickgelu", pretrained="openai", freeze=True),
        projector=Projector(kind="mlp2x_gelu"),
    ),
    dataset=Dataset(
        data_path=f"{data_root}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        image_folder=f"{data_root}/LLaVA-Pretrain/images",
        template="internlm2_chat",
        max_length=2048,
        pad_image_to_square=False,
        offline_processed_text_folder=None,  # set to a folder that `llava-tune prepare` wrote
        num_workers=4,
    ),
    optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.0, warmup_ratio=0.03, schedule="cosine"),
    training=Training(
        global_batch_size=256, micro_batch_size=32, epochs=1, gradient_checkpointing=True, save_steps=500
    ),
)
