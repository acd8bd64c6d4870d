import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on a network
sys.path.insert(0, str(Path(__file__).parent))
