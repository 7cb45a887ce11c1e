from .interventions import Intervention as Intervention
from .interventions import Mode as Mode
from .interventions import attach as attach
from .monitor import Monitor as Monitor
from .monitor import monitor as monitor
from .monitor import project as project
from .positions import Positions as Positions
