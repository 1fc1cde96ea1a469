"""Breaks a backend on purpose, and holds the ladder to naming it."""
