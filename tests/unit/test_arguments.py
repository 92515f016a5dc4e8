"""Flags and settings files of the trainer."""

import runpy
from dataclasses import asdict, fields

import pytest
import yaml
from conftest import ROOT

from fft.arguments import TrainArguments, build_parser, parse_arguments
from fft.errors import UserError

BASE = ["--model", "m", "--train_data", "t", "--output_dir", "o"]


def from_file(tmp_path, text, *flags):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return parse_arguments([*BASE, "--config", str(path), *flags])


def test_command_line_over_file_over_default(tmp_path):
    args = from_file(tmp_path, "seq_len: 128\nlearning_rate: 1e-3\nsplit_dlayer: true\n", "--seq_len", "64")
    assert (args.seq_len, args.learning_rate, args.split_dlayer, args.warmup_steps) == (64, 1e-3, True, 0)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("seed: 010", "seed", 10),
        ("seed: '5'", "seed", 5),
        ("seed: &s 4\nmax_skipped_steps: *s", "max_skipped_steps", 4),
        ("output_dir: 007", "output_dir", "007"),
        ("output_dir: 1.10", "output_dir", "1.10"),
        ("output_dir: 12:30:45", "output_dir", "12:30:45"),
        ("output_dir: 2020-01-02 03:04", "output_dir", "2020-01-02 03:04"),
        ("zero_stage: 1", "zero_stage", "1"),
        ("tokenizer: ~", "tokenizer", None),
        ("ragged: on", "ragged", True),
        ("{seed: 4, learning_rate: 1e-5}", "learning_rate", 1e-5),
    ],
)
def test_a_value_of_a_file_is_what_its_text_means_on_the_command_line(text, name, value, tmp_path):
    """Not what YAML 1.1 makes of it: octal numbers, clocks, dates."""
    (tmp_path / "settings.yaml").write_text(text)
    given = [*(BASE[:-2] if name == "output_dir" else BASE), "--config", str(tmp_path / "settings.yaml")]
    assert getattr(parse_arguments(given), name) == value


def test_a_default_given_on_the_command_line_still_wins(tmp_path):
    default = parse_arguments(BASE).seq_len
    assert from_file(tmp_path, "seq_len: 128\n", "--seq_len", str(default)).seq_len == default


def test_the_settings_a_run_leaves_behind_start_it_again(tmp_path):
    """A run folder's arguments.yaml holds every setting, those that were never given as null."""
    args = parse_arguments([*BASE, "--learning_rate", "3e-5", "--num_train_epochs", "0.5", "--init"])
    path = tmp_path / "arguments.yaml"
    path.write_text(yaml.safe_dump(asdict(args)))
    assert parse_arguments(["--config", str(path)]) == args


#: Of all commands but the jobs, which test_entry_points.py asks.
COMMANDS = sorted(
    {
        {"fft.arguments": "fft.train"}.get(make.__module__, make.__module__.removesuffix(".__main__"))
        for make in runpy.run_path(str(ROOT / "docs" / "flags.py"))["_PARSERS"]
        if make.__module__ != "spark_jobs.cli"
    }
)
JOBS = ("tokenize", "shuffle", "repartition", "generate")


def help_of(module, launch, *watched):
    """The lines of a command's help; the last one has its exit code, and which of some modules were imported."""
    program = (
        f"import sys, runpy; sys.argv = ['command', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, sorted(set({watched}) & set(sys.modules)))"
    )
    done = launch("python", "-c", program, env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_needs_no_torch(module, launch):
    """On a login node without a GPU, or a laptop without torch, the flags can still be read, at once, on a screen."""
    *told, end = help_of(module, launch, "torch", "deepspeed", "transformers")
    assert end == "0 []"
    assert told[0].startswith("usage: ")
    assert len(told) < 60


#: What takes more is not typed by hand every day: quickstarts, and the trace.
LIGHT = ["train", "parity", "plan", "report", "show", "checkpoint.convert", "serve.batch_infer", "serve.server"]


@pytest.mark.parametrize("module", [*(f"fft.{name}" for name in LIGHT), *(f"spark_jobs.{job}" for job in JOBS)])
def test_help_of_what_is_typed_most_needs_no_arrow(module, launch):
    """Which takes longer than all the rest of it."""
    assert help_of(module, launch, "numpy", "pyarrow", "pyspark")[-1] == "0 []"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seq_length: 128\n", "unknown setting 'seq_length' (did you mean 'seq_len'?)."),
        ("seq_len: long\n", "seq_len must be of type int, not 'long'"),
        ("seq_len: 12.5\n", "seq_len must be of type int, not 12.5"),
        ("split_dlayer: 1\n", "split_dlayer must be of type bool, not 1"),
        ("seq_len: true\n", "seq_len must be of type int, not true"),
        ("seq_len: .inf\n", "seq_len must be of type int, not .inf"),
        ("learning_rate:\n", "learning_rate must be of type float, not nothing"),
        ("tokenizer: [a, b]\n", "tokenizer must be of type str, not [a, b]"),
        ("dtype: fp8\n", "dtype must be one of bf16, fp16, fp32, not 'fp8'"),
        ("- seq_len\n", "must map flag names to values"),
        ("seq_len: [1\n", "is not YAML"),
        ("seq_len: " + "[" * 3000, "is not YAML"),
        ("seed: 1\nseq_len: 16\nseed: 2\n", "line 3: seed is set a second time: keep one of the two."),
        ("a: {seed: 1}\n", "line 1: unknown setting 'a'."),
        ("? [a, b]\n: 1\n", "unknown setting '[a, b]'."),
        ("2020-01-01: 1\n", "unknown setting '2020-01-01'."),
        ("<<: {seed: 1}\n", "unknown setting '<<'."),
        ("seed: 2020-13-45\n", "seed must be of type int, not 2020-13-45."),
        ("seed: 1:30\n", "seed must be of type int, not 1:30."),
        ("seed: !!timestamp x\n", "seed must be of type int, not !!timestamp x."),
        ("seed: !!python/name:os.getcwd\n", "seed must be of type int, not !!python/name:os.getcwd."),
        ("tokenizer: !!binary aGk=\n", "tokenizer must be of type str, not !!binary aGk=."),
        ("tokenizer: no\n", "tokenizer must be of type str, not no."),
        ("ragged: !!bool x\n", "ragged must be of type bool, not !!bool x."),
        ("seed: " + "9" * 5000, f"seed must be of type int, not {'9' * 60} ...."),
    ],
)
def test_bad_files_are_explained(tmp_path, text, sentence):
    with pytest.raises(UserError) as raised:
        from_file(tmp_path, text)
    assert sentence in str(raised.value)
    assert "settings.yaml" in str(raised.value)


def test_an_offloaded_optimizer_in_fp16_is_refused():
    """DeepSpeed 0.19.8 skips every step after the first that overflowed."""
    assert parse_arguments([*BASE, "--offload_optimizer"]).offload_optimizer
    with pytest.raises(UserError, match="--checkpoint_grad_selective and --checkpoint_grad_interval exclude"):
        parse_arguments([*BASE, "--checkpoint_grad_selective", "--checkpoint_grad_interval", "1"])
    with pytest.raises(UserError, match="--zero_stage 0 is for --dtype fp32 without --offload_optimizer"):
        parse_arguments([*BASE, "--offload_optimizer", "--dtype", "fp32", "--zero_stage", "0"])
    with pytest.raises(UserError, match="--offload_optimizer with --dtype fp16"):
        parse_arguments([*BASE, "--offload_optimizer", "--dtype", "fp16"])


def test_what_launchers_add_is_accepted():
    plain = parse_arguments(BASE)
    added = ["--local_rank=1", "--deepspeed", "--deepspeed_config", "x.json"]
    assert parse_arguments([*BASE, *added]) == plain


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seq_len", "0"], "--seq_len 0 must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate -1.0 must not be negative"),
        (["--adam_epsilon", "0"], "--adam_epsilon 0.0 must be at least 1e-30"),
        (["--learning_rate", "nan"], "--learning_rate nan must be a finite number"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf must be a finite number"),
        (["--adam_beta2", "1"], "--adam_beta2 1.0 must be at least 0 and less than 1"),
        (["--tokenizer", ""], "--tokenizer '' must be a line of text"),
        (["--eval_data", " "], "--eval_data ' ' must be a line of text"),
        (["--checkpoint", "a\udcff"], "--checkpoint 'a\\udcff' must be a line of text"),
        (["--max_steps", "-7"], "--max_steps -7 must be at least -1"),
        (["--max_steps", "2147483648"], "--max_steps 2147483648 must be less than 2,147,483,648"),
        (["--seq_len", "65536", "--gradient_accumulation_steps", "32768"], "is 2,147,483,648, the tokens of a rank's"),
        (["--freeze", "a\nb"], "--freeze 'a\\nb' must be a line of text"),
        (["--decay_ratio", "1.5"], "--decay_ratio 1.5 must be a share of all steps, from 0 to 1"),
        (["--early_stop_patience", "2"], "--early_stop_patience counts evaluations"),
        (["--lora_dim", "8", "--init"], "not with --init"),
        (["--lora_dim", "8", "--lora_alpha", "0"], "--lora_alpha 0 must be at least 1"),
        (["--lora_dim", "8", "--lora_dropout", "1"], "--lora_dropout 1.0 must be at least 0 and less than 1"),
        (["--use_dora"], "--use_dora is of adapters: give their rank by --lora_dim"),
        (["--init", "--from_ckpt", "c"], "exclude each other"),
        (["--tag", "step-1"], "--from_ckpt, which is missing"),
        (["--save_steps", "5"], "--save_steps needs --checkpoint"),
        (["--resume", "auto"], "--resume needs --checkpoint"),
        (["--resume", "auto", "--checkpoint", "r", "--only_ckpt_model"], "--resume needs whole checkpoints"),
        (["--best_of", "1", "--checkpoint", "r", "--save_steps", "5"], "--best_of chooses by evaluation"),
    ],
)
def test_flags_that_contradict(flags, sentence):
    with pytest.raises(UserError) as raised:
        parse_arguments([*BASE, *flags])
    assert sentence in str(raised.value)


def test_help_shows_every_flag_in_a_group_of_its_topic():
    groups = {group.title: group._group_actions for group in build_parser()._action_groups if group._group_actions}
    assert list(groups)[1:] == [
        "What to train, on what, to where",
        "Which parameters",
        "What is learned",
        "How long, how much at a time",
        "Optimizer",
        "Precision, kernels, seed",
        "Layout",
        "Planning",
        "Watching and keeping",
    ]
    ungrouped = {"help", "config", "local_rank", "deepspeed", "deepspeed_config"}
    assert {action.dest for action in groups.pop("options")} == ungrouped
    assert [a.dest for actions in groups.values() for a in actions] == [spec.name for spec in fields(TrainArguments)]


def test_an_unknown_flag_is_one_sentence():
    with pytest.raises(UserError, match=r"arguments: --pipe_size 2 \(did you mean --pipe_parallel_size\?\); .* --help"):
        parse_arguments([*BASE, "--pipe_size", "2"])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not YAML"):
        parse_arguments([*BASE, "--config", str(tmp_path / "settings.yaml")])
