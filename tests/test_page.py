"""The page of the service in a real browser, with a real server and two real, tiny ONNX models."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

import httpx
import numpy as np
import pytest
import tiny_models
import uvicorn
from axe_core_python.selenium import Axe
from fastapi.testclient import TestClient
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from tiny_models import (
    CONFIG,
    DRUGS,
    KEY,
    RIGHT,
    photo_jpeg,
    save_classifier,
    save_detector,
    save_quality,
    save_segmenter,
)

from pillsnap.answer.classes import ClassMap, Drug
from pillsnap.answer.cropping import Cropper
from pillsnap.answer.pills import percent
from pillsnap.answer.search.catalog import import_register
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.serve import create_app
from pillsnap.service.client.table import as_table
from pillsnap.service.guard.security_headers import HEADERS

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
WITHOUT_NAME = (155, 137, 165)  # a colour as far from one drug's as from the others'


# ---- The browser, the server and the photos


@pytest.fixture(scope="session")
def programs() -> tuple[str, str]:
    """Paths of Chromium and its driver; installs them where it may."""

    def find() -> list[str]:
        return [path for path in (shutil.which("chromium"), shutil.which("chromedriver")) if path]

    if len(find()) < 2 and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (
            ["apt-get", "update"],
            ["apt-get", "install", "--yes", "--no-install-recommends", "chromium", "chromium-driver"],
        ):
            subprocess.run(
                command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, check=False
            )
    if len(find()) < 2:
        advice = (
            "The page is tested in Chromium, and there is none: "
            "install the Debian packages chromium and chromium-driver."
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(advice)
    chromium, driver = find()
    return chromium, driver


@pytest.fixture(scope="module")
def chromium(programs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, Service(programs[1])) as driver:
        yield driver


@pytest.fixture
def browser(chromium: WebDriver) -> WebDriver:
    """A desktop window, light colours, English."""
    look(chromium, 1280, 900)
    speak(chromium, "en-US")
    return chromium


def look(browser: WebDriver, width: int, height: int, scheme: str = "light") -> None:
    """Set the window size in CSS pixels and the colour scheme, with reduced motion."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {
            "features": [
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]
        },
    )


def speak(browser: WebDriver, language: str) -> None:
    """Set the language of the browser."""
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Run a real server on a free port and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def app_for(folder: Path, per_minute: int = 0, features: str = "production") -> ASGIApp:
    return create_app(
        load_settings(CONFIG, [f"serve.requests_per_minute={per_minute}", f"serve.features={features}"]),
        Environment(api_keys=(RIGHT,), model_path=folder),
    )


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with serving(app_for(models)) as where:
        yield where


@pytest.fixture
def photo(jpeg: bytes, tmp_path: Path) -> Path:
    """A photo of a white and a red pill."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg)
    return path


def post_photo(address: str, photo: Path, pipeline: str = "single") -> httpx.Response:
    """The response of the API for the same photo."""
    return httpx.post(
        f"{address}/predict", params={"pipeline": pipeline}, headers=KEY, files={"image": photo.read_bytes()}
    )


# ---- Tests in the browser


def visit(browser: WebDriver, address: str, key: str = RIGHT) -> None:
    """Open the page for the first time and type a key."""
    browser.get(address)
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.refresh()
    browser.get_log("browser"), browser.get_log("performance")
    if key:
        browser.find_element(By.ID, "key").send_keys(key)


def send(browser: WebDriver, *photos: Path) -> None:
    browser.find_element(By.ID, "photos").send_keys("\n".join(map(str, photos)))


def choose(browser: WebDriver, pipeline: str) -> None:
    browser.find_element(By.CSS_SELECTOR, f"[name=pipeline][value={pipeline}]").click()


def wait(browser: WebDriver, condition: Callable[[], object]) -> object:
    return WebDriverWait(browser, 30, 0.05).until(lambda _: condition())


def see(browser: WebDriver, selector: str, count: int = 1) -> list[WebElement]:
    """Wait for a number of elements."""
    wait(
        browser,
        lambda: (
            len(browser.find_elements(By.CSS_SELECTOR, selector)) == count
            and not browser.find_elements(By.CSS_SELECTOR, ".busy")
        ),
    )
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: WebDriver, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def requests(browser: WebDriver) -> list[dict]:
    """Requests of the page since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"]["request"] for message in messages if message["method"] == "Network.requestWillBeSent"]


def sent_queries(browser: WebDriver) -> list[str]:
    """Queries of the photos that were sent since the last call."""
    return [urlsplit(request["url"]).query for request in requests(browser) if request["method"] == "POST"]


def quiet(browser: WebDriver) -> bool:
    """Check that the console is empty: no error, no violation of the content security policy."""
    messages = browser.get_log("browser")
    assert not messages, messages
    return True


def boxes_on_the_photo(browser: WebDriver) -> list[list[float]]:
    """Each box as fractions of its displayed photo: x1, y1, x2, y2."""
    return browser.execute_script("""
        return [...document.querySelectorAll(".photo rect")].map((node) => {
          const photo = node.closest(".photo").querySelector("img").getBoundingClientRect();
          const box = node.getBoundingClientRect();
          return [
            (box.left - photo.left) / photo.width, (box.top - photo.top) / photo.height,
            (box.right - photo.left) / photo.width, (box.bottom - photo.top) / photo.height
          ];
        });""")


def check_boxes(browser: WebDriver, answer: dict) -> None:
    """Check that the boxes are drawn where the server has found the pills."""
    width, height = answer["photo"]["width"], answer["photo"]["height"]
    shown = boxes_on_the_photo(browser)
    wanted = [
        [pill["box"]["x1"] / width, pill["box"]["y1"] / height, pill["box"]["x2"] / width, pill["box"]["y2"] / height]
        for pill in answer["pills"]
    ]
    assert len(shown) == len(wanted) > 0
    for one, other in zip(shown, wanted, strict=True):
        assert one == pytest.approx(other, abs=0.01), "a box lies in the wrong place"


def test_a_pill_is_identified_and_its_box_drawn(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    send(browser, photo)
    shown = see(browser, ".pill")[0].text
    answer = post_photo(address, photo).json()
    pill = answer["pills"][0]
    check_boxes(browser, answer)
    assert pill["code"] == "K-000030" and pill["name"] in shown and "Identified" in shown
    for value in (pill["code"], *pill["edi_codes"], pill["maker"], *pill["details"].values()):
        assert (value or "") in shown, value
    candidates = texts(browser, ".pill details li")
    assert len(candidates) == len(pill["candidates"]) == len(DRUGS)
    assert all(
        one["name"] in text and one["code"] in text for one, text in zip(pill["candidates"], candidates, strict=True)
    )
    levels = [
        float(node.get_attribute("aria-valuenow")) for node in browser.find_elements(By.CSS_SELECTOR, "[role=meter]")
    ]
    assert levels == pytest.approx([pill["confidence"], *(one["confidence"] for one in pill["candidates"])], abs=1e-5)
    said = " ".join(texts(browser, ".card"))
    assert (
        all(note in said for note in answer["notes"])
        and answer["notice"] in said
        and len(texts(browser, ".timings dd")) == 6
    )
    assert texts(browser, ".photo text") == ["1"]
    assert (
        pill["name"] in browser.find_element(By.CSS_SELECTOR, ".photo img").get_attribute("alt")
        and pill["name"] in texts(browser, "[aria-live=polite]")[0]
    )
    assert quiet(browser)


def test_combo_shows_all_pills(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    choose(browser, "combo")
    send(browser, photo)
    see(browser, ".pill", 2)
    answer = post_photo(address, photo, "combo").json()
    check_boxes(browser, answer)
    assert [pill["name"] in text for pill, text in zip(answer["pills"], texts(browser, ".pill h4"), strict=True)] == [
        True,
        True,
    ]
    assert sent_queries(browser) == ["pipeline=combo"] and quiet(browser)


def test_a_photo_with_exif_rotation(browser: WebDriver, address: str, jpeg: bytes, tmp_path: Path) -> None:
    sideways, exif = tmp_path / "sideways.jpg", Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees to the right
    Image.open(io.BytesIO(jpeg)).transpose(Image.Transpose.ROTATE_90).save(sideways, quality=95, exif=exif)
    visit(browser, address)
    choose(browser, "combo")
    send(browser, sideways)
    see(browser, ".pill", 2)
    answer = post_photo(address, sideways, "combo").json()
    assert answer["photo"] == {"width": 640, "height": 480}
    assert browser.execute_script(
        "const photo = document.querySelector('.photo img'); return [photo.naturalWidth, photo.naturalHeight]"
    ) == [640, 480]
    check_boxes(browser, answer)


def test_a_hint_is_followed_only_by_a_click(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    send(browser, photo)
    hint = see(browser, ".hint")[0]
    answer = post_photo(address, photo).json()
    assert answer["hint"]["pipeline"] == "combo" and answer["hint"]["reason"].startswith("2 pills were found")
    assert "2 pills were found" in hint.text and "Ask for several pills to name all." in hint.text
    assert "combo" not in hint.text, "the parameter's value says nothing to someone at the page"
    time.sleep(0.5)
    assert sent_queries(browser) == ["pipeline=single"], "no request without the user"
    hint.find_element(By.TAG_NAME, "button").click()
    see(browser, ".pill", 2)
    assert not browser.find_elements(By.CSS_SELECTOR, ".hint") and sent_queries(browser) == ["pipeline=combo"]
    assert browser.find_element(By.CSS_SELECTOR, "[value=single]").is_selected(), "the choice for the next photo stays"


def test_inactive_pipelines_are_not_offered(browser: WebDriver, models: Path, photo: Path) -> None:
    with serving(app_for(models, features="mvp")) as small:
        visit(browser, small)
        wait(browser, lambda: not browser.find_element(By.TAG_NAME, "fieldset").is_displayed())
        send(browser, photo)
        see(browser, ".pill")
        assert not browser.find_elements(By.CSS_SELECTOR, ".actions") and sent_queries(browser) == ["pipeline=single"]


def test_an_ambiguous_pill_is_shown_in_words(browser: WebDriver, address: str, tmp_path: Path) -> None:
    Image.new("RGB", (320, 320), WITHOUT_NAME).save(tmp_path / "unclear.png")
    visit(browser, address)
    send(browser, tmp_path / "unclear.png")
    see(browser, ".pill.ambiguous")
    assert "Not certain" in texts(browser, ".verdict")[0] and texts(browser, ".photo text")[0].endswith("?")
    assert browser.find_element(By.CSS_SELECTOR, ".pill details").get_attribute("open"), (
        "the other candidates are worth a look"
    )


def test_the_back_is_asked_together_with_the_front(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    send(browser, photo)
    see(browser, ".pill")
    (button,) = browser.find_elements(By.CSS_SELECTOR, ".turn button")
    assert button.text == "Add the back" and sent_queries(browser) == ["pipeline=single"]
    browser.find_element(By.CSS_SELECTOR, ".turn input").send_keys(str(photo))
    wait(browser, lambda: texts(browser, ".turn button") == ["Take another photo of the back"])
    see(browser, ".pill")
    both = [one for one in requests(browser) if one["method"] == "POST"]
    assert len(both) == 1 and texts(browser, ".verdict") == ["Identified"] and quiet(browser)


def test_several_photos_at_once_and_one_dropped(browser: WebDriver, address: str, photo: Path, tmp_path: Path) -> None:
    for name in ("front.jpg", "back.jpg"):
        shutil.copy(photo, tmp_path / name)
    visit(browser, address)
    send(browser, tmp_path / "front.jpg", tmp_path / "back.jpg")
    see(browser, ".pill", 2)
    dropped = {"items": [], "files": [str(photo)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 20, "y": 20, "data": dropped})
    see(browser, ".pill", 3)
    assert [text.split("One pill")[0] for text in texts(browser, ".card h3")] == ["photo.jpg", "front.jpg", "back.jpg"]
    assert sent_queries(browser) == ["pipeline=single"] * 3 and urlsplit(browser.current_url).path == "/"
    for left in (2, 1, 0):
        browser.find_element(By.CSS_SELECTOR, ".card > header button").click()
        assert len(browser.find_elements(By.CSS_SELECTOR, ".card")) == left
    assert browser.find_element(By.ID, "none-yet").is_displayed() and quiet(browser)


def test_a_wrong_key_leads_to_its_field(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address, key="wrong")
    send(browser, photo)
    alert = see(browser, "[role=alert]")[0].text
    response = httpx.post(
        f"{address}/predict", headers={"X-API-Key": "wrong"}, files={"image": photo.read_bytes()}
    ).json()
    assert response["detail"] in alert and re.search(r"\b[0-9a-f]{32}\b", alert)
    assert texts(browser, "[role=alert] b") == [response["detail"]], "as bold as its Korean sentence"
    field = browser.switch_to.active_element
    assert (
        field.get_attribute("id") == "key"
        and field.get_attribute("aria-invalid") == "true"
        and browser.find_element(By.ID, "key-problem").is_displayed()
    )
    field.send_keys(Keys.CONTROL, "a"), field.send_keys("\u00fcnknown", Keys.ENTER)
    see(browser, "[role=alert]")
    assert "no key has" in texts(browser, "[role=alert]")[0]
    field.send_keys(Keys.CONTROL, "a"), field.send_keys(RIGHT, Keys.ENTER)
    see(browser, ".pill")
    assert (
        not browser.find_elements(By.CSS_SELECTOR, "[role=alert]")
        and not browser.find_element(By.ID, "key-problem").is_displayed()
    )
    browser.refresh()
    assert browser.find_element(By.ID, "key").get_attribute("value") == RIGHT, "kept for this tab"
    stored = browser.execute_script(
        "return [JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage}), document.cookie]"
    )
    assert RIGHT not in stored[0] and RIGHT in stored[1] and stored[2] == "" and RIGHT not in browser.current_url


@pytest.mark.parametrize("content, status", [(b"two white tablets", 415), (bytes(25_000_000), 413)])
def test_bad_files_show_the_error_of_the_server(
    browser: WebDriver, address: str, tmp_path: Path, content: bytes, status: int
) -> None:
    (tmp_path / "letter.jpg").write_bytes(content)
    visit(browser, address)
    send(browser, tmp_path / "letter.jpg")
    alert = see(browser, "[role=alert]")[0].text
    response = post_photo(address, tmp_path / "letter.jpg")
    assert (
        response.status_code == status and response.json()["detail"] in alert and re.search(r"\b[0-9a-f]{32}\b", alert)
    )


def test_a_rate_limited_key_waits(browser: WebDriver, models: Path, photo: Path) -> None:
    with serving(app_for(models, per_minute=1)) as address:
        visit(browser, address)
        send(browser, photo)
        see(browser, ".pill")
        send(browser, photo)
        alert = see(browser, "[role=alert]")[0].text
        response = post_photo(address, photo)
        assert response.status_code == 429 and re.sub(r"\d+", "N", response.json()["detail"]) in re.sub(
            r"\d+", "N", alert
        )
        button = browser.find_element(By.CSS_SELECTOR, ".card .actions button")
        first = int(re.search(r"\d+", texts(browser, "[role=timer]")[0]).group())
        assert 1 <= first <= 60 and not button.is_enabled()
        wait(browser, lambda: int(re.search(r"\d+", texts(browser, "[role=timer]")[0]).group()) < first)
        assert sent_queries(browser) == ["pipeline=single"] * 2, "no request before the time"


def test_a_busy_server_is_retried_after_retry_after(browser: WebDriver, models: Path, photo: Path) -> None:
    app, refusals = (
        app_for(models),
        [{"detail": "Busy: ask again in 1 second.", "code": "busy", "request_id": "0" * 32}],
    )

    async def busy_once(scope: Scope, receive: Receive, send: Send) -> None:
        refuse = scope["type"] == "http" and scope["path"] == "/predict" and refusals
        await (JSONResponse(refusals.pop(), 503, {"Retry-After": "1"}) if refuse else app)(scope, receive, send)

    with serving(busy_once) as address:
        visit(browser, address)
        send(browser, photo)
        see(browser, ".pill")
        assert not refusals and sent_queries(browser) == ["pipeline=single"] * 2


def test_an_unreachable_server(browser: WebDriver, models: Path, photo: Path) -> None:
    with serving(app_for(models)) as address:
        visit(browser, address)
    send(browser, photo)
    assert "can't be reached" in see(browser, "[role=alert]")[0].text
    assert browser.find_element(By.CSS_SELECTOR, ".card .actions button").is_enabled()


def test_korean_and_english(browser: WebDriver, address: str, photo: Path) -> None:
    speak(browser, "ko-KR")
    visit(browser, address)
    assert (
        browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "ko"
        and "알약" in browser.find_element(By.TAG_NAME, "h1").text
        and "알약" in browser.title
    )
    send(browser, photo)
    assert "확인됨" in see(browser, ".pill")[0].text
    browser.find_element(By.CSS_SELECTOR, "[data-language=en]").click()
    assert (
        "Identified" in see(browser, ".pill")[0].text
        and browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    )
    browser.refresh()
    assert browser.find_element(By.TAG_NAME, "h1").text == "Which pill is it?", "remembered"
    assert browser.find_element(By.CSS_SELECTOR, "[data-language=en]").get_attribute("aria-pressed") == "true"
    browser.find_element(By.CSS_SELECTOR, "[data-language=ko]").click()
    browser.find_element(By.ID, "key").send_keys("x")
    send(browser, photo)
    alert = see(browser, "[role=alert]")[0].text
    assert "API 키가 맞지 않습니다" in alert and "key is wrong" not in alert
    assert not [text for text in texts(browser, "[data-text]") if not text.strip()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen_and_accessibility(
    browser: WebDriver, address: str, photo: Path, tmp_path: Path, scheme: str
) -> None:
    """360 pixels without horizontal scrolling; names, roles and contrasts pass axe-core."""
    shutil.copy(photo, tmp_path / f"{'a-long-name-without-any-space' * 4}.jpg")
    Image.new("RGB", (320, 320), WITHOUT_NAME).save(tmp_path / "unclear.png")

    def check(state: str) -> None:
        widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths == [360, 360], state
        violations = Axe().run(browser)["violations"]
        assert not violations, (state, [(one["id"], [node["html"] for node in one["nodes"]]) for one in violations])

    look(browser, 360, 740, scheme)
    visit(browser, address)
    check("empty")
    for language in ("ko", "en"):
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        choose(browser, "combo" if language == "ko" else "single")
        send(browser, *tmp_path.glob("*.jpg"), tmp_path / "unclear.png")
        wait(
            browser,
            lambda: (
                not browser.find_elements(By.CSS_SELECTOR, ".busy") and browser.find_elements(By.CSS_SELECTOR, ".pill")
            ),
        )
        for node in browser.find_elements(By.CSS_SELECTOR, "details:not([open]) summary"):
            browser.execute_script("arguments[0].click()", node)
        check(f"results, {language}")
    browser.find_element(By.ID, "key").send_keys("x")
    send(browser, photo)
    see(browser, "[role=alert]")
    check("error")


# ---- What is sent, and what is drawn on


def models_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: np.ndarray | None = None, drugs: ClassMap | None = None
) -> Path:
    """Tiny models that detect these boxes and name these drugs."""
    if found is not None:
        monkeypatch.setattr(tiny_models, "FOUND", np.asarray(found, np.float32))
    if drugs is not None:
        monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, class_map=drugs))
    folder.mkdir(exist_ok=True)
    save_classifier(folder), save_detector(folder)
    return folder


@contextmanager
def recording(app: ASGIApp) -> Iterator[tuple[str, list[bytes]]]:
    """Run an app; the bodies of its requests to /predict are kept."""
    bodies: list[bytes] = []

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await app(scope, receive, send)
        bodies.append(b"")

        async def receive_and_keep() -> dict:
            message = await receive()
            bodies[-1] += message.get("body", b"")
            return message

        await app(scope, receive_and_keep, send)

    with serving(record) as address:
        yield address, bodies


def sent_photo(body: bytes) -> bytes:
    """The file in the body of a request."""
    return body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]


def photo_of(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(photo_jpeg())).resize((width, height), Image.Resampling.BICUBIC)


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def colour_shown(browser: WebDriver, x: float, y: float) -> list[int]:
    """Colour of the shown photo at a place, which is given as fractions of its size."""
    script = """
        const [x, y] = arguments, photo = document.querySelector(".photo img");
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [photo.naturalWidth, photo.naturalHeight];
        const brush = canvas.getContext("2d");
        brush.drawImage(photo, 0, 0);
        return [...brush.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];"""
    wait(browser, lambda: browser.execute_script("return document.querySelector('.photo img').complete"))
    return browser.execute_script(script, x, y)[:3]


@pytest.mark.parametrize("where", ["EXIF of a WebP", "XMP of a JPEG", "EXIF of a PNG"])
@pytest.mark.parametrize("orientation, turn", [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)])
def test_the_photo_below_the_boxes_is_turned_as_the_server_turned_it(
    browser: WebDriver, address: str, jpeg: bytes, tmp_path: Path, where: str, orientation: int, turn: Image.Transpose
) -> None:
    stored, exif = Image.open(io.BytesIO(jpeg)).transpose(turn), Image.Exif()
    exif[0x0112] = orientation
    kind = where.split()[-1]
    file = tmp_path / f"turned.{kind.lower()}"
    stored.save(file, kind, **({"xmp": xmp(orientation)} if "XMP" in where else {"exif": exif}))
    visit(browser, address)
    choose(browser, "combo")
    send(browser, file)
    see(browser, ".pill", 2)
    answer = post_photo(address, file, "combo").json()
    assert answer["photo"] == {"width": 640, "height": 480} and "picture" not in answer
    check_boxes(browser, answer)
    box = answer["pills"][0]["box"]
    middle = (box["x1"] + box["x2"]) / 2 / 640, (box["y1"] + box["y2"]) / 2 / 480
    assert colour_shown(browser, *middle) == pytest.approx([238, 234, 224], abs=8), "the white pill is in its box"
    assert quiet(browser)


def test_large_photos_are_shrunk_and_small_ones_sent_as_they_are(
    browser: WebDriver, models: Path, photo: Path, tmp_path: Path
) -> None:
    large, exif = tmp_path / "large.jpg", Image.Exif()
    exif[0x0112] = 6
    photo_of(4000, 3000).transpose(Image.Transpose.ROTATE_90).save(large, quality=97, exif=exif)
    photo_of(3200, 2400).save(tmp_path / "large.png")
    with recording(app_for(models)) as (address, bodies):
        for file, size in ((photo, (640, 480)), (large, (2560, 1920)), (tmp_path / "large.png", (2560, 1920))):
            visit(browser, address)
            choose(browser, "combo")
            send(browser, file)
            see(browser, ".pill", 2)
            sent = sent_photo(bodies[-1])
            with Image.open(io.BytesIO(sent)) as image:
                assert image.size == size and image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1
                white = tuple(round(value * size[0] / 640) for value in (220, 200))
                assert image.convert("RGB").getpixel(white) == pytest.approx((238, 234, 224), abs=4)
            assert (sent == file.read_bytes()) == (file == photo)
            assert file != large or len(sent) < file.stat().st_size / 2
            (tmp_path / "sent.jpg").write_bytes(sent)
            check_boxes(browser, post_photo(address, tmp_path / "sent.jpg", "combo").json())
    assert quiet(browser)


@pytest.mark.parametrize("progressive", [False, True])
def test_half_a_photo_is_not_made_whole(browser: WebDriver, models: Path, tmp_path: Path, progressive: bool) -> None:
    """Browsers show a JPEG that ends early with an end mark; the server has to see it as it is."""
    whole, half = io.BytesIO(), tmp_path / "half.jpg"
    photo_of(4000, 3000).save(whole, "JPEG", quality=95, progressive=progressive)
    half.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2] + b"\xff\xd9")
    with recording(app_for(models)) as (address, bodies):
        visit(browser, address)
        send(browser, half)
        wait(browser, lambda: bodies and not browser.find_elements(By.CSS_SELECTOR, ".busy"))
        assert sent_photo(bodies[-1]) == half.read_bytes()


def test_the_progress_of_an_upload_is_shown(browser: WebDriver, address: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (500, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "slow.png")
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 400_000}
    visit(browser, address)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    try:
        send(browser, tmp_path / "slow.png")
        script = "return document.querySelector('.busy progress')?.value"
        shares = {wait(browser, lambda: browser.execute_script(script))}
        said = texts(browser, ".busy")[0]
        while browser.find_elements(By.CSS_SELECTOR, ".busy progress"):
            shares.add(browser.execute_script(script))
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": -1})
    see(browser, ".pill")
    assert re.fullmatch(r"Sending: \d+%", said) and len({share for share in shares if share and 0 < share < 1}) > 1


# ---- What is said


REGISTER = ClassMap(
    [
        Drug(
            code,
            name,
            ("649900030",),
            {
                "shape": "타원형",
                "colors": "하양, 투명",
                "form": "필름코팅정",
                "print_front": "M분할선25",
                "print_back": "마크십자분할선",
                "company": "예시제약(주)",
                "name_en": name_en,
                "company_en": "Example Pharm",
            },
        )
        for code, name, name_en in (
            ("K-000007", "빨간정 25밀리그램", "Red Tab. 25mg"),
            ("K-000030", "하얀정 10밀리그램", "White Tab. 10mg"),
            ("K-000101", "파란정 5밀리그램", "Blue Tab. 5mg"),
        )
    ]
)
FOUR = [[70, 90, 80, 60, 0.95], [155, 90, 80, 60, 0.94], [70, 155, 80, 60, 0.93], [155, 155, 80, 60, 0.92]]


@pytest.mark.parametrize("language", ["en", "ko"])
def test_everything_is_said_in_the_chosen_language(
    browser: WebDriver, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    with serving(app_for(models_with(tmp_path, monkeypatch, drugs=REGISTER))) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        send(browser, photo)
        see(browser, ".hint")
        answer, said = post_photo(address, photo).json(), browser.find_element(By.CSS_SELECTOR, ".card").text
    if language == "en":
        assert not re.search("[가-힣]", said), said
        for words in ("White Tab. 10mg", "oval", "white, transparent", "film-coated tablet", "Example Pharm"):
            assert words in said, words
        assert "M | 25 (| = score line)" in said and "[logo] + (+ = cross score line)" in said
        assert "Ask for several pills to name all." in said and answer["notice"] in said
    else:
        latin = set(re.findall(r"[A-Za-z]{2,}", said.replace("photo.jpg", "")))
        assert latin == {"EDI"}, latin
        for words in ("하얀정 10밀리그램", "타원형", "M | 25 (| = 분할선)", "[마크] +", "알약 2개가", "약사"):
            assert words in said, words
    assert quiet(browser)


@pytest.mark.parametrize("language, said", [("en", "{} joined with another"), ("ko", "상자 {}개는 같은 알약으로")])
@pytest.mark.parametrize("extra", [1, 2])
def test_boxes_that_were_joined_are_told(
    browser: WebDriver,
    tmp_path: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    language: str,
    said: str,
    extra: int,
) -> None:
    ends = np.array([[206, 204, 62, 62, 0.9], [236, 204, 70, 62, 0.8], [206, 226, 62, 62, 0.7]], np.float32)
    with serving(app_for(models_with(tmp_path, monkeypatch, ends[: 1 + extra]))) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        choose(browser, "combo")
        send(browser, photo)
        see(browser, ".pill")
        notes = browser.find_element(By.CSS_SELECTOR, ".card .notes").text
        assert len(texts(browser, ".pill")) == 1
    count = {"en": "1 box was" if extra == 1 else "2 boxes were", "ko": str(extra)}[language]
    assert said.format(count) in notes and quiet(browser)


def test_every_error_of_a_request_has_a_korean_sentence() -> None:
    folder = CONFIG.parent / "pillsnap" / "service"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    codes = set(re.findall(r"(?:ApiError|error_response)\(\s*\d{3},\s*\"(\w+)\"", source))
    codes |= set(re.findall(r"\(\w+, \d{3}, \"(\w+)\"\)", source))
    others = {"no_model_root", "folder_outside", "folder_missing", "several_processes", "model_unusable"}  # of /reload
    others |= {"model_cannot_enroll", "not_enrolled"}  # of POST /gallery
    others |= {"archive_unusable", "no_zip", "disk_full", "too_many_jobs", "jobs_unavailable"}  # of POST /jobs
    others |= {"job_missing", "not_done", "result_gone"}  # of GET /jobs
    korean = (folder / "page" / "files" / "texts.js").read_text(encoding="utf-8").split("problems: { //")[1]
    assert len(codes) > 15 and not {code for code in codes - others if f" {code}: " not in korean}


def test_percentages_are_those_of_the_client(
    browser: WebDriver, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "COLOURS", 4 * tiny_models.COLOURS)
    folder = models_with(tmp_path, monkeypatch)
    with serving(app_for(folder)) as address:
        visit(browser, address)
        send(browser, photo)
        see(browser, ".pill")
        answer = post_photo(address, photo).json()
        pill = answer["pills"][0]
        shown = texts(browser, ".pill .confidence span")
    assert pill["confidence"] > 0.9999 and shown[0] == "99%" and shown[0] in as_table([(photo, answer)])
    assert shown == [percent(one["confidence"]) for one in [pill, *pill["candidates"]]]


@pytest.mark.parametrize("language, said", [("en", "No pill"), ("ko", "알약을 찾지 못")])
@pytest.mark.parametrize("pipeline", ["single", "combo"])
def test_a_photo_without_a_pill(
    browser: WebDriver,
    tmp_path: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    language: str,
    said: str,
    pipeline: str,
) -> None:
    nothing = tiny_models.FOUND * [1, 1, 1, 1, 0]
    with serving(app_for(models_with(tmp_path, monkeypatch, nothing))) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        choose(browser, pipeline)
        send(browser, photo)
        see(browser, ".nothing")
        answer = post_photo(address, photo, pipeline).json()
        card = browser.find_element(By.CSS_SELECTOR, ".card").text
    assert not any(pill["verdict"] == "identified" for pill in answer["pills"])
    assert card.count(said) == 2 and not re.search(r"\d ?%|K-0", card), card
    assert not browser.find_elements(By.CSS_SELECTOR, ".pill, .photo rect, .actions")
    assert said in browser.find_element(By.CSS_SELECTOR, ".photo img").get_attribute("alt")
    assert "no pill was found" in as_table([(photo, answer)]) and "K-0" not in as_table([(photo, answer)])


@pytest.mark.parametrize("status, again", [(404, False), (413, False), (422, False), (500, False), (503, True)])
def test_asking_again_is_offered_where_it_can_help(
    browser: WebDriver, models: Path, photo: Path, status: int, again: bool
) -> None:
    app = app_for(models)

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = JSONResponse({"detail": "It can't be.", "code": "odd", "request_id": "0" * 32}, status)
        refused = scope["type"] == "http" and scope["path"] == "/predict"
        await (refusal if refused else app)(scope, receive, send)

    with serving(refuse) as address:
        visit(browser, address)
        send(browser, photo)
        assert "It can't be." in see(browser, "[role=alert]")[0].text
        assert bool(browser.find_elements(By.CSS_SELECTOR, ".card .actions button")) == again


def test_results_survive_a_reload_and_the_way_back(
    browser: WebDriver, address: str, photo: Path, tmp_path: Path
) -> None:
    photo_of(3000, 2250).save(tmp_path / "large.jpg")
    visit(browser, address)
    choose(browser, "combo")
    send(browser, photo)
    see(browser, ".pill", 2)
    send(browser, tmp_path / "large.jpg")
    see(browser, ".pill", 4)
    before = texts(browser, ".card h3"), texts(browser, ".pill h4"), boxes_on_the_photo(browser)
    stored = "return sessionStorage.getItem('pillsnap-results')"
    wait(browser, lambda: len(json.loads(browser.execute_script(stored) or "[]")) == 2)
    for way in ("reload", "back"):
        if way == "reload":
            browser.refresh()
        else:
            browser.find_element(By.CSS_SELECTOR, "[data-text=docs]").click()
            wait(browser, lambda: browser.current_url.endswith("/docs"))
            browser.back()
        see(browser, ".pill", 4)
        shown = browser.find_element(By.CSS_SELECTOR, ".photo img")
        wait(browser, lambda shown=shown: shown.get_property("naturalWidth") > 0)
        after = texts(browser, ".card h3"), texts(browser, ".pill h4"), boxes_on_the_photo(browser)
        assert after[:2] == before[:2] and after[2] == [pytest.approx(box, abs=0.01) for box in before[2]], way
        assert colour_shown(browser, 220 / 640, 200 / 480) == pytest.approx([238, 234, 224], abs=8)
        assert not browser.find_elements(By.CSS_SELECTOR, ".card .actions button"), "the file itself is gone"
    for _ in range(2):
        browser.find_element(By.CSS_SELECTOR, ".card > header button").click()
    browser.refresh()
    assert not browser.find_elements(By.CSS_SELECTOR, ".card"), "what was removed stays away"
    assert browser.execute_script("return localStorage.length") == 0 and quiet(browser)


@pytest.mark.parametrize("kind", ["text/uri-list", "text/plain"])
def test_dropping_an_address_says_why_nothing_happens(browser: WebDriver, address: str, kind: str) -> None:
    visit(browser, address)
    item = {"mimeType": kind, "data": "https://example.org/pill.jpg"}
    dropped = {"items": [item], "files": [], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": event, "x": 20, "y": 20, "data": dropped})
    assert "address or a text, not a photo" in see(browser, "[role=alert]")[0].text
    browser.find_element(By.CSS_SELECTOR, "[data-language=ko]").click()
    assert "사진이 아니라" in see(browser, "[role=alert]")[0].text and not sent_queries(browser)
    assert urlsplit(browser.current_url).path == "/" and quiet(browser)


# ---- Where it stands


def rectangles(browser: WebDriver, selector: str) -> list[list[float]]:
    """Left, top, right and bottom of elements, pixels of the window."""
    return browser.execute_script(
        """return [...document.querySelectorAll(arguments[0])].map((node) => {
             const { left, top, right, bottom } = node.getBoundingClientRect();
             return [left, top, right, bottom];
           });""",
        selector,
    )


def apart(one: list[float], other: list[float], slack: float = 0.0) -> bool:
    return (
        one[2] <= other[0] + slack
        or other[2] <= one[0] + slack
        or one[3] <= other[1] + slack
        or other[3] <= one[1] + slack
    )


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
def test_numbers_cover_neither_each_other_nor_a_pill(
    browser: WebDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    """Pills that touch each other, that touch the photo's edge, and a row of them."""
    row = [[30 + 52 * index, 160, 50, 40, 0.9 - index / 100] for index in range(6)]
    edge = [[40, 60, 76, 36, 0.95], [40, 97, 76, 36, 0.94], [285, 265, 66, 26, 0.93], [30, 265, 58, 26, 0.92]]
    photo_of(960, 720).save(tmp_path / "photo.jpg")
    look(browser, width, height)
    for number, found in enumerate((FOUR, row, edge)):
        with serving(app_for(models_with(tmp_path / str(number), monkeypatch, found))) as address:
            visit(browser, address)
            choose(browser, "combo")
            send(browser, tmp_path / "photo.jpg")
            see(browser, ".pill", len(found))
        badges, boxes = rectangles(browser, ".photo circle"), rectangles(browser, ".photo rect")
        photo = rectangles(browser, ".photo img")[0]
        assert len(badges) == len(found) == len(boxes)
        assert all(badge[2] - badge[0] > 18 for badge in badges), "legible"
        for index, badge in enumerate(badges):
            assert all(apart(badge, other) for other in badges[:index]), (found, index)
            assert all(apart(badge, box, 3) for box in boxes), (found, index)
            assert photo[0] <= badge[0] + 2 and badge[2] <= photo[2] + 2, "inside the photo"


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("identified", [True, False])
def test_a_phone_shows_the_first_name_at_once_and_four_pills_on_three_screens(
    browser: WebDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, identified: bool
) -> None:
    if not identified:
        monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=Verdicts()))
    folder = models_with(tmp_path / "models", monkeypatch, FOUR, REGISTER)
    photo_of(2400, 3200).save(tmp_path / "IMG_20260101_120000.jpg")
    with serving(app_for(folder)) as address:
        look(browser, 390, 844)
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        choose(browser, "combo")
        send(browser, tmp_path / "IMG_20260101_120000.jpg")
        see(browser, ".pill", 4)
        wait(browser, lambda: rectangles(browser, ".photo img")[0][3] - rectangles(browser, ".photo img")[0][1] > 100)
        time.sleep(0.3)
        left, top, right, bottom = rectangles(browser, ".pill h4")[0]
        assert 0 <= top and bottom <= 844 and 0 <= left and right <= 390, "no scrolling to the first name"
        card = rectangles(browser, ".card")[0]
        assert rectangles(browser, ".pill")[3][3] - card[1] <= 3 * 844
        assert card[1] <= 60, "the photo is at the top"


def test_keyboard_only(browser: WebDriver, address: str) -> None:
    def press(*keys: str) -> WebElement:
        ActionChains(browser).send_keys(*keys).perform()
        return browser.switch_to.active_element

    def has_visible_focus() -> bool:
        return browser.execute_script("""
            const node = document.activeElement, shown = node.matches("[type=radio]") ? node.closest("label") : node;
            const { outlineStyle, outlineWidth } = getComputedStyle(shown);
            return outlineStyle === "solid" && parseFloat(outlineWidth) >= 2;""")

    visit(browser, address, key="")
    path = []
    for _ in range(11):
        here = press(Keys.TAB)
        assert has_visible_focus(), here.get_attribute("outerHTML")
        if here.get_attribute("id") == "key":
            press(RIGHT)
        path.append(
            here.get_attribute("id")
            or here.get_attribute("data-language")
            or here.get_attribute("value")
            or here.get_attribute("data-text")
        )
    assert path == ["skip", "ko", "en", "single", "expected-summary", "choose"] + [
        "shoot",
        "key",
        "key_use",
        "look-summary",
        "docs",
    ]
    browser.execute_script("""
        for (const id of ["photos", "camera"])
          document.getElementById(id).addEventListener("click", (event) => {
            event.preventDefault();
            event.target.dataset.opened = "yes";
          });""")
    for button, field in (("choose", "photos"), ("shoot", "camera")):
        browser.execute_script("document.getElementById(arguments[0]).focus()", button)
        press(Keys.ENTER)
        assert browser.find_element(By.ID, field).get_attribute("data-opened") == "yes"
    browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": address},
    )
    browser.execute_async_script("""
        const done = arguments[0];
        const canvas = Object.assign(document.createElement("canvas"), {width: 640, height: 480});
        const brush = canvas.getContext("2d");
        brush.fillStyle = "rgb(238, 234, 224)"; brush.fillRect(0, 0, 640, 480);
        const copy = (blob) => navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        canvas.toBlob((blob) => copy(blob).then(() => done(), done));""")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()
    see(browser, ".hint")
    for _ in range(12):
        here = press(Keys.TAB)
        if here.text == "Ask again for several pills":
            break
    press(Keys.ENTER)
    see(browser, ".pill", 2)
    assert browser.switch_to.active_element.tag_name == "h3", "the focus is still at this photo"
    assert sent_queries(browser) == ["pipeline=single", "pipeline=combo"] and press(Keys.TAB).text == "Remove"
    press(Keys.ENTER)
    assert (
        not browser.find_elements(By.CSS_SELECTOR, ".card")
        and browser.switch_to.active_element.get_attribute("id") == "choose"
    )
    assert quiet(browser)


def test_names_are_text_and_never_markup(
    browser: WebDriver, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "<img src=x onerror=\"document.title='taken over'\"><b>Tablet</b>"
    drugs = ClassMap([Drug(code, name) for code in DRUGS.codes])
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, class_map=drugs))
    save_classifier(tmp_path), save_detector(tmp_path)
    shutil.copy(photo, tmp_path / "<i>photo<i>.jpg")
    with serving(app_for(tmp_path)) as address:
        visit(browser, address)
        send(browser, tmp_path / "<i>photo<i>.jpg")
        see(browser, ".pill")
        assert texts(browser, ".pill h4") == [f"1{name}"] and texts(browser, ".card h3")[0].startswith(
            "<i>photo<i>.jpg"
        )
        assert (
            len(browser.find_elements(By.CSS_SELECTOR, ".card img")) == 1
            and browser.title.startswith("pillsnap")
            and quiet(browser)
        )


def test_the_page_sends_requests_to_its_own_server_only(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    browser.refresh()
    send(browser, photo)
    see(browser, ".pill")
    browser.get(f"{address}/docs")
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    see(browser, ".opblock-summary-path", sum(map(len, paths.values())))
    browser.find_element(By.CSS_SELECTOR, "[data-path='/health']").click()
    see(browser, ".try-out__btn")[0].click()
    see(browser, ".execute")[0].click()
    assert '"ok"' in wait(browser, lambda: texts(browser, ".live-responses-table pre"))[0], (
        "the API can be tried out there"
    )
    made = requests(browser)
    hosts = {
        urlsplit(request["url"]).netloc for request in made if urlsplit(request["url"]).scheme not in ("data", "blob")
    }
    assert hosts == {urlsplit(address).netloc} and not [request for request in made if RIGHT in request["url"]]
    assert {"/", "/page.css", "/page.js", "/predict", "/docs", "/openapi.json"} <= {
        urlsplit(request["url"]).path for request in made
    }
    assert quiet(browser)


def test_an_installed_package_has_the_page(tmp_path: Path) -> None:
    for name in ("setup.py", "settings.ini"):
        shutil.copy(CONFIG.parent / name, tmp_path)
    shutil.copytree(CONFIG.parent / "pillsnap", tmp_path / "pillsnap", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    with ZipFile(next((tmp_path / "wheels").glob("*.whl"))) as wheel:
        assert {
            f"pillsnap/service/page/files/{name}" for name in ("page.html", "page.css", "page.js", "search.js")
        } < set(wheel.namelist())


def test_every_response_has_the_security_headers(models: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("nobody expected this")

    client = TestClient(app_for(models), raise_server_exceptions=False)
    preflight = {"Origin": "https://pillsnap.co.kr", "Access-Control-Request-Method": "POST"}
    responses = [
        client.get(path)
        for path in (
            "/",
            "/page.css",
            "/page.js",
            "/docs",
            "/docs/swagger-ui.css",
            "/openapi.json",
            "/health",
            "/nowhere",
            "/classes",
        )
    ]
    responses += [
        client.get("/page.js", headers={"If-None-Match": client.get("/page.js").headers["etag"]}),
        client.options("/predict", headers=preflight),
        client.put("/predict"),
    ]
    responses += [
        client.post("/predict", headers=KEY, files={"image": content})
        for content in (jpeg, b"a letter", bytes(25_000_000))
    ]
    monkeypatch.setattr(Cropper, "crop_pills", fail)
    responses.append(client.post("/predict", headers=KEY, files={"image": jpeg}))
    assert [response.status_code for response in responses] == [200] * 7 + [404, 401, 304, 200, 405, 200, 415, 413, 500]
    for response in responses:
        assert {name.lower() for name in HEADERS} <= set(response.headers), response.request.url
        assert "strict-transport-security" not in response.headers
    kept = {"/", "/page.css", "/page.js", "/docs/swagger-ui.css"}
    assert {
        response.request.url.path for response in responses if response.headers["cache-control"] != "no-store"
    } == kept
    policies = {response.request.url.path: response.headers["content-security-policy"] for response in responses}
    assert not [path for path, policy in policies.items() if "unsafe" in policy]
    assert {path for path, policy in policies.items() if policy != HEADERS["Content-Security-Policy"]} == {"/docs"}
    assert (
        client.get("/health", headers={"X-Forwarded-Proto": "https"})
        .headers["strict-transport-security"]
        .startswith("max-age=")
    )


# ---- Photo quality


@pytest.fixture
def judging(models: Path, tmp_path: Path) -> Callable[[float], Path]:
    """A function that puts a judge beside the models; it accepts brightness from a value on."""

    def make(accept: float) -> Path:
        folder = shutil.copytree(models, tmp_path / f"accept {accept}")
        save_quality(folder, accept)
        return folder

    return make


def test_what_is_wrong_with_a_photo_stands_before_its_answer(
    browser: WebDriver, judging: Callable[[float], Path], photo: Path, tmp_path: Path
) -> None:
    dark = tmp_path / "dark.jpg"
    dark.write_bytes(photo_jpeg(0.2))
    with serving(app_for(judging(0.5))) as address:
        visit(browser, address)
        send(browser, dark)
        poor = see(browser, ".poor")[0]
        assert "It is too dark" in poor.text and "may not be good enough" in poor.text
        assert browser.execute_script("return document.querySelector('.poor ~ .pills') !== null"), "above the pills"
        assert "may not be good enough" in texts(browser, "[aria-live=polite]")[0]
        browser.find_element(By.CSS_SELECTOR, "[data-language=ko]").click()
        assert "어둡습니다" in see(browser, ".poor")[0].text
        send(browser, photo)
        see(browser, ".card", 2)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".poor")) == 1 and quiet(browser)


def test_the_camera_says_while_one_aims_whether_it_is_good_enough(
    browser: WebDriver, judging: Callable[[float], Path]
) -> None:
    with serving(app_for(judging(0.0))) as address:
        visit(browser, address)
        wait(browser, lambda: browser.find_element(By.ID, "aim").is_displayed())
        browser.find_element(By.ID, "aim").click()
        wait(browser, lambda: browser.find_element(By.ID, "advice").text == "This is good enough: take the photo.")
        time.sleep(1)
        asked = [request["url"] for request in requests(browser) if request["method"] == "POST"]
        assert len(asked) >= 2 and {urlsplit(url).path for url in asked} == {"/quality"}, "a few frames a second"
        browser.find_element(By.ID, "snap").click()
        see(browser, ".pill")
        assert not browser.find_element(By.ID, "aiming").is_displayed()
        assert browser.execute_script("return document.getElementById('view').srcObject === null"), "the camera is off"
        assert quiet(browser)
    with serving(app_for(judging(1.01))) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, "[data-language=ko]").click()
        wait(browser, lambda: browser.find_element(By.ID, "aim").is_displayed())
        browser.find_element(By.ID, "aim").click()
        wait(browser, lambda: browser.find_element(By.ID, "advice").text.endswith("다시 찍으세요."))
        browser.find_element(By.ID, "stop").click()
        assert not browser.find_element(By.ID, "aiming").is_displayed() and quiet(browser)


def test_without_a_judge_there_is_nothing_to_aim_with(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    send(browser, photo)
    see(browser, ".pill")
    assert not browser.find_element(By.ID, "aim").is_displayed() and not browser.find_elements(By.CSS_SELECTOR, ".poor")


# ---- Outlines


@pytest.mark.parametrize("language, word", [("en", "Outlines"), ("ko", "윤곽선")])
def test_outlines_are_drawn_where_they_are_asked_for(
    browser: WebDriver, models: Path, photo: Path, tmp_path: Path, language: str, word: str
) -> None:
    folder = shutil.copytree(models, tmp_path / "models")
    save_segmenter(folder)

    def switch() -> WebElement:
        (found,) = [node for node in browser.find_elements(By.CSS_SELECTOR, ".actions button") if node.text == word]
        return found

    with serving(app_for(folder)) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        choose(browser, "combo")
        send(browser, photo)
        see(browser, ".photo rect", 2)
        boxes = boxes_on_the_photo(browser)
        assert sent_queries(browser) == ["pipeline=combo"] and switch().get_attribute("aria-pressed") == "false"
        switch().click()
        see(browser, ".photo polygon", 2)
        assert sent_queries(browser) == ["pipeline=combo&masks=true"] and not browser.find_elements(
            By.CSS_SELECTOR, ".photo rect"
        )
        photo_at, outlines = rectangles(browser, ".photo img")[0], rectangles(browser, ".photo polygon")
        across, down = photo_at[2] - photo_at[0], photo_at[3] - photo_at[1]
        for box, (left, top, right, bottom) in zip(boxes[:1], outlines[:1], strict=True):  # the round one fills its box
            shown = [
                (left - photo_at[0]) / across,
                (top - photo_at[1]) / down,
                (right - photo_at[0]) / across,
                (bottom - photo_at[1]) / down,
            ]
            assert shown == pytest.approx(box, abs=0.02)
        assert switch().get_attribute("aria-pressed") == "true"
        switch().click()
        see(browser, ".photo rect", 2)
        switch().click()
        see(browser, ".photo polygon", 2)
        assert not sent_queries(browser), "they are known already"
        assert quiet(browser)


def test_without_a_segmenter_there_is_no_switch(browser: WebDriver, address: str, photo: Path) -> None:
    visit(browser, address)
    send(browser, photo)
    see(browser, ".pill")
    assert "Outlines" not in texts(browser, ".card")[0]


# ---- Search by look


def search_server(tmp_path: Path, models: Path | None = None) -> ASGIApp:
    """A service with a catalogue of 61 drugs."""
    rows = [f"{number},Drug {number},Z{number},무각인,원형,하양" for number in range(100, 158)]
    rows += ["1,하나정,A10,무각인,원형,하양", "2,둘캡슐,A10B,무각인,장방형,하양|빨강", "3,셋정,,,타원형,주황"]
    register = "\n".join(["품목일련번호,품목명,표시앞,표시뒤,의약품제형,색상앞", *rows])
    (tmp_path / "register.csv").write_text(f"{register}\n", encoding="utf-8")
    import_register(tmp_path / "register.csv", tmp_path / "catalog.json")
    settings = load_settings(CONFIG, ["serve.requests_per_minute=0", f"paths.catalog={tmp_path / 'catalog.json'}"])
    return create_app(settings, Environment(api_keys=(RIGHT,), model_path=models))


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_pill_is_found_by_its_look_without_a_model(browser: WebDriver, tmp_path: Path, language: str) -> None:
    with serving(search_server(tmp_path)) as address:
        visit(browser, address)
        browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
        browser.find_element(By.ID, "look-summary").click()
        browser.find_element(By.ID, "look-imprint").send_keys("a10")
        browser.find_element(By.CSS_SELECTOR, "#look-colors [value=white] + svg").click()
        browser.find_element(By.CSS_SELECTOR, "#look-form [type=submit]").click()
        see(browser, ".group", 3)
        assert texts(browser, ".group:first-child b, .group:nth-of-type(1) li b")[0] == "하나정"
        titles = {"en": ["As searched: 1", "Begins with it: 1"], "ko": ["찾은 그대로: 1", "이 글자로 시작: 1"]}
        assert texts(browser, ".group h3")[:2] == titles[language]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        other = "ko" if language == "en" else "en"
        browser.find_element(By.CSS_SELECTOR, f"[data-language={other}]").click()
        assert texts(browser, ".group h3")[:2] == titles[other]
        assert browser.find_element(By.CSS_SELECTOR, "#look-colors [value=white]").is_selected()
        assert not Axe().run(browser)["violations"]
        browser.find_element(By.CSS_SELECTOR, "#look-form [type=reset]").click()
        assert not texts(browser, "#found *")
    assert quiet(browser)


def test_all_records_of_a_group_can_be_shown(browser: WebDriver, tmp_path: Path) -> None:
    with serving(search_server(tmp_path)) as address:
        visit(browser, address)
        browser.find_element(By.ID, "look-summary").click()
        browser.find_element(By.CSS_SELECTOR, "#look-shapes [value=round] + svg").click()
        browser.find_element(By.CSS_SELECTOR, "#look-form [type=submit]").click()
        see(browser, ".group li", 50)
        browser.find_element(By.CSS_SELECTOR, "#found > button").click()
        see(browser, ".group li", 60)
        assert not browser.find_elements(By.CSS_SELECTOR, "#found > button")
        assert "1 (shape 1)" in texts(browser, "#found > .notes")[0]
        browser.find_element(By.CSS_SELECTOR, "#look-form [type=reset]").click()
        browser.find_element(By.CSS_SELECTOR, "#look-form [type=submit]").click()
        assert "nothing to search for" in see(browser, "#found .problem")[0].text
    assert [entry["message"] for entry in browser.get_log("browser") if "422" not in entry["message"]] == []


def test_an_ambiguous_answer_leads_to_the_search_with_what_was_seen(
    browser: WebDriver, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=Verdicts()))
    looks = {"shape": "장방형", "colors": "하양, 빨강"}
    drugs = ClassMap([Drug(f"K-00000{number}", f"Drug {number}", (), looks) for number in range(3)])
    with serving(search_server(tmp_path, models_with(tmp_path / "models", monkeypatch, drugs=drugs))) as address:
        visit(browser, address)
        send(browser, photo)
        see(browser, ".pill")
        browser.find_element(By.CSS_SELECTOR, ".pill > button").click()
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".group"))
        chosen = browser.find_elements(By.CSS_SELECTOR, "#look-form :checked")
        assert [box.get_attribute("value") for box in chosen] == ["white", "red", "oblong"]
        assert texts(browser, ".group:nth-of-type(1) li b") == ["Drug 0", "Drug 1", "Drug 2", "둘캡슐"]
        assert browser.switch_to.active_element.get_attribute("id") == "look-imprint"


def test_text_is_pasted_into_the_search(browser: WebDriver, address: str) -> None:
    visit(browser, address)
    browser.find_element(By.ID, "look-summary").click()
    field = browser.find_element(By.ID, "look-imprint")
    field.send_keys("A10", Keys.CONTROL, "a", "x", "v", Keys.NULL)
    assert field.get_attribute("value") == "A10" and not browser.find_elements(By.ID, "drop-problem")


@pytest.mark.parametrize("language, encoding", [("en", "cp949"), ("ko", "utf-16")])
def test_pills_are_compared_with_a_prescription(
    browser: WebDriver, tmp_path: Path, address: str, photo: Path, language: str, encoding: str
) -> None:
    order, long = tmp_path / "order.csv", tmp_path / "long.csv"
    order.write_bytes("약품코드,약품명\nK-000030,예시정\nK-000101,다른정\nK-999999,또다른정\n".encode(encoding))
    long.write_text("K-000030," * 3000, encoding="utf-8")
    visit(browser, address)
    browser.find_element(By.CSS_SELECTOR, f"[data-language={language}]").click()
    choose(browser, "combo")
    browser.find_element(By.ID, "expected-summary").click()
    browser.find_element(By.ID, "expected-file").send_keys(str(long))
    see(browser, "#expected-problem")
    assert not browser.find_element(By.ID, "expected").get_attribute("value"), "no part of a list is taken"
    browser.find_element(By.ID, "expected-file").send_keys(str(order))
    wait(browser, lambda: "다른정" in browser.find_element(By.ID, "expected").get_attribute("value"))
    assert not browser.find_element(By.ID, "expected-problem").is_displayed()
    send(browser, photo)
    see(browser, ".prescription")
    shown = texts(browser, ".prescription p")
    words = {
        "en": ["Matched: 1 White", "Missing: Blue tablet", "Not expected: 2 Red", "Not checked"],
        "ko": ["맞음: 1 White", "빠짐: Blue tablet", "목록에 없음: 2 Red", "이 모델에 없는 약"],
    }[language]
    assert len(shown) == 4 and all(said.startswith(word) for said, word in zip(shown, words, strict=True)), shown
    assert not browser.find_elements(By.CSS_SELECTOR, ".prescription.complete")
    assert not Axe().run(browser)["violations"]
    browser.find_element(By.ID, "expected").clear()
    browser.find_element(By.ID, "expected").send_keys("K-000030,K-000007")
    send(browser, photo)
    see(browser, ".prescription.complete")
    assert quiet(browser)
