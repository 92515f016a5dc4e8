#!/usr/bin/env bash
# Rejection sampling: several answers to each question, and training on those that a check accepts; all of it is tables.
# MODEL and PROMPTS (JSON lines with a key prompt) are yours; the check is accept.py's. Workers may have a Python of
# their own, with vLLM: PYSPARK_PYTHON=.venv-serve/bin/python PYSPARK_DRIVER_PYTHON=.venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${MODEL:-}" ] && [ -n "${PROMPTS:-}" ] || python -m examples.inputs
model=${MODEL:-runs/examples/model} prompts=${PROMPTS:-runs/examples/prompts.jsonl} out=${OUT:-runs/examples/rejection}

# A row an answer. Interrupted, the same command goes on from the parts that are finished.
spark-submit spark_jobs/generate.py -i "$prompts" -o "$out/samples" --model "$model" --n 4 --temperature 0.8 \
    --max_new_tokens 32 --overwrite
# Rows that are not accepted stay in the table of samples.
spark-submit examples/accept.py "$out/samples" "$out/accepted"
# The column messages holds the conversations; their ids are the prompts', so no prompt is in train and validation.
spark-submit spark_jobs/tokenize.py --task chat -i "$out/accepted" -o "$out/tokens" --tokenizer "$model" --overwrite
spark-submit spark_jobs/shuffle.py -i "$out/tokens" -o "$out/shuffled" --holdout 0.05 --overwrite
spark-submit spark_jobs/repartition.py -i "$out/shuffled" -o "$out/packed" --max_len 1024 --overwrite

deepspeed --num_gpus "${GPUS:-2}" fft/train.py --config examples/chat_sft.yaml --model "$model" \
    --train_data "$out/packed/train" --eval_data "$out/packed/validation" \
    --output_dir "$out/model" --checkpoint "$out/run" "$@"
