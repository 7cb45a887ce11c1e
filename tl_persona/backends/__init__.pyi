from .base import JOURNAL_FOLDER as JOURNAL_FOLDER
from .base import Backend as Backend
from .base import OnStatus as OnStatus
from .base import Pooled as Pooled
from .base import Totals as Totals
from .base import totals_of as totals_of
from .choice import open_backend as open_backend
from .choice import require_remote as require_remote
