"""JSON lines to token files: ours on Spark beside datatrove and Hugging Face tokenizers, on the same text.

    python -m benchmarks.tokenize                       # 343 M tokens, all engines: a quarter of an hour on 2 cores
    python -m benchmarks.tokenize --mb 60 --only spark  # a quick look at one
    python -m benchmarks.tokenize --lake s3://bucket/bench --only spark  # on disks, then the same from store to store

(As a module: run by its path, this file's name would hide the standard library's tokenize from everything.)
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.corpus import source_texts, write_corpus
from benchmarks.lake import copied
from benchmarks.measure import run_measured
from fft.console import format_table, say
from fft.data.manifest import read_manifest
from fft.data.storage import Storage
from fft.data.views import files_below, view
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
        rows.append(_measured(name, corpus, tokenizer, args, None))
        if args.lake is not None and name in OF_STORES:
            rows.append(_measured(name, corpus, tokenizer, args, args.lake))
    base = next((row[3] for row in rows if row[0] == "datatrove"), None)
    header = ("engine", "tokens", "seconds", "tokens/s", "CPU s", "cores", "bytes/token", "peak MB", "x datatrove")
    print(f"{text_bytes / 1e6:,.0f} MB of text, {args.cores} cores, start-up included")
    print(format_table(header, [[*row, row[3] / base if base else float("nan")] for row in rows]))
    return 0


def _measured(name: str, corpus: Path, tokenizer: Path, args: argparse.Namespace, lake: str | None) -> list[object]:
    """The row of an engine, from disk to disk or within a lake."""
    work = args.work.resolve()
    output: str | Path = work / "out" / name if lake is None else f"{lake.rstrip('/')}/out-{name}"
    source: str | Path = corpus if lake is None else copied(corpus, lake)
    command, environment, count = ENGINES[name](source, tokenizer, output, args.cores, work)
    Storage.at(output).delete_folder()
    (work / "out").mkdir(exist_ok=True)
    called = name if lake is None else f"{name}, in a store"
    say(f"{called} ...")
    cost = run_measured(command, ROOT, {**os.environ, **environment}, work / f"{name}.log")
    tokens = count(output)
    kept = {path: found.size for path, found in files_below(Storage.at(output)).items()}
    size = sum(size for path, size in kept.items() if "log" not in Path(path).parts)
    rate, cpu, peak = round(tokens / cost.seconds), cost.seconds * cost.cores, cost.peak_bytes / 2**20
    return [called, tokens, cost.seconds, rate, cpu, cost.cores, size / tokens, peak]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mb", type=int, default=1200, help="text in MB; 3.5 of it are about a million tokens")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="kept between runs")
    parser.add_argument("--only", nargs="+", choices=ENGINES, help="default: all")
    parser.add_argument(
        "--lake", metavar="URL", help=f"within a store, too, whose credentials are set: {OF_STORES} can"
    )
    return parser.parse_args()


def _first(size: int) -> Iterator[str]:
    for _, text in source_texts():
        yield text
        size -= len(text)
        if size < 0:
            return


Plan = tuple[list[object], dict[str, str], Callable[[str | Path], int]]


def _spark(corpus: str | Path, tokenizer: Path, output: str | Path, cores: int, work: Path) -> Plan:
    command = ["spark-submit", "--master", f"local[{cores}]", *_JVM, "spark_jobs/tokenize.py"]
    return [*command, "-i", corpus, "-o", output, "--tokenizer", tokenizer], {}, _in_parquet


def _spark_writer(corpus: str | Path, tokenizer: Path, output: str | Path, cores: int, work: Path) -> Plan:
    command, environment, count = _spark(corpus, tokenizer, output, cores, work)
    return [*command, "--writer", "spark"], environment, count


def _sail(corpus: str | Path, tokenizer: Path, output: str | Path, cores: int, work: Path) -> Plan:
    command = [sys.executable, "spark_jobs/tokenize.py", "-i", corpus, "-o", output, "--tokenizer", tokenizer]
    return command, {"FFT_ENGINE": "sail"}, _in_parquet


def _huggingface(corpus: str | Path, tokenizer: Path, output: str | Path, cores: int, work: Path) -> Plan:
    command = [sys.executable, "benchmarks/peers/hf_tokenizers.py", corpus, tokenizer, output]
    return command, {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}, _in_parquet


def _datatrove(corpus: str | Path, tokenizer: Path, output: str | Path, cores: int, work: Path) -> Plan:
    home = work / "datatrove"
    if not (home / "installed").exists():
        say("installing datatrove in a virtual environment of its own")
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", *DATATROVE], check=True)
        (home / "installed").touch()
    command = [home / "bin" / "python", "benchmarks/peers/datatrove_tokenize.py", corpus, tokenizer, output, cores]
    return command, {}, lambda folder: sum(f.stat().st_size for f in Path(folder).glob("*.ds")) // 2


def _in_parquet(folder: str | Path) -> int:
    """Tokens of a folder of parquet files, from its manifest or from their footers."""
    manifest = read_manifest(view(folder, fresh=True))
    if manifest is not None:
        return manifest.tokens
    tokens = 0
    for file in Path(folder).glob("*.parquet"):
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
#: Those that read and write stores, too.
OF_STORES = ("spark", "sail")

if __name__ == "__main__":
    sys.exit(main())
