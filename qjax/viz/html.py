"""Html: a page's own markup, described in words, and able to show itself in a notebook."""


class Html(str):
    """A string of HTML that a notebook shows as what it means.

    ``alt`` says what it shows, as that of a `Figure` does: for text-only pages, and for nbval.
    """

    alt: str

    def __new__(cls, markup: str, alt: str) -> "Html":
        page = super().__new__(cls, markup)
        page.alt = alt
        return page

    def _repr_html_(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"Html: {self.alt}"
