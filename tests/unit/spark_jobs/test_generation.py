"""What tasks make of prompts, without Spark and with an engine that says which question it was asked."""

import bz2
import copy
import gzip
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spark.chat_templates import TOOL_STYLES

import spark_jobs
from examples.inputs import CHATML
from fft.corpus.files import find_sources
from fft.corpus.splits import Split
from fft.data.part_files import PartFolder
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from fft.quickstart.tokenizer import train_tokenizer
from fft.serve.engines import Completion, EngineOptions
from fft.serve.sampling import Sampling
from fft.text.messages import parse_conversation
from fft.text.records import Malformed
from spark_jobs import generate_table
from spark_jobs.generation import parts as parts_module
from spark_jobs.generation import prompts as prompts_module
from spark_jobs.generation.answers import Asking, answer_chunks
from spark_jobs.generation.engine import Loaded, Wanted
from spark_jobs.generation.fields import Fields, fields_of, infer, merge, turns_in
from spark_jobs.generation.frames import frame_chunks
from spark_jobs.generation.parts import GenerateParts
from spark_jobs.generation.prompts import LookThrough, PromptKeys, prompt_splits, read_chunks
from spark_jobs.runtime.placement import Placement, place_engines
from spark_jobs.token_table.kept import waiting

KEYS = PromptKeys()
TURN = {"role": "user", "content": "Hi", "mood": "good"}
LINES = ("a.jsonl.gz", "b.jsonl.bz2", "c.txt")


class Echo:
    """Answers with its sample's seed, out of order: the last request first."""

    name, limit, window = "echo", 200, 5

    def __init__(self) -> None:
        self.waiting = []

    def add(self, request):
        self.waiting.append(request)

    def step(self):
        request = self.waiting.pop()
        return [(request.number, Completion(str(request.seed), 3, "stop"))]

    def close(self):
        self.waiting.clear()


@pytest.fixture(scope="module")
def loaded():
    tokenizer = train_tokenizer(["What is two and two?", "def f(x): return x"] * 5, 300)
    tokenizer.chat_template = CHATML
    return Loaded(Echo(), tokenizer, started=True)


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def splits_of(*paths: Path) -> list[Split]:
    return prompt_splits(find_sources(list(paths)))


def looked(splits: list[Split]) -> Fields:
    """The fields of JSON lines, as the job finds them."""
    batch = pa.RecordBatch.from_pylist([vars(split) for split in splits])
    (found,) = LookThrough(KEYS)(iter([batch]))
    rows, turns = (pa.ipc.read_schema(pa.py_buffer(found.column(name)[0].as_py())) for name in ("rows", "turns"))
    return fields_of([rows], [turns], "prompt")


def answered(loaded, path: Path, **given) -> list[dict]:
    """All rows that the prompts of a file of JSON lines make."""
    sampling = Sampling(**given)
    splits = splits_of(path)
    fields, asking = looked(splits), Asking(Wanted("m", EngineOptions()), sampling, KEYS)
    chunks = (
        chunk
        for part in range(splits[-1].part + 1)
        for chunk in read_chunks(part, [split for split in splits if split.part == part], fields, KEYS)
    )
    return [
        row
        for found in answer_chunks(loaded, asking, chunks)
        for row in found.table(fields, sampling.logprobs is not None, error=True).to_pylist()
    ]


def test_answers_stand_in_order_beside_the_fields_of_their_rows(loaded, tmp_path):
    rows = [{"id": i, "prompt": f"What is {i}?", "level": i % 3, "tags": ["a"] * (i % 2)} for i in range(40)]
    out = answered(loaded, lines(tmp_path / "p.jsonl", rows), n=2, temperature=1.0)
    assert [(row["id"], row["sample"]) for row in out] == [(i, k) for i in range(40) for k in (0, 1)]
    assert [{name: row[name] for name in rows[0]} for row in out[::2]] == rows
    assert len({row["text"] for row in out}) == 80
    for row in out:
        assert row["messages"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["text"]},
        ]
        assert (row["finish_reason"], row["tokens"], row["error"]) == ("stop", 3, None)


def test_samples_depend_on_the_id_and_not_on_where_a_row_stands(loaded, tmp_path):
    rows = [{"id": f"q{i}", "prompt": "What?"} for i in range(12)]
    one = answered(loaded, lines(tmp_path / "a.jsonl", rows), temperature=1.0)
    other = answered(loaded, lines(tmp_path / "b.jsonl", rows[::-1]), temperature=1.0)
    assert {row["id"]: row["text"] for row in one} == {row["id"]: row["text"] for row in other}
    assert len({row["text"] for row in one}) == 12
    assert one != answered(loaded, tmp_path / "a.jsonl", temperature=1.0, seed=1)


def test_equal_prompts_without_ids_get_different_samples(loaded, tmp_path):
    out = answered(loaded, lines(tmp_path / "a.jsonl", [{"prompt": "What?"}] * 30), temperature=1.0)
    assert len({row["text"] for row in out}) == 30


def test_prompts_in_the_formats_of_training_data_make_conversations(loaded, tmp_path):
    hermes = replace(loaded, engine=Echo(), tokenizer=copy.deepcopy(loaded.tokenizer))
    hermes.engine.limit = 400
    hermes.tokenizer.chat_template = TOOL_STYLES["hermes"].template
    call = {"name": "f", "arguments": {"a": 1}}
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}], "system": "Be brief."},
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "7"},
            ]
        },
    ]
    out = answered(hermes, lines(tmp_path / "a.jsonl", rows))
    assert [row["error"] for row in out] == [None] * 3
    told = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in out]
    answers = [("assistant", row["text"]) for row in out]
    assert told[0] == [("system", "Be brief."), ("user", "Hi"), answers[0]]
    assert told[1] == [("user", "Add\n1 1"), answers[1]]
    assert told[2] == [("user", "Hi"), ("assistant", None), ("tool", "7"), answers[2]]
    assert json.loads(out[2]["messages"][1]["tool_calls"]) == [{"type": "function", "function": call}]
    assert out[1]["output"] == "2"
    raw = parse_conversation(json.dumps({"messages": out[2]["messages"]}).encode(), "id")
    assert raw.messages[1]["tool_calls"][0]["function"] == call


def test_conversations_keep_their_turns(loaded, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]},  # it goes on
        {"conversation": [{"user": "Hi"}, {"assistant": "Yes"}, {"user": "And?"}]},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
        {"messages": [{"user": "Hi"}, {"role": "assistant", "content": "No", "weight": 0}, {"user": "And?"}]},
    ]
    out = answered(loaded, lines(tmp_path / "a.jsonl", rows))
    told = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in out]
    texts = [row["text"] for row in out]
    assert told[0] == [("user", "Hi"), ("assistant", f"So{texts[0]}")]
    assert told[1] == [("user", "Hi"), ("assistant", "Yes"), ("user", "And?"), ("assistant", texts[1])]
    assert told[2] == [("system", "Be brief."), ("user", "Hi"), ("assistant", texts[2])]
    assert [turn["name"] for turn in out[2]["messages"]] == [None, "Ann", None]
    assert [turn["weight"] for turn in out[3]["messages"]] == [None, 0, None, None]
    assert set(out[0]) == {"messages", "text", "finish_reason", "tokens", "sample", "error"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("not json", "not valid JSON"),
        ("7", "not a JSON object but int"),
        ({"question": "Hi"}, "prompt is null or missing"),
        ({"prompt": None}, "prompt is null or missing"),
        ({"prompt": 7}, "the prompt is int"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x y z " * 40}, "tokens, but may have 199"),
        ({"prompt": "Hi", "messages": [{"user": "Hi"}]}, "both prompt and messages are there"),
        ({"messages": [{"role": "ghost", "content": "Hi"}]}, "unknown role 'ghost'"),
        ({"messages": []}, "no turns"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(row, reason, loaded, tmp_path):
    rows = [{"prompt": "Hi"}, *[{"prompt": f"What is {i}?"} for i in range(30)]]
    path = lines(tmp_path / "p.jsonl", [*rows[:20], "", row, *rows[20:]])
    out = answered(loaded, path)
    (bad,) = [at for at, found in enumerate(out) if found["error"] is not None]
    assert reason in out[bad]["error"]
    assert (len(out), bad) == (32, 20)
    splits, fields = splits_of(path), looked(splits_of(path))
    asking = Asking(Wanted("m", EngineOptions()), Sampling(), KEYS)
    chunks = (chunk for split in splits for chunk in read_chunks(split.part, [split], fields, KEYS))
    found = [
        found for found in answer_chunks(loaded, asking, chunks) if any(isinstance(r, Malformed) for r in found.rows)
    ]
    with pytest.raises(UserError, match=rf"p\.jsonl, line 22: .*{reason}.*quarantine"):
        found[0].check()


def test_files_of_all_kinds_are_read_as_they_stand(loaded, tmp_path):
    texts = [f"What is {i}?" for i in range(50)]
    folder = tmp_path / "in"
    folder.mkdir()
    content = "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "b.jsonl.bz2").write_bytes(bz2.compress(content))
    (folder / "c.txt").write_text("\n".join(texts) + "\n\n")
    pq.write_table(pa.table({"prompt": texts, "n": range(50)}), folder / "d.parquet", row_group_size=7)
    splits = splits_of(folder)
    schemas = [pa.schema([("prompt", pa.string())]), pq.read_schema(folder / "d.parquet")]
    fields = fields_of(schemas, [], "prompt")
    read = {}
    for part in range(splits[-1].part + 1):
        for chunk in read_chunks(part, [split for split in splits if split.part == part], fields, KEYS):
            for row, place, n in zip(chunk.rows, chunk.places, chunk.carried.column("n").to_pylist(), strict=True):
                read[str(place).removeprefix(f"{folder}/")] = row["prompt"], n
    assert read == {
        **{
            f"{name}, line {i + 1}": (text, None)
            for name in ("a.jsonl.gz", "b.jsonl.bz2", "c.txt")
            for i, text in enumerate(texts)
        },
        **{f"d.parquet, row {i}": (text, i) for i, text in enumerate(texts)},
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 200))
def test_lines_are_numbered_right_wherever_a_split_begins(tmp_path_factory, lengths, chunk):
    path = tmp_path_factory.mktemp("lines") / "p.txt"
    path.write_text("".join("x" * length + "\n" for length in lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_module, "PART_BYTES", chunk)
        splits = splits_of(path)
    fields = Fields(pa.schema([("prompt", pa.string())]), pa.schema([]))
    found = [
        (str(place), row["prompt"])
        for split in splits
        for read in read_chunks(split.part, [split], fields, KEYS)
        for row, place in zip(read.rows, read.places, strict=True)
    ]
    assert found == [(f"{path}, line {i + 1}", "x" * length) for i, length in enumerate(lengths) if length]


def test_types_of_json_are_found_in_all_rows():
    rows = [
        {"a": 1, "b": None, "c": [], "d": {"x": 1}, "e": 1, "f": {}, "g": 1 << 70, "h": True},
        {"a": 2.5, "b": None, "c": ["t"], "d": {"y": "t"}, "e": "one", "f": {}, "g": 1, "h": False, "i": "late"},
    ]
    fields = fields_of([infer(rows[:1]), infer(rows[1:]), pa.schema([("prompt", pa.string())])], [], "prompt")
    types = {field.name: str(field.type) for field in fields.carried}
    assert types["a"] == "double"
    assert types["b"] == types["e"] == types["f"] == types["g"] == types["i"] == "string"
    assert types["c"].startswith("list<")
    assert types["d"] == "struct<x: int64, y: string>"
    assert types["h"] == "bool"
    (note,) = fields.notes
    assert note.endswith("e, f, g.")
    carried = fields.carry(rows).to_pylist()
    assert [row["e"] for row in carried] == ["1", '"one"']
    assert [row["g"] for row in carried] == [str(1 << 70), "1"]
    assert [row["d"] for row in carried] == [{"x": 1, "y": None}, {"x": None, "y": "t"}]
    assert infer([*rows]).field("e").type == pa.string()
    assert merge([infer(rows[:1]), infer(rows)]) == merge([infer(rows), infer(rows[:1])])


@pytest.mark.parametrize("name", ["text", "finish_reason", "tokens", "sample", "logprobs"])
def test_a_column_that_the_output_needs_is_refused(name):
    with pytest.raises(UserError, match=f"have a field '{name}', which the output needs"):
        fields_of([pa.schema([("prompt", pa.string()), (name, pa.string())])], [], "prompt")


def test_inputs_without_prompts_are_refused():
    with pytest.raises(UserError, match="have no 'prompt' and no 'messages' or 'conversation' \\(they have q\\)"):
        fields_of([pa.schema([("q", pa.string())])], [], "prompt")


def test_rows_of_a_dataframe_are_known_by_id_or_content(loaded):
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    schema = pa.schema([("id", pa.int64()), ("a.b", pa.binary()), ("messages", pa.list_(turn))])
    fields = fields_of([schema], [turns_in(schema, KEYS.turns)], "prompt")
    messages = [{"role": "user", "content": "Hi", "name": None}]
    rows = [{"id": i, "a.b": b"\xff", "messages": messages} for i in (None, None, 2, 3)]
    asking = Asking(Wanted("m", EngineOptions()), Sampling(temperature=1.0), KEYS)

    def run(some: list[dict], size: int) -> list[dict]:
        batches = (pa.RecordBatch.from_pylist(some[at : at + size], schema) for at in range(0, len(some), size))
        chunks = frame_chunks(batches, schema.names, fields, KEYS, ("DataFrame", -1))
        return [
            row for found in answer_chunks(loaded, asking, chunks) for row in found.table(fields, False).to_pylist()
        ]

    out = run(rows, 3)
    assert [row["a.b"] for row in out] == [b"\xff"] * 4
    assert out[0]["messages"][0] == {"role": "user", "content": "Hi", "name": None}
    assert out[0]["text"] == out[1]["text"]
    assert len({row["text"] for row in out}) == 3
    assert run(rows[::-1], 1) == out[::-1]


class TestParts:
    """Tasks that write parts, and find them again."""

    @pytest.fixture
    def engine(self, monkeypatch, loaded):
        """Counts how often an engine was asked for."""
        asked = []

        @contextmanager
        def worker_engine(wanted):
            asked.append(wanted)
            yield loaded

        monkeypatch.setattr(parts_module, "worker_engine", worker_engine)
        return asked

    def run(self, folder: Path, path: Path, fail: bool = True, only: set[int] | None = None, **given) -> list[dict]:
        """What the tasks report, one task for all parts."""
        splits = splits_of(path)
        target = PartFolder(folder, WorkerNotes(str(folder), "-job"), "", "_finished/work")
        target.parts.mkdir(parents=True, exist_ok=True)
        asking = Asking(Wanted("m", EngineOptions()), Sampling(**given), KEYS)
        work = GenerateParts(asking, looked(splits), target, fail)
        rows = [vars(split) for split in splits if only is None or split.part in only]
        return [row for found in work(pa.RecordBatch.from_pylist([row]) for row in rows) for row in found.to_pylist()]

    def rows(self, folder: Path, reports: list[dict]) -> list[dict]:
        names = [report["name"] for report in reports if report["name"]]
        return [row for name in names for row in pq.read_table(folder / "_finished/work" / name).to_pylist()]

    def test_finished_parts_are_found_and_no_engine_is_started_for_them(self, engine, tmp_path):
        path = lines(tmp_path / "p.jsonl", [{"id": i, "prompt": f"What is {i}?"} for i in range(90)])
        folder = tmp_path / "out"
        some = self.run(folder, path, only={1, 2, 6})
        assert waiting(folder) == {"work": 3}
        every = self.run(folder, path)
        assert [report["part"] for report in every] == list(range(8))
        assert [every[i] for i in (1, 2, 6)] == some
        assert [row["id"] for row in self.rows(folder, every)] == list(range(90))
        assert len(engine) == 2
        assert self.run(folder, path) == every
        assert len(engine) == 2
        assert len(list((folder / "_finished/work").glob(".part-*"))) == 8

    def test_accounts_of_a_part(self, engine, tmp_path):
        rows = [{"prompt": f"What is {i}?"} for i in range(16)]
        path = lines(tmp_path / "p.jsonl", [*rows[1:], {"messages": [TURN]}, "no json", {"prompt": ""}])
        folder = tmp_path / "out"
        reports = self.run(folder, path, fail=False, n=2, temperature=1.0)
        sums = {name: 0 for report in reports for name, _ in report["tallies"]}
        for report in reports:
            for name, count in report["tallies"]:
                sums[name] += count
        assert (sums["prompts_in"], sums["prompts_out"], sums["quarantined"]) == (18, 16, 2)
        assert (sums["finished stop"], sums["engine_starts"], sums["engine echo"]) == (32, 1, len(reports))
        assert sum(report["rows"] for report in reports) == 32
        assert sums["unused mood of a turn"] == 1
        assert sum(report["tokens"] for report in reports) == 96
        aside = [report["rejects"] for report in reports if report["rejects"]]
        told = [
            json.loads(line) for name in aside for line in (folder / "_finished/work" / name).read_text().splitlines()
        ]
        assert [entry["file"] for entry in told] == [f"{path}, line 17", f"{path}, line 18"]
        assert told[0]["record"] == "no json"

    def test_a_malformed_row_leaves_what_is_finished(self, engine, tmp_path):
        path = lines(tmp_path / "p.jsonl", [*[{"prompt": f"What is {i}?"} for i in range(60)], "no json"])
        folder = tmp_path / "out"
        with pytest.raises(UserError, match="line 61"):
            self.run(folder, path)
        assert waiting(folder) == {"work": 7}
        assert len(list((folder / "_finished/work").glob(".part-*"))) == 7
        every = self.run(folder, path, fail=False)
        assert [row["rows"] for row in every].count(0) == 0
        assert len(engine) == 2  # for the last part alone
        with pytest.raises(UserError, match="line 61"):
            self.run(folder, path)

    def test_a_part_without_prompts_has_no_file(self, engine, tmp_path):
        path = lines(tmp_path / "p.jsonl", [{"prompt": 7}] * 3)
        reports = self.run(tmp_path / "out", path, fail=False)
        assert {report["name"] for report in reports} == {""}
        assert self.run(tmp_path / "out", path, fail=False) == reports

    def test_others_stop_at_the_first_error(self, engine, tmp_path):
        path = lines(tmp_path / "p.jsonl", [{"prompt": "What?"}] * 60)
        folder = tmp_path / "out"
        folder.mkdir()
        WorkerNotes(str(folder), "-job").fail(UserError("another task"))
        assert self.run(folder, path) == []


def test_malformed_is_told_of_bytes_that_are_no_text(tmp_path):
    offsets = pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00")
    bad = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "p.parquet")
    splits = splits_of(tmp_path / "p.parquet")
    fields = fields_of([pq.read_schema(tmp_path / "p.parquet")], [], "prompt")
    (chunk,) = read_chunks(0, splits, fields, KEYS)
    (row,) = chunk.rows
    assert isinstance(row, Malformed)
    assert "not valid UTF-8" in str(row)


class Settings(dict):
    """Stands for a session of which nothing but the settings is asked."""

    @property
    def conf(self):
        return self


@pytest.mark.parametrize("master", [None, "local", "local[4]", "local[2,4]"])
def test_a_local_spark_has_one_engine_unless_told_otherwise(master):
    processors = len(os.sched_getaffinity(0))
    spark = Settings({"spark.master": master})
    assert place_engines(spark, 8, 1) == Placement(1, None, processors)
    assert place_engines(spark, 8, 1, num_engine=2) == Placement(2, None, max(1, processors // 2))
    assert place_engines(spark, 1, 1, num_engine=2).tasks == 1


@pytest.mark.parametrize(
    ("given", "gpus", "asked"),
    [
        ({}, 1, None),
        ({"spark.executor.cores": "8"}, 1, {"cpus": 8}),
        ({"spark.executor.cores": "8", "spark.task.cpus": "4"}, 1, None),
        ({"spark.executor.resource.gpu.amount": "4"}, 2, {"gpu": 2}),
        ({"spark.executor.resource.gpu.amount": "1", "spark.task.resource.gpu.amount": "0.25"}, 1, {"gpu": 1}),
        ({"spark.executor.resource.gpu.amount": "1", "spark.task.resource.gpu.amount": "1"}, 1, None),
    ],
)
def test_a_task_on_a_cluster_takes_what_its_engine_needs(given, gpus, asked):
    place = place_engines(Settings({"spark.master": "spark://host:7077", **given}), 9, gpus)
    assert (place.tasks, place.threads) == (9, None)
    found = place.profile and {name: one.amount for name, one in place.profile.taskResources.items()}
    assert found == asked
    assert place_engines(Settings({"spark.master": "yarn"}), 1000, 1).tasks == 256
    assert place_engines(Settings({"spark.master": "yarn"}), 1000, 1, num_engine=3).tasks == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_token": 3}, "`max_token` is no setting of generation, which are batch_size"),
        ({"temperature": -1.0}, "`temperature` -1.0 must be"),
        ({"engine": "gguf"}, "`engine` gguf must be one of"),
        ({"num_engine": 0}, "`num_engine` is 0, it must be a positive integer"),
        ({"chat": "maybe"}, "`chat` is 'maybe', it must be one of auto, yes, no"),
        ({"model": "nowhere"}, "`model` nowhere has no config.json"),
    ],
)
def test_parameters_are_checked_before_anything_starts(given, sentence, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        generate_table(tmp_path, tmp_path / "out", **{"model": model, **given})


def test_the_function_is_the_packages_and_not_the_script():
    assert callable(spark_jobs.generate)
