"""Checks of the course's documents, and its bibliography. Not for notebooks: those import `common`."""
