"""A stage of Spark whose tasks run side by side, one a node: each starts a keeper, and they agree where ranks meet.

Tasks need nothing of this package: it travels with them, so that every node runs the code of the notebook.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fft.package_files import modules_of

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

#: What a task needs to know: where it is among the others, and what Spark gives it.
Context = Any


@dataclass(frozen=True)
class NodeStage:
    """What all nodes are told: the ``order`` of their keepers, and the ``variables`` of their ranks' environment."""

    order: Mapping[str, Any]
    variables: Mapping[str, str]

    def on_executors(self, spark: "SparkSession", profile: "ResourceProfile | None", tag: str) -> list[dict[str, Any]]:
        """Run it as a job of Spark's with this ``tag``; returns what became of each node."""
        import json

        node = _node(self.order, package_zip(), self.variables)
        spark.addTag(tag)
        nodes = self.order["nodes"]
        given = {} if profile is None else {"profile": profile}
        rows = spark.range(0, nodes, 1, nodes).mapInArrow(_task(node), "told string", barrier=True, **given).collect()
        return [json.loads(row.told) for row in rows]

    def here(self) -> list[dict[str, Any]]:
        """Run it on this machine, without Spark."""
        place = SimpleNamespace(address="127.0.0.1")
        alone = SimpleNamespace(
            partitionId=lambda: 0, allGather=lambda text: [text], getTaskInfos=lambda: [place], resources=dict
        )
        return [_node(self.order, package_zip(), self.variables)(alone)]


def package_zip() -> bytes:
    """This package's modules as a zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, file in modules_of("fft"):
            out.writestr(name, file.read_bytes())
    return packed.getvalue()


def _task(node: Callable[[Context], dict[str, Any]]) -> Callable:
    """``node`` for ``mapInArrow``. A function within a function, as the next one: such are sent whole, not by name."""

    def work(batches: Iterator) -> Iterator:
        import json

        import pyarrow as pa
        from pyspark import BarrierTaskContext

        for _ in batches:
            continue
        told = node(BarrierTaskContext.get())
        yield pa.RecordBatch.from_pydict({"told": [json.dumps(told)]})

    return work


def _node(order: Mapping[str, Any], code: bytes, variables: Mapping[str, str]) -> Callable[[Context], dict[str, Any]]:
    """What a task does: returns what became of its node, ``problem`` or ``failed`` being sentences."""

    def node(context: Context) -> dict[str, Any]:
        import io
        import json
        import os
        import subprocess
        import sys
        import tempfile
        import zipfile

        folder = tempfile.mkdtemp(prefix="fft-")
        zipfile.ZipFile(io.BytesIO(code)).extractall(folder)
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([folder, *filter(None, sys.path)])}
        if order["use_gpu"] and "gpu" in context.resources():
            visible, given = environment.get("CUDA_VISIBLE_DEVICES", ""), context.resources()["gpu"].addresses
            devices = [visible.split(",")[int(number)] for number in given] if visible else given
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif not order["use_gpu"]:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-P", "-m", "fft.spark.keeper"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        keeper: Any = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

        def ask(message: dict) -> dict[str, Any]:
            try:
                print(json.dumps(message), file=keeper.stdin, flush=True)
                return json.loads(keeper.stdout.readline())
            except (OSError, ValueError):
                said = keeper.stderr.read().strip().splitlines() or ["nothing"]
                return {"problem": f"the keeper of node {context.partitionId()} has ended, it said: {said[-1]}"}

        found = ask({**order, "node": context.partitionId(), "folder": folder})
        reports = [json.loads(text) for text in context.allGather(json.dumps(found))]
        if any(report["problem"] for report in reports):
            keeper.communicate()
            return found
        host, _, port = context.getTaskInfos()[0].address.rpartition(":")
        ended = ask({"address": host or port, "port": reports[0]["port"]})
        keeper.communicate()
        return found | ended

    return node
