#!/usr/bin/env bash
# Train on rows of 8,192 tokens, each spread over two ranks; only documents longer than a row are cut.
# MODEL and CORPUS are yours; without them, small ones are made from Python's standard library.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${MODEL:-}" ] && [ -n "${CORPUS:-}" ] || python -m examples.inputs
model=${MODEL:-runs/examples/model} corpus=${CORPUS:-runs/examples/corpus.jsonl} out=${OUT:-runs/examples/long_context}

spark-submit spark_jobs/tokenize.py -i "$corpus" -o "$out/tokens" --tokenizer "$model" --overwrite
spark-submit spark_jobs/shuffle.py -i "$out/tokens" -o "$out/shuffled" --overwrite
spark-submit spark_jobs/repartition.py -i "$out/shuffled" -o "$out/packed" --max_len 8192 --overwrite

deepspeed --num_gpus "${GPUS:-2}" fft/train.py --config examples/long_context.yaml --model "$model" \
    --train_data "$out/packed" --output_dir "$out/model" --overwrite "$@"
