# ruff: noqa: F811
"""The Evaluate tab in a real browser, with the embedded model."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import FakeHub
from test_browser import HOSTILE, ROOT, address, go, needs_own_page, own_hub, page  # noqa: F401

from neurosteer.artifacts.plots import receipt_plot
from neurosteer.artifacts.storage import load, pack

pytestmark = [pytest.mark.browser, pytest.mark.embedded]

PROMPTS = ("Tell me about the restaurant.", f"The film was {HOSTILE}")


def ask(page: Any, *, what: str, prompts: tuple[str, ...] = PROMPTS, tokens: int = 12) -> None:
    """Fill in a small evaluation of an artifact of the shelf."""
    go(page, "Evaluate")
    page.locator("#evaluated input").click()
    page.get_by_role("option", name=what, exact=True).click()
    page.locator("#evaluate-prompts textarea").fill("\n".join(prompts))
    page.locator("#strengths input, #strengths textarea").first.fill("-1, 0, 1")
    length = page.get_by_label("number input for Length")
    length.fill(str(tokens))
    length.blur()


def picture(page: Any, name: str) -> None:
    """A screenshot in the folder NEUROSTEER_PICTURES, where that is set."""
    if folder := os.environ.get("NEUROSTEER_PICTURES"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"evaluate-{name}.png", full_page=True)


@needs_own_page
def test_a_slider_is_measured_and_published_with_the_receipt(page: Any, own_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "mine.zip").write_bytes(pack(replace(load(ROOT / "vectors" / "formality"), name="mine", receipts=())))
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(tmp_path / "mine.zip")
    page.locator("#mix-note").get_by_text("mine is added").wait_for()
    ask(page, what="mine")
    page.locator("#about-judge").get_by_text("formality").wait_for()
    page.locator("#evaluate").focus()
    page.keyboard.press("Enter")
    page.locator("#figures table").wait_for()
    for plot in ("effect", "damage"):
        page.locator(f"#{plot} .js-plotly-plot").wait_for()
    summary = page.locator("#evaluation").inner_text()
    assert "mine: at strength +1, " in summary and "labelled texts it had not seen" in summary
    written = page.locator("#written")
    assert written.locator("details").count() == len(PROMPTS) and written.locator("details[open] li").count() == 5
    written.locator("summary").nth(1).click()
    assert HOSTILE in written.inner_text() and page.locator("img[src=x]").count() == 0
    picture(page, "light")

    with page.expect_download() as download:
        page.locator("#download-evaluation").click()
    assert download.value.suggested_filename == "mine-evaluation.zip"
    download.value.save_as(tmp_path / "evaluation.zip")
    with zipfile.ZipFile(tmp_path / "evaluation.zip") as file:
        assert set(file.namelist()) == {"receipt.json", "generations.csv", "evaluation.html", "evaluation.png"}
        receipt = json.loads(file.read("receipt.json"))
    rows = [" ".join(row.split()) for row in page.locator("#figures tbody tr").all_inner_texts()]
    wanted = [" ".join(" ".join(row).split()) for row in receipt["table"]["rows"]]
    assert [row.replace("−", "-") for row in rows] == [row.replace("−", "-") for row in wanted]

    page.locator("#keep-receipt").click()
    page.locator("#evaluate-note").get_by_text("mine carries the receipt now").wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "phone")
    page.set_viewport_size({"width": 1180, "height": 1000})
    page.evaluate("document.body.classList.add('dark')")
    picture(page, "dark")
    go(page, "Library")
    page.locator("#labels").get_by_label("mine (mine)").check()
    page.locator("#card").get_by_text(receipt["table"]["title"][:60]).first.wait_for()
    page.locator("#repo input, #repo textarea").fill("alice/mine")
    page.locator("#push").click()
    page.locator("#push-note").get_by_text("Published:").wait_for()
    pushed = {name: file.data for name, file in own_hub.repos["alice/mine"].head.files.items()}
    assert json.loads(pushed["config.json"])["receipts"] == [receipt]
    table = "\n".join(f"| {' | '.join(row)} |" for row in receipt["table"]["rows"])
    assert table in pushed["README.md"].decode().replace("\\", "")
    assert pushed["evaluation.png"] == receipt_plot(receipt)


def test_what_is_missing_is_one_line_and_work_can_be_cancelled(page: Any) -> None:
    ask(page, what="sentiment", tokens=120)
    page.get_by_label("Words to look for").check()
    page.locator("#judge-words textarea").wait_for()
    page.locator("#evaluate").click()
    page.locator("#evaluate-error .ns-error").get_by_text("no words to look for").wait_for()
    page.locator("#judge-words textarea").fill("good, nice")
    page.locator("#evaluate:not([disabled])").click()
    page.locator("#evaluation").get_by_text("Writing texts 1 to").wait_for()
    page.locator("#cancel-evaluate").click()
    page.locator("#evaluate-note").get_by_text("Cancelled.").wait_for()
    assert page.locator("#judge-words textarea").input_value() == "good, nice"
    assert page.locator("#figures table").count() == 0
