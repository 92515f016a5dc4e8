"""Sessions that let little be set, as serverless ones do."""

from types import SimpleNamespace

import pytest

from spark_jobs.runtime import session


class Settings:
    """Those of a session, some of which are refused."""

    def __init__(self, **refused):
        self.values, self.refused = {"spark.sql.execution.arrow.maxBytesPerBatch": "1"}, refused

    def get(self, name, default=None):
        if self.refused.get("get"):
            raise RuntimeError("CONFIG_NOT_AVAILABLE")
        return self.values.get(name, default)

    def set(self, name, value):
        if self.refused.get("set") and name.endswith("maxRecordsPerBatch"):
            raise RuntimeError("CONFIG_NOT_AVAILABLE")
        self.values[name] = value

    def unset(self, name):
        del self.values[name]


@pytest.mark.parametrize("refused", [{}, {"set": True}, {"get": True}])
def test_settings_are_tried_and_put_back(refused, capsys):
    session._tell_refused.cache_clear()
    conf = Settings(**refused)
    before = dict(conf.values)
    for _ in range(2):
        with session.job_settings(SimpleNamespace(conf=conf)):
            inside = dict(conf.values)
        assert conf.values == before
    told = capsys.readouterr().err.count("does not let")
    assert told == {0: 0, 1: 2 if "get" in refused else 1}[len(refused)]  # once each
    assert (inside == before) == ("get" in refused)
