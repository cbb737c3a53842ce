"""Pages of HTML, read back."""

import html.parser

HOSTILE = "<script>alert('|')</script>\x1b[2J\n# forged"


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: its elements with attributes, its text, its table."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.rows, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data.split()
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
