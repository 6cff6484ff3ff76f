"""Measures of pictures of avatars that no training is pleased by: traits of people, and how well faces are drawn."""
