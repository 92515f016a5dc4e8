"""The classes of a Spark that has run all three jobs, as one file that later ones map instead of reading and checking
each class again (Java's class data sharing): a third of what a small job costs.

    python tests/spark_classes.py

``conftest.py`` has every Java of the tests use it, where it is there. A file of another Java or Spark is passed over.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Programs that end after seconds are not worth compiling well, or a collector with threads of its own.
SHORT_LIVED = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xlog:disable")
#: Where the tests look for them.
ARCHIVE = Path(sys.prefix) / "spark-classes.jsa"
_JOBS = """
import sys
sys.path[:0] = ["tests", "."]
from pathlib import Path
from spark.helpers import save_tokenizer
from spark_jobs import repartition_table, shuffle_tables, tokenize_table
folder, texts = Path(sys.argv[1]), sorted(Path("docs").glob("*.md"))[:8]
(folder / "text").mkdir()
for text in texts:
    (folder / "text" / f"{text.stem}.txt").write_bytes(text.read_bytes())
tokenizer = save_tokenizer(folder / "tokenizer", [text.read_text(encoding="utf-8") for text in texts[:4]])
tokenize_table(folder / "text", folder / "tokens", tokenizer)
shuffle_tables(folder / "tokens", folder / "shuffled", holdout=0.5)
repartition_table(folder / "shuffled", folder / "packed", max_len=64)
"""


def main() -> None:
    """Run the jobs once, and keep the classes that they needed."""
    with tempfile.TemporaryDirectory() as folder:
        program, made = Path(folder, "jobs.py"), ARCHIVE.with_suffix(".making")
        program.write_text(_JOBS, encoding="utf-8")
        options = " ".join([*SHORT_LIVED, f"-XX:ArchiveClassesAtExit={made}"])
        submit = [Path(sys.executable).with_name("spark-submit"), "--master", "local[2]"]
        command = [*submit, "--conf", "spark.ui.enabled=false", program, folder]
        variables = {**os.environ, "SPARK_SUBMIT_OPTS": options, "PYSPARK_PYTHON": sys.executable}
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        if done.returncode or not made.exists():
            sys.exit(f"error: Spark ended with {done.returncode} and left no {made}:\n{done.stderr[-4000:]}")
        made.replace(ARCHIVE)


def environment() -> dict[str, str]:
    """Variables by which Spark starts such a Java, for drivers, executors and a cluster's own processes."""
    options = " ".join([*SHORT_LIVED, *([f"-XX:SharedArchiveFile={ARCHIVE}"] if ARCHIVE.exists() else [])])
    return {
        "SPARK_LAUNCHER_OPTS": options,
        "SPARK_DAEMON_JAVA_OPTS": options,
        "SPARK_SUBMIT_OPTS": f"{options} '-Dspark.executor.extraJavaOptions={options}'",
    }


if __name__ == "__main__":
    main()
