from .prepare import Chat as Chat
from .prepare import prepare_messages as prepare_messages
from .prepare import prepare_prompts as prepare_prompts
