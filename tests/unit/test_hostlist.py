"""Slurm's lists of hosts, as `scontrol show hostnames` reads them."""

import pytest

from megatron_papo.runtime.hostlist import first_host, hosts

LISTS = {
    "n1": "n1",
    "n1,n2": "n1 n2",
    "h[03-05,9],k1": "h03 h04 h05 h9 k1",
    "r[7,9]-ib": "r7-ib r9-ib",
    "a-b[12]": "a-b12",
    "a[1,3-5],b7": "a1 a3 a4 a5 b7",
    "n[001-003]": "n001 n002 n003",
    "n[8-11]": "n8 n9 n10 n11",
    "n[098-101]": "n098 n099 n100 n101",
    "rack[0-1]_blade[0-2]": "rack0_blade0 rack0_blade1 rack0_blade2 rack1_blade0 rack1_blade1 rack1_blade2",
    "r[1-2]n[07-08].ib.cluster,login": "r1n07.ib.cluster r1n08.ib.cluster r2n07.ib.cluster r2n08.ib.cluster login",
    "x[1][2][3-4]": "x123 x124",
    "[1-2]": "1 2",
    "127.0.0.1": "127.0.0.1",
}


@pytest.mark.parametrize("nodelist", LISTS)
def test_the_hosts_of(nodelist):
    names = LISTS[nodelist].split()
    assert list(hosts(nodelist)) == names and first_host(nodelist) == names[0]


NONE = (
    "",
    ",",
    "a,",
    "a,,b",
    "n[",
    "n[1",
    "n]1[",
    "n[]",
    "n[a]",
    "n[3-1]",
    "n[1-]",
    "n[1--2]",
    "n[0-9999999]",
    "b[0x1]",
)


@pytest.mark.parametrize("nodelist", NONE)
def test_what_is_none_is_refused(nodelist):
    with pytest.raises(ValueError, match="is no list of Slurm's hosts"):
        first_host(nodelist)
