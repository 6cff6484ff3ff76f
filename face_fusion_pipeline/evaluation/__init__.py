"""Measuring likeness, prompt following and image quality; nothing here is needed to generate images."""
