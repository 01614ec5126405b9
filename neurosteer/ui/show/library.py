"""What the Library tab shows, as pure functions. Cards, names and descriptions are data: all of it is escaped."""

from html import escape
from typing import TYPE_CHECKING

from neurosteer.models.catalog import find_model
from neurosteer.text import cut

if TYPE_CHECKING:
    from neurosteer.hub import Found, Pushed

NOTHING_CHOSEN = "Choose something from the list to see what it is, what it was made from, and how to use it elsewhere."

_MAX_CARD = 30_000  # three times as long as a long one of ours
_MAX_LINE = 160


def hub_id(model: str) -> str:
    """The Hub id of a model of the catalog, or the name itself."""
    known = find_model(model)
    return known.recorded_name if known else model


def nothing_found(text: str) -> str:
    what = f" for “{text[:60]}”" if text.strip() else ""
    return (
        f"Nothing was found on the Hub{what}. Try another word, untick “Only what was made for the model above”, or "
        "build your own on the Build tab."
    )


def found_line(found: "Found") -> str:
    """One result as a line of plain text."""
    marks = [
        {True: "fits this model", False: "for another model", None: ""}[found.compatible],
        "private" if found.private else "",
        "gated: ask for access on its page" if found.gated else "",
        f"♥ {found.likes:,}" if found.likes else "",
        f"{found.downloads:,} downloads" if found.downloads else "",
    ]
    return cut(" · ".join([found.repo, *filter(None, marks)]), _MAX_LINE)


def published(pushed: "Pushed") -> str:
    """Where it is now, and how others use it."""
    kept = " The card that is there was edited by hand and was kept." if pushed.card_kept else ""
    url = escape(pushed.url)
    link = f"<a href='{url}' target='_blank' rel='noopener noreferrer'>{url}</a>" if _is_web(pushed.url) else url
    return (
        f"<div class='ns-card'><p class='ns-done'>Published: {link}.{kept}</p>"
        f"<p>Others use it with <code>neurosteer steer --use {escape(pushed.repo)}:1</code>, or by its name "
        f"<code>{escape(pushed.repo)}</code> on this tab.</p></div>"
    )


def hub_card(markdown: str) -> str:
    """A card as HTML: its text as it is, with headings, code, tables and links to the web; of its own HTML and pictures
    nothing comes through."""
    return f"<div class='ns-card ns-hubcard'>{_as_html(_without_metadata(markdown[:_MAX_CARD]))}</div>"


def _is_web(url: str) -> bool:
    return url.startswith(("https://", "http://"))


def _without_metadata(markdown: str) -> str:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.match(markdown)
    return markdown[found.end() :] if found else markdown


def _as_html(markdown: str) -> str:
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
    reader.disable(["image", "autolink", "html_block", "html_inline"])
    reader.validateLink = _is_web  # type: ignore[method-assign]
    tokens = reader.parse(_without_comments(markdown))
    for token in (child for block in tokens for child in block.children or ()):
        if token.type == "link_open":
            token.attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    return reader.renderer.render(tokens, reader.options, {})


def _without_comments(markdown: str) -> str:
    """Without its HTML comments, found one after the other: in one pass, whatever stands there."""
    kept, end = [], 0
    while (begin := markdown.find("<!--", end)) >= 0 and (closed := markdown.find("-->", begin)) >= 0:
        kept.append(markdown[end:begin])
        end = closed + len("-->")
    return "".join([*kept, markdown[end:]])
