"""The examples of the jobs and of the transforms run, in a folder with a corpus and a tokenizer."""

import doctest
import json

import spark_jobs
from spark_jobs import transforms


def test_examples_of_the_jobs(spark, tokenizer, tmp_path, monkeypatch):
    lines = [{"text": f"a text of number {n} " * (1 + n % 4), "url": f"http://x/{n}"} for n in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    monkeypatch.chdir(tmp_path)
    for module in (spark_jobs, transforms):
        failed, tried = doctest.testmod(module, globs={"spark": spark}, optionflags=doctest.ELLIPSIS)
        assert tried > 4
        assert not failed
