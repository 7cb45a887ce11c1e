"""Shows persona vectors and steering vectors: as figures for notebooks, and as one HTML page that needs no network.

- `survey`: what is under a path. `geometry`: cosines, components. `attributes`: groups and colours.
- `heatmap`, `norms`, `maps`, `profile`: the figures, in the style of `style`.
- `thinning`, `data`: what of it is written into a page, small enough for hundreds of personas.
- `page`, `provenance`: the page, with `page.js`, `page.css` and `personas.html`.

Figures need plotly (`pip install "tl-persona[plots]"`), which is loaded when the first one is drawn.
"""

from tl_persona.report.geometry import cosines, principal_map, without_mean
from tl_persona.report.heatmap import similarity_figure
from tl_persona.report.maps import persona_map_figure
from tl_persona.report.norms import norms_figure
from tl_persona.report.page import write_report
from tl_persona.report.profile import layer_profile_figure

__all__ = [
    "cosines",
    "layer_profile_figure",
    "norms_figure",
    "persona_map_figure",
    "principal_map",
    "similarity_figure",
    "without_mean",
    "write_report",
]
