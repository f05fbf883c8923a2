"""Answers of a given form: grammars, and calls of functions."""
