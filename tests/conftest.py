"""What several test modules share: the default model's file, fetched once (93 MB), cached as for a user."""

from pathlib import Path

import pytest

from models import hub


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    return hub.resolve(hub.DEFAULT_MODEL)
