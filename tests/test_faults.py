"""The short form of the fault campaign: see tests/faults/campaign.py."""
import pytest

from faults.campaign import SHORT, Campaign


@pytest.fixture(scope='module')
def campaign(tmp_path_factory): return Campaign(tmp_path_factory.mktemp('runs'))


@pytest.mark.parametrize('fault', SHORT, ids=lambda f: f.name)
def test_a_fault_changes_nothing(fault, campaign):
    row = campaign.run(fault)
    assert row['lost_steps'] == row['orphans'] == 0
