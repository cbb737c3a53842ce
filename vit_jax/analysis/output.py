"""Files of an analysis: each picture with its numbers, and the page that gathers them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.files import atomic_write, make_folder
from vit_jax.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vit_jax.analysis.page import Page


class Output:
    """Writes a figure and its arrays, each whole or not at all, and says so.

    Attributes:
        page: that gathers the pictures; None unless it is asked for.
    """

    def __init__(self, directory: Path, dpi: int, html: bool):
        self._directory, self._dpi = directory, dpi
        self.page: Page | None = None
        if html:
            from vit_jax.analysis import page

            self.page = page.Page()

    def make(self) -> None:
        """Makes the directory."""
        make_folder(self._directory)

    def save(self, name: str, figure: "Figure", **arrays: Any) -> None:
        """Writes NAME.png and NAME.npz."""
        png, npz = (self._directory / f"{name}.{suffix}" for suffix in ("png", "npz"))
        with atomic_write(npz) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=self._dpi)
        for path in (png, npz):
            print(printable(str(path)), flush=True)

    def show(self, title: str, caption: str, figure: "Figure", **options: Any) -> None:
        """Adds a picture to the page, see `Page.add`."""
        if self.page is not None:
            self.page.add(title, caption, figure, **options)

    def finish(self, title: str, facts: Mapping[str, str]) -> None:
        """Writes the page, unless there is nothing to see."""
        if self.page is not None and (self.page.images or self.page.of_model):
            print(printable(str(self.page.write(self._directory, title, facts))), flush=True)
