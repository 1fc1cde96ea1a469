"""The ladder: five layers that prove an engine and a trainer to be the same policy, or name what is not."""
