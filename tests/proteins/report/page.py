"""A page as a test reads it."""

import base64
import hashlib
import json
from html.parser import HTMLParser

VOID = ("meta", "img", "input")


class Page(HTMLParser):
    """A page whose tags must be balanced: its tags, its attributes, its text, its data."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.scripts = []
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open and self._open[-1] != "style":
            self.text += data + " "

    def values(self, name):
        return [value for key, value in self.attributes if key == name]

    def assert_self_contained(self):
        assert not {"link", "iframe", "object", "embed", "img", "base"} & set(self.tags)
        assert not self.values("src")
        assert all(target.startswith("#") for target in self.values("href"))
        assert {target[1:] for target in self.values("href")} <= set(self.values("id"))
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        policy = self.values("content")[0]
        assert policy.startswith("default-src 'none'")
        assert "unsafe-eval" not in policy
        # Data, library, script of ours; the policy has the hashes of those that run.
        assert len(self.scripts) == 3
        for script in self.scripts[1:]:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        rest = self.source.replace(self.scripts[1], "")
        for text in ("http://", "https://", "url(", "@import"):
            assert text not in rest
