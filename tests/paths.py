"""Where the tests' files lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CACHE = ROOT / ".pytest_cache" / "xla"
