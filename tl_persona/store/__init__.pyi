from .core import DEFAULT_MASK_STRATEGY as DEFAULT_MASK_STRATEGY
from .core import DEFAULT_ROOT as DEFAULT_ROOT
from .core import DEFAULT_VARIANTS as DEFAULT_VARIANTS
from .core import StoredStatus as StoredStatus
from .file import ArtifactDescription as ArtifactDescription
from .file import describe as describe
from .store import PersonaVectorStore as PersonaVectorStore
