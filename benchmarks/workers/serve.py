"""The loop of a worker: a line of JSON in, a line of JSON out."""

import json
import sys
from collections.abc import Callable
from typing import Any


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answers requests until standard input closes; `{"ready": true}` only says that everything is loaded."""
    for line in sys.stdin:
        request = json.loads(line)
        result = {"ready": True} if request == {"ready": True} else answer(**request)
        print(json.dumps(result), flush=True)
