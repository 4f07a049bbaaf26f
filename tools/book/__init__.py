"""The book: one static site made of the repository's documents and notebooks. `python -m tools.book` builds it."""
