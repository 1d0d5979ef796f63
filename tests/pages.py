"""A page read as a browser reads it."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "hr", "img", "input"}
# What makes a browser fetch something, and where it says from whence.
LOADS = {"src", "srcset", "poster", "data", "background", "action"}


class Page(HTMLParser):
    """Its elements, and the text of each heading, cell, caption and so on.

    Raises AssertionError where an element is not closed, or closed twice.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        """Each with the element that it stands in."""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    @classmethod
    def of(cls, path: Path) -> "Page":
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if words := " ".join(data.split()):
            self.texts.append((self._open[-1] if self._open else "", words))

    def of_element(self, *tags: str) -> list[str]:
        """The texts in elements of these names."""
        return [words for tag, words in self.texts if tag in tags]

    def attributes(self, name: str) -> list[str]:
        return [value for _, own in self.elements if (value := own.get(name)) is not None]

    def loaded(self) -> list[str]:
        """All that a browser would fetch to show it, but what the page itself holds."""
        found = [value for name in LOADS for value in self.attributes(name)]
        found += [own["href"] or "" for tag, own in self.elements if tag in ("link", "use", "image")]
        return [value for value in found if not value.startswith(("#", "data:"))]
