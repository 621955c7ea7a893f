"""Texts from outside the program: characters that do not show, and values that look like secrets."""
