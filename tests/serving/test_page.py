"""The pages: nothing from elsewhere, and, in a real browser, from typing to reading."""

import json
import re
import shutil

import pytest
import tiny

from modeling_querit.serving.page import FOLDER

QUERY = "who wrote the book"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_only_files_of_this_server(client, path):
    page = client.get(path)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert loaded
    for name in loaded:
        assert client.get("/" + name.removeprefix("./")).status_code == 200


def test_no_file_names_another_host():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(^|\s)//.*", "", text, flags=re.MULTILINE).replace("http://", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver, which are not on this machine")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(driver))
    browser.set_window_size(1280, 900)
    yield browser
    browser.quit()


@pytest.fixture
def find(browser):
    return lambda selector: browser.find_element("css selector", selector)


@pytest.fixture
def wait(browser):
    from selenium.webdriver.support.ui import WebDriverWait

    return lambda condition: WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def texts(browser, selector):
    return [element.get_attribute("textContent") for element in browser.find_elements("css selector", selector)]


@pytest.mark.slow
def test_the_page_ranks_what_is_typed(browser, find, wait, address, served_model):
    from selenium.webdriver.common.keys import Keys

    documents = ["A novel by Lee. Nobody asked who wrote it.", "x", "the judge wrote a book"]
    browser.get(address)
    wait(lambda: find("#model").text == "tiny")
    find("#query").send_keys(QUERY)
    find("#documents").send_keys("\n".join(documents))
    assert find("#count").text == "3 documents"
    find("#documents").send_keys(Keys.CONTROL, Keys.ENTER)
    wait(lambda: len(texts(browser, "#results li")) == 3)
    ranking = served_model.rank(QUERY, documents)
    assert texts(browser, "#results .text") == [ranked.document for ranked in ranking]
    assert texts(browser, "#results .score") == [f"{ranked.score:+.3f}".replace("-", "−") for ranked in ranking]
    sentences = ["A novel by Lee. ", "Nobody asked who wrote it."]
    best = served_model.rank(QUERY, sentences)[0].document.strip()
    wait(lambda: texts(browser, "mark") == [best])
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_a_file_is_dropped_and_an_error_shown(browser, find, wait, address, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps(row) for row in [{"title": "The book", "text": "who wrote it"}, {"text": "x"}])
    )
    browser.get(address)
    find("#file").send_keys(str(path))
    wait(lambda: find("#count").text == "2 documents")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    find("#file").send_keys(str(picture))
    wait(lambda: "picture.png is not a text file" in find("#error").text)
    assert find("#count").text == "2 documents"
    find("#query").send_keys(tiny.QUERY)
    find("#submit").click()
    wait(lambda: len(texts(browser, "#results li")) == 2)
    assert not find("#error").is_displayed()
    assert texts(browser, "#results .title") == ["The book"]
    find("summary").click()
    find("#instruction").send_keys("the judge wrote a book " * 60)
    find("#submit").click()
    wait(lambda: "shorten the instruction" in find("#error").text)


@pytest.mark.slow
def test_the_token_is_asked_for(browser, find, wait, served_model, serve):
    with serve(served_model, token="secret-token") as address:
        browser.get(address)
        wait(lambda: find("#locked").is_displayed())
        find("#query").send_keys(tiny.QUERY)
        find("#documents").send_keys("a novel")
        find("#submit").click()
        wait(lambda: "needs a token" in find("#error").text)
        find("#token").send_keys("secret-token")
        find("#submit").click()
        wait(lambda: len(texts(browser, "#results li")) == 1)


@pytest.mark.slow
def test_it_fits_a_phone_and_keys_move_through_the_results(browser, find, wait, address):
    from selenium.webdriver.common.keys import Keys

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.get(address)
    find("#example").click()
    find("#submit").click()
    wait(lambda: len(texts(browser, "#results li")) == 6)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    first, second, *_ = browser.find_elements("css selector", "#results li")
    first.send_keys(Keys.ARROW_DOWN)
    assert browser.switch_to.active_element == second
    second.send_keys(Keys.ENTER)
    assert "open" in second.get_attribute("class")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
