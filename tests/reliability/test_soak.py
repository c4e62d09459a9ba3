"""The soak, a tenth of it; the whole is `python -m tests.reliability.soak`."""

import pytest

from tests.reliability.soak import CHECKS, soak


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G10")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_everything_at_once(tmp_path):
    assert len(soak(tmp_path, 200)) == len(CHECKS)
