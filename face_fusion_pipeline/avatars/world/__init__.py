"""The world itself: people and scenes as numbers, and their pictures."""
