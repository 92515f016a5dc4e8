"""JSON lines -> parquet with Hugging Face tokenizers and pyarrow. Arguments: corpus, tokenizer, output."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

_BATCH = 256

if __name__ == "__main__":
    corpus, tokenizer_dir, output = map(Path, sys.argv[1:])
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    output.mkdir(parents=True)
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    for source in sorted(corpus.glob("*.jsonl")):
        with (
            open(source, encoding="utf-8") as lines,
            pq.ParquetWriter(output / f"{source.stem}.parquet", schema) as sink,
        ):
            texts = []
            for line in lines:
                texts.append(json.loads(line)["text"])
                if len(texts) == _BATCH:
                    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
                    sink.write_table(pa.table({"input_ids": [e.ids for e in encoded]}, schema=schema))
                    texts.clear()
            if texts:
                encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
                sink.write_table(pa.table({"input_ids": [e.ids for e in encoded]}, schema=schema))
