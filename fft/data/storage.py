"""Folders of an object store, by URL, through pyarrow's own file systems: s3://, gs://, abfs://, hdfs://, file://.

Credentials are what those find by themselves: the environment, a profile, the machine's role. Logs of Delta tables are
read by ``deltalake``, which looks into the environment, too.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fft.data.delta import read_log
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, Manifest, is_hidden
from fft.errors import UserError, one_line


@dataclass(frozen=True)
class RemoteFolder:
    """Parquet files of a table in name order, as paths of its file system, and the manifest if there is one.

    ``version`` is a Delta table's.
    """

    filesystem: fs.FileSystem
    files: tuple[str, ...]
    manifest: Manifest | None
    version: int | None


def is_url(path: object) -> bool:
    """Whether a path names its file system."""
    return "://" in str(path)


def read_folder(url: str, version: int | None = None) -> RemoteFolder:
    """List a table, of a Delta table the latest version or the one asked for.

    Raises :class:`UserError` when it cannot be listed, is unfinished, or is not what its manifest or log says.
    """
    try:
        filesystem, root = fs.FileSystem.from_uri(url)
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        sizes = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == fs.FileType.File}
        text = None
        if MANIFEST_NAME in sizes:
            with filesystem.open_input_stream(f"{root}/{MANIFEST_NAME}") as stream:
                text = stream.read().decode("utf-8", "replace")
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{url} cannot be listed ({one_line(error)}): check the address and this machine's credentials."
        ) from error
    if any(name.startswith("_delta_log/") for name in sizes):
        log = read_log(url, version)
        manifest, version = log.manifest, log.version
        names = sorted(uri.removeprefix(log.root) for uri in log.files)
        if missing := [name for name in names if name not in sizes]:
            raise UserError(f"{missing[0]} is in the Delta log of {url} but is missing: was the table vacuumed?")
    elif version is not None:
        raise UserError(f"{url} is no Delta table: leave out @v{version}, or give one.")
    elif text is None and WRITING_NAME in sizes:
        raise UserError(f"{url} is unfinished: the job that wrote it was interrupted; run that job again.")
    else:
        manifest = Manifest.from_json(text, f"{url}/{MANIFEST_NAME}") if text is not None else None
        names = sorted(name for name in sizes if name.endswith(".parquet") and not is_hidden(PurePosixPath(name)))
        if manifest is not None and (stray := sorted(set(names) - {info.path for info in manifest.files})):
            raise UserError(f"{url}/{stray[0]} is not in the table's manifest: remove it or write the table again.")
    if manifest is not None:
        for info in manifest.files:
            if sizes.get(info.path) != info.bytes:
                raise UserError(
                    f"{url}/{info.path} has {sizes.get(info.path, 'no')} bytes, its manifest says {info.bytes}: the "
                    "table was changed after it was written; write it again."
                )
    return RemoteFolder(filesystem, tuple(f"{root.rstrip('/')}/{name}" for name in names), manifest, version)
