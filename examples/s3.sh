#!/usr/bin/env bash
# Train on tables that lie in an object store; nothing is copied to the nodes.
#
#   TABLES=s3://bucket/packed   a folder with the tables train and validation, or Delta tables: s3://bucket/table@v3
#
# Credentials are found as Amazon's own tools find them: variables, ~/.aws, the role of the machine. The variables:
#   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION
# and, for a server that is not Amazon's:
#   AWS_ENDPOINT_URL=http://host:port
#   AWS_ALLOW_HTTP=true         without TLS
# Every node needs them. gs://, abfs:// and hdfs:// take pyarrow's own variables.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TABLES:?names the folder of the tables, for example s3://bucket/packed}"
model=${MODEL:-runs/examples/model} out=${OUT:-runs/examples/s3}

deepspeed --num_gpus "${GPUS:-2}" fft/train.py --config examples/chat_sft.yaml --model "$model" \
    --train_data "$TABLES/train" --eval_data "$TABLES/validation" \
    --output_dir "$out/model" --checkpoint "$out/run" "$@"
