"""Who types what the pages say, in a folder that has what they name: every command is carried out, in small sizes."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from checkout import AS_IT_IS, copy_checkout
from conftest import BIN, ROOT
from forked import run_ranks
from ports import free_port
from walk import told

#: What a page writes in place of what its reader knows.
PLACES = {"DIR": "path/to/hf-model", "TABLE": "runs/packed/train", "JOB": "7", "OWN_ADDRESS": "127.0.0.1"}
#: What is put behind flags, since the last one counts.
SHORT = {
    "fft.train": "--max_steps 2 --warmup_steps 1 --gradient_accumulation_steps 2 --dtype fp32",
    "fft.serve.batch_infer": "--max_new_tokens 4",
    "generate": "--max_new_tokens 4",
}
#: What takes a minute of an idle machine, shortened.
_QUICK = {"fft.plan.measure": "quick_measure"}
#: Flags that name what a command makes: it must not be there yet.
_MAKES = ("-o", "--output", "--output_dir", "--checkpoint", "--write", "--timeline", "--html", "--overwrite")
#: Folders that machines of a page share, or have.
_ELSEWHERE = r"/shared/|/mnt/nvme/"
_CATALOG_TABLE = re.compile(r"[a-z]+\.[a-z]+\.[a-z_]+")
#: A catalog with a name, as many lakehouses have.
_CATALOG = {
    "FFT_ENGINE": "sail",
    "SAIL_CATALOG__LIST": '[{name="lake", type="memory", initial_database=["default"]}]',
    "SAIL_CATALOG__DEFAULT_CATALOG": "lake",
    "SAIL_SPARK__SESSION_TIMEOUT_SECS": "7200",  # other commands come between
}


class Reader:
    """A folder, and the engines that are started there when a command first needs one. To be closed."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self._variables = dict(variables)
        self._open = ExitStack()
        self._drivers: dict[str, Connection] = {}
        #: The trainer's flags, as a page gave them last: what ``...`` stands for.
        self._flags: list[str] = []

    def close(self) -> None:
        """End the engines."""
        self._open.close()

    def types(self, words: list[str]) -> None:
        """Carry a command out; it must end well. Raises :class:`LookupError` for one that nothing here runs."""
        words = self._spelled(words)
        self._clear(words)
        match words:
            case ["spark-submit", script, *flags] if script.startswith("spark_jobs/"):
                name = script.removeprefix("spark_jobs/").removesuffix(".py")
                self.drives(name, flags + SHORT.get(name, "").split())
            case ["python", "-m", module, *flags]:
                self._run(1, _QUICK.get(module, module), flags)
            case ["deepspeed", "--num_gpus", _, "fft/train.py", *flags]:
                self._run(2, "fft.train", flags)
            case ["torchrun", *launch, "-m", "fft.plan.measure", "-o", output]:
                here = "1" if "--nnodes" in launch else "2"
                self._run(2, "quick_measure", ["-o", output], {"LOCAL_WORLD_SIZE": here})
            case ["make", ("format" | "site") as target]:
                self._make(target)
            case ["torchrun", *_] if "fft/train.py" in words:
                self._launch(words)
            case _:
                raise LookupError(f"nothing runs {words}: mark it with <!-- needs: ... --> or <!-- run by: ... -->")

    def remembers(self, words: list[str]) -> None:
        """Note the trainer's flags, which the page may leave out from here on."""
        if "fft/train.py" in words:
            self._flags = [PLACES.get(word, word) for word in words[words.index("fft/train.py") + 1 :]]

    def drives(self, job: str, given: list[str] | str) -> None:
        """Have a driver run a job with flags, or Python: Spark's, or where a catalog has a name, Sail's."""
        with_catalog = not job or any(_CATALOG_TABLE.fullmatch(word) for word in given)
        engine = "sail" if with_catalog else "spark"
        if engine not in self._drivers:
            self._drivers[engine] = self._start(engine)
        driver = self._drivers[engine]
        driver.send((job, given))
        assert driver.poll(300), "no answer"
        wrong = driver.recv()
        assert not wrong, wrong

    def _start(self, engine: str) -> Connection:
        """A driver, in the folder."""
        submit = ["spark-submit", "--master", "local[2]", "--conf", "spark.ui.enabled=false"]
        started = submit if engine == "spark" else [sys.executable]
        address = str(self.folder / f"{engine}.socket")
        variables = {**os.environ, **self._variables, "PYTHONPATH": str(ROOT)} | (_CATALOG if engine == "sail" else {})
        listener = self._open.enter_context(Listener(address))
        command = [*started, str(ROOT / "tests" / "journeys" / "driver.py"), address]
        with open(self.folder / f"{engine}.log", "wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=variables, stdout=log, stderr=log)
        self._open.callback(process.wait)
        driver = listener.accept()
        self._open.callback(driver.send, None)
        return driver

    def _spelled(self, words: list[str]) -> list[str]:
        """With what the reader knows in the place of what the page leaves to them."""
        words = [PLACES.get(word, word) for word in words]
        if "..." in words:
            at = words.index("...")
            before = [] if "fft/train.py" in words else ["--nproc_per_node", "2", "fft/train.py"]
            words[at : at + 1] = [*before, *self._flags]
        else:
            self.remembers(words)
        # What was remembered, too: nothing here reads, writes or removes anything in the machine's own folders.
        return [re.sub(_ELSEWHERE, f"{self.folder}/", word) for word in words]

    def _clear(self, words: list[str]) -> None:
        """Remove what another page has had made under the same name."""
        for flag, name in pairwise(words):
            made = self.folder / name
            if flag in _MAKES and "://" not in name and made.exists():
                assert made.resolve().is_relative_to(self.folder.resolve()), f"{made} is not the test's"
                shutil.rmtree(made) if made.is_dir() else made.unlink()

    def _run(self, ranks: int, module: str, flags: list[str], more: Mapping[str, str] | None = None) -> None:
        short = [] if "--dry_run" in flags else SHORT.get(module, "").split()
        variables = self._variables | (more or {})
        told(run_ranks(ranks, *flags, *short, module=module, env=variables, folder=self.folder))

    def _make(self, target: str) -> None:
        """In a copy of the checkout, with this environment."""
        copy = self.folder / "checkout"
        if not copy.exists():
            copy_checkout(self.folder)
        done = subprocess.run(["make", *AS_IT_IS, target], cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    def _launch(self, words: list[str]) -> None:
        """`torchrun` itself: on this machine, for each of two that the page has."""
        port, short = str(free_port()), SHORT["fft.train"].split()
        places = {"ADDRESS": "127.0.0.1", "ADDRESS:29500": f"127.0.0.1:{port}", "29500": port}
        words = [str(BIN / words[0]), *(places.get(word, word) for word in words[1:]), *short]
        nodes = 2 if "--nnodes" in words else 1
        if nodes == 2:
            words[words.index("--nproc_per_node") + 1] = "1"
        variables = {**os.environ, **self._variables, "PYTHONPATH": str(ROOT)}
        with ExitStack() as ended:
            running = []
            for node in range(nodes):
                command = [str(node) if word == "N" else word for word in words]
                log = ended.enter_context(open(self.folder / f"node{node}.log", "w+"))
                streams = {"stdout": log, "stderr": log, "start_new_session": True}
                process = subprocess.Popen(command, cwd=self.folder, env=variables, **streams)
                ended.callback(process.kill)
                running.append((process, log))
            for process, log in running:
                code = process.wait(timeout=600)  # torchrun itself waits five minutes for one that has ended before it
                log.seek(0)
                assert code == 0, log.read()[-4000:]
