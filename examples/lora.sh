#!/usr/bin/env bash
# Train an adapter on the packed conversations of chat_sft.sh, merge it into its model, let the result answer.
# MODEL and DATA (a folder with the tables train and validation) are yours.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-runs/examples/model} data=${DATA:-runs/examples/chat_sft/packed} out=${OUT:-runs/examples/lora}

deepspeed --num_gpus "${GPUS:-2}" fft/train.py --config examples/lora.yaml --model "$model" \
    --train_data "$data/train" --eval_data "$data/validation" \
    --output_dir "$out/adapter" --checkpoint "$out/run" --overwrite "$@"

# The adapter is as PEFT writes it; merged, it is an ordinary model for transformers, vLLM or the next training.
python -m fft.checkpoint.convert "$model" "$out/merged" --lora "$out/adapter" --overwrite

# Prompts are continued as they are; this one has the marks of the model's chat template.
printf '%s\n' '{"prompt": "<|im_start|>user\nWhat is Path for?<|im_end|>\n<|im_start|>assistant\n"}' >"$out/prompts.jsonl"
python -m fft.serve.batch_infer --model "$out/merged" --input "$out/prompts.jsonl" --output "$out/answers.jsonl" \
    --max_new_tokens 32 --overwrite
cat "$out/answers.jsonl"
