from .geometry import cosines as cosines
from .geometry import principal_map as principal_map
from .geometry import without_mean as without_mean
from .layers import layer_profile_figure as layer_profile_figure
from .page import write_report as write_report
from .personas import norms_figure as norms_figure
from .personas import persona_map_figure as persona_map_figure
from .personas import similarity_figure as similarity_figure
