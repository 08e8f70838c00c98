"""What all tests need: this directory on the path, and signals that are not ignored in the processes they start.

`--import-mode=importlib` does not put it there, and `import conformance` needs it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# A shell ignores SIGINT in what it starts in the background, and `nohup` SIGHUP; processes inherit that, and the tests
# send these signals to theirs. One that is handled here has its default there. SIGHUP still does not end this process.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
