"""The limits that keep the code easy to read. CONTRIBUTING.md says what they are for."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for package in ("fft", "spark_jobs")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

# Functions with more than eight parameters.
LONG_SIGNATURES = {
    "spark_jobs/tokenize_job.py: tokenize_table": "what flags are on the command line are keywords in a notebook",
    "spark_jobs/shuffle_job.py: shuffle_tables": "what flags are on the command line are keywords in a notebook",
    "spark_jobs/repartition_job.py: repartition_table": "what flags are on the command line are keywords in a notebook",
    "spark_jobs/transforms.py: tokenize": "what flags are on the command line are keywords in a notebook",
    "spark_jobs/generate_job.py: generate_table": "what flags are on the command line are keywords in a notebook",
    "fft/ops/attention.py: hf_attention": "transformers dictates it",
    "fft/ops/vision_attention.py: tower_attention": "transformers dictates it",
    "fft/ops/logits_kernel.py: _sums": "a kernel takes pointers and sizes one by one",
    "fft/ops/logits_kernel.py: _gradients": "a kernel takes pointers and sizes one by one",
}
# Calls that write or remove what a name leads to, where that may be no link that another has planted.
BARE_WRITES = {
    "fft/errors.py: open": "torchrun names the file, and waits for it",
    "fft/quickstart/corpus.py: open": "the file that atomic_file has just made",
    "fft/quickstart/results.py: open": "the file that atomic_file has just made",
    "fft/quickstart/vision/scores.py: open": "the file that atomic_file has just made",
}
# Names that several modules define: what a command has, and what every attention backend supplies.
SHARED_NAMES = {"build_parser", "cli", "main", "forward", "backward"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def functions(node: ast.AST, owners: tuple[Definition, ...] = ()) -> Iterator[tuple[Function, tuple[Definition, ...]]]:
    """Every function below a node, with the classes and functions that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, owners
        yield from functions(child, (*owners, child) if isinstance(child, Definition) else owners)


EVERY_FUNCTION = [
    (f"{name}: {'.'.join(node.name for node in (*owners, function))}", function, owners)
    for name, tree in TREES.items()
    for function, owners in functions(tree)
]


def test_files_have_at_most_350_lines():
    none_of([f"{name}: {lines} lines" for name, text in FILES.items() if (lines := text.count("\n")) > 350])


def none_of(faults: list[str]) -> None:
    assert not faults, "\n".join([f"{len(faults)} are against the rule:", *faults])


def test_functions_have_at_most_60_lines():
    lengths = {name: function.end_lineno - function.lineno + 1 for name, function, _ in EVERY_FUNCTION}
    none_of([f"{name}: {lines} lines" for name, lines in lengths.items() if lines > 60])


def test_functions_have_at_most_8_parameters():
    long = {name: count for name, function, _ in EVERY_FUNCTION if (count := parameters(function)) > 8}
    none_of([f"{name}: {count} parameters" for name, count in long.items() if name not in LONG_SIGNATURES])
    none_of([f"{name} is excused without need" for name in LONG_SIGNATURES if name not in long])


def parameters(function: Function) -> int:
    """How many parameters a caller gives."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(parameter is not None and parameter.arg not in ("self", "cls", "ctx") for parameter in every)


def test_docstrings_say_which_functions_raise_a_user_error():
    none_of(
        [
            name
            for name, function, owners in EVERY_FUNCTION
            if is_public(function, owners) and raises(function) and not says_so(function, owners)
        ]
    )


def is_public(function: Function, owners: tuple[Definition, ...]) -> bool:
    """Whether others may call it: no function is around it, no name on the way to it is private."""
    hidden = any(node.name.startswith("_") and not node.name.endswith("__") for node in (*owners, function))
    return not hidden and not any(isinstance(owner, Function) for owner in owners)


def raises(node: ast.AST) -> bool:
    """Whether a statement below, but within no other function, raises a UserError."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "UserError":
        return True
    children = (child for child in ast.iter_child_nodes(node) if not isinstance(child, Definition | ast.Lambda))
    return any(raises(child) for child in children)


def says_so(function: Function, owners: tuple[Definition, ...]) -> bool:
    return any(re.search(r"\bRaises?\b", ast.get_docstring(node) or "") for node in (function, *owners))


def test_code_that_a_model_brings_is_never_run():
    """transformers asks on a terminal whether it may, unless it is told: a "y" on stdin may be meant for anything."""
    none_of(
        [
            f"{name}, line {node.lineno}: say trust_remote_code=False"
            for name, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("from_pretrained", "from_config", "LLM", "EngineArgs")
            and not any(
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "False"
                for keyword in node.keywords
            )
        ]
    )


def test_ranks_send_one_another_no_pickles():
    """Who can send could run anything by one: fft.parallel.groups has what sends values as JSON."""
    none_of(
        [
            f"{name}, line {node.lineno}: {node.attr}: tell by fft/parallel/groups.py"
            for name, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and re.fullmatch(r"(all_gather|broadcast|gather|scatter|send|recv)_object\w*", node.attr)
        ]
    )


def test_what_is_written_or_removed_goes_through_one_module():
    """Others may plant links where we write: fft/files.py knows how not to follow them."""
    found = {
        f"{name}: {call}": f"{name}, line {node.lineno}: {call}: write and remove by fft/files.py"
        for name, tree in TREES.items()
        if name != "fft/files.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (call := bare_write(node))
    }
    none_of([fault for place, fault in found.items() if place not in BARE_WRITES])
    none_of([f"{place} is excused without need" for place in BARE_WRITES if place not in found])


def bare_write(node: ast.Call) -> str:
    """The name of a call that writes to, or removes, what has a name; "" for another one."""
    name, _, last = ast.unparse(node.func).rpartition(".")
    if name in ("shutil", "os"):
        removing = ("rmtree", "move", "unlink", "remove", "rmdir", "removedirs", "truncate", "open", "mkfifo")
        return last if last in removing or (last.startswith("copy") and name == "shutil") else ""
    if last in ("unlink", "rmdir", "touch", "write_text", "write_bytes", "symlink_to", "hardlink_to") and name:
        return last
    if last != "open" or (name not in ("", "io") and not isinstance(node.func, ast.Attribute)):
        return ""
    given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    modes = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    writes = any(re.fullmatch("[rbt]*[wax+][bt+]*", mode) for mode in modes)
    ours = bool(node.args) and ast.unparse(node.args[0]).startswith(("new_file(", "own_file("))
    return "open" if writes and not ours else ""


def test_a_public_name_means_one_thing():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_") and node.name not in SHARED_NAMES:
                places[node.name].append(name)
    none_of([f"{name}: {', '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1])


def test_nobody_is_told_to_install_what_is_not_published():
    """Whoever publishes our name would be installed. In a checkout it is ``pip install -e '.[x]'``."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    texts = FILES | {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages}
    advice = re.compile(r"""install\s[^\n.;]{0,60}flash[-_]fine[-_]tuning(?!\.zip)""")
    none_of([f"{name}: {found[0]}" for name, text in texts.items() for found in advice.finditer(text)])


def test_the_model_of_trust_names_tests_that_are_there():
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs/security.md").read_text(encoding="utf-8"))
    none_of([f"{name} is not there" for name in named if not (ROOT / name).exists()])


def test_files_of_tests_have_names_of_their_own():
    """Two of one name cannot be read by one process, but for those of a package."""
    paths = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests/unit").rglob("test_*.py")]
    names = Counter(path.name for path in paths)
    none_of([f"{path.relative_to(ROOT)} has another's name" for path in paths if names[path.name] > 1])


def test_excuses_have_reasons():
    none_of([f"{name}:{number}" for name, text in FILES.items() for number in unexplained(text.splitlines())])


def unexplained(lines: list[str]) -> list[int]:
    """Numbers of the lines that excuse themselves from a check and say why neither there nor in a comment above."""
    excuse = re.compile(
        r"#\s*(noqa(:[A-Z0-9, ]+)?|(type|pyrefly):\s*ignore(\[[^\]]*\])?|pragma: no cover)(?P<reason>.*)"
    )
    found = [(number, match["reason"]) for number, line in enumerate(lines) if (match := excuse.search(line))]
    return [n + 1 for n, reason in found if not re.search(r"\w", reason) and not lines[n - 1].strip().startswith("#")]


def test_texts_and_tables_load_transformers_on_use():
    packages = ("fft/text/", "fft/corpus/", "fft/data/")
    none_of([name for name, tree in TREES.items() if name.startswith(packages) and "transformers" in imported(tree)])


def imported(tree: ast.Module) -> set[str]:
    """The packages that a module imports when it is imported itself."""
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_no_circle_of_imports():
    graph = grimp.build_graph("fft", "spark_jobs", cache_dir=None)  # imports under TYPE_CHECKING and in functions, too
    circles = [pair for package in graph.modules for pair in graph.nominate_cycle_breakers(package)]
    none_of([f"{importer} imports {imported_module}" for importer, imported_module in sorted(circles)])


def test_contributing_names_every_module():
    named, path = set(), []
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1].strip().splitlines():
        if line:
            depth = (len(line) - len(line.lstrip())) // 2
            path[depth:] = [line.split()[0].rstrip("/")]
            named.add("/".join(path))
    modules = {name for name in FILES if not name.endswith("__init__.py")}
    none_of([f"{name} is not named" for name in sorted(modules - named)])
    none_of([f"{name} is named and not there" for name in sorted(named) if name.endswith(".py") and name not in FILES])


def test_nothing_is_shown_by_thorough_tests_alone():
    """`make test` leaves them out: some other test, or another case of the same, stands beside each."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tests = [f for f in ast.parse(path.read_text("utf-8")).body if getattr(f, "name", "").startswith("test_")]
        marks = [{ast.unparse(decorator) for decorator in test.decorator_list} for test in tests]
        assert not marks or any("pytest.mark.thorough" not in mark for mark in marks), path
        for values in (d.args[1] for f in tests for d in f.decorator_list if len(getattr(d, "args", ())) > 1):
            if isinstance(values, ast.List | ast.Tuple) and values.elts:
                assert any(not ast.unparse(value).startswith("thorough(") for value in values.elts), path
