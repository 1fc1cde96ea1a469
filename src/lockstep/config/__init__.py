"""Recipes and where things are kept."""
