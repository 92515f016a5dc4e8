"""Which published runs are to be believed, and which the constants were fitted on."""

#: Studies whose numbers can be reproduced from what they say. Rows that say DOUBTFUL are left out, as are torchtitan's
#: on a card of which neither clocks nor peak are known.
TRUSTED = ("mosaic", "titan", "mega22", "alephalpha", "vtrainM", "ascend")

#: Of these the rows that constants were fitted on, by number: in each study every second of those at hand, in their
#: order, beginning with the first, but for the last of an odd number. Nobody looked at errors to choose them.
_FITTED = {
    "mosaic": "01 03 05 08 11 20 23 26 28 30 32 35 39 41 45",
    "titan": "01 05",
    "mega22": "02 04 06",
    "vtrainM": "02 06 09 11 13 15 18",
    "alephalpha": "02 07 09 12 14 17 19 22 24 27",
    "ascend": "03 06 09 15 17 19",
}
FITTED = frozenset(f"{study}-{number}" for study, numbers in _FITTED.items() for number in numbers.split())


def trusted(row: dict[str, str]) -> bool:
    """Whether a row's rate counts."""
    study = row["id"].rpartition("-")[0]
    if study not in TRUSTED or "DOUBTFUL" in row["notes"] or not row["tokens_per_s_total"]:
        return False
    return study != "titan" or row["device"] == "A100"
