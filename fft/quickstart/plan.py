"""The quickstart's eight stages: which command makes what from what."""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import fft
from fft.data.manifest import MANIFEST_NAME, read_manifest
from fft.data.table import Table
from fft.errors import UserError
from fft.files import write_atomically
from fft.quickstart import corpus, report
from fft.quickstart.baseline import predicted_counts, unigram_counts, unigram_cross_entropy
from fft.quickstart.stages import Stage, fingerprint, run_command

#: The repository: Spark jobs and configuration are run from there.
ROOT = Path(fft.__file__).resolve().parent.parent

VOCAB_SIZE = 4096
SEQ_LEN = 512
HOLDOUT = 0.01
MODEL = "conf/models/llama-3m.json"
CONFIG = "conf/quickstart.yaml"
PROMPTS = (
    "    def __init__(self, name, path):",
    "import os\nimport sys",
    "    for name in names:\n        if name",
    "    def close(self):",
)
#: Greedy text of so small a model soon repeats itself; the likeliest part of its distribution shows what it knows.
SAMPLING = {"max_new_tokens": 96, "temperature": 0.6, "top_p": 0.9, "seed": 0}


@dataclass(frozen=True)
class Places:
    """Where everything lies below the output folder."""

    output: Path

    @property
    def corpus(self) -> Path:
        """JSON lines of text."""
        return self.output / "corpus.jsonl"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer directory."""
        return self.output / "tokenizer"

    @property
    def tokens(self) -> Path:
        """Table with one row a document."""
        return self.output / "tokens"

    @property
    def shuffled(self) -> Path:
        """The tables train and validation in their global order."""
        return self.output / "shuffled"

    @property
    def packed(self) -> Path:
        """The tables train and validation in rows of the model's length."""
        return self.output / "packed"

    @property
    def run(self) -> Path:
        """The trainer's run folder."""
        return self.output / "run"

    @property
    def model(self) -> Path:
        """Hugging Face model directory."""
        return self.output / "model"

    @property
    def prompts(self) -> Path:
        """Prompts to complete."""
        return self.output / "prompts.jsonl"

    @property
    def completions(self) -> Path:
        """What the model wrote."""
        return self.output / "completions.jsonl"

    @property
    def picture(self) -> Path:
        """The loss curve."""
        return self.output / "loss.png"

    @property
    def records(self) -> Path:
        """Records of finished stages."""
        return self.output / ".stages"


def build_stages(places: Places, max_steps: int | None = None) -> list[Stage]:
    """The stages in order. ``max_steps`` overrides the configured length of the training."""
    return [*_data_stages(places), *_model_stages(places, max_steps)]


def _data_stages(places: Places) -> list[Stage]:
    """From sources to tables in rows of the model's length."""
    library = corpus.standard_library()
    return [
        Stage(
            "corpus",
            ("collect", str(library), fingerprint(corpus.source_files(library))[:12]),
            (),
            (places.corpus,),
            lambda: asdict(corpus.write_corpus(library, places.corpus)),
        ),
        Stage(
            "tokenizer",
            ("byte-level-bpe", "--vocab_size", str(VOCAB_SIZE)),
            (places.corpus,),
            (places.tokenizer,),
            partial(_train_tokenizer, places),
        ),
        _spark(
            "tokenize",
            ("-i", _shown(places.corpus), "-o", _shown(places.tokens), "--tokenizer", _shown(places.tokenizer)),
            (places.corpus, places.tokenizer),
            places.tokens,
        ),
        _spark(
            "shuffle",
            ("-i", _shown(places.tokens), "-o", _shown(places.shuffled), "--seed", "0", "--holdout", str(HOLDOUT)),
            (places.tokens,),
            places.shuffled,
        ),
        _spark(
            "repartition",
            (
                *("-i", _shown(places.shuffled), "-o", _shown(places.packed)),
                *("--max_len", str(SEQ_LEN), "--pack", "best-fit", "--num_partition", "4"),
            ),
            (places.shuffled,),
            places.packed,
        ),
    ]


def _model_stages(places: Places, max_steps: int | None) -> list[Stage]:
    """From the tables to a model, its text and its losses."""
    tables = [places.packed / split for split in ("train", "validation")]
    manifests = tuple(table / MANIFEST_NAME for table in tables)
    train = [
        *("deepspeed", "--num_gpus", "2", "fft/train.py", "--config", CONFIG, "--init", "--model", MODEL),
        *("--tokenizer", _shown(places.tokenizer)),
        *("--train_data", _shown(tables[0]), "--eval_data", _shown(tables[1])),
        *("--output_dir", _shown(places.model), "--checkpoint", _shown(places.run), "--overwrite"),
        *(("--max_steps", str(max_steps)) if max_steps is not None else ()),
    ]
    infer = [
        *("python", "-m", "fft.serve.batch_infer", "--model", _shown(places.model)),
        *("--input", _shown(places.prompts), "--output", _shown(places.completions)),
        *(part for name, value in SAMPLING.items() for part in (f"--{name}", str(value))),
        "--overwrite",
    ]
    return [
        Stage(
            "train",
            tuple(train),
            (*manifests, places.tokenizer, ROOT / CONFIG, ROOT / MODEL),
            (places.model, places.run),
            partial(_train, train),
        ),
        Stage(
            "generate",
            (*infer, json.dumps(PROMPTS)),
            (places.model,),
            (places.completions,),
            partial(_generate, places, infer),
        ),
        Stage(
            "report",
            ("unigram-baseline-and-picture",),
            (*manifests, places.run),
            (places.picture,),
            partial(_report, places),
        ),
    ]


def spark_rate(table: Path) -> tuple[int, float]:
    """Tokens of a table, and tokens/s at which its job wrote it. Raises :class:`UserError` without a manifest."""
    manifest = read_manifest(table)
    if manifest is None:
        raise UserError(f"{table} has no manifest: remove it and run the quickstart again.")
    return manifest.tokens, manifest.lineage["timing"]["tokens_per_second"]


def _spark(name: str, flags: tuple[str, ...], inputs: tuple[Path, ...], output: Path) -> Stage:
    command = ("spark-submit", f"spark_jobs/{name}.py", *flags, "--overwrite")
    # A laptop's host name often resolves to nothing; one machine needs no more than the loopback address.
    variables = {"SPARK_LOCAL_IP": os.environ.get("SPARK_LOCAL_IP", "127.0.0.1"), "PYSPARK_PYTHON": sys.executable}

    def work() -> dict:
        run_command(name, command, ROOT, variables)
        return {}

    return Stage(name, command, inputs, (output,), work)


def _train_tokenizer(places: Places) -> dict:
    from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(corpus.read_texts(places.corpus), VOCAB_SIZE)
    save_tokenizer(tokenizer, places.tokenizer)
    return {"entries": len(tokenizer)}


def _train(command: list[str]) -> dict:
    # DeepSpeed's own choice of port fails while another of its jobs runs on this machine.
    launcher = ("--quiet", "--master_addr", "127.0.0.1", "--master_port", str(_free_port()))
    # Two processes on any machine, also on one with a single GPU.
    run_command("train", [command[0], *launcher, *command[1:]], ROOT, {"DS_ACCELERATOR": "cpu"})
    return {}


def _generate(places: Places, command: list[str]) -> dict:
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    write_atomically(places.prompts, lines)
    run_command("generate", [sys.executable, *command[1:]], ROOT, {})
    return {}


def _report(places: Places) -> dict:
    train, validation = (Table.open(places.packed / split) for split in ("train", "validation"))
    baseline = unigram_cross_entropy(unigram_counts(train, VOCAB_SIZE), predicted_counts(validation, VOCAB_SIZE))
    report.plot_losses(report.read_metrics(places.run / "metrics.jsonl"), baseline, places.picture)
    return {"baseline": baseline}


def _shown(path: Path) -> str:
    """As a user in the repository's root would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
