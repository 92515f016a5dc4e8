"""The trainer's settings: one table of names, types and meanings, for the command line and for YAML files alike."""

from dataclasses import dataclass

from fft.flags import (
    AT_LEAST_1,
    AT_LEAST_5,
    BELOW_1,
    EPSILON,
    FROM_MINUS_1,
    NOT_NEGATIVE,
    SHARE,
    SHARE_OF_STEPS,
    flag,
)

#: Linear layers that LoRA adapts, as most decoders name them.
LORA_MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class TrainArguments:
    """Everything a run is made of. Names are those of the flags; ``jllm`` users will recognise most."""

    model: str = flag(
        "Hugging Face model directory, a path or, as for all places below, a URL (s3://, gs://, abfs://, hdfs://); "
        "with --init a config.json or a directory that has one",
        None,
        topic="What to train, on what, to where",
    )
    init: bool = flag("start from random weights (seeded) instead of loading them", False)
    tokenizer: str | None = flag("tokenizer directory copied into --output_dir (default: --model's own)", None)
    train_data: str | None = flag(
        "token table to train on: a folder of parquet files or a Delta table (PATH@v3: version 3); or texts or "
        "conversations as JSON lines (.jsonl, .json, also .gz, .zst), which are tokenized first, into a table below "
        "--checkpoint; or several, each with the weight of its samples: 'web:0.7 chats.jsonl:0.3'",
        None,
    )
    eval_data: str | None = flag(
        "token table, or file of JSON lines, to evaluate on; or several, whose losses are told by name, and of which "
        "the first says what is best: 'web=TABLE code=lines.jsonl'",
        None,
    )
    output_dir: str | None = flag("Hugging Face model directory to write at the end", None)
    register_model: str | None = flag(
        "send the model of --output_dir to MLflow at the end and register it under this name, for Unity Catalog "
        "CATALOG.SCHEMA.MODEL (docs/training.md)",
        None,
    )
    overwrite: bool = flag("allow an existing --output_dir or --checkpoint run to be replaced", False)

    lora_dim: int = flag(
        "train low-rank adapters of this rank alone, and write them as PEFT does (0: the model); 16 holds most sets of "
        "conversations, with ten times the rate of full training (thinkingmachines.ai/blog/lora)",
        0,
        topic="Which parameters",
        bound=NOT_NEGATIVE,
    )
    lora_alpha: int = flag("what an adapter adds is multiplied by this / --lora_dim", 16)
    lora_module_name: str = flag(
        "linear modules of the decoder layers that get adapters; PART.NAME: those within a part of the model that sees "
        "images, such as visual.qkv or vision_tower.q_proj",
        LORA_MODULES,
    )
    lora_dropout: float = flag(
        "share of an adapter's input that it does not see in training, drawn by --seed alike on every layout",
        0.0,
        bound=BELOW_1,
    )
    use_rslora: bool = flag("multiply by --lora_alpha / sqrt(--lora_dim): ranks from 64 on need it (rsLoRA)", False)
    use_dora: bool = flag("train also the length of each row of an adapted matrix: better, slower (DoRA)", False)
    load_in_4bit: bool = flag(
        "hold the model below the adapters in four bits (NF4): a quarter of its memory, slower; needs bitsandbytes",
        False,
    )
    adapter_name_or_path: str | None = flag(
        "adapter directory, as PEFT or a run saves it, to go on training: it says what --lora_dim, --lora_alpha, "
        "--lora_module_name, --use_rslora and --use_dora are (docs/training.md)",
        None,
    )
    freeze: str | None = flag("do not train parameters whose name has one of these regular expressions, a,b,c", None)

    objective: str = flag(
        "lm: the next token of all that is trained on; dpo: preferences, of tables that spark_jobs/tokenize.py --task "
        "preference makes; what the model says of them as the run begins is computed first, and kept by the table",
        "lm",
        topic="What is learned",
        choices=("lm", "dpo"),
    )
    dpo_beta: float = flag(
        "--objective dpo: how closely the model is held to what it was (TRL's beta)", 0.1, bound=NOT_NEGATIVE
    )
    dpo_length_normalized: bool = flag(
        "--objective dpo: compare mean log-probabilities of a token, not sums (TRL's loss_type sigmoid_norm)", False
    )
    dpo_sft_weight: float = flag(
        "--objective dpo: add so many times the mean loss of the chosen answer's tokens (TRL's loss_type sft)",
        0.0,
        bound=NOT_NEGATIVE,
    )

    seq_len: int = flag("tokens of a sample", 2048, topic="How long, how much at a time", bound=AT_LEAST_1)
    pack: str = flag(
        "make samples of rows that are not packed to --seq_len: cut = lay them end to end and cut, nothing unused; "
        "best-fit = cut only rows longer than a sample",
        "cut",
        choices=("cut", "best-fit"),
    )
    ragged: bool = flag(
        "make micro-batches as long as their documents: what rows and the last batch leave unused is not computed "
        "(full rows save nothing); costs a message of shapes with every micro-batch between stages, which wait for the "
        "longest; loss and weights stay the same, but that the balance of experts counts no unused tokens",
        False,
    )
    shuffle_lanes: int = flag(
        "places of --train_data that are read side by side: more shuffle better and hold more in memory; data-parallel "
        "replicas whose number divides it decode no row group twice",
        32,
        bound=AT_LEAST_1,
    )
    blend_end: str = flag(
        "what a table of a blend does that has been read once: repeat = it begins again, in another order; drop = it "
        "leaves the blend until all have been read",
        "repeat",
        choices=("repeat", "drop"),
    )
    per_device_train_batch_size: int = flag("samples of a micro-batch", 1, bound=AT_LEAST_1)
    gradient_accumulation_steps: int = flag("micro-batches of a step, per data-parallel replica", 1, bound=AT_LEAST_1)
    num_train_epochs: float = flag("passes over --train_data; 0 only converts", 1.0, bound=NOT_NEGATIVE)
    max_steps: int = flag("stop after so many steps, whatever the epochs (-1: epochs decide)", -1, bound=FROM_MINUS_1)

    learning_rate: float = flag("peak learning rate", 1e-4, topic="Optimizer", bound=NOT_NEGATIVE)
    min_learning_rate: float = flag("where the schedule ends", 0.0, bound=NOT_NEGATIVE)
    lr_scheduler_type: str = flag(
        "decay after the warm-up; wsd (warmup-stable-decay) is constant but for its end",
        "cosine",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_ratio: float = flag("share of all steps at whose end wsd decays, linearly", 0.1, bound=SHARE_OF_STEPS)
    warmup_steps: int = flag("steps of linear warm-up", 0, bound=NOT_NEGATIVE)
    weight_decay: float = flag("AdamW's decay of matrices (never of norms and biases)", 0.1, bound=NOT_NEGATIVE)
    adam_beta1: float = flag("AdamW's first beta", 0.9, bound=BELOW_1)
    adam_beta2: float = flag("AdamW's second beta", 0.95, bound=BELOW_1)
    adam_epsilon: float = flag("AdamW's epsilon", 1e-8, bound=EPSILON)
    max_grad_norm: float = flag("clip the global gradient norm to this (0: never)", 1.0, bound=NOT_NEGATIVE)
    max_skipped_steps: int = flag(
        "end the run with an error after k steps in a row whose gradients were not finite, which change nothing; those "
        "that lower fp16's loss scale do not count (0: never)",
        5,
        bound=NOT_NEGATIVE,
    )
    dtype: str = flag(
        "type of weights and activations; masters and moments are fp32; a run without a step keeps the model's",
        "bf16",
        topic="Precision, kernels, seed",
        choices=("bf16", "fp16", "fp32"),
    )
    attention: str = flag(
        "attention kernel, which is compared with the reference before the first step; auto takes the device's fastest "
        "that is installed and right (docs/attention.md)",
        "auto",
        choices=(
            *("auto", "reference", "cpu", "cuda", "cudnn"),
            *("flash_attention_2", "flash_attention_3", "flash_attention_4", "npu"),
        ),
    )
    fused_ops: str = flag(
        "auto: one kernel each for RMSNorm, rotary embedding and SwiGLU, on NPUs and on GPUs that have liger-kernel; "
        "none: as transformers computes them",
        "auto",
        choices=("auto", "none"),
    )
    compile: bool = flag(
        "compile decoder layers, each as one graph, on NVIDIA GPUs: in place of --fused_ops, and for families that it "
        "does not know, too (docs/training.md)",
        False,
    )
    zero_stage: str = flag(
        "1 shares masters and moments out over the data- and sequence-parallel ranks; 0 gives every rank all of them, "
        "in fp32 only; auto is 0 for fp32 on a single such rank, and 1 otherwise",
        "auto",
        choices=("auto", "0", "1"),
    )
    offload_optimizer: bool = flag("keep masters and moments in the machine's memory, and step there: slower", False)
    seed: int = flag("seed of the initial weights and of the table's order", 0, bound=NOT_NEGATIVE)

    layout: str = flag(
        "given: the sizes below; auto: what is predicted to be fastest on --hardware, in place of them, of "
        "recomputation and of both batch sizes (docs/planner.md)",
        "given",
        topic="Layout",
        choices=("given", "auto"),
    )
    hardware: str | None = flag("--layout auto: a file that describes the machines, as in conf/hardware", None)
    tokens_per_step: int = flag("--layout auto: tokens of a step, of all replicas", 1 << 22, bound=AT_LEAST_1)
    pipe_parallel_size: int = flag("pipeline stages", 1)
    model_parallel_size: int = flag("ranks that share the parameters of a layer (tensor parallel)", 1)
    sequence_parallel_size: int = flag("ranks that share the tokens of a micro-batch: for very long rows", 1)
    expert_parallel_size: int = flag("data- and sequence-parallel neighbours that share out a layer's experts", 1)
    ulysses_degree: int = flag(
        "so many neighbours of the sequence-parallel ranks exchange heads, rings of keys run across (1: rings only)", 1
    )
    encoder_pipe_parallel_size: int = flag(
        "first stages, for a vision tower (0: all ranks share it; -1: cut with the decoder)", 0, bound=FROM_MINUS_1
    )
    partition_method: str = flag(
        "stages by fast (equal time, as far as --device_memory goes, if it is given), mem (equal memory), parameters, "
        "uniform, or layers per stage: 5,4,4; as in 11,2 those of the decoder's first and last alone, the rest by time",
        "fast",
    )
    split_dlayer: bool = flag("let attention and MLP of a decoder layer fall on different stages", False)
    checkpoint_grad_interval: int = flag(
        "recompute activations of every k layers in backward (0: keep them)", 0, bound=NOT_NEGATIVE
    )
    checkpoint_grad_selective: bool = flag(
        "keep the results of matrix products and attention, recompute the rest of every layer in backward: about half "
        "the memory of activations for little time",
        False,
    )

    dry_run: bool = flag(
        "print the layout, its memory and its bubble, and end: needs no weights, data or devices",
        False,
        topic="Planning",
    )
    ranks: int = flag(
        "how many ranks --dry_run plans for (0: as many as were launched); given to fft.parity, how many it starts",
        0,
        bound=NOT_NEGATIVE,
    )
    device_memory: float = flag(
        "GB of a device: a --dry_run that needs more ends with 1, fast cuts avoid it (0: any)", 0.0, bound=NOT_NEGATIVE
    )
    image_tokens: float | None = flag(
        "--dry_run with this share of tokens of images (docs/layouts.md)", None, bound=SHARE
    )

    eval_steps: int = flag(
        "evaluate every k steps, besides before the first and after the last (0: only those)",
        0,
        topic="Watching and keeping",
        bound=NOT_NEGATIVE,
    )
    sample_prompts: str | None = flag(
        "file of JSON lines, each a prompt or messages, that the model answers at every evaluation, greedily and in 64 "
        "tokens at most: into samples.jsonl of --checkpoint, the first also into the log",
        None,
    )
    early_stop_patience: int = flag(
        "end the run after k evaluations in a row without a lower validation loss, and write the model that had the "
        "lowest, of which --checkpoint keeps a checkpoint (0: never)",
        0,
        bound=NOT_NEGATIVE,
    )
    timeout: int = flag(
        "end the run, with exit code 75, when a rank has said nothing for so many seconds: its machine or the link to "
        "it is gone, or it is stopped",
        60,
        bound=AT_LEAST_5,
    )
    logging_steps: int = flag("print every k steps", 10, bound=AT_LEAST_1)
    show_first: bool = flag("print how the first sample begins, with what is trained of it marked", False)
    checkpoint: str | None = flag(
        "run folder: metrics.jsonl, the resolved settings, checkpoints; a URL, or a folder that all machines see",
        None,
    )
    upload: str | None = flag(
        "mirror the run folder of --checkpoint, which is on a disk, to this URL, behind the training: where the store "
        "fails, training goes on and it is asked again; the end of the run waits 5 minutes at most for what is left; "
        "--resume takes the newest whole checkpoint of both",
        None,
    )
    save_steps: int = flag(
        "write a checkpoint into --checkpoint every k steps, and after the last (0: never)", 0, bound=NOT_NEGATIVE
    )
    only_ckpt_model: bool = flag("checkpoints hold the model alone: smaller, but no run goes on from them", False)
    max_num_checkpoints: int = flag("keep the newest k checkpoints (0: all)", 0, bound=NOT_NEGATIVE)
    best_of: int = flag(
        "keep, besides the newest, the k of lowest validation loss; evaluates before each save", 0, bound=NOT_NEGATIVE
    )
    background_executor: str = flag(
        "who writes a checkpoint while training goes on: a thread, a process, or none: training waits",
        "thread",
        choices=("thread", "process", "none"),
    )
    resume: str | None = flag(
        "go on with the run in --checkpoint, from its newest whole checkpoint (auto; or else from the start) "
        "or from the one named, for example step-100, or best: that of the lowest validation loss; newer ones go, with "
        "--overwrite",
        None,
    )
    from_ckpt: str | None = flag("take the weights from a checkpoint in this run folder instead of --model", None)
    tag: str | None = flag(
        "which checkpoint of --from_ckpt, for example step-100, or best: that of the lowest validation loss (default: "
        "the newest)",
        None,
    )
