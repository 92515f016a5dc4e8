"""How far an engine says that it is."""

import threading
import time
from types import SimpleNamespace

from spark_jobs.runtime.watching import _asked_of, _told_by


def test_classic_spark_is_asked(spark):
    """Of both stages of a shuffle, and not of what ran before."""

    def slow(batches):
        for batch in batches:
            time.sleep(0.3)
            yield batch

    seen, stop = [], threading.Event()
    spark.range(4, numPartitions=4).count()
    with _asked_of(spark) as counts:

        def look():
            while not stop.wait(0.02):
                seen.append(counts())

        looking = threading.Thread(target=look)
        looking.start()
        rows = spark.range(8, numPartitions=4).mapInArrow(slow, "id long").repartition(3, "id")
        assert rows.mapInArrow(slow, "id long").count() == 8
        stop.set()
        looking.join()
    assert seen[0][0] == 0
    assert max(tasks for _, tasks in seen) >= 7
    assert 4 <= max(ended for ended, _ in seen) <= max(tasks for _, tasks in seen)


def test_spark_connect_tells():
    handlers = []
    session = SimpleNamespace(registerProgressHandler=handlers.append, removeProgressHandler=handlers.remove)
    with _told_by(session) as counts:
        (hear,) = handlers
        assert counts() == (0, 0)
        for done in (1, 3):
            stages = [SimpleNamespace(stage_id=i, num_tasks=4, num_completed_tasks=done) for i in range(2)]
            hear(stages=stages, inflight_tasks=1, operation_id="a", done=False)
        hear(stages=None, inflight_tasks=0, operation_id="b", done=True)
        assert counts() == (6, 8)
    assert not handlers
