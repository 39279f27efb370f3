"""The signals that end a server. A terminal may send them to all of its processes; only the front handles them."""

from __future__ import annotations

import signal

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
