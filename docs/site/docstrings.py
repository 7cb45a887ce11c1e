"""Tells griffe, which reads docstrings for the site, that `Example:` begins examples, as it does in this package."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the section the plural name that griffe knows; by another it would show the code as a quotation."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Change the docstring of one object, before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
