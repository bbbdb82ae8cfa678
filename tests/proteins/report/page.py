"""A page as a test reads it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page whose tags must be balanced: its tags, its attributes, its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "

    def values(self, name):
        return [value for key, value in self.attributes if key == name]

    def assert_self_contained(self):
        assert not {"script", "link", "iframe", "object", "embed"} & set(self.tags)
        assert self.values("src")
        assert all(source.startswith("data:image/png;base64,") for source in self.values("src"))
        assert all(target.startswith("#") for target in self.values("href"))
        assert {target[1:] for target in self.values("href")} <= set(self.values("id"))
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        assert all(self.values("alt"))
        for text in ("http://", "https://", "url(", "@import"):
            assert text not in self.source
