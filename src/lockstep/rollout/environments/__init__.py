"""Tasks of several turns: what a recipe's environment is, and conversations with it, exact to the token."""
