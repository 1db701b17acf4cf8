from collections.abc import Callable

import pytest

from pwrewrite.analysis.records import Analysis
from pwrewrite.capturing.records import Coverage
from pwrewrite.core.errors import GateError
from pwrewrite.report.gates import check


def test_gates(analysis: Analysis, make_analysis: Callable[..., Analysis]) -> None:
    check(analysis)
    check(analysis, max_params=analysis.params, max_macs=analysis.macs)
    with pytest.raises(GateError, match=r"too many parameters and too many MACs") as raised:
        check(analysis, max_params=analysis.params - 1, max_macs=100)
    assert "319,999" in str(raised.value)
    assert "1 too many" in str(raised.value)
    with pytest.raises(GateError, match="mylib::correlate ×2"):
        check(analysis, strict=True)
    check(make_analysis(coverage=Coverage("whole", 5, 5, (), "meta")), strict=True)
