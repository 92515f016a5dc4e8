"""All images of a token table once through one loader, in this process; prints what it cost as JSON.

    python benchmarks/peers/images.py KIND TABLE WORK

KIND is fft (uint8 patches and positions of micro-batches), transformers (the PIL processor of Qwen2-VL over bytes in
memory), mosaic (MosaicML streaming's bytes through the same processor) or mosaic-rgb (the same, decoded and no more).
"""

import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.peers.loaders import peak_bytes, print_and_exit, stand_in_for_torchvision  # noqa: E402 - after sys.path
from benchmarks.vision import RULES, SEQ_LEN  # noqa: E402


def read_fft(table: Path, work: Path) -> Iterator[int]:
    """Ours, shuffled: the images of each step."""
    from fft.data.batches import BatchPlan, Loader
    from fft.data.reader import SampleReader
    from fft.data.table import Table

    reader = SampleReader(Table.open(table), SEQ_LEN, seed=0).with_images(RULES)
    yield 0
    for (batch,) in Loader(reader, BatchPlan(1, 0, 1, 1), reader.samples_per_epoch):
        yield len(batch.images.grids) - 1


def files_of_rows(table: Path) -> Iterator[bytes]:
    """The images of a table, as files."""
    import pyarrow.parquet as pq

    for path in sorted(table.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for rows in file.iter_batches(1, columns=["images"]):
                yield from rows.column(0)[0].as_py()


def to_rgb(data: bytes) -> "Image":
    """A decoded image."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def to_pixel_values() -> Callable[[bytes], object]:
    """Decoding, and Qwen2-VL's processor: its PIL backend."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": RULES.min_pixels, "longest_edge": RULES.max_pixels}
    processor = Qwen2VLImageProcessorPil(patch_size=RULES.patch, size=size)
    return lambda data: processor(images=[to_rgb(data)], return_tensors="np")


def read_transformers(table: Path, work: Path) -> Iterator[int]:
    """Nothing but decoding and the processor: the files are in memory."""
    files, process = list(files_of_rows(table)), to_pixel_values()
    yield 0
    for data in files:
        process(data)
        yield 1


def read_mosaic(table: Path, work: Path) -> Iterator[int]:
    """MosaicML streaming, and the processor."""
    return stream(table, work, to_pixel_values())


def read_mosaic_rgb(table: Path, work: Path) -> Iterator[int]:
    """MosaicML streaming, and decoding alone."""
    return stream(table, work, to_rgb)


def stream(table: Path, work: Path, process: Callable[[bytes], object]) -> Iterator[int]:
    """MosaicML streaming, after its conversion to shards, shuffled by its default py1e, in this process."""
    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset

    shards = work / "mds-images"
    shutil.rmtree(shards, ignore_errors=True)
    with MDSWriter(out=str(shards), columns={"image": "bytes"}) as sink:
        for data in files_of_rows(table):
            sink.write({"image": data})
    dataset = StreamingDataset(local=str(shards), shuffle=True, batch_size=1)
    yield 0
    for sample in dataset:
        process(sample["image"])
        yield 1


KINDS = {"fft": read_fft, "transformers": read_transformers, "mosaic": read_mosaic, "mosaic-rgb": read_mosaic_rgb}


def main() -> None:
    """See the module."""
    counts = KINDS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    next(counts)  # from here on it counts
    begin, busy = time.perf_counter(), time.process_time()
    images = sum(counts)
    cost = {
        "images": images,
        "seconds": time.perf_counter() - begin,
        "busy": time.process_time() - busy,
        "peak_bytes": peak_bytes(),
    }
    print_and_exit(cost)


if __name__ == "__main__":
    main()
