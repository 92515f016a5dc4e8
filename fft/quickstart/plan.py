"""The quickstart's eight stages: which command makes what from what."""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fft.data.manifest import MANIFEST_NAME
from fft.files import write_atomically
from fft.quickstart import corpus, results
from fft.quickstart.commands import ROOT, QuickstartPlace, run_trainer, shown, spark_stage
from fft.quickstart.places import Place, fetched, written
from fft.quickstart.stages import Stage, fingerprint, run_command

VOCAB_SIZE = 4096
SEQ_LEN = 512
METRICS = "metrics.jsonl"
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
class Folders(QuickstartPlace):
    """What else lies below the output folder."""

    @property
    def corpus(self) -> Place:
        """JSON lines of text."""
        return self.output / "corpus.jsonl"

    @property
    def tokenizer(self) -> Place:
        """Tokenizer directory."""
        return self.output / "tokenizer"

    @property
    def shuffled(self) -> Place:
        """The tables train and validation in their global order."""
        return self.output / "shuffled"

    @property
    def packed(self) -> Place:
        """The tables train and validation in rows of the model's length."""
        return self.output / "packed"

    @property
    def prompts(self) -> Place:
        """Prompts to complete."""
        return self.output / "prompts.jsonl"

    @property
    def completions(self) -> Place:
        """What the model wrote."""
        return self.output / "completions.jsonl"

    @property
    def picture(self) -> Place:
        """The loss curve."""
        return self.output / "loss.png"


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
            partial(_write_corpus, library, folders),
        ),
        Stage(
            "tokenizer",
            ("byte-level-bpe", "--vocab_size", str(VOCAB_SIZE)),
            (folders.corpus,),
            (folders.tokenizer,),
            partial(_train_tokenizer, folders),
        ),
        spark_stage(
            "tokenize",
            ("-i", shown(folders.corpus), "-o", shown(folders.tokens), "--tokenizer", shown(folders.tokenizer)),
            (folders.corpus, folders.tokenizer),
            folders.tokens,
        ),
        spark_stage(
            "shuffle",
            ("-i", shown(folders.tokens), "-o", shown(folders.shuffled), "--seed", "0", "--holdout", str(HOLDOUT)),
            (folders.tokens,),
            folders.shuffled,
        ),
        spark_stage(
            "repartition",
            (
                *("-i", shown(folders.shuffled), "-o", shown(folders.packed)),
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
        *("--tokenizer", shown(folders.tokenizer)),
        *("--train_data", shown(tables[0]), "--eval_data", shown(tables[1])),
        *("--output_dir", shown(folders.model), "--checkpoint", shown(folders.run), "--overwrite"),
        *(("--max_steps", str(max_steps)) if max_steps is not None else ()),
    ]
    return [
        Stage(
            "train",
            tuple(train),
            (*manifests, folders.tokenizer, ROOT / CONFIG, ROOT / MODEL),
            (folders.model, folders.run),
            partial(run_trainer, train),
        ),
        Stage(
            "generate",
            (*_inference(*map(shown, (folders.model, folders.prompts, folders.completions))), json.dumps(PROMPTS)),
            (folders.model,),
            (folders.completions,),
            partial(_generate, folders),
        ),
        Stage(
            "report",
            ("unigram-baseline-and-picture",),
            (*manifests, folders.run),
            (folders.picture,),
            partial(_report, folders),
        ),
    ]


def _write_corpus(library: Path, folders: Folders) -> dict:
    with written(folders.corpus) as path:
        return asdict(corpus.write_corpus(library, path))


def _train_tokenizer(folders: Folders) -> dict:
    from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

    with fetched(folders.corpus) as path, written(folders.tokenizer) as folder:
        tokenizer = train_tokenizer(corpus.read_texts(path), VOCAB_SIZE)
        save_tokenizer(tokenizer, folder)
    return {"entries": len(tokenizer)}


def _inference(model: str, prompts: str, completions: str) -> list[str]:
    return [
        *("python", "-m", "fft.serve.batch_infer", "--model", model, "--input", prompts, "--output", completions),
        *(part for name, value in SAMPLING.items() for part in (f"--{name}", str(value))),
        "--overwrite",
    ]


def _generate(folders: Folders) -> dict:
    """By a command that reads models from a disk alone, and writes there."""
    with written(folders.prompts) as prompts:
        write_atomically(prompts, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    with fetched(folders.model) as model, fetched(folders.prompts) as prompts, written(folders.completions) as output:
        command = _inference(*map(shown, (model, prompts, output)))
        run_command("generate", [sys.executable, *command[1:]], ROOT, {})
    return {}


def _report(folders: Folders) -> dict:
    # Not before: --help need not wait for Arrow.
    from fft.data.table import Table
    from fft.quickstart.baseline import predicted_counts, unigram_counts, unigram_cross_entropy

    train, validation = (Table.open(str(folders.packed / split)) for split in ("train", "validation"))
    baseline = unigram_cross_entropy(unigram_counts(train, VOCAB_SIZE), predicted_counts(validation, VOCAB_SIZE))
    with fetched(folders.run / METRICS) as metrics, written(folders.picture) as picture:
        results.plot_losses(results.read_metrics(metrics), baseline, picture)
    return {"baseline": baseline}
