#!/usr/bin/env bash
# Fine-tune a chat model on conversations; only what the assistant says is trained.
# MODEL and CHATS are yours; without them, small ones are made from Python's standard library.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${MODEL:-}" ] && [ -n "${CHATS:-}" ] || python -m examples.inputs
model=${MODEL:-runs/examples/model} chats=${CHATS:-runs/examples/chats.jsonl} out=${OUT:-runs/examples/chat_sft}

# Ids by the model's own chat template; what is longer than a row is cut between turns.
spark-submit spark_jobs/tokenize.py --task chat -i "$chats" -o "$out/tokens" --tokenizer "$model" --max_len 1024 \
    --overwrite
# One seeded order; one conversation in twenty is held out.
spark-submit spark_jobs/shuffle.py -i "$out/tokens" -o "$out/shuffled" --holdout 0.05 --overwrite
# Many conversations to a row of 1,024 tokens; they do not see each other.
spark-submit spark_jobs/repartition.py -i "$out/shuffled" -o "$out/packed" --max_len 1024 --overwrite

deepspeed --num_gpus "${GPUS:-2}" fft/train.py --config examples/chat_sft.yaml --model "$model" \
    --train_data "$out/packed/train" --eval_data "$out/packed/validation" \
    --output_dir "$out/model" --checkpoint "$out/run" "$@"
