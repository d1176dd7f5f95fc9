"""The soak's verdict: what grows is found, what is level is not; a short run goes through."""

import pytest
import soak

LEVEL = [(1000, 10, 3, 0.01)] * 50


@pytest.mark.parametrize(
    ("column", "by", "name"),
    [(0, 1, "rss_growth"), (1, 1, "files_growth"), (2, 1, "threads_growth"), (3, 0.0002, "step_time_drift")],
)
def test_what_grows_is_over_its_limit(column, by, name):
    assert not [key for key, limit in soak.LIMITS.items() if soak.growth(LEVEL)[key] > limit]
    growing = [(*s[:column], s[column] + by * i, *s[column + 1 :]) for i, s in enumerate(LEVEL)]
    assert [key for key, limit in soak.LIMITS.items() if soak.growth(growing)[key] > limit] == [name]


def test_a_short_run(tmp_path):
    result = soak.soak(20, str(tmp_path), every=2)
    assert result["steps"] == 20 and result["files_growth"] == result["threads_growth"] == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]
