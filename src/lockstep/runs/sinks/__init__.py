"""Where a run's records go: one module for each sink, found by its name.

A module ``NAME.py`` with ``open_sink(layout) -> Sink`` (``base.py``) is the sink ``NAME``; a recipe asks for
it with ``recording.sinks = ["NAME"]``. What it needs beyond the standard library ``open_sink`` imports. JSONL
is the one that resume and every reader take a run from.

``open_sink`` writes nothing: a run may end before its first record, and its directory must then still be
empty for the next try. A run that goes on opens its sinks again; a step that a kill came in may have reached
the first alone.
"""
