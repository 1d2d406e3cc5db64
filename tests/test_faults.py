"""The short form of the fault campaign: see tests/faults/campaign.py."""
import pytest

from faults.campaign import SHORT, Campaign, growth, soak


@pytest.fixture(scope='module')
def campaign(tmp_path_factory): return Campaign(tmp_path_factory.mktemp('runs'))


@pytest.mark.parametrize('fault', SHORT, ids=lambda f: f.name)
def test_a_fault_changes_nothing(fault, campaign):
    row = campaign.run(fault)
    assert row['lost_steps'] == row['orphans'] == 0


def test_a_short_soak(tmp_path):
    """Kills at random moments, then a stop in good order: an undisturbed run that stops after the same step has the same numbers."""
    row = soak(tmp_path, .1, between=(1, 4), rest=.01, least=2)
    assert row['weights_equal'] and row['kills'] >= 2 and row['steps'] > 0


def test_growth_is_seen():
    """A leak is the difference of medians; what a process takes at its beginning is none, and too few samples say nothing."""
    assert growth([300., *[500.] * 40]) == 0 and growth([1.] * 14) is None
    assert growth([500 + i for i in range(100)]) == pytest.approx(60, abs=2)
