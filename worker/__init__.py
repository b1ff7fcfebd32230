"""Workers: take connections from the queue and run one application instance for each.

Imports channel_layer only. Begin with process.py (the process), then instance.py (one running call) and events.py
(what an application may send). ``worker.handover`` is what applications import.
"""
