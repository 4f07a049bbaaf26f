"""Which of several processes is named: the one that a signal ended, not the one that lost touch with it."""

import pytest

from common.parallel import launch

LOG = """E1130 16:19:22 api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 25735) of binary: python
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {one} (pid: 25736)
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {zero} (pid: 25735)
"""


@pytest.fixture
def reason(tmp_path):
    (tmp_path / "error-0.txt").write_text("RuntimeError: connection closed by peer\n")

    def tell(text):
        (tmp_path / "log.txt").write_text(text)
        return launch._reason(tmp_path, tmp_path / "log.txt")

    return tell


def test_the_killed_one_is_named_although_another_was_seen_first(reason):
    assert reason(LOG.format(one=-9, zero=1)) == "Process 1 was ended by SIGKILL."
    assert reason(LOG.format(one=1, zero=-11)) == "Process 0 was ended by SIGSEGV."


def test_who_was_only_stopped_with_the_others_is_not_named(reason):
    assert reason(LOG.format(one=-15, zero=1)) == "Process 0 failed: RuntimeError: connection closed by peer"


def test_no_failure_of_a_process_shows_the_end_of_the_log(reason, tmp_path):
    (tmp_path / "error-0.txt").unlink()
    assert "the last words" in reason("the last words")
