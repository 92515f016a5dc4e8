"""Published runs without a layout, as jobs of our own trainer."""

from transformers import AutoConfig

from fft.models.spec import DTYPES, ModelSpec
from fft.plan.ours import Job
from fft.train_arguments import TrainArguments


def job_of(row: dict[str, str]) -> Job:
    """A row's model, of Llama's form, its rows of tokens and its steps."""
    sizes = {
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "ffn",
        "vocab_size": "vocab",
    }
    config = AutoConfig.for_model("llama", **{name: int(row[column]) for name, column in sizes.items()})
    seq = int(row["seq"])
    args = TrainArguments(model=row["model"], seq_len=seq, dry_run=True)
    return Job(ModelSpec(config, DTYPES["bf16"]), row["model"], args, int(row["global_batch_samples"]) * seq)
