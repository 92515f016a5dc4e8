"""The one kind of error a user is meant to read, and the one place that prints it."""

import argparse
import copy
import difflib
import errno
import json
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fft.redaction import fit_to_print, harmless, has_credentials, redact

#: Exit code of a command that refused its input, as argparse uses for bad flags.
EXIT_BAD_INPUT = 2
#: That of a run that goes on when it is started again, as one that was asked to stop and saved first does: EX_TEMPFAIL
#: of sysexits.h, "try again".
EXIT_AGAIN = 75

#: Seconds by which ranks may differ in meeting the same error.
_PATIENCE = 10


#: What the system says of a path, not of a program that is wrong; whoever looks at a path may meet it.
_OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

#: A parameter as a message names it: `output`, `overwrite=True`, `task="chat"`.
_PARAMETER = re.compile(r'`(\w+)(?:=True|="([^"`]*)")?`')


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong, where, and the remedy.

    A function that notebooks call, too, names its parameters in backticks; see :meth:`Parser.naming_flags`.
    """

    exit_code = EXIT_BAD_INPUT


class ElsewhereError(UserError):
    """What another process of the same run has met, and told of."""


class StorageError(UserError):
    """A storage did not do what it was asked. Tried again it may: a task that meets this fails, so that the engine runs
    it once more, there or elsewhere. What the last one says is for the user."""


def one_line(error: Exception) -> str:
    """What another program's error says, fit to stand inside a sentence, without what is secret in it."""
    return harmless(" ".join(redact(str(error)).split())).rstrip(".")


def check_no_credentials(url: str) -> None:
    """Raise :class:`UserError` for a URL with a password or a signature in it, which is not repeated."""
    if has_credentials(url):
        raise UserError(
            f"{redact(url)} has credentials in it, which would stand in logs, in lists of processes and in manifests: "
            "leave them out, and give them by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or a "
            "profile."
        )


def _first_clause(text: str) -> str:
    """A text up to its first semicolon that is not within parentheses."""
    ends = (at for at, letter in enumerate(text) if letter == ";" and text.count("(", 0, at) == text.count(")", 0, at))
    return text[: next(ends, len(text))]


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(parser.full_help() if isinstance(parser, Parser) else parser.format_help(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence, too, with the flag that was probably meant. Its program is
    called what an installed command is, where one runs (``fft-tokenize``).

    One with many flags says which are ``common``, by their names: ``--help`` explains these, those that have to be
    given, and names the others by purpose; ``--help_all`` explains all.
    """

    def __init__(self, *, common: Collection[str] = (), **options: Any) -> None:
        command = os.path.basename(sys.argv[0])
        if command.startswith("fft-"):
            options["prog"] = command
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._common = frozenset(common)
        if common:
            unset = {"nargs": 0, "dest": "help", "default": argparse.SUPPRESS}
            self.add_argument("--help_all", action=_HelpAll, **unset, help="explain all flags and exit")

    def format_help(self) -> str:
        """What ``--help`` prints."""
        return self._brief() if self._common else self.full_help()

    def full_help(self) -> str:
        """What ``--help_all`` prints."""
        return super().format_help()

    def _brief(self) -> str:
        """Flags that are needed or common explained, up to a semicolon, the others named by purpose; of description and
        epilog the beginning."""
        needed = [one for one in self._actions if one.required or one.dest == "help" or not one.option_strings]
        shown = [one for one in self._actions if one in needed or one.dest in self._common]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, [])
        formatter.add_text((self.description or "").partition("\n\n")[0])
        formatter.start_section("common flags")
        for one in map(copy.copy, shown):
            one.help = _first_clause(one.help or "")
            formatter.add_argument(one)
        formatter.end_section()
        lines, width = ["more flags by purpose, explained by --help_all:"], shutil.get_terminal_size().columns - 2
        for group in self._action_groups:
            rest = [one for one in group._group_actions if one not in shown and one.help != argparse.SUPPRESS]
            names = " ".join(next(name for name in one.option_strings if name.startswith("--")) for one in rest)
            if names:
                title = "other" if group.title == "options" else group.title
                indents = {"initial_indent": "  ", "subsequent_indent": "    "}
                lines.append(textwrap.fill(f"{title}: {names}", width, **indents, break_on_hyphens=False))
        examples, _, _ = (self.epilog or "").partition("\n\n")
        return "\n".join([formatter.format_help(), *lines, "", examples.strip(), ""])

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UserError`."""
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.findall(r"--?[\w-]+", message.partition("unrecognized arguments:")[2])
        near = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise UserError(f"{message}{meant}; {self.prog} --help lists the flags.")

    # argparse's own takes namespaces of any class, for which it has three signatures.
    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # pyrefly: ignore[bad-override]
        """As argparse does, into a new namespace. Raises :class:`UserError` for URLs with credentials, too."""
        for word in sys.argv[1:] if args is None else args:
            check_no_credentials(word.removeprefix("--").partition("=")[2] if word.startswith("--") else word)
        return super().parse_args(args)

    @contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Put this command line's flags for the parameters that a :class:`UserError` names: ``--overwrite`` for
        ```overwrite=True```, ``--task chat`` for ```task="chat"```."""
        flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}

        def as_flag(found: re.Match[str]) -> str:
            name, value = found.groups()
            return found[0] if name not in flags else " ".join(filter(None, (flags[name], value)))

        try:
            yield
        except UserError as error:
            error.args = (_PARAMETER.sub(as_flag, str(error)),)
            raise


def positive(text: str) -> int:
    """What a flag takes that counts something: an integer of at least 1. For the ``type`` of an argument."""
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def check_new_file(path: Path | None, overwrite: bool) -> None:
    """Raise :class:`UserError`, before work begins, for a file that could not be written after it: one that is there,
    where ``overwrite`` is not given, or whose folder is not. None is no file.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another place.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it, or another name.")


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit with its code, if it is not 0; a :class:`UserError` becomes one line on stderr and exit
    code 2 (its own, if it has one), and so does what the system says of a path that cannot be used.

    Ranks of a distributed job meet the same bad input, so rank 0 speaks for all: the others wait for their launcher to
    stop them. One that is still there after :data:`_PATIENCE` seconds has met something of its own, and says so.

    A program's fault is raised as Python does, unless there is something secret in what it says.
    """
    try:
        code = main() or 0
    except UserError as error:
        code = _refuse(error)
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.errno not in _OF_PATHS or error.filename is None:
            raise
        code = _refuse(UserError(f"{error.filename} cannot be used ({error.strerror}): name another path, or mend it."))
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        if fit_to_print(told) == told:
            raise
        print(fit_to_print(told), file=sys.stderr, flush=True)
        code = 1
    if code:  # where an interpreter runs commands as functions, as Databricks does, to exit is to fail
        sys.exit(code)


def _refuse(error: UserError) -> int:
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(_PATIENCE)
    print(fit_to_print(f"error: {error}"), file=sys.stderr, flush=True)
    tell_launcher(str(error))
    return error.exit_code


def tell_launcher(sentence: str) -> None:
    """Leave the sentence where torchrun looks for a rank's root cause, so that its closing report repeats it; without
    what is secret in it.

    torchrun always ends a failed job with a traceback of its own and this report below. The format is that of
    ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``; written here, it needs no torch.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        sentence = redact(sentence)
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        with open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": {"message": sentence, "extraInfo": details}}, stream)
