"""Where a run's records go: one module for each sink, found by its name. JSONL is the one that resume and every reader read.

A module ``NAME.py`` with ``open_sink(layout)``, which returns a :class:`~lockstep.runs.sinks.base.Sink`, is the sink ``NAME``:
a recipe asks for it with ``recording.sinks = ["NAME"]``. What it needs beyond the standard library ``open_sink`` imports.

``open_sink`` writes nothing: a run may end before its first record, and its directory must then still be empty for the next try.
A run that goes on opens its sinks again, and may record nothing more of the step that a kill came in.
"""
