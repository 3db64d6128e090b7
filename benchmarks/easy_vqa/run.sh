#!/usr/bin/env bash
# easy-VQA from raw files to scores with the shipped commands: benchmarks/easy_vqa/run.sh (from the project's root)
set -euo pipefail
source=${1:-../shared/data/easy_vqa}
export EASY_VQA=${2:-work_dirs/easy_vqa}
here=$(dirname "$0")
run() { echo "\$ $*"; "$@"; }
SECONDS=0
run python "$here/make_data.py" "$source" "$EASY_VQA"
run llava-tune prepare "$here/pretrain.py" --save-folder "$EASY_VQA/store-captions"
run llava-tune pretrain "$here/pretrain.py" --dataset.offline-processed-text-folder "$EASY_VQA/store-captions"
run llava-tune prepare "$here/finetune.py" --save-folder "$EASY_VQA/store-train"
first=$(ls -d "$EASY_VQA"/pretrain/checkpoint-* | sort -V | tail -1)
run llava-tune finetune "$here/finetune.py" --dataset.offline-processed-text-folder "$EASY_VQA/store-train" --model.init-from "$first"
last=$(ls -d "$EASY_VQA"/finetune/checkpoint-* | sort -V | tail -1)
run llava-tune evaluate "$last" --data "$EASY_VQA/test.json" --image-folder "$source/images" --batch-size 64 --swap-images
run llava-tune export "$last" "$EASY_VQA/hf" --dtype fp32
run python "$here/pipeline.py" "$EASY_VQA/hf" "$last/answers.jsonl" "$source/images" "${PIPELINE_LIMIT:-400}"
echo "all of it took $SECONDS s"
