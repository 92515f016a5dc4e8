"""Token tables by ``df.transform``: functions that make functions DataFrame -> DataFrame.

>>> from spark_jobs import pack, shuffle, tokenize
>>> df = spark.createDataFrame([("a text",), ("another one",)], "text string")
>>> rows = df.transform(tokenize("tokenizer")).transform(shuffle(seed=7)).transform(pack(64))
>>> rows.columns
['input_ids', 'cu_seqlens', 'doc_ids']
>>> sum(len(row["doc_ids"]) for row in rows.collect())
2

They compute nothing themselves, write nothing and set nothing: the rows are a DataFrame like any other, and all is done
when somebody uses it. They are those of the jobs, which are made of the same functions, see
:mod:`spark_jobs.token_rows`. What of a worker's error is the user's comes as Spark's exception with our sentence in it.

Tables that Spark's own writer makes of them are read by the trainer, the other jobs and these functions as any foreign
table. Their order is that of the DataFrame: by its partitions, and in each by its rows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from fft.data.known import DOC_IDS, IMAGES
from fft.errors import UserError
from fft.images.rules import ImageLimits
from fft.text.keeping import keeping
from fft.text.records import Keys
from spark_jobs.dataframes import Frame, columns_read
from spark_jobs.encoders import encoder_loader, image_settings
from spark_jobs.mixing import check_weights
from spark_jobs.parameters import check_parameters
from spark_jobs.placing import Shuffling, bucket_tokens, buckets_for, in_partitions, partition_order
from spark_jobs.runtime.tasks import map_in_order
from spark_jobs.token_rows import (
    ERROR,
    RECORD,
    Balanced,
    ChosenRows,
    EncodeRows,
    PackedInPlace,
    PackedRows,
    own_beside,
    own_columns,
    token_bytes,
    token_columns,
    token_schema,
)
from spark_jobs.token_table.pack_rows import Packer, window_tokens

Transform = Callable[[DataFrame], DataFrame]

#: Partitions of an exchange where the session does not say how many: Spark's own default.
_PARTITIONS = "200"


def tokenize(
    tokenizer: str | Path,
    *,
    task: str = "pretrain",
    text_key: str = "text",
    id_key: str = "id",
    max_len: int | None = None,
    image_path: str | Path | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    max_tiles: int | None = None,
    eos: str = "auto",
    parse_special_tokens: bool = False,
    keep: Sequence[str] | None = None,
    on_error: str = "fail",
) -> Transform:
    """From documents, a row each, to token rows, in their order; parameters are those of ``tokenize_table``.

    In: a column of texts (``text_key``) and perhaps one of ids (``id_key``); with ``task="chat"`` conversations under
    ``messages`` or ``conversation``. Out: ``input_ids array<int>, doc_ids array<string>``; of chats ``labels
    array<int>`` between them; with ``image_path`` also ``image_grids array<int>, images array<binary>``; of the columns
    to ``keep``, each as ``array<string>``, one a document. Other columns are dropped. A document without tokens has no
    row; with ``max_len`` a longer one has several. A malformed record ends the query; with ``on_error="quarantine"`` it
    is a row of nulls but for two more columns, which all rows then have: ``error string`` (why) and ``record string``
    (what it is).

    Needs no exchange, and works on streams. The tokenizer is read here, and travels. Raises :class:`UserError` for
    parameters that are none; the function that is returned, for columns that are none.
    """
    check_parameters(locals())
    if task == "preference":
        raise UserError(
            '`task="preference"`: a DataFrame cannot say that its rows are pairs: make a table with `tokenize_table`.'
        )
    images = image_settings(image_path, ImageLimits(max_pixels, min_pixels, max_tiles), task)
    keys, fail = Keys(text_key, id_key), on_error == "fail"
    if not fail and (taken := [name for name in keep or () if name in (ERROR, RECORD)]):
        raise UserError(f'`keep` names {taken[0]}, which `on_error="quarantine"` says of malformed records: rename it.')
    encoder, _ = encoder_loader(tokenizer, task, keys, max_len, eos, parse_special_tokens, images)()
    encoder = keeping(encoder, keep)
    columns_out = encoder.columns_out if fail else (*encoder.columns_out, ERROR, RECORD)

    def tokenized(df: DataFrame) -> DataFrame:
        rows, columns = columns_read(Frame("DataFrame", "parquet", df, df.schema), encoder)
        return rows.mapInArrow(EncodeRows(encoder, fail, "DataFrame", "parquet", columns), token_schema(columns_out))

    return tokenized


def shuffle(
    seed: int = 0,
    *,
    num_block: int | None = None,
    weights: Mapping[str, float] | None = None,
    keep: Sequence[str] | None = None,
    dedup: bool = False,
    holdout: float = 0.0,
    split: str = "train",
) -> Transform:
    """Token rows in an order that depends on their content and ``seed`` alone, however the DataFrame was cut.

    In: the columns of a token table, of which ``input_ids`` must be there, and perhaps ``dataset`` (a string, or an
    array of them), by whose values ``weights`` say how often rows occur (once where none is given). Out: the same, and
    ``doc_ids array<string>`` in any case, ``dataset array<string>`` where it was there, and the columns to ``keep``,
    each as ``array<string>``, one a document; other columns are dropped. Rows without tokens are left out. With
    ``holdout``, the rows of one ``split`` of the documents, "train" or "validation"; ``dedup`` leaves out rows whose
    content occurred before, or is held out.

    The order goes through the ``num_block`` partitions one after the other (by default
    ``spark.sql.shuffle.partitions``), and does not depend on how many they are. It is that of ``shuffle_tables``
    where ``dataset`` has the names that tables have there. On Sail, some partitions may hold several stretches of
    it, or none. Not for streams. Raises :class:`UserError` for parameters that are none; the function that is
    returned, for columns that are none.
    """
    check_parameters(locals())
    # The rows of no dataset, which occur once: all others may be left out.
    known = check_weights(weights or {}, [*(weights or {}), ""])
    shuffling = Shuffling(seed, holdout, split, known, dedup)

    def shuffled(df: DataFrame) -> DataFrame:
        _check_whole(df, "shuffle")
        rows, columns = token_bytes(df, keep), token_columns(df, beside=own_beside(df, keep))
        placed = shuffling.place(rows, num_block or _default_partitions(df))
        work = ChosenRows(shuffling.choice(rows), columns)
        return map_in_order(placed, work, shuffling.order(rows), token_schema(columns))

    return shuffled


def pack(
    max_len: int,
    *,
    method: str = "best-fit",
    num_partition: int | None = None,
    seed: int = 0,
    keep: Sequence[str] | None = None,
) -> Transform:
    """Token rows packed to rows of at most ``max_len`` tokens; ``method`` is the ``pack`` of ``repartition_table``.

    In: the columns of a token table, of which ``input_ids`` must be there, without images. Out: ``input_ids
    array<int>``, perhaps ``labels array<int>``, ``cu_seqlens array<int>`` (where documents begin and end: 0 first, the
    row's length last), ``doc_ids array<string>`` (one a document), and as many of ``dataset array<string>`` where there
    is such a column, and of the columns to ``keep``; other columns are dropped.

    With ``num_partition``, documents are dealt to so many partitions of equal token count, and packed there: the rows
    of ``repartition_table``. That reads the DataFrame twice, and is not for streams. Without it each partition of the
    DataFrame is packed as it is, in its order, without an exchange; of a stream, each batch. Raises
    :class:`UserError` for parameters that are none; the function that is returned, for columns that are none.
    """
    check_parameters(locals())
    packer = Packer(max_len, method, seed, window_tokens(max_len))

    def packed(df: DataFrame) -> DataFrame:
        lists, beside = tuple(n for n in token_columns(df) if n != DOC_IDS), own_beside(df, keep)
        columns = token_columns(df, packed=True, beside=beside)
        if IMAGES in columns:
            raise UserError("`pack` is for texts; rows with images are packed by spark_jobs/repartition.py.")
        schema = token_schema(columns)
        if num_partition is None:
            return own_columns(df, keep).mapInArrow(PackedInPlace(packer, lists, beside, columns), schema)
        _check_whole(df, "pack, with `num_partition`,")
        rows, buckets = token_bytes(df, keep).where(F.length("input_ids") > 0), buckets_for(num_partition)
        weights = bucket_tokens(rows, seed, buckets).agg(F.collect_list(F.struct("bucket", "tokens")).alias("weights"))
        assigned = weights.mapInArrow(Balanced(num_partition), "bucket int, part int")
        placed = in_partitions(rows, assigned, seed, buckets, num_partition)
        return map_in_order(placed, PackedRows(packer, columns), partition_order(placed), schema)

    return packed


def _check_whole(df: DataFrame, what: str) -> None:
    if df.isStreaming:
        raise UserError(f"{what} needs all rows at once, and a stream has no end: write it, then read the table.")


def _default_partitions(df: DataFrame) -> int:
    return int(df.sparkSession.conf.get("spark.sql.shuffle.partitions", _PARTITIONS) or _PARTITIONS)
