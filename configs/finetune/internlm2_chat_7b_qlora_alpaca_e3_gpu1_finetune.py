"""Text alone, on one GPU: InternLM2-Chat-7B in 4 bits with LoRA (QLoRA, arXiv:2305.14314) on Alpaca-52K.

    llava-tune finetune internlm2_chat_7b_qlora_alpaca_e3_gpu1_finetune

The hyper-parameters of XTuner's recipe of the same name: rank 64, alpha 16, learning rate 2e-4, batch 16, three epochs. Data: Alpaca's
JSON (instruction, input, output), as in https://huggingface.co/datasets/tatsu-lab/alpaca; its Parquet files do as well.
"""

from llava_tune.config import Dataset, LanguageModel, Lora, Model, Optimizer, Run, Training

run = Run(
    model=Model(
        llm=LanguageModel(
            name="internlm/internlm2-chat-7b",
            freeze=True,
            quantization="nf4",
            lora=Lora(rank=64, alpha=16, dropout=0.1),
        ),
        vision=None,
    ),
    dataset=Dataset(
        data_path="data/alpaca/alpaca_data.json",
        format="alpaca",
        template="internlm2_chat",
        system="Below is an instruction that describes a task. Write a response that appropriately completes the request.\n",
        max_length=2048,
        offline_processed_text_folder=None,  # set to a folder that tools/process_untokenized_datasets.py wrote
    ),
    optimizer=Optimizer(learning_rate=2e-4, weight_decay=0.0, warmup_ratio=0.03, schedule="cosine"),
    training=Training(global_batch_size=16, micro_batch_size=1, epochs=3, gradient_checkpointing=True, save_steps=500),
)
