"""JSON lines to token files: ours on Spark beside datatrove and Hugging Face tokenizers, on the same text.

    python -m benchmarks.tokenize                       # 343 M tokens, all engines: a quarter of an hour on 2 cores
    python -m benchmarks.tokenize --mb 60 --only spark  # a quick look at one

(As a module: run by its path, this file's name would hide the standard library's tokenize from everything.)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.corpus import source_texts, write_corpus
from benchmarks.measure import run_measured
from fft.console import format_table, say
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 32_000
DATATROVE = ("datatrove==0.10.1", "tokenizers==0.23.3", "orjson", "regex", "nltk")
#: The JVM only plans and schedules here: compiling little and collecting garbage simply starts two seconds sooner.
_JVM = ("--driver-memory", "4g", "--driver-java-options", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
#: Bytes of text on which the tokenizer is trained.
_TRAINED_ON = 30_000_000


def main() -> int:
    """Prepare, run each engine once, print the table."""
    args = _parse()
    work = args.work.resolve()
    files = args.cores * 4
    say(f"corpus: {args.mb} MB of Python sources in {files} files")
    text_bytes = write_corpus(work / f"corpus-{args.mb}", args.mb * 1_000_000, files)
    corpus, tokenizer = work / f"corpus-{args.mb}", work / f"tokenizer-{VOCAB_SIZE}"
    if not tokenizer.exists():
        say(f"tokenizer: byte-level BPE of {VOCAB_SIZE:,} entries")
        save_tokenizer(train_tokenizer(_first(_TRAINED_ON), VOCAB_SIZE), tokenizer)
    rows = []
    for name in args.only or ENGINES:
        command, environment, count = ENGINES[name](corpus, tokenizer, work / "out" / name, args.cores, work)
        shutil.rmtree(work / "out" / name, ignore_errors=True)
        (work / "out").mkdir(exist_ok=True)
        say(f"{name} ...")
        cost = run_measured(command, ROOT, {**os.environ, **environment}, work / f"{name}.log")
        tokens = count(work / "out" / name)
        size = sum(f.stat().st_size for f in (work / "out" / name).rglob("*") if f.is_file() and "log" not in f.parts)
        rows.append(
            [
                name,
                tokens,
                cost.seconds,
                round(tokens / cost.seconds),
                cost.seconds * cost.cores,
                cost.cores,
                size / tokens,
                cost.peak_bytes / 2**20,
            ]
        )
    base = next((row[3] for row in rows if row[0] == "datatrove"), None)
    header = ("engine", "tokens", "seconds", "tokens/s", "CPU s", "cores", "bytes/token", "peak MB", "x datatrove")
    print(f"{text_bytes / 1e6:,.0f} MB of text, {args.cores} cores, start-up included")
    print(format_table(header, [[*row, row[3] / base if base else float("nan")] for row in rows]))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mb", type=int, default=1200, help="text in MB; 3.5 of it are about a million tokens")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="kept between runs")
    parser.add_argument("--only", nargs="+", choices=ENGINES, help="default: all")
    return parser.parse_args()


def _first(size: int) -> Iterator[str]:
    for _, text in source_texts():
        yield text
        size -= len(text)
        if size < 0:
            return


Plan = tuple[list[object], dict[str, str], Callable[[Path], int]]


def _spark(corpus: Path, tokenizer: Path, output: Path, cores: int, work: Path) -> Plan:
    command = ["spark-submit", "--master", f"local[{cores}]", *_JVM, "spark_jobs/tokenize.py"]
    return [*command, "-i", corpus, "-o", output, "--tokenizer", tokenizer], {}, _in_parquet


def _spark_writer(corpus: Path, tokenizer: Path, output: Path, cores: int, work: Path) -> Plan:
    command, environment, count = _spark(corpus, tokenizer, output, cores, work)
    return [*command, "--writer", "spark"], environment, count


def _sail(corpus: Path, tokenizer: Path, output: Path, cores: int, work: Path) -> Plan:
    command = [sys.executable, "spark_jobs/tokenize.py", "-i", corpus, "-o", output, "--tokenizer", tokenizer]
    return command, {"FFT_ENGINE": "sail"}, _in_parquet


def _huggingface(corpus: Path, tokenizer: Path, output: Path, cores: int, work: Path) -> Plan:
    command = [sys.executable, "benchmarks/peers/hf_tokenizers.py", corpus, tokenizer, output]
    return command, {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}, _in_parquet


def _datatrove(corpus: Path, tokenizer: Path, output: Path, cores: int, work: Path) -> Plan:
    home = work / "datatrove"
    if not (home / "installed").exists():
        say("installing datatrove in a virtual environment of its own")
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", *DATATROVE], check=True)
        (home / "installed").touch()
    command = [home / "bin" / "python", "benchmarks/peers/datatrove_tokenize.py", corpus, tokenizer, output, cores]
    return command, {}, lambda folder: sum(f.stat().st_size for f in folder.glob("*.ds")) // 2


def _in_parquet(folder: Path) -> int:
    """Tokens of a folder of parquet files, from their footers."""
    manifest = folder / "_fft_manifest.json"
    if manifest.exists():
        return json.loads(manifest.read_text())["tokens"]
    tokens = 0
    for file in folder.glob("*.parquet"):
        metadata = pq.read_metadata(file)
        tokens += sum(metadata.row_group(i).column(0).num_values for i in range(metadata.num_row_groups))
    return tokens


ENGINES = {
    "datatrove": _datatrove,
    "tokenizers": _huggingface,
    "spark": _spark,
    "spark-writer": _spark_writer,
    "sail": _sail,
}

if __name__ == "__main__":
    sys.exit(main())
