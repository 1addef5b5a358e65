"""The folder's scripts and modules are imported by name; others have the same names, so it is on the path only here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
