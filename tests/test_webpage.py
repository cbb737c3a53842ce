"""Pages of HTML: what comes from outside stays text, nothing is loaded."""

import pytest

from vit_jax import webpage

from .webpages import HOSTILE, Page


@pytest.fixture
def page(tmp_path):
    def write(title, *body):
        path = tmp_path / "page.html"
        text = webpage.document(title, body, "b { color: red; }", self_contained=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_hostile_text_stays_text(page):
    attribute = f'<p title="{webpage.text(HOSTILE)}">{webpage.text(HOSTILE)}</p>'
    path = page(HOSTILE, attribute, "")
    read = Page(path)
    assert not read.all("script") and "\x1b" not in path.read_text()
    (paragraph,) = read.all("p")
    assert paragraph["title"] == HOSTILE.replace("\x1b", r"\x1b").replace("\n", r"\n")
    assert read.text.count("<script>alert('|')</script>") == 2  # The title's and the paragraph's.


def test_a_page_loads_nothing_and_says_with_what_it_was_made(page):
    path = page("A title", "<p>Words</p>")
    read = Page(path)
    assert not (read.all("script") + read.all("link") + read.all("img"))
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    (policy,) = (x["content"] for x in read.all("meta") if "http-equiv" in x)
    assert policy.startswith("default-src 'none';")
    assert "Words Made on 2" in read.text and "jax" in read.text
