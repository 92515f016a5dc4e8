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
from fft.quickstart import corpus, results
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
class Folders:
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


def build_stages(folders: Folders, max_steps: int | None = None) -> list[Stage]:
    """The stages in order. ``max_steps`` overrides the configured length of the training."""
    return [*_data_stages(folders), *_model_stages(folders, max_steps)]


def _data_stages(folders: Folders) -> list[Stage]:
    """From sources to tables in rows of the model's length."""
    library = corpus.standard_library()
    return [
        Stage(
            "corpus",
            ("collect", str(library), fingerprint(corpus.source_files(library))[:12]),
            (),
            (folders.corpus,),
            lambda: asdict(corpus.write_corpus(library, folders.corpus)),
        ),
        Stage(
            "tokenizer",
            ("byte-level-bpe", "--vocab_size", str(VOCAB_SIZE)),
            (folders.corpus,),
            (folders.tokenizer,),
            partial(_train_tokenizer, folders),
        ),
        _spark(
            "tokenize",
            ("-i", _shown(folders.corpus), "-o", _shown(folders.tokens), "--tokenizer", _shown(folders.tokenizer)),
            (folders.corpus, folders.tokenizer),
            folders.tokens,
        ),
        _spark(
            "shuffle",
            ("-i", _shown(folders.tokens), "-o", _shown(folders.shuffled), "--seed", "0", "--holdout", str(HOLDOUT)),
            (folders.tokens,),
            folders.shuffled,
        ),
        _spark(
            "repartition",
            (
                *("-i", _shown(folders.shuffled), "-o", _shown(folders.packed)),
                *("--max_len", str(SEQ_LEN), "--pack", "best-fit", "--num_partition", "4"),
            ),
            (folders.shuffled,),
            folders.packed,
        ),
    ]


def _model_stages(folders: Folders, max_steps: int | None) -> list[Stage]:
    """From the tables to a model, its text and its losses."""
    tables = [folders.packed / split for split in ("train", "validation")]
    manifests = tuple(table / MANIFEST_NAME for table in tables)
    train = [
        *("deepspeed", "--num_gpus", "2", "fft/train.py", "--config", CONFIG, "--init", "--model", MODEL),
        *("--tokenizer", _shown(folders.tokenizer)),
        *("--train_data", _shown(tables[0]), "--eval_data", _shown(tables[1])),
        *("--output_dir", _shown(folders.model), "--checkpoint", _shown(folders.run), "--overwrite"),
        *(("--max_steps", str(max_steps)) if max_steps is not None else ()),
    ]
    infer = [
        *("python", "-m", "fft.serve.batch_infer", "--model", _shown(folders.model)),
        *("--input", _shown(folders.prompts), "--output", _shown(folders.completions)),
        *(part for name, value in SAMPLING.items() for part in (f"--{name}", str(value))),
        "--overwrite",
    ]
    return [
        Stage(
            "train",
            tuple(train),
            (*manifests, folders.tokenizer, ROOT / CONFIG, ROOT / MODEL),
            (folders.model, folders.run),
            partial(_train, train),
        ),
        Stage(
            "generate",
            (*infer, json.dumps(PROMPTS)),
            (folders.model,),
            (folders.completions,),
            partial(_generate, folders, infer),
        ),
        Stage(
            "report",
            ("unigram-baseline-and-picture",),
            (*manifests, folders.run),
            (folders.picture,),
            partial(_report, folders),
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


def _train_tokenizer(folders: Folders) -> dict:
    from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(corpus.read_texts(folders.corpus), VOCAB_SIZE)
    save_tokenizer(tokenizer, folders.tokenizer)
    return {"entries": len(tokenizer)}


def _train(command: list[str]) -> dict:
    # DeepSpeed's own choice of port fails while another of its jobs runs on this machine.
    launcher = ("--quiet", "--master_addr", "127.0.0.1", "--master_port", str(_free_port()))
    # Two processes on any machine, also on one with a single GPU.
    run_command("train", [command[0], *launcher, *command[1:]], ROOT, {"DS_ACCELERATOR": "cpu"})
    return {}


def _generate(folders: Folders, command: list[str]) -> dict:
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    write_atomically(folders.prompts, lines)
    run_command("generate", [sys.executable, *command[1:]], ROOT, {})
    return {}


def _report(folders: Folders) -> dict:
    train, validation = (Table.open(folders.packed / split) for split in ("train", "validation"))
    baseline = unigram_cross_entropy(unigram_counts(train, VOCAB_SIZE), predicted_counts(validation, VOCAB_SIZE))
    results.plot_losses(results.read_metrics(folders.run / "metrics.jsonl"), baseline, folders.picture)
    return {"baseline": baseline}


def _shown(path: Path) -> str:
    """As a user in the repository's root would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
