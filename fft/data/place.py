"""Where a job writes one table."""

from dataclasses import dataclass
from pathlib import Path

from fft.data.delta import commit_delta
from fft.data.manifest import Manifest, commit
from fft.data.worker_notes import Channel


@dataclass(frozen=True)
class Place:
    """A table's folder, an absolute path, and the job's channel, which all of its tables share.

    The channel's tag is part of the names of all files: "" unless older versions of a Delta table lie there, too.
    """

    folder: Path
    channel: Channel

    @property
    def tag(self) -> str:
        """See the class."""
        return self.channel.tag

    def commit(self, manifest: Manifest) -> None:
        """Publish the files that the manifest names: from now on they are the table."""
        if self.tag:
            commit_delta(self.folder, manifest)
        else:
            commit(self.folder, manifest)
