"""What if: the same devices on other links, more or fewer of them, and what that costs."""

from collections.abc import Sequence
from dataclasses import replace

from fft.console import format_table
from fft.errors import UserError
from fft.plan.hardware import Machine, named_link
from fft.plan.ours import Job
from fft.plan.search import LayoutPlan, Search
from fft.plan.step import predict
from fft.plan.told import layout_name


def on_link(machine: Machine, name: str) -> Machine:
    """The machine with other links inside its nodes. Raises :class:`UserError` for a link that is not known."""
    return replace(machine, name=f"{machine.name} on {name}", inside=named_link(name))


def links_table(job: Job, machine: Machine, ranks: int, names: Sequence[str], number: int) -> str:
    """The best layouts of each link on all of them: tokens/s, and how much slower than on the first.

    Raises :class:`UserError` for fewer than two links, and for a link that is not known.
    """
    if len(names) < 2:
        raise UserError("--compare takes two links or more, such as nvlink,pcie.")
    machines = [on_link(machine, name) for name in names]
    plans: dict[tuple, LayoutPlan] = {}
    for other in machines:
        for plan in Search(job, other, ranks).best(number):
            plans.setdefault(plan.choice.family, plan)
    rates = {
        family: [predict(replace(plan.run, machine=other)).rate for other in machines] for family, plan in plans.items()
    }
    heads = ["layout", *(f"{name} tokens/s" for name in names), *(f"{name} slower %" for name in names[1:])]
    rows = []
    for family, own in sorted(rates.items(), key=lambda item: -item[1][0]):
        rows.append([layout_name(plans[family]), *map(round, own), *(100 * (1 - rate / own[0]) for rate in own[1:])])
    best = [max(own[index] for own in rates.values()) for index in range(len(names))]
    rows.append(["the best of each", *map(round, best), *(100 * (1 - rate / best[0]) for rate in best[1:])])
    return format_table(heads, rows)


def price_table(job: Job, machine: Machine, ranks: int, price: float, train_tokens: float) -> str:
    """What tokens cost on as many devices, on half and a quarter of them, on twice and four times as many."""
    heads = ["devices", "layout", "tokens/s", "per billion tokens"]
    heads += ["all tokens", "days"] if train_tokens else []
    rows = []
    for count in sorted({ranks // 4, ranks // 2, ranks, ranks * 2, ranks * 4} - {0}):
        found = Search(job, machine, count).best(1)
        if not found:
            continue
        rate = found[0].prediction.rate
        money = count * price / 3600 / rate * 1e9
        row = [count, layout_name(found[0]), round(rate), money]
        rows.append(row + ([money * train_tokens / 1e9, train_tokens / rate / 86_400] if train_tokens else []))
    return format_table(heads, rows)
