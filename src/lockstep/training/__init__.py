"""From rollouts to changed weights."""
