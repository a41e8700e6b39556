import pytest

from holdfast.stats import bootstrap


@pytest.fixture
def resamples(monkeypatch):
    """Sets how many resamples an interval has, for tests of many intervals."""
    return lambda n: monkeypatch.setattr(bootstrap, "N_RESAMPLES", n)
