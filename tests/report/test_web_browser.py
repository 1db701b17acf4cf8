"""The HTML file of a report in a real browser: it draws, its switches work, its console and the network are silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from test_web import FRONTIER, HOSTILE, X, net, rewritten
from torch import nn

import pwrewrite

Browser = Any  # selenium's, which need not be installed
Open = Callable[[str], Browser]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless Chromium that logs what is said on the console and asked of the network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra browser)")
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a file; in the end its console was silent, and nothing but itself was asked for."""

    def opened(text: str) -> Browser:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size(1200))
        chromium.get(file.as_uri())
        assert js("return document.readyState === 'complete'")
        return chromium

    def js(code: str) -> Any:
        return chromium.execute_script(code)

    chromium.get_log("browser")
    chromium.get_log("performance")
    yield opened
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    asked = {url for url in asked if not url.startswith("data:,")}  # its own empty icon
    assert asked <= {(tmp_path / "report.html").as_uri()}


def size(width: int) -> dict[str, object]:
    return {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}


def count(browser: Browser, selector: str) -> int:
    return int(browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector))


def texts(browser: Browser, selector: str) -> list[str]:
    code = "return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)"
    return list(browser.execute_script(code, selector))


def press(browser: Browser, selector: str, *keys: str) -> None:
    """Puts the focus there and presses keys wherever it then is."""
    browser.execute_script("document.querySelector(arguments[0]).focus()", selector)
    for key in keys:
        send = browser.switch_to.active_element
        send.send_keys(key)


def choose(browser: Browser, group: str, value: str) -> None:
    press(browser, f"#{group} input[value='{value}']", " ")


def test_an_analysis_draws_everything_at_three_widths(page: Open) -> None:
    browser = page(pwrewrite.analyze(torchvision.models.resnet18().eval(), torch.randn(1, 3, 224, 224)).to_html())
    for width in (390, 1024, 1600):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size(width))
        browser.refresh()
        assert count(browser, "#treemap .tile:not(.group)") >= 18  # what does MACs, but for slivers
        assert count(browser, "#graph .box") > 10
        assert count(browser, "#roofline .dot") == 21 == count(browser, "#layers tbody tr")
        assert count(browser, "#memory .area") == count(browser, "#memory .peak") == 1
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert count(browser, "section[hidden]") == 1  # the frontier


def test_the_cost_colours_and_sizes_treemap_and_graph(page: Open) -> None:
    browser = page(pwrewrite.analyze(net(), X).to_html())
    seen = []
    for cost in ("macs", "params", "memory", "time"):
        choose(browser, "costs", cost)
        label = browser.execute_script("return document.querySelector('#treemap .tile').getAttribute('aria-label')")
        seen.append((label, *texts(browser, "#graph .amount"), *texts(browser, ".cost")))
    assert len(set(seen)) == 4
    assert [each[-1] for each in seen] == ["MACs", "Parameters", "Activations", "Least time"]


def test_a_rewrite_is_switched_between_before_and_after(page: Open) -> None:
    browser = page(rewritten().to_html())
    assert count(browser, "#roofline .dot.before") == 3
    assert count(browser, "#roofline .dot.after") == count(browser, "#layers tbody tr") == 9
    after = texts(browser, "#layers .path")
    choose(browser, "models", "before")
    assert sorted(texts(browser, "#layers .path")) == ["body.0", "body.2", "stem"]
    assert "body.0.core" in after
    assert any("bottleneck" in text for text in texts(browser, "#layers .note"))
    assert "→" in texts(browser, "#totals dd")[0]


def test_themes(page: Open) -> None:
    browser, seen = page(pwrewrite.analyze(net(), X).to_html()), set()
    for theme in ("light", "dark"):
        choose(browser, "themes", theme)
        seen.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        tile = "return getComputedStyle(document.querySelector('#treemap .tile:not(.group) rect')).fill"
        seen.add(browser.execute_script(tile))
    assert len(seen) == 4


def test_the_table_is_sorted_and_searched(page: Open) -> None:
    browser = page(pwrewrite.analyze(net(), X).to_html())
    assert texts(browser, "#layers .path") == ["body.2", "body.0", "stem"]
    press(browser, "#layers th:first-child button", "\n")
    assert texts(browser, "#layers .path") == ["body.0", "body.2", "stem"]
    press(browser, "#layers th:first-child button", "\n")
    assert texts(browser, "#layers .path") == ["stem", "body.2", "body.0"]
    press(browser, "#search", *"BODY 64")
    assert texts(browser, "#layers .path") == ["body.2"]
    assert texts(browser, "#shown") == ["1 of 3 layers"]


def test_everything_is_reached_by_keyboard(page: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = page(pwrewrite.analyze(net(), X).to_html())
    press(browser, "#treemap .tile", Keys.ARROW_DOWN, Keys.ENTER)  # into the largest module
    assert texts(browser, "#crumbs li") == ["(model)", "body"]
    assert texts(browser, "#selected")[0].startswith("body · Sequential · ")
    press(browser, "#treemap .tile", Keys.ESCAPE)
    assert texts(browser, "#crumbs li") == ["(model)"]

    boxes = count(browser, "#graph .box")
    press(browser, "#graph .box[aria-expanded='true']", Keys.ARROW_LEFT)
    assert count(browser, "#graph .box") == boxes - 3
    press(browser, "#graph .box[aria-expanded='false']", Keys.ARROW_RIGHT)
    assert count(browser, "#graph .box") == boxes
    where = browser.execute_script("return document.querySelector('#graph svg > g').getAttribute('transform')")
    press(browser, "#graph .box", "+")
    assert browser.execute_script("return document.querySelector('#graph svg > g').getAttribute('transform')") != where

    press(browser, "#memory svg", Keys.HOME)
    assert texts(browser, "#memory-note")[0].startswith("operation 0 of 6, ")
    press(browser, "#roofline .dot[tabindex='0']", Keys.ARROW_RIGHT)
    press(browser, "#layers tbody tr[tabindex='0']", Keys.ARROW_DOWN)
    assert texts(browser, "#selected")[0].startswith("body.0 · Conv2d")
    assert count(browser, "#layers tr.marked") == count(browser, "#roofline .marked") == 1


def test_buttons_of_the_graph(page: Open) -> None:
    browser = page(rewritten().to_html())
    boxes = count(browser, "#graph .box")
    press(browser, "#graph-tools [value='less']", "\n")
    fewer = count(browser, "#graph .box")
    press(browser, "#graph-tools [value='more']", "\n")
    assert fewer < count(browser, "#graph .box") == boxes
    for value in ("in", "out", "fit"):
        press(browser, f"#graph-tools [value='{value}']", "\n")


def test_a_frontier_with_its_plan(page: Open) -> None:
    browser = page(FRONTIER.to_html())
    assert count(browser, "#pareto .dot") == 2
    assert count(browser, "section[hidden]") == 5
    press(browser, "#pareto .dot[tabindex='0']", "\ue012")  # the arrow to the left
    assert texts(browser, "#pareto-note") == ["50.0% of the MACs: loss 0.1, 3 layers"]


def test_a_plan_on_its_frontier(page: Open) -> None:
    result = pwrewrite.rewrite(net(), X, budget={"macs": 0.6}, verify=False)
    browser = page(result.to_html())
    assert count(browser, "#pareto .dot.chosen") == 1
    assert count(browser, "#pareto .dot") > 3
    assert texts(browser, "#pareto-note")[0].startswith("the plan: ")


def test_a_compression_before_and_after_and_on_its_frontier(page: Open) -> None:
    result = pwrewrite.compress(
        net(), X, {"macs": 0.6}, calibration=X.expand(32, -1, -1, -1) + torch.randn(32, 1, 1, 1)
    )
    browser = page(result.report.to_html())
    assert count(browser, "section[hidden]") == 0
    assert count(browser, "#pareto .dot.chosen") == 1
    assert count(browser, "#pareto .dot") > 3
    assert texts(browser, "#pareto-note")[0].startswith("the plan: ")


def test_hostile_names_stay_text(page: Open) -> None:
    browser = page(rewritten(net(HOSTILE)).to_html())
    assert count(browser, "img") == 0
    assert any("onerror=alert(1)" in text for text in texts(browser, "#layers .path"))
    for cost in ("params", "memory"):
        choose(browser, "costs", cost)
    press(browser, "#search", *"img")
    assert 1 <= count(browser, "#layers tbody tr") <= 3


def test_two_thousand_layers(page: Open) -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(2000))).eval()
    browser = page(pwrewrite.analyze(model, torch.randn(1, 2, 4, 4)).to_html())
    assert 2 <= count(browser, "#graph .box") <= 1300
    assert count(browser, "#layers tbody tr") == 100
    press(browser, "#all", "\n")
    assert count(browser, "#layers tbody tr") == 2000 == count(browser, "#roofline .dot")
