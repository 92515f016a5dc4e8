"""The command, with transformers: what it reads, refuses, keeps and writes."""

import datetime
import decimal
import gzip
import json
import os
import signal
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from generation import BAD_PROMPTS, PROMPTS, TEMPLATE, complete, make_model, refusal, write_lines

from fft.errors import UserError
from fft.serve import answer_file, batch_infer
from fft.serve.engines.transformers_engine import TransformersEngine
from fft.serve.sampling import row_seed


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "chat", template=TEMPLATE)


def run(*arguments: object) -> None:
    batch_infer.main([str(argument) for argument in arguments])


@pytest.fixture
def batch(model_dir, tmp_path):
    """Runs the command on an input, by default with 4 tokens an answer, and returns its rows."""

    def batch(source: object, *flags: object, model: Path = model_dir, output: str = "out.jsonl") -> list[dict]:
        path = write_lines(tmp_path / "in.jsonl", source) if isinstance(source, list) else source
        flags = (*flags, "--engine", "transformers")
        flags = flags if "--max_new_tokens" in flags else (*flags, "--max_new_tokens", 4)
        run("--model", model, "--input", path, "--output", tmp_path / output, *flags, "--overwrite")
        if output.endswith(".parquet"):
            return pq.read_table(tmp_path / output).to_pylist()
        return [json.loads(line) for line in (tmp_path / output).read_text(encoding="utf-8").splitlines()]

    return batch


def test_command_writes_prompts_texts_and_other_fields(model_dir, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    write_lines(source, [{"q": p, "n": i} for i, p in enumerate(PROMPTS)])
    arguments = ("--model", model_dir, "--input", source, "--output", output, "--prompt_key", "q")
    run(*arguments, "--max_new_tokens", 4, "--engine", "transformers")
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["n"]) for line in lines] == [(p, i) for i, p in enumerate(PROMPTS)]
    assert all(set(line) == {"prompt", "text", "finish_reason", "n"} for line in lines)
    assert "5/5 prompts" in capsys.readouterr().err
    assert [p.name for p in output.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(UserError, match="exists: choose another file or add --overwrite"):
        run(*arguments)


def test_jllm_s_flags_and_its_default_output(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("one\ntwo\n")
    run("--model", model_dir, "--prompt_file", "prompt.txt", "--bacth_size", 1, "--engine", "transformers")
    assert len(Path("result.jsonl").read_text().splitlines()) == 2
    run("--model", model_dir, "--prompt_file", "prompt.txt", "--output_file", "x.txt", "--engine", "transformers")
    assert Path("x.txt").read_text() == Path("result.jsonl").read_text()


def test_every_form_of_input_gives_the_same_answers(batch, tmp_path):
    """Lines, text, parquet, compressed, a folder, wild cards, a Delta table and one of its versions, a URL."""
    prompts = ["one", "  two ", "three", "four"]
    expected = [
        (prompt, row["text"]) for prompt, row in zip(prompts, batch([{"prompt": p} for p in prompts]), strict=True)
    ]
    table = pa.table({"prompt": prompts})
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in prompts).encode()
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines[: lines.index(b'{"prompt": "three')])
    pq.write_table(table.slice(2, 2), folder / "deep" / "b.parquet")
    (folder / "notes.csv").write_text("x")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\n  two \r\nthree\nfour")
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    write_deltalake(tmp_path / "delta", table)
    write_deltalake(tmp_path / "delta", table.slice(0, 1), mode="overwrite")
    for source in (
        *(tmp_path / "a.txt", tmp_path / "a.parquet", tmp_path / "a.jsonl.gz", folder),
        *(
            tmp_path / "a.j*.gz",
            f"{tmp_path}/delta@v0",
            f"file://{tmp_path}/a.parquet",
            f"file://{tmp_path}/a.jsonl.gz",
        ),
        *(f"file://{tmp_path}/a.txt", f"file://{tmp_path}/delta@v0"),
    ):
        assert [(row["prompt"], row["text"]) for row in batch(source)] == expected, source
    assert len(batch(tmp_path / "delta")) == 1


def test_what_of_a_folder_is_not_read_is_told(batch, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("one")
    (tmp_path / "folder" / "b.csv").write_text("one")
    batch(tmp_path / "folder")
    assert "not read: 1 .csv files (3 bytes)" in capsys.readouterr().err


@pytest.mark.parametrize(("record", "said"), BAD_PROMPTS)
def test_bad_prompts_are_named_before_the_engine_starts(record, said, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "start_engine", lambda *_: pytest.fail("the model was loaded"))
    assert (
        refusal(model_dir, tmp_path, record, "transformers")
        == f"{tmp_path}/in.jsonl, line 2: {said}; mend it, or give --on_error quarantine."
    )


def test_bad_prompts_get_rows_with_their_errors(batch, capsys):
    """Between others, which are answered as if nothing stood there."""
    good = [{"prompt": prompt, "n": i} for i, prompt in enumerate(PROMPTS)]
    records = [record for i, (bad, _) in enumerate(BAD_PROMPTS) for record in (bad, good[i % 5])]
    rows = batch(records, "--on_error", "quarantine")
    expected = batch(good, output="good.jsonl")
    assert [row["text"] for row in rows[1::2]] == [expected[i % 5]["text"] for i in range(len(BAD_PROMPTS))]
    for (record, said), row in zip(BAD_PROMPTS, rows[::2], strict=True):
        assert row["error"].endswith(f": {said}")
        assert (row["text"], row["finish_reason"]) == (None, "error")
        if isinstance(record, dict) and "text" not in record:
            assert row.items() >= record.items()
    assert f"{len(BAD_PROMPTS)} of {2 * len(BAD_PROMPTS)} rows with an error in them" in capsys.readouterr().err


def test_nothing_is_loaded_for_bad_prompts_alone(batch, monkeypatch):
    monkeypatch.setattr(answer_file, "start_engine", lambda *_: pytest.fail("the model was loaded"))
    (row,) = batch([{"prompt": ""}], "--on_error", "quarantine")
    assert row["error"].endswith("line 1: the prompt is empty: it has no tokens")


def test_all_kinds_of_bad_rows_fill_a_parquet_column(batch):
    rows = batch([{"prompt": "a", "k": 1}, {"prompt": "", "k": 2}], "--on_error", "quarantine", output="o.parquet")
    assert [(row["k"], row["finish_reason"], row["error"] is None) for row in rows] == [
        (1, "length", True),
        (2, "error", False),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not valid UTF-8 at byte 12"),
        (b'{"prompt": "a"\n', "line 1: not valid JSON"),
        (b"\n \n", "holds no prompts"),
    ],
)
def test_bytes_that_are_no_records_are_named(batch, tmp_path, content, said):
    (tmp_path / "bytes.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        batch(tmp_path / "bytes.jsonl")


def test_bad_paths_are_named(model_dir, batch, tmp_path):
    (tmp_path / "x.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for path, said in (
        ("none.jsonl", "--input .*none.jsonl does not exist"),
        ("x.csv", r"x\.csv is of no known kind: its name must end in \.jsonl"),
        ("empty", "empty holds no documents"),
        ("*.none", "there is no file of such a name"),
        ("x.parquet", r"x\.parquet cannot be read .*: is it whole"),
    ):
        with pytest.raises(UserError, match=said):
            batch(tmp_path / path)
    with pytest.raises(UserError, match="cannot be reached from here: copy it"):
        batch("https://example.invalid/a.jsonl")
    rest = ("--input", tmp_path / "x.csv", "--output", tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="is not a folder"):
        run("--model", tmp_path / "nowhere", *rest)
    with pytest.raises(UserError, match=r"has no config\.json"):
        run("--model", tmp_path, *rest)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="name the model that it adapts, and the adapter with --lora"):
        run("--model", tmp_path, *rest)


def test_an_output_that_cannot_be_written_is_named_before_anything_is_made(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "start_engine", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "in.txt").write_text("a")
    (tmp_path / "file").touch()
    for output, said in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "file" / "out.jsonl", r"cannot be made \(.*\): choose another place"),
        ("/proc/nowhere/out.jsonl", r"cannot be made \(.*\): choose another place"),
        (tmp_path / "out.csv", r"written as JSON lines \(.jsonl\) or .parquet"),
        ("s3://bucket/out.jsonl", "a local or mounted folder"),
        (tmp_path / "in.txt", "is an input, too"),
    ):
        with pytest.raises(UserError, match=f"--output .*{said}"):
            run("--model", model_dir, "--input", tmp_path / "in.txt", "--output", output, "--overwrite")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--temperature", "3"), r"--temperature 3\.0 must be 0 \(greedy\) or from 0\.01 to 2"),
        (("--temperature", "nan"), "--temperature nan must be"),
        (("--top_p", "0"), "--top_p 0.0 must be a share"),
        (("--n", "2"), "--n 2 needs a --temperature above 0"),
        (("--stop", ""), "--stop .* must hold no empty text"),
        (("--logprobs", "21"), "--logprobs 21 must be from 0 to 20"),
        (("--max_model_len", "4096"), r"--max_model_len 4096 is more than the model has positions for \(2048\)"),
        (("--tensor_parallel_size", "2"), "--tensor_parallel_size is vLLM's"),
        (("--engine_args", '{"dtype": "half"}'), "--engine_args holds dtype, which has a flag of its own"),
        (("--engine_args", "fp8"), "'fp8' is no JSON object"),
        (("--chat", "yes"), "--chat yes: .* has no chat template"),
        (("--system", "x"), "--system: .* has no chat template"),
        (("--lora", "nowhere"), "nowhere is no adapter directory"),
        (("--stopp", "x"), "did you mean --stop"),
    ],
)
def test_settings_that_nothing_can_do_are_named(flags, said, batch):
    with pytest.raises(UserError, match=said):
        batch([{"prompt": "a"}], *flags)


#: A row of everything that JSON has no form for, and what its lines have.
ODD = {
    "number": (float("nan"), None),
    "far": (float("inf"), None),
    "bytes": (b"\xff\x00", "/wA="),
    "when": (datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC), "2026-01-02T03:00:00+00:00"),
    "day": (datetime.date(2026, 1, 2), "2026-01-02"),
    "price": (decimal.Decimal("1.50"), "1.50"),
    "list": ([1.5, float("nan")], [1.5, None]),
    "struct": ({"a": b"x", "b": None}, {"a": "eA==", "b": None}),
    "line": ("a\u2028b\u2029c\x85d", "a\u2028b\u2029c\x85d"),
}


def test_lines_are_json_for_every_reader(batch, tmp_path):
    pq.write_table(
        pa.table({"prompt": ["a"], **{name: [value] for name, (value, _) in ODD.items()}}), tmp_path / "odd.parquet"
    )
    (row,) = batch(tmp_path / "odd.parquet")  # its lines are split as str.splitlines does
    assert {name: row[name] for name in ODD} == {name: plain for name, (_, plain) in ODD.items()}
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_half_a_character_in_a_field_stays_what_it_was(batch):
    (row,) = batch([{"prompt": "a", "field": "\ud800"}])
    assert row["field"] == "\ud800"


def test_parquet_keeps_types(batch, tmp_path):
    table = pa.table({"prompt": ["a", "b"], **{name: [value] * 2 for name, (value, _) in ODD.items()}})
    table = table.append_column("map", pa.array([{"k": 1}, {"k": 2}], pa.map_(pa.string(), pa.int8())))
    table = table.append_column("nothing", pa.nulls(2))
    pq.write_table(table, tmp_path / "odd.parquet")
    batch(tmp_path / "odd.parquet", output="out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.names[:3] == ["prompt", "text", "finish_reason"]
    before = pq.read_table(tmp_path / "odd.parquet")
    for name in (*ODD, "map"):
        assert repr(found.column(name).to_pylist()) == repr(before.column(name).to_pylist())
        assert found.column(name).type == before.column(name).type or name == "struct"  # its nulls have no type


def test_parquet_of_json_lines_has_the_types_of_all_lines(batch):
    records = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": 1.5, "y": [{"z": "q"}]}]
    rows = batch(records, output="out.parquet")
    assert [(row["x"], row["y"]) for row in rows] == [(1.0, None), (1.5, [{"z": "q"}])]
    for other, said in (({"x": "q"}, "'x' has values that no one parquet column"), ({"x": {}}, "'x' .*parquet")):
        with pytest.raises(UserError, match=f"--input: {said}.*name an --output that ends in .jsonl"):
            batch([{"prompt": "a", **({"x": 1} if other["x"] else {})}, {"prompt": "b"} | other], output="out.parquet")


def test_samples_and_logprobs_are_lists(batch):
    flags = ("--n", 3, "--temperature", 1, "--logprobs", 2)
    rows = batch([{"prompt": p} for p in PROMPTS], *flags)
    for row in rows:
        assert len({*row["text"]}) > 1
        assert [len(row[name]) for name in ("text", "finish_reason", "logprobs")] == [3, 3, 3]
        assert all(len(token["top_logprobs"]) == 2 for token in row["logprobs"][0])
    table = batch([{"prompt": p} for p in PROMPTS], *flags, output="out.parquet")
    assert [row["text"] for row in table] == [row["text"] for row in rows]
    assert table[0]["logprobs"][2][0]["logprob"] == rows[0]["logprobs"][2][0]["logprob"]


def test_conversations_in_all_forms_ask_the_same(batch, chat_model):
    turns = [{"role": "user", "content": "x"}]
    forms = [
        *({"prompt": "x"}, {"prompt": turns}, {"messages": turns, "id": 3}, {"conversation": [{"user": "x"}]}),
        *([{"user": "x"}], [{"role": "user", "content": "x", "name": "n"}]),
    ]
    rows = batch(forms, model=chat_model)
    assert len({row["text"] for row in rows}) == 1
    assert rows[2].items() >= forms[2].items()
    (plain,) = batch([forms[0]], "--chat", "no", model=chat_model)
    assert plain["text"] != rows[0]["text"]
    said = batch([{"messages": [{"role": "system", "content": "be x"}, *turns]}], model=chat_model)
    assert batch([{"messages": turns}], "--system", "be x", model=chat_model)[0]["text"] == said[0]["text"]


def test_an_assistant_s_last_turn_goes_on(batch, chat_model):
    turns = [{"user": "x"}, {"assistant": "def"}]
    (row,) = batch([{"messages": turns}], model=chat_model)
    (text,) = batch([{"prompt": "<|user|>x<|endoftext|><|assistant|>def"}], "--chat", "no", model=chat_model)
    assert row["text"] == text["text"]


def test_what_the_template_does_not_read_is_told(batch, chat_model, capsys):
    batch([[{"role": "user", "content": "x", "mood": "good"}]], model=chat_model)
    assert "note: the chat template does not read mood of a turn (1 times)." in capsys.readouterr().err


def test_openai_s_batch_files_are_answered_in_their_form(batch, chat_model):
    def request(number: int, **body) -> dict:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **body}
        return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}

    requests = [
        request(0),
        request(1, max_tokens=2, logprobs=True, top_logprobs=1),
        request(2, temperature=1.0, n=2, seed=5, user="u"),
        request(3, logit_bias={"1": 2}),
        {**request(4), "url": "/v1/embeddings"},
        request(5, temperature="hot"),
    ]
    rows = batch(requests, "--on_error", "quarantine", model=chat_model)
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(6)]
    (plain,) = batch([{"prompt": "x"}], model=chat_model, output="plain.jsonl")
    body = rows[0]["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": plain["text"]}
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    told = rows[1]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in told] == [1, 1]
    assert len(rows[2]["response"]["body"]["choices"]) == 2
    said = [row["error"]["message"].partition(": ")[2] for row in rows[3:]]
    assert [row["response"] for row in rows[3:]] == [None] * 3
    assert said[0] == "key logit_bias of the body is not supported: leave it out"
    assert said[1] == "url '/v1/embeddings' is not answered here, only /v1/chat/completions"
    assert said[2] == "temperature must be a number, not 'hot'"
    with pytest.raises(UserError, match=r"are answered in lines: name an --output in \.jsonl"):
        batch(requests[:1], model=chat_model, output="out.parquet")


def test_a_sample_depends_on_its_row_whatever_stands_before(batch):
    rows = batch([{"prompt": "x"}] * 5, "--temperature", 1, "--batch_size", 2)
    other = batch([{"prompt": "y"}] * 3 + [{"prompt": "x"}] * 2, "--temperature", 1, "--batch_size", 1)
    assert [row["text"] for row in rows[3:]] == [row["text"] for row in other[3:]]
    assert len({row["text"] for row in rows}) == 5
    assert len({row_seed(seed, row, sample) for seed in range(9) for row in range(9) for sample in range(9)}) == 729


def failing_after(steps: int, monkeypatch, error: BaseException | None = None) -> None:
    """The engine loses its device, or a signal comes, after so many steps."""
    step, left = TransformersEngine.step, [steps]

    def broken(self):
        left[0] -= 1
        if left[0] < 0:
            raise error or RuntimeError("device lost")
        return step(self)

    monkeypatch.setattr(TransformersEngine, "step", broken)


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_a_run_goes_on_where_it_was_interrupted(output, batch, model_dir, tmp_path, monkeypatch, capsys):
    records = [{"prompt": p, "k": i} for i, p in enumerate(PROMPTS * 2)]
    flags = ("--temperature", 1, "--batch_size", 2)
    expected = batch(records, *flags, output=f"undisturbed.{output}")
    with monkeypatch.context() as patched:
        failing_after(2, patched)
        with pytest.raises(RuntimeError, match="device lost"):
            batch(records, *flags, output=output)
    assert not (tmp_path / output).exists()
    partial = tmp_path / f".{output}.partial"
    with open(partial, "ab") as stream:
        stream.write(b'{"prompt": "torn')
    steps = []
    monkeypatch.setattr(
        TransformersEngine, "step", lambda self, step=TransformersEngine.step: steps.append(1) or step(self)
    )
    assert batch(records, *flags, output=output) == expected
    assert len(steps) == 3
    assert "4 of them answered before" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or "owner" in path.name]


def test_what_is_left_of_another_run_is_not_gone_on_with(batch, tmp_path, monkeypatch):
    records = [{"prompt": p} for p in PROMPTS]
    with monkeypatch.context() as patched:
        failing_after(1, patched)
        with pytest.raises(RuntimeError):
            batch(records, "--batch_size", 2)
    for source, flags, said in (
        (records, ("--max_new_tokens", 5), "sampling.max_new_tokens: 4, now 5"),
        (records, ("--dtype", "bfloat16"), "model.engine.dtype: 'auto', now 'bfloat16'"),
        (records[:4], (), "input.rows: 5, now 4"),
        ([{"prompt": "y"}, *records[1:]], (), "input.sha256"),
    ):
        with pytest.raises(UserError, match=rf"\.out\.jsonl\.partial has answers .*{said}.*give --resume no"):
            batch(source, *flags, "--batch_size", 2)
    assert len(batch(records[:4], "--resume", "no")) == 4


def test_two_runs_do_not_write_one_output(batch, tmp_path, monkeypatch):
    def other(*_):
        with pytest.raises(UserError, match=r"--output .*out\.jsonl"):
            batch([{"prompt": "a"}], "--resume", "no")
        raise RuntimeError("tried")

    monkeypatch.setattr(answer_file, "_generate", other)
    with pytest.raises(RuntimeError, match="tried"):
        batch([{"prompt": "a"}])


def test_an_input_that_changes_meanwhile_is_named(batch, tmp_path, monkeypatch):
    start = answer_file.start_engine

    def changing(*given):
        write_lines(tmp_path / "in.jsonl", [{"prompt": "other"}])
        return start(*given)

    monkeypatch.setattr(answer_file, "start_engine", changing)
    with pytest.raises(UserError, match="--input changed while they were read"):
        batch([{"prompt": "a"}])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(number, code, batch, tmp_path, monkeypatch, capsys):
    closed = []
    close = TransformersEngine.close
    monkeypatch.setattr(TransformersEngine, "close", lambda self: closed.append(1) or close(self))
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        failing_after(1, patched, None)
        patched.setattr(TransformersEngine, "add", _killing(TransformersEngine.add, 4, number))
        with pytest.raises(SystemExit) as ended:
            batch([{"prompt": p} for p in PROMPTS], "--batch_size", 2)
    assert (ended.value.code, closed) == (code, [1])
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}: 2 of 5 prompts are answered in" in said
    assert len((tmp_path / ".out.jsonl.partial").read_text().splitlines()) == 2
    assert len(batch([{"prompt": p} for p in PROMPTS], "--batch_size", 2)) == 5


def _killing(add, at: int, number: int):
    """``add``, before the call with this number of which a signal comes."""
    calls = []

    def killed(self, request):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.1)
        add(self, request)

    return killed


def test_texts_are_those_of_the_engine(batch, model_dir):
    rows = batch([{"prompt": p} for p in PROMPTS], "--max_new_tokens", 12, "--stop", "e", "\n", "--batch_size", 3)
    assert [row["text"] for row in rows] == [c.text for c in complete(model_dir, stop=("e", "\n"))]
