"""No finished table is lost: two jobs with one output, drivers that are killed at any moment, a full disk.

The points at which a driver touches files are tried one by one in ``tests/unit/spark_jobs/test_output.py``. Here real
drivers die on real engines: with ``FFT_KILLS=20`` each job so many times, by default tokenize alone, once.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest
from failing_store import with_faults
from listening import processes_of
from namespaces import own_mounts
from thorough import thorough

from fft.corpus import splits
from fft.data.manifest import read_manifest
from fft.data.owner import OWNER_NAME
from fft.data.part_files import QUARANTINE
from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import rows_of, stacks_of_ours
from spark_jobs import cli, tokenize_table
from spark_jobs.token_table.kept import FINISHED

ROOT = Path(__file__).resolve().parents[2]
#: Tables that jobs read, as they are called here.
JOBS_OF_TABLES = ("tokens", "shuffled")
KILLS = int(os.environ.get("FFT_KILLS", "1"))
JOBS = ("tokenize",) if KILLS == 1 else ("tokenize", "shuffle", "repartition")
#: Settings of the process by engine.
ENGINES = {"spark": {}, "sail": {"FFT_ENGINE": "sail"}}
#: Spark on one machine gives a task one try, unless it is told another number.
MASTERS = {"tries": "local[2,4]"}


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory) -> Path:
    """The corpus some times over: a second or two of work."""
    lines = corpus.read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(line.replace('"id": "', f'"id": "{i}-', 1) for i in range(6) for line in lines))
    return path


def start(engine: str, *command: object, **more: str) -> subprocess.Popen:
    """A job in a session of its own, so that what it leaves can be told; with ``more`` in its environment."""
    words = [str(word) for word in command]
    environment = {**os.environ, **ENGINES.get(engine, {}), "SPARK_LOCAL_IP": "127.0.0.1", **more}
    master = MASTERS.get(engine, "local[2]")
    environment["PYSPARK_SUBMIT_ARGS"] = f"--master {master} --conf spark.ui.enabled=false pyspark-shell"
    script, *flags = words
    return subprocess.Popen(
        [sys.executable, Path("spark_jobs", f"{script}.py"), *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return said


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check_nobody_left(process: subprocess.Popen, seconds: float = 300) -> None:
    """No process of a job outlives its driver: neither Java nor Sail's server, nor a worker of theirs."""
    deadline = time.monotonic() + seconds
    while left := [command for command in commands_of(process.pid) if command]:  # who has ended has none any more
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"left: {left}")
        time.sleep(0.05)


def fingerprints(out: Path) -> dict[str, str]:
    """What the finished tables at an output hold, by name, each read whole."""
    found = {}
    for name in ("", "train", "validation"):
        try:
            table = Table.open(out / name)
        except UserError:
            continue
        for group in range(len(table.row_groups)):
            table.read(group)
        found[name] = table.fingerprint
    return found


def job_of(name: str, seed: int, folders: dict[str, Path]) -> list[object]:
    """A job's command but for its output; another seed makes another table."""
    if name == "tokenize":
        flags = ["-i", folders["many"], "--tokenizer", folders["tokenizer"], "--max_len", 100 + seed]
    elif name == "shuffle":
        flags = ["-i", folders["tokens"], "--seed", seed, "--holdout", "0.1", "--num_block", 4]
    else:
        flags = ["-i", folders["shuffled"], "--max_len", 256, "--seed", seed, "--num_partition", 4]
    return [name, *flags]


@pytest.fixture(scope="module")
def folders(many, tokenizer, tokens, shuffled):
    return {"many": many, "tokenizer": tokenizer, "tokens": tokens, "shuffled": shuffled}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("engine", [thorough("spark"), "sail"])
def test_killed_at_random_moments(job, engine, spark, folders, tmp_path):
    """All kills of one kind hit the same folder, one after the other: each job finds what the one before has left."""
    moments, commands = random.Random(f"{job} {engine}"), getattr(cli, f"run_{job}")
    out, alone = tmp_path / "out", tmp_path / "alone"
    old, new = (list(map(str, job_of(job, seed, folders))) for seed in (1, 2))
    commands([*old[1:], "-o", str(alone)])
    before = fingerprints(alone)
    shutil.copytree(alone, out)
    process = start(engine, *new, "-o", out, "--overwrite")
    wait_for((out / OWNER_NAME).exists, process)
    begin = time.monotonic()
    wait_for(lambda: not (out / OWNER_NAME).exists(), process)
    seconds = time.monotonic() - begin
    finish(process)
    after = fingerprints(out)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)

    def killed(*flags):
        process = start(engine, *new, "-o", out, *flags)
        wait_for((out / OWNER_NAME).exists, process)
        time.sleep(moments.random() * seconds * 1.1)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        check_nobody_left(process)
        return fingerprints(out)

    shutil.rmtree(out)
    for _ in range(KILLS):
        found = killed()
        assert found.items() <= after.items()
        if found:
            shutil.rmtree(out)
    commands([*old[1:], "-o", str(out), "--overwrite"])
    assert fingerprints(out) == before
    check_tidy(out)
    for _ in range(KILLS):
        found = killed("--overwrite")
        assert found.keys() == before.keys()
        assert all(found[name] in (before[name], after[name]) for name in found)
        if found != before:
            shutil.rmtree(out)
            shutil.copytree(alone, out)
    commands([*new[1:], "-o", str(out), "--overwrite"])
    assert fingerprints(out) == after
    check_tidy(out)


@pytest.fixture(scope="module")
def lines(corpus, tokenizer, spark, tmp_path_factory) -> dict[str, Path]:
    """Many short documents, and their tables."""
    folder = tmp_path_factory.mktemp("lines")
    texts = [line for document in map(json.loads, corpus.open()) for line in document["text"].splitlines() if line]
    records = (json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts[:4000]))
    (folder / "lines.jsonl").write_text("\n".join(records))
    tokenize_table(folder / "lines.jsonl", folder / "tokens", tokenizer)
    return {"many": folder / "lines.jsonl", "tokenizer": tokenizer} | dict.fromkeys(JOBS_OF_TABLES, folder / "tokens")


@pytest.mark.parametrize(
    ("job", "parts"),
    [("tokenize", 60), thorough("tokenize", 200), thorough("shuffle", 40), thorough("repartition", 40)],
)
def test_a_killed_job_repeats_only_what_was_not_finished(job, parts, lines, tmp_path, monkeypatch, capfd):
    """A driver on Sail is killed when some parts are finished; Spark goes on, to the bytes of one run."""
    monkeypatch.setattr(splits, "FEWEST_PARTS", parts)
    more = {"shuffle": ["--num_block", parts], "repartition": ["--num_partition", parts]}
    command = [str(word) for word in (*job_of(job, 1, lines), *more.get(job, []))]
    out, alone, run = tmp_path / "out", tmp_path / "alone", getattr(cli, f"run_{job}")
    run([*command[1:], "-o", str(alone)])
    (tmp_path / "killed.py").write_text(
        "from fft.corpus import splits\nfrom spark_jobs import cli\n"
        f"splits.FEWEST_PARTS = {parts}\ncli.run_{job}({[*command[1:], '-o', str(out)]})\n"
    )
    tables = [path.parent.relative_to(alone) for path in alone.rglob("_fft_manifest.json")]
    process = start("sail", tmp_path / "killed", **with_faults(tmp_path, FFT_STALLS=str(parts // 4)))
    wait_for(lambda: any(len(facts_in(out / table)) >= parts // 4 for table in tables), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    check_nobody_left(process)
    finished = {table: [json.loads(path.read_text()) for path in facts_in(out / table)] for table in tables}
    assert parts // 4 <= sum(map(len, finished.values())) < parts
    killed = time.time()
    capfd.readouterr()
    run([*command[1:], "-o", str(out)])
    said = capfd.readouterr().err
    for table in tables:
        files = [out / table / file.path for file in read_manifest(out / table).files]
        assert sum(file.stat().st_mtime < killed for file in files) == sum(bool(p["name"]) for p in finished[table])
        if finished[table]:
            assert f"going on: {len(finished[table])} of " in said
        theirs = [alone / table / file.path for file in read_manifest(alone / table).files]
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in theirs]
        assert counted(out / table) == counted(alone / table)
    check_tidy(out)


def facts_in(table: Path) -> list[Path]:
    """What is known of parts that outlive their job."""
    return list(table.glob("_finished/*/part-*.json"))


def counted(table: Path) -> dict:
    """All that a manifest counts, but for the time that it took, and for what was checked in some of it."""
    manifest = read_manifest(table)
    return {**vars(manifest), "lineage": {**manifest.lineage["counts"], "seconds": None, "checked": None}}


def check_tidy(out: Path) -> None:
    """Nothing lies there but tables."""
    assert not list(out.rglob("*.writing"))
    for manifest in out.rglob("_fft_manifest.json"):
        files = {path.name for path in manifest.parent.iterdir()} - {"train", "validation", QUARANTINE, "_data.info"}
        assert files == {file.path for file in read_manifest(manifest.parent).files} | {manifest.name}


def test_sails_server_ends_with_its_driver(tmp_path):
    """Also when the driver has forked, and its child, which has all that was open, lives on."""
    code = (
        "import os, time\n"
        "from spark_jobs.runtime.session import get_session\n"
        "assert get_session('idle').range(3).count() == 3\n"
        "os.write(1, f'{os.fork() or os.getpid()}\\n'.encode())\n"  # a line at once: both write it
        "time.sleep(600)\n"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "FFT_ENGINE": "sail"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        child = int(max((driver.stdout.readline(), driver.stdout.readline()), key=lambda line: int(line) != driver.pid))
        assert b"sail_server" in b"".join(commands_of(driver.pid))
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 300
        while any(b"sail_server" in command for command in commands_of(driver.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)


def commands_of(session: int) -> list[bytes]:
    """The command lines of all processes of a session."""
    found = []
    for process in processes_of(session):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{process}/cmdline").read_bytes())
    return found


@pytest.mark.parametrize(
    ("overwrite", "engine"), [(True, "spark"), (False, "sail"), thorough(False, "spark"), thorough(True, "sail")]
)
def test_a_second_job_is_refused_and_the_first_ends_well(overwrite, engine, spark, many, tokenizer, tmp_path):
    out, flags = tmp_path / "out", ["--overwrite"] if overwrite else []
    if overwrite:
        tokenize_table(many, out, tokenizer, max_len=50)
    first = start(engine, "tokenize", "-i", many, "-o", out, "--tokenizer", tokenizer, *flags)
    wait_for((out / OWNER_NAME).exists, first)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"is being written by another job: process {first.pid} on .* Wait for it"):
            tokenize_table(many, out, tokenizer, max_len=60, overwrite=overwrite)
    assert f"wrote {out}" in finish(first)
    assert Table.open(out).manifest.lineage["parameters"]["max_len"] is None
    check_tidy(out)


@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_a_malformed_line_does_not_cost_the_old_table(table_format, spark, corpus, tokenizer, tmp_path):
    """Nor what had been set aside for it."""
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_text(corpus.read_text() + "not json\n")
    tokenize_table(bad, out, tokenizer, on_error="quarantine", format=table_format)
    lying = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="not valid JSON"):
        tokenize_table(bad, out, tokenizer, overwrite=True, format=table_format)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == lying
    tokenize_table(bad, out, tokenizer, on_error="quarantine", max_len=9, overwrite=True, format=table_format)
    (aside,) = (out / QUARANTINE).iterdir()
    assert json.loads(aside.read_text())["record"] == "not json"


def test_what_is_appended_to_a_delta_table_while_it_is_repartitioned_stays(spark, corpus, tokenizer, tmp_path):
    """In place: the version that was read is the one that may be replaced."""
    from spark_jobs import repartition_job

    out = tmp_path / "t"
    tokenize_table(corpus, out, tokenizer, format="delta")
    more = pa.table({"input_ids": pa.array([[1, 2, 3]], pa.list_(pa.int32())), "doc_ids": [["more"]]})
    opened = repartition_job.open_datasets

    def appends(*given):
        found = opened(*given)
        deltalake.write_deltalake(str(out), more, mode="append")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repartition_job, "open_datasets", appends)
        with pytest.raises(UserError, match=r"another writer committed version 1 while this job ran \(version 0 was"):
            repartition_job.repartition_table(out, max_len=64, overwrite=True)
    assert ["more"] in [row["doc_ids"] for row in rows_of(out)]
    assert Table.open(out).version == 1


FULL = """
mount -t tmpfs -o size=6m tmpfs {disk} || exit 77
cp -r {tokens} {disk}/out
job="{python} spark_jobs/tokenize.py -o {disk}/out --tokenizer {tokenizer} -i {large} --overwrite"
$job; echo "code $?" >&2
head -c 6m /dev/zero > {disk}/filler; $job; echo "code $?" >&2; rm {disk}/filler
cp -r {disk}/out {copy}
"""


@pytest.mark.parametrize("engine", [thorough("spark"), "sail"])
def test_a_full_disk_does_not_cost_the_old_table(engine, launch, tokens, tokenizer, many, tmp_path):
    """A real one, of 6 MB: with room for the new table in part, and with none at all."""
    mounting = own_mounts()
    (tmp_path / "disk").mkdir()
    large = tmp_path / "large.jsonl"
    large.write_text(many.read_text() * 2)
    places = {"disk": tmp_path / "disk", "copy": tmp_path / "copy", "tokens": tokens, "large": large}
    script = FULL.format(python=sys.executable, tokenizer=tokenizer, **places)
    done = launch(*mounting, "bash", "-c", script, env=ENGINES[engine])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("code 2") == 2, done.stderr
    assert done.stderr.count("make room there") == 2
    assert not stacks_of_ours(done.stderr)
    assert fingerprints(tmp_path / "copy") == fingerprints(tokens)
    shutil.rmtree(tmp_path / "copy" / FINISHED, ignore_errors=True)  # what waits for room
    check_tidy(tmp_path / "copy")
