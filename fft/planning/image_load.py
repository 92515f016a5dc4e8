"""What the images of a run's rows weigh, by the manifests of its tables: for the cost of a tower, and its memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fft.arguments import TrainArguments
from fft.corpus.local import is_json_lines
from fft.data.blend import parse_tables
from fft.data.delta import read_snapshot, split_name
from fft.data.manifest import Manifest
from fft.data.storage import Storage
from fft.data.table_files import parquet_files
from fft.images.rules import GRIDS, ImageRules

#: Where nothing else is known: half of a row's tokens are of images, which have a megapixel each.
SHARE, _PIXELS = 0.5, 1 << 20


@dataclass(frozen=True)
class ImageLoad:
    """Patches, as the tower counts them: ``per_token`` of a row has a row in the mean, ``seen`` are those that a patch
    attends to in the mean, ``most`` are those of a row at most. ``known`` says whether tables have counted them.
    """

    per_token: float
    seen: float
    most: int
    known: bool = False


def assumed_load(rules: ImageRules, seq_len: int, share: float | None = None) -> ImageLoad:
    """Of rows all alike, ``share`` of whose tokens are of images; without it half of them, and of some rows all."""
    side = rules.merge**2
    most = side * max(1, int(seq_len * (1.0 if share is None else share)))
    seen = min(_PIXELS // rules.patch**2, most) if rules.family in GRIDS else (rules.tile // rules.patch) ** 2
    return ImageLoad(side * (SHARE if share is None else share), float(seen), most)


def load_of(
    args: TrainArguments,
    rules: ImageRules,
    training: Sequence[Manifest | None],
    evaluation: Sequence[Manifest | None] = (),
) -> ImageLoad:
    """What a run's tables, in the order of ``--train_data``, say of their images.

    A table whose manifest does not count its images is taken for one of :func:`assumed_load`.
    """
    weights = [weight for _, weight in parse_tables(args.train_data or "", "train_data")] if training else []
    loads = [_of_table(args, rules, manifest) for manifest in training]
    others = [_of_table(args, rules, manifest) for manifest in evaluation]
    whole = sum(weights)
    if not whole:
        return assumed_load(rules, args.seq_len)
    patches = sum(weight * load.per_token for weight, load in zip(weights, loads, strict=True)) / whole
    pairs = sum(weight * load.per_token * load.seen for weight, load in zip(weights, loads, strict=True)) / whole
    seen = pairs / patches if patches else 0.0
    most = max(load.most for load in (*loads, *others))
    return ImageLoad(patches, seen, most, all(load.known for load in loads))


def _of_table(args: TrainArguments, rules: ImageRules, manifest: Manifest | None) -> ImageLoad:
    if manifest is None or manifest.vision is None:  # a table of texts
        return ImageLoad(0.0, 0.0, 0, known=True)
    counts = manifest.lineage.get("counts")
    facts = counts.get("vision") if isinstance(counts, Mapping) else None
    if not isinstance(facts, Mapping) or not {"patches", "patches_squared", "patches_per_row"} <= facts.keys():
        return assumed_load(rules, args.seq_len)
    packed = manifest.seq_len == args.seq_len
    # What rows leave unused is computed, too, but for --ragged.
    tokens = manifest.rows * args.seq_len if packed and not args.ragged else manifest.tokens
    patches, most = int(facts["patches"]), rules.merge**2 * args.seq_len
    if packed:  # a bin begins at a power of two; other rows share a sample
        largest = max(map(int, facts["patches_per_row"]), default=0)
        most = min(most, max(0, 2 * largest - 1) // rules.merge**2 * rules.merge**2)
    return ImageLoad(patches / max(1, tokens), int(facts["patches_squared"]) / max(1, patches), most, known=True)


def manifests_of(tables: str) -> list[Manifest | None]:
    """The manifests of the tables that ``--train_data`` names, None of those without; no footer is read.

    Raises :class:`UserError` for a table that is not there, or is unfinished.
    """
    found = []
    for path, _ in parse_tables(tables, "train_data"):
        if is_json_lines(path):
            found.append(None)
            continue
        name, version = split_name(path.rstrip("/") or "/")
        storage = Storage.at(name)
        listing = storage.list()
        delta = version is not None or "_delta_log" in listing.folders
        found.append(read_snapshot(storage, version, listing).manifest if delta else parquet_files(storage, listing)[1])
    return found
