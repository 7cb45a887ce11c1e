"""Shows persona vectors and steering vectors: as figures for notebooks, and as one HTML page that needs no network.

- `survey`: what is under a path. `geometry`: cosines, components. `attributes`: groups and colours.
- `style`: what all figures share. `personas`, `layers`: the figures.
- `data`: what of it is written into a page, small enough for hundreds of personas.
- `page`: the page, with `page.js`, `page.css` and `personas.html`.

Figures need plotly (`pip install "tl-persona[plots]"`), which is loaded when the first one is drawn. Declined:
computing vectors; a report reads what is saved.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
