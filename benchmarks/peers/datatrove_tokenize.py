"""JSON lines -> datatrove's token files with shuffling. Arguments: corpus, tokenizer, output, workers."""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    corpus, tokenizer_dir, output = map(Path, sys.argv[1:4])
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(corpus), glob_pattern="*.jsonl"),
            DocumentTokenizer(
                output_folder=str(output),
                tokenizer_name_or_path=str(tokenizer_dir / "tokenizer.json"),
                eos_token="<|endoftext|>",
                shuffle_documents=True,
                seed=0,
            ),
        ],
        tasks=len(list(corpus.glob("*.jsonl"))),
        workers=int(sys.argv[4]),
        logging_dir=str(output / "logs"),
    ).run()
