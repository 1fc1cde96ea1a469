"""What samples tokens.

``base.py`` says what an engine is; each adapter is a sibling that no other adapter imports.
"""
