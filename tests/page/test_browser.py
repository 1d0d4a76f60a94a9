"""The page in headless Chromium: what a person does on it, and that it asks nothing of any other host."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port
from PIL import Image

from mmfast.generate import ChatSession, chat
from mmfast.models import open_model
from mmfast.page import chat as page_chat
from mmfast.page.runs import find_runs
from mmfast.page.server import HOST, launch
from mmfast.world import samples

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
# gradio's own, in its statistics of the queue.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

LONGEST = 60
HOSTILE = (
    "<img src=x onerror=\"document.title='hit'\"> ![](http://example.com/x.png) <script>document.title='hit'</script>"
)


class Browser:
    """A page and what a person sees and does on it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def wait(self, condition: Callable[[], Any]) -> Any:
        """What `condition` gives as soon as it is true; the page may put an element in another's place meanwhile."""
        wait = WebDriverWait(self.driver, 30, 0.05, [StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def text(self, name: str) -> str:
        return self.driver.execute_script(f"return (document.getElementById('{name}') || {{}}).innerText || ''").strip()

    def messages(self, role: str) -> list[str]:
        script = (
            "return [...document.querySelectorAll(`#chat [data-testid=${arguments[0]}] .md`)].map(e => e.innerText)"
        )
        return self.driver.execute_script(script, role)

    def attach(self, path: Path) -> None:
        files = self.driver.find_element(By.CSS_SELECTOR, "#question input[type=file]")
        # As a click does; the driver adds to the files that were chosen before.
        self.driver.execute_script("arguments[0].value = ''", files)
        files.send_keys(str(path))

    def write(self, text: str) -> None:
        box = self.wait(lambda: self.driver.find_element(By.CSS_SELECTOR, "#question textarea:enabled"))
        box.send_keys(text + "\n")

    def is_ready(self) -> bool:
        return "loaded in" in self.text("status")

    def ask(self, text: str) -> str:
        """The answer, when it is over."""
        turns = len(self.messages("user"))
        self.write(text)
        self.wait(lambda: len(self.messages("user")) > turns and self.is_ready())
        return self.messages("bot")[-1]

    def click(self, selector: str) -> str:
        """Clicks an element as soon as it is shown; returns its text."""

        def clicked() -> str | bool:
            for element in self.driver.find_elements(By.CSS_SELECTOR, selector)[:1]:
                if text := element.is_displayed() and element.text:
                    element.click()
                    return text
            return False

        return self.wait(clicked)

    def choose(self, run: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, "#run input").click()

        def chosen() -> bool:
            for option in self.driver.find_elements(By.CSS_SELECTOR, "[role=option]"):
                if option.text.strip("✓ \n").startswith(run):
                    option.click()
                    return True
            return False

        self.wait(chosen)
        self.wait(lambda: self.text("status").startswith(run) and self.is_ready())


@pytest.fixture(scope="module")
def speed() -> dict[str, float]:
    """Seconds that a token takes at least."""
    return {"pause": 0.02}


@pytest.fixture(scope="module")
def address(runs: Path, speed: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is, with models that are slow enough to be watched, of which one can be told what to answer."""
    stream = ChatSession.stream

    def slow(folder: Path, **bases: Any) -> Any:
        model: Any = open_model(folder, **bases)
        forward = model.language_model.forward

        def delayed(*args: Any, **kwargs: Any) -> Any:
            time.sleep(speed["pause"])
            return forward(*args, **kwargs)

        model.language_model.forward = delayed
        return model

    def told(session: ChatSession, text: str, *media: Any) -> Iterator[str]:
        if not text.startswith("say "):
            return stream(session, text, *media)
        answer: Any = [{"role": "user", "content": text}, {"role": "assistant", "content": text[4:]}]
        session.messages += answer
        return iter(text[4:])

    port = free_port()
    surroundings = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_chat, "open_model", slow)
        patch.setattr(ChatSession, "stream", told)
        folder = tmp_path_factory.mktemp("uploads")
        blocks = launch(lambda: find_runs(runs), None, None, port, 1, LONGEST, 0.0, folder)
        yield f"http://{HOST}:{port}"
        blocks.close(verbose=False)
    os.environ.clear()
    os.environ.update(surroundings)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.add_argument(f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, address: str) -> Iterator[Browser]:
    """The page freshly opened; afterwards, everything it asked for was on loopback, and its console has no error."""
    driver.get(address)
    browser = Browser(driver)
    browser.wait(browser.is_ready)
    yield browser
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 10
    assert [url for url in urls if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))] == []
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    path = tmp_path / "digits.png"
    samples("questions-test")[0]["messages"][0]["content"][0]["image"].save(path)
    return path


def test_a_conversation_equals_that_in_the_terminal(
    browser: Browser, runs: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ["what is it?", "and the dog?"]
    chat(str(runs / "tiny"), image=str(digits), prompt=questions, max_new_tokens=LONGEST)
    expected = capsys.readouterr().out.splitlines()
    browser.choose("tiny")
    browser.attach(digits)
    browser.wait(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#question img"))
    browser.write(questions[0])
    seen = set()
    browser.wait(lambda: seen.update(browser.messages("bot")) or (seen and browser.is_ready()))
    assert browser.messages("bot") == expected[:1]
    growing = sorted(seen, key=len)
    assert len(growing) > 3 and all(expected[0].startswith(text.rstrip()) for text in growing)
    assert browser.driver.find_elements(By.CSS_SELECTOR, "#chat img")
    assert browser.ask(questions[1]) == expected[1]
    browser.click("#new")
    browser.wait(lambda: browser.messages("bot") == [])
    browser.attach(digits)
    browser.wait(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#question img"))
    assert browser.ask(questions[0]) == expected[0]


def test_files_that_are_refused_leave_the_conversation_usable(browser: Browser, tmp_path: Path) -> None:
    browser.choose("tiny")
    first = browser.ask("it?")
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"only words")
    browser.attach(corrupt)
    browser.wait(lambda: "corrupt.png" in browser.driver.page_source)
    browser.write("and this?")
    browser.wait(lambda: "'corrupt.png' is no image or video by its content" in browser.text("error"))
    assert browser.messages("bot") == [first]
    large = tmp_path / "large.png"
    Image.effect_noise((1200, 1200), 100).save(large)
    assert large.stat().st_size > 1 << 20
    browser.attach(large)
    browser.wait(lambda: "large.png" in browser.text("refused") and "1.0 Mb" in browser.text("refused"))
    browser.click("#new")
    browser.wait(lambda: browser.messages("bot") == [] and not browser.text("error") + browser.text("refused"))
    assert browser.ask("it?") == first


def test_stop_ends_the_answer_and_gives_the_question_back(browser: Browser, speed: dict[str, float]) -> None:
    browser.choose("tiny")
    speed["pause"] = 0.3
    started = time.monotonic()
    browser.write("it?")
    browser.wait(lambda: browser.messages("bot"))
    browser.click("#stop")
    browser.wait(lambda: browser.text("status") == "Stopped; this question is forgotten.")
    assert time.monotonic() - started < LONGEST * 0.3 / 2
    speed["pause"] = 0.0
    assert browser.messages("user") == []
    assert browser.driver.find_element(By.CSS_SELECTOR, "#question textarea").get_attribute("value") == "it?"
    browser.ask("")
    assert browser.messages("user") == ["it?"]


def test_who_leaves_the_page_gives_the_model_back(browser: Browser, address: str, speed: dict[str, float]) -> None:
    browser.choose("tiny")
    speed["pause"] = 0.5
    browser.write("it?")
    browser.wait(lambda: browser.messages("bot"))
    started = time.monotonic()
    browser.driver.get(address)
    browser.wait(browser.is_ready)
    assert time.monotonic() - started < LONGEST * 0.5 / 2
    speed["pause"] = 0.0
    browser.driver.get_log("browser")  # gradio complains of the stream that broke off when the page was left


def test_hostile_texts_are_shown_as_they_are(browser: Browser) -> None:
    assert browser.ask(f"say {HOSTILE}") == HOSTILE
    assert browser.messages("user") == [f"say {HOSTILE}"]
    assert browser.driver.title == "mmfast"
    assert browser.driver.find_elements(By.CSS_SELECTOR, "#chat img, #chat script") == []


def test_an_example_of_the_world_can_be_sent(browser: Browser) -> None:
    browser.choose("digits")
    asked = browser.click(".example")
    browser.wait(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#question img"))
    browser.write("")
    browser.wait(lambda: browser.messages("user") == [asked])
    assert browser.wait(lambda: browser.messages("bot"))
    shared = browser.driver.find_elements(By.CSS_SELECTOR, "[aria-label=Share]")
    assert not any(button.is_displayed() for button in shared)
    assert browser.driver.find_elements(By.CSS_SELECTOR, "footer a") == []
