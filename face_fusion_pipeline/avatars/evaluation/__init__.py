"""Evaluators of avatars, and the tables of what the pipelines draw of them."""
