"""The time until an engine speaks."""

import gc
import sys

import pytest

from cosyq.cli.starting import starting


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_within_and_all_is_as_it_was_behind(tmp_path, before):
    switch = sys.getswitchinterval()
    try:
        if not before:
            gc.disable()
        with starting(tmp_path, "cpu"):
            assert not gc.isenabled()
            assert sys.getswitchinterval() < 0.001
            young = [[] for _ in range(1000)]
            assert gc.get_count()[0] >= 1000
        assert (gc.isenabled(), sys.getswitchinterval()) == (before, switch)
        assert gc.get_freeze_count() == 0
        assert not before or gc.get_count()[0] < 1000, "what is there is old"
        del young
        with pytest.raises(KeyError), starting(tmp_path, "cpu"):
            raise KeyError
        assert gc.isenabled() == before
    finally:
        gc.enable()
        sys.setswitchinterval(switch)
