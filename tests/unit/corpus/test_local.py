"""JSON lines as training data: made once, found again, made anew when file, tokenizer or template changes."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conversations import sentences, write_chats
from spark.chat_templates import save_chat_tokenizer

from fft import train
from fft.corpus import local
from fft.corpus.local import is_json_lines, scratch_cache, table_of, text_input
from fft.corpus.tokenize_parts import name_malformed
from fft.data.manifest import read_manifest
from fft.data.pairs import REFERENCE_PREFIX
from fft.data.table import Table
from fft.errors import UserError
from fft.files import staging_folder
from fft.planning import dry_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen2.5", "qwen2.5")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 60)


def make(path, tokenizer, cache, max_len=4096):
    return table_of(text_input(path, tokenizer, max_len), cache)


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.jsonl", True), ("a.json", True), ("a.ndjson.gz", True), ("a.parquet", False), ("runs/web", False)],
)
def test_what_counts_as_json_lines(name, said, tmp_path):
    assert is_json_lines(tmp_path / name) == said
    (tmp_path / name).mkdir(parents=True)
    assert not is_json_lines(tmp_path / name)  # Spark writes folders of any name


def test_the_first_record_says_what_a_file_holds(tmp_path, tokenizer):
    for record, task in (
        ([{"user": "a"}, {"assistant": "b"}], "chat"),
        ({"conversation": [{"user": "a"}, {"assistant": "b"}]}, "chat"),
        ({"messages": []}, "chat"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "chat"),
        ({"instruction": "a", "output": "b"}, "chat"),
        ({"prompt": "a", "completion": "b"}, "chat"),
        ({"text": "a", "id": 1}, "pretrain"),
    ):
        path = tmp_path / "some.jsonl"
        path.write_text("\n\n" + json.dumps(record) + "\n")
        assert text_input(path, tokenizer, 64).task == task


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no documents"),
        ("\n \n", "holds no documents"),
        ("\n{'a': 1}\n", r"line 2: not valid JSON"),
        ('{"body": "x"}\n', r"line 1: an object of body, where a text \(key text\) or a conversation"),
        ("17\n", r"line 1: no object, where"),
        (
            '{"question": "a", "answer": "b"}\n',
            r"should be: jq -c '\{prompt: .question, completion: .answer\}' makes one",
        ),
        (
            '{"instruction": "a", "output": "b", "text": "a b"}\n',
            r"1: it has a text \(key text\) and a conversation \(instruction and output\): .* jq -c 'del\(.text\)'",
        ),
        (
            '{"text": "a"}\n{"text": "b"}\n\n{"text": 3}\n',
            r"some.jsonl, line 4: key text is int, .*: mend it, or make a table",
        ),
        (
            '[{"user": "a"}, {"assistant": "b"}]\n{"text": "a"}\n',
            r"some.jsonl, line 2: no key messages or",
        ),
        ('{"text": ""}\n', r"holds no documents: 1 are empty"),
    ],
)
def test_bad_lines_are_named(content, said, tmp_path, tokenizer):
    path = tmp_path / "some.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        make(path, tokenizer, tmp_path / "cache")
    left = [p.name for p in (tmp_path / "cache").glob("*")] if (tmp_path / "cache").exists() else []
    assert all(name.endswith((".lock", ".content")) for name in left)


def test_the_line_that_is_named_is_the_one_that_is_told_of(tokenizer, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n{"txt": "b"}\n')
    encoder = text_input(path, tokenizer, 64).encoder
    met = UserError("malformed record: " + json.dumps([str(path), "key text is missing"]))  # by the worker of line 3
    assert str(name_malformed(met, encoder, "mend it.")) == f"{path}, line 2: key text is int, not a string: mend it."
    (tmp_path / "some.txt").write_bytes(b"\xff")
    met = UserError("malformed record: " + json.dumps([str(tmp_path / "some.txt"), "not valid UTF-8 at byte 0"]))
    assert str(name_malformed(met, encoder, "mend it.")).startswith(f"{tmp_path}/some.txt: not valid UTF-8 at byte 0:")


def test_a_table_is_made_once(chats, tokenizer, tmp_path, monkeypatch):
    first = make(chats, tokenizer, tmp_path)
    table = Table.open(first)
    manifest = read_manifest(first)
    assert table.columns == {"input_ids", "labels", "doc_ids"}
    assert manifest.lineage["inputs"] == [str(chats)]
    assert manifest.lineage["counts"]["documents_out"] == 60
    assert manifest.tokenizer.sha256
    monkeypatch.setattr(local, "_make", None)
    assert make(chats, tokenizer, tmp_path) == first
    os.utime(chats)  # touched, not changed
    assert make(chats, tokenizer, tmp_path) == first
    copy = shutil.copy(chats, tmp_path / chats.name)
    assert make(tmp_path / copy, tokenizer, tmp_path) == first


def test_another_table_is_made_when_anything_it_depends_on_changes(chats, tokenizer, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(chats.read_bytes())
    own = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, own)
    made = [make(path, own, tmp_path / "cache")]
    before = path.stat()
    path.write_bytes(chats.read_bytes().replace(b"the", b"THE", 1))  # as long as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    made += [make(path, own, tmp_path / "cache"), make(path, own, tmp_path / "cache", max_len=128)]
    template = own / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    made.append(make(path, own, tmp_path / "cache"))
    assert len(set(made)) == 4
    assert all(read_manifest(folder) for folder in made)  # a run may still be reading the older ones


def test_settings_of_the_tokenizer_that_change_ids_change_the_table(chats, tokenizer, tmp_path):
    own = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, own)
    before = text_input(chats, own, 512).identity
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"split_special_tokens": True}))
    assert text_input(chats, own, 512).identity != before


def test_a_file_that_changes_while_it_is_read_makes_no_table(chats, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "growing.jsonl"
    path.write_bytes(chats.read_bytes())
    real = local._tokenize

    def grows(text, folder):
        manifest = real(text, folder)
        with path.open("a") as stream:
            stream.write('[{"user": "more"}, {"assistant": "of it"}]\n')
        return manifest

    monkeypatch.setattr(local, "_tokenize", grows)
    with pytest.raises(UserError, match=r"growing\.jsonl was changed while it was tokenized"):
        make(path, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*growing-*"))
    monkeypatch.setattr(local, "_tokenize", real)
    assert read_manifest(make(path, tokenizer, tmp_path / "cache")).lineage["counts"]["documents_out"] == 61


def test_what_a_killed_process_left_is_made_again(chats, tokenizer, tmp_path):
    folder = make(chats, tokenizer, tmp_path)
    shutil.rmtree(folder)
    staging_folder(folder).mkdir()
    (staging_folder(folder) / "part-00000.parquet").write_bytes(b"half")
    assert make(chats, tokenizer, tmp_path) == folder
    assert Table.open(folder).rows == 60
    assert not staging_folder(folder).exists()


def test_a_process_that_was_taken_over_leaves_the_table_of_the_other(chats, tokenizer, tmp_path, monkeypatch):
    """As one that stood still for minutes on another machine, and wakes up when the table is made."""
    real, made = local._tokenize, []

    def sleeps(text, folder):
        manifest = real(text, folder)
        (lock,) = tmp_path.glob(".*.lock")
        lock.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(local, "_tokenize", real)
            made.append(make(chats, tokenizer, tmp_path))
        return manifest

    monkeypatch.setattr(local, "_tokenize", sleeps)
    with pytest.raises(UserError, match="was taken over by another job while this one stood still"):
        make(chats, tokenizer, tmp_path)
    assert Table.open(made[0]).rows == 60


def test_while_another_machine_makes_it_a_process_waits(chats, tokenizer, tmp_path):
    """Its locks may not be seen here; its mark is, and is renewed, until it has lain still for long."""
    make(chats, tokenizer, tmp_path)
    lock = tmp_path / ".chats.lock"
    lock.write_text(json.dumps({"owner": "0" * 12, "process": 1, "host": "far", "machine": "other"}))
    waiting = threading.Thread(target=make, args=(chats, tokenizer, tmp_path))
    waiting.start()
    waiting.join(0.7)
    assert waiting.is_alive()
    os.utime(lock, (0, 0))
    waiting.join(300)
    assert not waiting.is_alive()
    assert not lock.exists()


def test_a_table_that_has_lost_a_file_is_made_again(chats, tokenizer, tmp_path):
    folder = make(chats, tokenizer, tmp_path)
    lost = min(folder.glob("*.parquet"))
    content = lost.read_bytes()
    lost.unlink()
    assert make(chats, tokenizer, tmp_path) == folder
    assert lost.read_bytes() == content


def test_what_is_kept_beside_a_table_does_not_have_it_made_again(chats, tokenizer, tmp_path):
    folder = make(chats, tokenizer, tmp_path)
    kept = folder / f"{REFERENCE_PREFIX}0.parquet"
    kept.write_bytes(b"of the whole table")
    assert make(chats, tokenizer, tmp_path) == folder
    assert kept.exists()


def test_ranks_that_ask_at_once_get_one_table(chats, tokenizer, tmp_path):
    text, calls, real = text_input(chats, tokenizer, 256), [], local._make

    def counted(*given):
        calls.append(given)
        real(*given)

    local._make = counted
    try:
        with ThreadPoolExecutor(4) as pool:
            folders = set(pool.map(lambda _: table_of(text, tmp_path / "cache"), range(4)))
    finally:
        local._make = real
    assert len(folders) == len(calls) == 1


def test_compressed_texts(tokenizer, tmp_path):
    texts = sentences(50)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    plain, packed = (Table.open(make(tmp_path / name, tokenizer, tmp_path)) for name in ("a.jsonl", "b.jsonl.gz"))
    assert plain.tokens == packed.tokens
    assert plain.rows == packed.rows == 50
    assert plain.columns == {"input_ids", "doc_ids"}


def test_a_trainer_that_reads_texts_names_its_flags(tmp_path, monkeypatch):
    def reads(arguments):
        text_input(tmp_path / "a.jsonl", Path(arguments.tokenizer), 8)

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(dry_run, "dry_run", reads)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "m", "--train_data", "t", "--tokenizer", "t", "--dry_run"])
    with pytest.raises(UserError, match=r"^--tokenizer t is not a folder"):
        train.main()


@pytest.mark.parametrize("name", ["x" * 245 + ".jsonl", "日本" * 40 + ".jsonl", ".jsonl", "my chats.v1.jsonl"])
def test_a_file_may_have_any_name(name, chats, tokenizer, tmp_path):
    path = tmp_path / name
    path.write_bytes(chats.read_bytes())
    assert Table.open(make(path, tokenizer, tmp_path / "cache")).rows == 60


def test_the_scratch_folder_is_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = scratch_cache()
    assert scratch_cache() == folder
    folder.chmod(0o777)
    with pytest.raises(UserError, match="open to others"):
        scratch_cache()
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="belongs to somebody else"):
        scratch_cache()
    folder.unlink()
    folder.touch()
    with pytest.raises(UserError, match="belongs to somebody else"):
        scratch_cache()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no temporary folder can hold tokens \(.*\): make room, or give the run"):
        scratch_cache()


def test_neither_torch_nor_spark_is_needed(chats, tokenizer, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'pyspark', 'deepspeed', 'spark_jobs'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from fft.corpus.local import text_input, table_of\n"
        "if __name__ == '__main__':\n"
        f"    text = text_input(Path({str(chats)!r}), Path({str(tokenizer)!r}), 4096)\n"
        f"    print(table_of(text, Path({str(tmp_path)!r})))\n"
    )
    script = tmp_path / "alone.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Table.open(done.stdout.strip()).rows == 60
    assert "chat data" in done.stderr


#: A run by two workers, which read their files over and over: none of them ends by itself. Each, as it imports this
#: file as well, says that it has begun once it has read a file.
ENDLESS = """
import os, signal, sys
from pathlib import Path
from fft.corpus.local import table_of, text_input
from fft.corpus.tokenize_parts import PartTokenizer

folder, tokenizer = map(Path, sys.argv[1:])
read = PartTokenizer.add_split

def over_and_over(self, split):
    while True:
        read(self, split)
        (folder / f"begun-{os.getpid()}").touch()

PartTokenizer.add_split = over_and_over
os.sched_getaffinity = lambda _: range(2)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    table_of(text_input(folder / "chats.jsonl", tokenizer, 4096), folder)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_run_that_is_ended(how, tokenizer, tmp_path):
    script = tmp_path / "ended.py"
    script.write_text(ENDLESS)
    write_chats(tmp_path / "chats.jsonl", 200)
    ours = {**os.environ, "PYTHONPATH": str(Path(local.__file__).parents[2])}
    pipes = {"stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, script, tmp_path, tokenizer]
    with subprocess.Popen(command, env=ours, start_new_session=True, **pipes) as process:
        try:
            while len(list(tmp_path.glob("begun-*"))) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(how)
            said = process.communicate(timeout=300)[1]  # while a worker is left, it holds the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -how, said
    assert said.count("Traceback") == (how == signal.SIGINT)
