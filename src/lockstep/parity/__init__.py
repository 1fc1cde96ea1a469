"""The ladder: five layers that prove an engine and a trainer to be the same trainer, or name what is not."""
