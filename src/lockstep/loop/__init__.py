"""The composition root: engine, trainer, task and ladder put together. The only place that knows them all."""
