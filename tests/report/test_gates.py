import re
from collections.abc import Callable

import pytest

from pwrewrite.analysis.gates import judge
from pwrewrite.analysis.records import Analysis
from pwrewrite.capturing.records import Coverage
from pwrewrite.core.errors import GateError
from pwrewrite.core.options import GateOptions
from pwrewrite.report.costs import hold


def test_what_is_just_too_much_is_told_by_all_digits(analysis: Analysis) -> None:
    text = str(judge(analysis, GateOptions(analysis.params - 1, max_weights=analysis.weight_bytes - 1)))
    assert re.search(r"parameters +320,000 +319,999 +>100\.0%", text), text
    assert re.search(r"weights +[0-9,]+ B +[0-9,]+ B +>100\.0%", text), text


def test_gates(analysis: Analysis, make_analysis: Callable[..., Analysis]) -> None:
    hold(judge(analysis, GateOptions()))
    hold(judge(analysis, GateOptions(analysis.params, analysis.macs)))
    with pytest.raises(GateError, match=r"2 of 2 limits exceeded: parameters, MACs") as raised:
        hold(judge(analysis, GateOptions(analysis.params - 1, 100)))
    assert "parameters: 320,000, at most 319,999" in str(raised.value)
    assert "MACs: " in str(raised.value)
    with pytest.raises(GateError, match=r"mylib::correlate \(2\)") as raised:
        hold(judge(analysis, GateOptions(strict=True)))
    assert "register_formula" in str(raised.value)
    hold(judge(make_analysis(coverage=Coverage("whole", 5, 5, (), "meta")), GateOptions(strict=True)))
