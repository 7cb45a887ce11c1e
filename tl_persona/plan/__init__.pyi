from .plan import DEFAULT_BATCH_TOKENS as DEFAULT_BATCH_TOKENS
from .plan import Plan as Plan
from .plan import Sample as Sample
from .plan import Sharing as Sharing
from .plan import make_plan as make_plan
