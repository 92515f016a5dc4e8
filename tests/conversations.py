"""Conversations in all the forms that are read, of real sentences, from a seed."""

import json
import random
import sysconfig
from pathlib import Path


def sentences(count: int) -> list[str]:
    """Lines of prose from the standard library's docstrings and comments."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [line.strip(" #") for line in lines if len(line.split()) > 6]
        if len(found) >= count:
            break
    return found[:count]


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    """JSON lines of ``count`` conversations: bare lists, ``conversation`` and ``messages``, some with ids."""
    rng, prose = random.Random(seed), sentences(4000)
    lines = []
    for number in range(count):
        turns = [{"system": rng.choice(prose)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 4)):
            turns += [{"user": rng.choice(prose)}, {"assistant": " ".join(rng.sample(prose, rng.randint(1, 3)))}]
        messages = [{"role": role, "content": text} for turn in turns for role, text in turn.items()]
        form = rng.randrange(3)
        row = [turns, {"conversation": turns}, {"id": f"chat/{number}", "messages": messages}][form]
        lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path
