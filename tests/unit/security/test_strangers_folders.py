"""Folders that strangers have made, changed for the worse: no command ends in a traceback, touches what is outside of
the folders that it was given, or leaves a process.

FFT_FUZZ=5000 tries that many; in a test run the first of them are tried. An example is made of its number alone.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path

import pytest
import yaml
from unit.security.readers import COMMANDS
from unit.security.strangers import make_all

import fft
from fft.errors import run_cli

EXAMPLES = int(os.environ.get("FFT_FUZZ", "150"))
SECRET = "sk-this-is-what-nobody-may-see"
#: Where the interpreter and what is installed lie, and what the system tells anybody.
OWN = tuple(
    os.path.realpath(path)
    for path in (
        *(sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(fft.__file__).parents[1]),
        *("/proc", "/sys", "/dev/null", "/dev/urandom", "/usr", "/lib", "/etc/ld.so.cache", "/etc/mime.types"),
    )
)


#: Tables, folders of texts, and a file that is named itself: these may be links.
LINKED = {"table", "pairs", "images", "texts", "machine"}


class Watch:
    """What this process opens, lists or changes by paths, and what it starts or calls, while it is on."""

    TOUCHES = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link")
    TOUCHES += ("os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime")
    STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect")

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if self.on and event in self.STARTS:
            self.seen.append((event, str(args)[:200]))
        elif self.on and event in self.TOUCHES and isinstance(args[0], (str, bytes, os.PathLike)):
            self.on = False  # to ask where it leads opens something, too
            self.seen.append((event, os.path.realpath(os.fsdecode(args[0]))))
            self.on = True

    def outside(self, allowed: tuple[str, ...]) -> list[tuple[str, str]]:
        """What lay in none of these folders, nor in this process's own for what it read in stores before."""
        views = os.path.join(os.path.realpath(tempfile.gettempdir()), f"fft-views-{os.getpid()}-")
        touched = [(event, path) for event, path in self.seen if not path.startswith(views)]
        return [(event, path) for event, path in touched if not lies_in(path, (*OWN, *allowed))]


def lies_in(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}{os.sep}") for folder in folders)


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    place = tmp_path_factory.mktemp("original")
    make_all(place)
    return place


NAMES = [
    "..",
    "../outside/secret.json",
    "/etc/passwd",
    "",
    ".",
    "a/b",
    "\0",
    "x" * 300,
    "\udcff",
    "é",
    "-rf",
    "a\nb",
    "\\",
]
VALUES = [*NAMES, None, True, -1, 0, 3, 0.5, 1e308, [], {}, [[]], "NaN", "evil.Model", "gpt2", "llama", SECRET[:3]]
KEYS = (
    *("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "size", "patch_size", "llm_config", "ranks"),
    *("auto_map", "architectures", "model_type", "quantization_config", "rope_parameters", "rope_scaling", "dtype"),
    *(
        "tokenizer_class",
        "chat_template",
        "added_tokens_decoder",
        "vision_config",
        "weight_map",
        "peft_type",
        "lineage",
    ),
    *(
        "base_model_name_or_path",
        "processor_class",
        "metadata",
        "files",
        "vocab_file",
        "init_lora_weights",
        "tokenizer",
    ),
)
#: How files of values are read and written.
FORMS = {
    ".json": (json.loads, json.dumps),
    ".yaml": (yaml.safe_load, yaml.safe_dump),
    ".jsonl": (
        lambda text: [json.loads(line) for line in text.splitlines()],
        lambda lines: "".join(f"{json.dumps(line)}\n" for line in lines),
    ),
}
KINDS = ("cut", "flip", "noise", "value", "value", "value", "key", "deep", "link", "folder link", "pipe", "folder")
KINDS += ("aliases", "device", "loop", "name", "gone", "sums", "index")


def worsen(dice: random.Random, place: Path, folders: tuple[str, ...]) -> str:
    """Change one thing in a folder; returns what."""
    given = [folder for folder in folders if (place / folder).is_dir()]
    files = sorted(f for folder in given for f in (place / folder).rglob("*") if f.is_file() and not f.is_symlink())
    if not files:
        return "nothing"
    kind, file = dice.choice(KINDS), dice.choice(files)
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: dice.randint(0, len(content))])
    elif kind == "flip" and content:
        at = dice.randrange(len(content))
        file.write_bytes(content[:at] + bytes([dice.randrange(256)]) + content[at + 1 :])
    elif kind == "noise":
        file.write_bytes(dice.randbytes(dice.randrange(40)))
    elif kind in ("value", "key", "index"):
        written = [f for f in files if f.suffix in FORMS and (kind != "index" or "index" in f.name)]
        worsen_values(dice, dice.choice(written or [file]), kind)
    elif kind == "deep":
        file.write_bytes(b"[" * 100_000)
    elif kind == "aliases":
        tenfold = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(12)]
        file.write_text("\n".join(tenfold))
    elif kind == "sums":
        for sums in (f for f in files if f.name == "SHA256SUMS"):
            sums.write_bytes(b"0" * 64 + b"  " + dice.choice(NAMES).encode("utf-8", "surrogateescape") + b"\n")
    elif kind == "name":
        file.rename(file.with_name(dice.choice(["-rf", "a\nb", "é", "model.safetensors", "x.bin", "tokenizer.model"])))
    else:
        file.unlink()
        replace(kind, file, place)
    return f"{kind} {file.relative_to(place)}"


def replace(kind: str, file: Path, place: Path) -> None:
    outside = place.parent / "outside"
    if kind == "link":
        file.symlink_to(outside / ("secret.safetensors" if file.suffix == ".safetensors" else "secret.json"))
    elif kind == "folder link":
        file.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file.name)


def worsen_values(dice: random.Random, file: Path, kind: str) -> None:
    read, write = FORMS.get(file.suffix, FORMS[".json"])
    try:
        at = content = read(file.read_bytes())
    except (ValueError, RecursionError, yaml.YAMLError):
        return
    while isinstance(at, (dict, list)) and at:
        key = dice.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if kind == "key" and isinstance(at, dict):
            at[dice.choice(KEYS)] = dice.choice(VALUES)
            break
        if not isinstance(at[key], (dict, list)) or not at[key] or dice.random() < 0.3:
            at[key] = dice.choice(VALUES)
            break
        at = at[key]
    file.write_bytes(write(content).encode("utf-8", "surrogatepass"))


def state_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, or in a file."""
    return {str(path): path.read_bytes() for path in (folder, *sorted(folder.rglob("*"))) if path.is_file()}


@pytest.fixture(scope="module")
def room(tmp_path_factory, original):
    """Where examples are made, beside what must not be touched."""
    room = tmp_path_factory.mktemp("room")
    outside = room / "outside"
    shutil.copytree(original / "model", outside)
    (outside / "secret.json").write_text(json.dumps({"secret": SECRET, "chat_template": SECRET}))
    shutil.copyfile(sorted(outside.glob("*.safetensors"))[0], outside / "secret.safetensors")
    return room


def harm(number: int, room: Path, original: Path, watch: Watch) -> str | None:
    """What an example does that it should not; None for nothing."""
    dice, place = random.Random(number), room / "place"
    shutil.rmtree(place, ignore_errors=True)
    name = dice.choice(sorted(COMMANDS))
    folders, command = COMMANDS[name]
    place.mkdir()
    for folder in set(folders) - {"out"}:
        shutil.copytree(original / folder, place / folder, symlinks=True)
    done = [worsen(dice, place, folders) for _ in range(dice.randint(1, 3))]
    printed, code = io.StringIO(), 0
    children, watch.seen, watch.on = processes(), [], True
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            run_cli(lambda: command(place) and None)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        return f"{name} after {done}: {traceback.format_exc()}"
    finally:
        watch.on = False
    if processes() != children:
        return f"{name} after {done} leaves a process"
    if code not in (0, 2):
        return f"{name} after {done} ends with {code}"
    touched = watch.outside(tuple(os.path.realpath(place / folder) for folder in folders))
    if LINKED & set(folders):  # whose files may be links, which are followed to be read
        touched = [(event, path) for event, path in touched if not lies_in(path, (str(room / "outside"),))]
    if "out" in folders:  # which is made beside its place
        beside = re.compile(rf"{re.escape(str(place))}(/\.[^/]*\.(writing|trying|owner|old)(/.*)?)?")
        touched = [(event, path) for event, path in touched if not beside.fullmatch(path)]
    if touched:
        return f"{name} after {done} touched {touched[:5]}"
    written = b"".join(state_of(place / "out").values())
    return (
        f"{name} after {done} tells a secret"
        if SECRET.encode() in written + printed.getvalue().encode(errors="replace")
        else None
    )


def processes() -> str:
    """Those that this one has started, and that are there."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found.append(task.read_text())
    return "".join(sorted(found))


def test_nothing_that_a_stranger_makes_of_a_folder_does_harm(room, original, watch, monkeypatch):
    monkeypatch.setenv("HOME", str(room / "outside"))
    before = state_of(room / "outside")
    found = [f"{number}: {fault}" for number in range(EXAMPLES) if (fault := harm(number, room, original, watch))]
    assert not found, "\n".join([f"{len(found)} of {EXAMPLES}", *found[:20]])
    assert state_of(room / "outside") == before
